"""A demo in the browser: choose an image, degrade it, restore it, compare the stages (``dgunet demo``)."""

import argparse
import contextlib
import os
import re
import signal
import socket
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from dgunet.apps.figures import restore_stages
from dgunet.checkpoints.load import load_model, read_checkpoint
from dgunet.checkpoints.registry import list_pretrained
from dgunet.data import photos
from dgunet.data.images import to_tensor
from dgunet.data.photos import estimate_sigma, noise_warning, trained_sigma_range
from dgunet.data.samples import MIN_SIDE, sample_photos
from dgunet.data.synthesis import Degrade, added_rain, degrade_image, gaussian_noise, motion_blur, sensor_noise
from dgunet.data.transforms import as_colour, pad_to_blocks, to_uint8, unit_range
from dgunet.evaluation.metrics import evaluate_pair
from dgunet.model.network import DGUNet
from dgunet.model.sampling import BlockSampling, FirstRows, ScalableSampling, percentage
from dgunet.runtime.errors import UserError, describe_error
from dgunet.runtime.hardware import autocast_dtype, pick_device

PORTS = range(7860, 7960)  # the first free one, where none is asked for
MAX_FILE_SIZE = "50mb"
MAX_READ = 80_000_000  # pixels; an image with more is not even decoded
TILE, OVERLAP = 512, 64  # pixels
EXAMPLE_SIDE = 400  # pixels: restored in some seconds on a CPU
EXAMPLES = {"test": ("astronaut", "cat", "coffee"), "train": ("rocket", "motorcycle_left"), "val": ("camera_face",)}
UNCHANGED = "nothing: restore it as it is"


@dataclass(frozen=True)
class Task:
    """A tab: title, first example, and degradations by name, each a function of a strength."""

    title: str
    example: str
    ways: dict[str, Callable[[float], Degrade]]
    strength: tuple[str, float, float, float] | None = None  # label, minimum, maximum, default


TASKS = {
    "denoising": Task(
        "Denoising",
        "astronaut",
        {
            "Gaussian noise": lambda sigma: partial(gaussian_noise, sigma=sigma),
            "camera noise at high ISO": lambda _: sensor_noise,
        },
        ("sigma of the Gaussian noise, in 8-bit levels", 0, 75, 25),
    ),
    "deraining": Task(
        "Deraining",
        "motorcycle_left",
        {"rain": lambda drops: partial(added_rain, density=(drops, drops))},
        ("drops per 10,000 pixels", 10, 100, 40),
    ),
    "deblurring": Task(
        "Deblurring",
        "coffee",
        {"camera shake": lambda extent: partial(motion_blur, extent=(extent, extent))},
        ("extent of the shake in pixels", 3, 25, 10),
    ),
    "compressive_sensing": Task("Compressive sensing", "camera_face", {}),
}


@dataclass(frozen=True)
class Network:
    """Weights to choose from, and their description."""

    name: str
    task: str
    path: Path
    description: str = ""
    noise_sigma: tuple[float, float] | None = None


def list_networks() -> list[Network]:
    """The networks that come with dgunet, those of one task from the fewest measurements to the most."""
    return [
        Network(
            r.name, r.task, r.path, f"{r.trained_for} Not for {r.not_for[:1].lower()}{r.not_for[1:]}", r.noise_sigma
        )
        for r in list_pretrained()
    ]


def add_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, reachable from here only)")
    add("--port", type=int, help=f"(default: the first free one from {PORTS[0]})")
    add("--no_browser", action="store_true", help="do not open the page")
    add("--weights", nargs="+", default=[], metavar="TASK=FILE", help="networks of your own, e.g. denoising=model.pth")
    add("--device", default="auto", help="auto (a CUDA GPU where there is one), cpu, cuda, cuda:1, mps, ...")
    add("--megapixels", type=float, default=1, help="scale down larger images (default: 1, a minute of two CPU cores)")


def run(args: argparse.Namespace):
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the port is in use, no such address, weights that cannot be used.
        ModuleNotFoundError: the extra ``demo`` is not installed; the message says so.
    """
    if not 0.01 <= args.megapixels <= 100:
        raise UserError(f"--megapixels is from 0.01 to 100, got {args.megapixels:g}")
    if args.port is not None and not 0 < args.port < 2**16:
        raise UserError(f"--port is from 1 to {2**16 - 1}, got {args.port}")
    port = _free_port(args.host, args.port)
    device = pick_device(args.device)
    networks = [*(_load_own_network(text, device) for text in args.weights), *list_networks()]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="dgunet_demo_", ignore_cleanup_errors=True) as folder:
        # Gradio reads these when it is imported; it looks for Matplotlib's backend, which otherwise lists all fonts.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "MPLBACKEND": "agg"}
        import gradio as gr

        app = build(networks, device, round(1e6 * args.megapixels))
        app.queue(default_concurrency_limit=4, max_size=40)
        url = app.launch(
            server_name=args.host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            max_file_size=MAX_FILE_SIZE,
            footer_links=["settings"],
            theme=gr.themes.Default(
                primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=CSS,
        )[1]
        print(f"DGUNet is at {url} (Ctrl-C ends it)", flush=True)
        if not args.no_browser and _has_display():
            webbrowser.open(url)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    os._exit(0)  # at once: a running restoration would block the exit


def _free_port(host: str, port: int | None) -> int:
    for candidate in PORTS if port is None else [port]:
        with contextlib.suppress(OSError), socket.create_server((host, candidate)):
            return candidate
    place = f"the ports {PORTS[0]} to {PORTS[-1]}" if port is None else f"port {port}"
    raise UserError(f"cannot listen on {host}, {place}: in use, or no address of this machine; choose another --port")


def _has_display() -> bool:
    """Whether a browser would have a window; without, Python opens one in the terminal."""
    return os.name == "nt" or os.uname().sysname == "Darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ))


def _load_own_network(text: str, device: torch.device) -> Network:
    task, separator, path = text.partition("=")
    if not separator or task not in TASKS:
        raise UserError(f"--weights takes TASK=FILE, the task one of {', '.join(TASKS)}; got {text!r:.100}")
    network = Network(Path(path).stem, task, Path(path), noise_sigma=trained_sigma_range(read_checkpoint(path)))
    known = load(network, device).degradation
    if not (isinstance(known, BlockSampling) if task == "compressive_sensing" else known is None):
        raise UserError(f"{path}: the tab for {task} cannot show a network of the degradation {type(known).__name__}")
    return network


@cache
def load(network: Network, device: torch.device) -> DGUNet:
    return load_model(network.path, task=network.task, device=device)


def read_photo(path: str | Path, pixels: int) -> tuple[np.ndarray, str]:
    """A user's image as (H, W, 3) uint8, upright, of at most ``pixels`` pixels, and a sentence on changes.

    Raises:
        UserError: it cannot be read, is too small or too large.
    """
    try:
        height, width, _ = photos.probe(path)
        if height * width > MAX_READ:
            most = f"more than the {MAX_READ / 1e6:.0f} million that the demo reads"
            raise UserError(f"{path} has {width}x{height} pixels, {most}; make it smaller")
        if min(height, width) < MIN_SIDE:
            raise UserError(f"{path} has {width}x{height} pixels; the demo needs at least {MIN_SIDE}x{MIN_SIDE}")
        photo = photos.read_photo(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), "This file")) from error
    image, changed = unit_range(photo.pixels), []
    if photo.pixels.dtype == np.uint16:
        image = (photo.pixels / 65535).astype(np.float32)
        changed.append("rounded to 8 bits")
    image = as_colour(image)
    if photo.alpha is not None:
        alpha = photo.alpha[..., None] / np.float32(np.iinfo(photo.alpha.dtype).max)
        image = alpha * image + (1 - alpha)
        changed.append("laid on white")
    if (scale := (pixels / (height * width)) ** 0.5) < 1:
        before, after = image.shape[:2], [max(int(scale * side), 1) for side in image.shape[:2]]
        import cv2

        image = cv2.resize(image, after[::-1], interpolation=cv2.INTER_AREA)
        changed.append(
            f"scaled from {before[1]}x{before[0]} to {after[1]}x{after[0]} pixels, so that it does not take long "
            "(the command line restores images of any size)"
        )
    return to_uint8(image), f"Your image was {', and '.join(changed)}." if changed else ""


@cache
def examples() -> dict[str, np.ndarray]:
    """Photographs that come with scikit-image, none of which a shipped network has seen: (H, W, 3) uint8 by name."""
    import cv2

    found = {}
    for split, names in EXAMPLES.items():
        for photo in sample_photos(split):
            if photo.name in names:
                image = photo.load()
                scale = min(EXAMPLE_SIDE / max(image.shape), 1)
                found[photo.name] = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return found


def degrade(task: str, image: np.ndarray, way: str | None, strength: float, seed: int) -> np.ndarray:
    """The network's input for an image (H, W, 3) uint8: of its shape, or its luminance (H, W) for sensing."""
    if task == "compressive_sensing":
        from PIL import Image

        return np.asarray(Image.fromarray(image).convert("L"))
    if way == UNCHANGED:
        return image
    return degrade_image(image, TASKS[task].ways[way](strength), int(seed), "demo")


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    return evaluate_pair(image, truth, "train_rgb")[0]


CSS = """
.gradio-container {max-width: 1240px !important}
.gallery .grid-container {grid-template-columns: repeat(6, minmax(0, 1fr)) !important}
.gallery .gallery-item, .gallery .thumbnail-item {width: 100% !important; height: auto; min-width: 0}
"""

ABOUT = """## DGUNet restores images by proximal gradient descent, unrolled into learned stages
"""


def build(networks: list[Network], device: torch.device, pixels: int):
    """The page, a `gradio.Blocks`, with networks for each task; images of more than ``pixels`` are scaled down."""
    import gradio as gr

    with gr.Blocks(title="DGUNet", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(ABOUT)
        for name, task in TASKS.items():
            with gr.Tab(task.title, id=name):
                _Tab(name, [network for network in networks if network.task == name], device, pixels).build()
    return app


class _Tab:
    """One task's tab. A session's state is kept in the page, none of it here."""

    def __init__(self, name: str, networks: list[Network], device: torch.device, pixels: int):
        self.name, self.task, self.device, self.pixels = name, TASKS[name], device, pixels
        self.networks = _by_label(networks)
        self.sensing = name == "compressive_sensing"

    def build(self):
        import gradio as gr

        task, sensing, photos = self.task, self.sensing, examples()
        ways = [*task.ways, UNCHANGED]
        network = "25 %" if "25 %" in self.networks else next(iter(self.networks))
        measured = self.ratios(network)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = gr.State(photos[task.example])
                gallery = gr.Gallery(
                    list(photos.values()), label="Examples", show_label=False, columns=6, height=90,
                    allow_preview=False, object_fit="cover", buttons=[], interactive=False, elem_classes="gallery",
                    selected_index=list(photos).index(task.example),
                )  # fmt: skip
                own = gr.File(
                    label="or an image of your own",
                    file_types=["image"],
                    height=120,
                    elem_id=f"{self.name}_own",
                )
                note = gr.Markdown(elem_id=f"{self.name}_note")
                way = gr.Radio(ways, value=ways[0], label="Degrade it by", visible=not sensing)
                what, low, high, usual = task.strength or ("", 0, 1, 0)
                if sigma := self.networks[network].noise_sigma:
                    usual = min(max(usual, sigma[0]), sigma[1])
                strength = gr.Slider(low, high, usual, step=1, label=what, visible=not sensing)
                seed = gr.Slider(0, 20, 0, step=1, label="random seed", visible=not sensing)
                chosen = gr.Radio(
                    list(self.networks), value=network, visible=len(self.networks) > 1,
                    label="Measurements, as a part of the pixels" if sensing else "Network",
                )  # fmt: skip
                ratio = gr.Slider(step=1, label="percent of the pixels that are measured", **measured)
                button = gr.Button("Restore", variant="primary")
            with gr.Column(scale=3, min_width=400):
                pair, text, _, _, _ = self.preview(photos[task.example], ways[0], usual, 0, network, measured["value"])
                caption = gr.Markdown(text, elem_id=f"{self.name}_caption")
                viewer = gr.ImageSlider(
                    pair, format="png", label="before and after", show_label=False, interactive=False, max_height=445,
                    elem_id=f"{self.name}_viewer",
                )  # fmt: skip
                stage = gr.Slider(0, 7, 7, step=1, label="On the right: the estimate after stage", visible=False)
                table = gr.Markdown()
                found = gr.State(None, time_to_live=3600)
        about = gr.Markdown(self.describe(network))

        def choose(event: gr.SelectData):  # Gradio reads the signatures of these two
            return list(photos.values())[event.index], "", None

        def restore(image, way, strength, seed, label, percent, progress=gr.Progress()):  # noqa: B008
            return self.restore(image, way, strength, seed, label, percent, progress)

        inputs, outputs = [image, way, strength, seed, chosen, ratio], [viewer, caption, stage, table, found]
        quietly = dict(api_visibility="private", show_progress="hidden", trigger_mode="multiple")
        # One at a time, so that the last request is also the last to be shown.
        preview = dict(
            fn=self.preview, inputs=inputs, outputs=outputs, concurrency_id="preview", concurrency_limit=1, **quietly
        )
        gallery.select(choose, None, [image, note, own], **quietly).then(**preview)
        own.upload(self.upload, [own, image], [image, note, gallery], **quietly).then(**preview)
        way.input(self.update_controls, [way, chosen], [strength, seed, chosen, about], **quietly).then(**preview)
        for event in (strength.release, seed.release, ratio.release):
            event(**preview)
        # After the slider is within the network's ratios.
        chosen.input(lambda label: gr.update(**self.ratios(label)), chosen, ratio, **quietly).then(**preview)
        chosen.input(self.describe, chosen, about, **quietly)
        button.click(
            restore, inputs, outputs, concurrency_id="restore", concurrency_limit=1, show_progress_on=viewer,
            api_visibility="private",
        )  # fmt: skip
        stage.input(self.show, [found, stage], [viewer, caption], **quietly | dict(trigger_mode="always_last"))

    def ratios(self, label) -> dict:
        """The slider of a network for a range of ratios, in percent; hidden for others."""
        known = load(self.networks[label], self.device).degradation if self.sensing else None
        if not isinstance(known, ScalableSampling):
            return dict(minimum=0, maximum=100, value=0, visible=False)
        least, most = (float(percentage(rows, known.block)) for rows in (known.lowest, len(known.matrix)))
        return dict(minimum=least, maximum=most, value=min(max(25.0, least), most), visible=True)

    def ratio(self, label, percent) -> float | None:
        """What `BlockSampling.at` takes, of a network for a range of ratios."""
        return percent / 100 if self.ratios(label)["visible"] else None

    def describe(self, label):
        network = self.networks[label]
        return f"**{network.name}**: {network.description}" if network.description else f"**{network.name}**"

    def upload(self, path, image):
        """The uploaded image, or the former one with the reason why it cannot be used."""
        import gradio as gr

        try:
            return *read_photo(path, self.pixels), gr.update(selected_index=None)
        except UserError as error:
            return image, f"⚠️ {error}", gr.skip()

    def update_controls(self, way, label):
        """Which sliders to show, and the network for the kind of noise, unless a user's network is chosen."""
        from gradio import update

        gaussian = way == "Gaussian noise"
        if self.name == "denoising" and way != UNCHANGED and self.networks[label].description:
            suits = {
                name: (n.noise_sigma is not None) == gaussian for name, n in self.networks.items() if n.description
            }
            label = label if suits[label] else next((name for name in suits if suits[name]), label)
        sliders = update(visible=way == next(iter(self.task.ways))), update(visible=way != UNCHANGED)
        return *sliders, update(value=label), self.describe(label)

    def preview(self, image, way, strength, seed, label, percent=0):
        """The degraded image beside the original."""
        given = degrade(self.name, image, way, strength, seed)
        network = self.networks[label]
        if self.sensing:
            operator, ratio = load(network, self.device).degradation, self.ratio(label, percent)
            operator = operator.at(ratio)
            pair = given, initial_estimate(operator, given)
            text = (
                f"Left the luminance, right Aᵀy of {len(operator.matrix)} measurements a block of "
                f"{operator.block}x{operator.block}: **{psnr(*pair):.2f} dB**."
            )
        elif way == UNCHANGED:
            pair, text = (given, given), "The image as it is. " + _noise_warning(network, given)
        else:
            pair = image, given
            text = f"Left the original, right with {way}: **{psnr(*pair):.2f} dB**. "
            text += _noise_warning(network, given, strength if way == "Gaussian noise" else None)
        from gradio import update

        return pair, f"{text} Press **Restore**.", update(visible=False), "", None

    def restore(self, image, way, strength, seed, label, percent, progress):
        import gradio as gr

        try:
            given = degrade(self.name, image, way, strength, seed)
            model = load(self.networks[label], self.device)
            begin = time.perf_counter()
            report = lambda done, doing: progress(done, desc=doing)  # noqa: E731
            bf16 = autocast_dtype("auto", self.device) is not None  # where it is faster
            ratio = self.ratio(label, percent)
            stages = restore_stages(model, given, bf16=bf16, tile=TILE, overlap=OVERLAP, ratio=ratio, progress=report)
            seconds = time.perf_counter() - begin
        except Exception as error:
            if (message := describe_error(error)) is None:
                raise
            return gr.skip(), f"⚠️ {message}", gr.skip(), gr.skip(), gr.skip()
        truth = given if self.sensing else None if way == UNCHANGED else image
        scores = [] if truth is None else [psnr(stage, truth) for stage in stages]
        place = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        size = f"{given.shape[1]}x{given.shape[0]} pixels"
        found = Found(stages, scores, f"{size}, restored in {seconds:.1f} s on the {place}.")
        last = len(stages) - 1
        return *self.show(found, last), gr.update(visible=True, maximum=last, value=last), _table(scores), found

    def show(self, found, k):
        """The estimate after stage k beside x_0."""
        if found is None:
            import gradio

            return gradio.skip()
        k, last = int(k), len(found.stages) - 1
        before = "Aᵀy" if self.sensing else "degraded" if found.scores else "the image"
        score = [f", **{score:.2f} dB**" for score in found.scores] or [""] * (last + 1)
        name = "x₀" if k == 0 else "restored" if k == last else f"after stage {k} of {last}"
        text = f"Left {before}{score[0]}; right {name}{score[k]}. {found.took}"
        return (found.stages[0], found.stages[k]), text


@dataclass(frozen=True)
class Found:
    """A restored image: x_0 ... x_K, their PSNR if the ground truth is known, and the time taken."""

    stages: list[np.ndarray]
    scores: list[float]
    took: str


def initial_estimate(operator: BlockSampling | FirstRows, luma: np.ndarray) -> np.ndarray:
    """A_adjoint(A(x)) of a luminance (H, W), as uint8."""
    height, width = luma.shape
    with torch.inference_mode():
        x = pad_to_blocks(unit_range(to_tensor(luma)[None]), operator.block)
        start = operator.A_adjoint(operator.A(x.to(operator.matrix.device)))
    return to_uint8(start[0, 0, :height, :width].cpu().numpy())


def _label(network: Network) -> str:
    ratio = network.name.rpartition("_")[2].replace("to", " to ")  # 25, or 1to50
    known = network.task == "compressive_sensing" and re.fullmatch(r"\d+( to \d+)?", ratio)
    return f"{ratio} %" if known else network.name


def _by_label(networks: list[Network]) -> dict[str, Network]:
    """Networks by unique labels: a name, if needed with the folder's name and a number."""
    found = {}
    for network in networks:
        label, folder = _label(network), network.path.resolve().parent.name
        candidates = (label, f"{label} ({folder})", *(f"{label} ({folder}, {k})" for k in range(2, len(networks) + 1)))
        found[next(candidate for candidate in candidates if candidate not in found)] = network
    return found


def _noise_warning(network: Network, given: np.ndarray, sigma: float | None = None) -> str:
    """A sentence if the noise of an image is outside the network's training range, or nothing."""
    if network.noise_sigma is None:
        return ""
    level = 255 * estimate_sigma(unit_range(given)) if sigma is None else sigma
    text = noise_warning(level, network.noise_sigma)
    return f"About sigma {level:.0f}, {text}. " if text else ""


def _table(scores: list[float]) -> str:
    if not scores:
        return ""
    rows = [["", *(f"x{chr(0x2080 + k) if k < 10 else k}" for k in range(len(scores)))]]
    rows += [["---"] * len(rows[0]), ["PSNR in dB", *(f"{score:.2f}" for score in scores)]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
