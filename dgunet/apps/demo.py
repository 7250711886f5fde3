"""A demo in the browser: drop a photograph, and noise, rain or blur are removed from it (``dgunet demo``)."""

import argparse
import contextlib
import html
import importlib.util
import os
import re
import signal
import socket
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from dgunet import __version__
from dgunet.apps.batch import OURS
from dgunet.apps.demo_html import CARDS_JS, CSS, DOWNLOAD_JS, STRENGTH_JS, VIEW_JS, cache_folder, draw_cards, draw_view
from dgunet.apps.figures import estimate_stages
from dgunet.automatic import choose, diagnose
from dgunet.checkpoints.load import load_model
from dgunet.checkpoints.registry import list_pretrained
from dgunet.data import photos
from dgunet.data.images import to_tensor
from dgunet.data.photos import Photo
from dgunet.data.samples import MIN_SIDE, sample_photos
from dgunet.data.synthesis import (
    Degrade,
    added_rain,
    degrade_image,
    gaussian_noise,
    jpeg_compress,
    motion_blur,
    sensor_noise,
)
from dgunet.data.transforms import as_colour, pad_to_blocks, to_uint8, unit_range
from dgunet.evaluation.metrics import evaluate_pair
from dgunet.model.network import DGUNet
from dgunet.model.sampling import BlockSampling, FirstRows, ScalableSampling, percentage
from dgunet.runtime.errors import UserError, describe_error
from dgunet.runtime.hardware import autocast_dtype, pick_device

PORTS = range(7860, 7960)  # the first free one, where none is asked for
MAX_FILE_SIZE = "300mb"
MAX_READ = 80_000_000  # pixels; an image with more is not even decoded
TILE, OVERLAP = 512, 64  # pixels
CROP_SIDE = 192  # pixels of the centre, which the candidates are compared on
EXAMPLE_SIDE = 400  # pixels: restored in some seconds on a CPU
EXAMPLES = {"test": ("astronaut", "cat", "coffee"), "train": ("rocket", "motorcycle_left"), "val": ("camera_face",)}
SENSING = "compressive_sensing"
TASKS = ("denoising", "deraining", "deblurring", SENSING)
# What the networks that come with dgunet remove, in a visitor's words.
REMOVES = {
    "denoising_gaussian": "noise",
    "denoising_photo": "camera noise, JPEG blocks",
    "deraining_mixture": "rain",
    "deblurring_motion": "blur",
}


@dataclass(frozen=True)
class Way:
    """To degrade an example: a function of a strength, and its slider: label, minimum, maximum, default."""

    make: Callable[[float], Degrade]
    slider: tuple[str, float, float, float] | None = None


WAYS = {
    "rain": Way(lambda drops: partial(added_rain, density=(drops, drops)), ("drops per 10,000 pixels", 10, 100, 40)),
    "Gaussian noise": Way(
        lambda sigma: partial(gaussian_noise, sigma=sigma), ("sigma of the noise, in 8-bit levels", 1, 75, 25)
    ),
    "camera noise": Way(lambda _: sensor_noise),
    "blur": Way(
        lambda extent: partial(motion_blur, extent=(extent, extent)), ("extent of the shake in pixels", 3, 25, 10)
    ),
    "JPEG": Way(lambda quality: lambda image, rng: jpeg_compress(image, int(quality)), ("quality", 5, 95, 15)),
    "nothing": Way(lambda _: lambda image, rng: image),
}


@dataclass(frozen=True)
class Network:
    """Weights to choose from, and their description; none of a network of the user's own."""

    name: str
    task: str
    path: Path
    description: str = ""


def list_networks() -> list[Network]:
    """The networks that come with dgunet, those of one task from the fewest measurements to the most."""
    return [
        Network(r.name, r.task, r.path, f"{r.trained_for} Not for {r.not_for[:1].lower()}{r.not_for[1:]}")
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
    network = Network(Path(path).stem, task, Path(path))
    known = load(network, device).degradation
    if not (isinstance(known, BlockSampling) if task == SENSING else known is None):
        raise UserError(f"{path}: the demo of {task} cannot show a network of the degradation {type(known).__name__}")
    return network


@cache
def load(network: Network, device: torch.device) -> DGUNet:
    return load_model(network.path, task=network.task, device=device)


@dataclass(frozen=True)
class Estimates:
    """x_0 ... x_K as they are shown, x_K in full precision, (H, W, 3) in [0, 1], and what it took."""

    stages: list[np.ndarray]
    last: np.ndarray
    took: str


@dataclass(frozen=True)
class Choice:
    """An answer to what is wrong with a photograph; without a network it stays as it is."""

    title: str
    network: Network | None = None
    strength: float = 1.0

    def __str__(self):
        return self.title + (f", strength {self.strength:g}" if 0 < self.strength < 1 else "")


UNCHANGED = Choice("Leave it as it is")


@dataclass
class Visit:
    """A photograph and what was computed for it.

    photo: of no more pixels than the demo computes; name: of the download; notes: what was changed in reading it;
    truth: the example that was degraded; turn: counts requests, so that a former one gives way.
    """

    photo: Photo
    name: str
    notes: list[str] = field(default_factory=list)
    truth: np.ndarray | None = None
    choices: list[Choice] = field(default_factory=list)
    best: Choice | None = None
    crops: list[np.ndarray] = field(default_factory=list)  # the centre of the photograph by each choice
    estimates: dict[Network, Estimates] = field(default_factory=dict)
    chosen: Choice | None = None
    turn: int = 0


def read_photo(path: str | Path, pixels: int) -> Visit:
    """A visitor's photograph, scaled down to at most ``pixels`` pixels.

    Raises:
        UserError: it cannot be read, is too small or too large.
    """
    try:
        height, width, kind = photos.probe(path)
        if height * width > MAX_READ:
            most = f"more than the {MAX_READ / 1e6:.0f} million that the demo reads"
            raise UserError(f"{path} has {width}x{height} pixels, {most}; make it smaller")
        if min(height, width) < MIN_SIDE:
            raise UserError(f"{path} has {width}x{height} pixels; the demo needs at least {MIN_SIDE}x{MIN_SIDE}")
        photo = photos.read_photo(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), "This file")) from error
    notes = []
    if (scale := (pixels / (height * width)) ** 0.5) < 1:
        import cv2

        before = photo.pixels.shape[:2]
        after = [max(int(scale * side), 1) for side in before]
        small = [
            None if image is None else cv2.resize(image, after[::-1], interpolation=cv2.INTER_AREA)
            for image in (photo.pixels, photo.alpha)
        ]
        photo = replace(photo, pixels=small[0], alpha=small[1])
        notes = [
            f"scaled down from {before[1]}x{before[0]} to {after[1]}x{after[0]} pixels, so that it does not take long "
            "(`dgunet denoise` restores any size)"
        ]
    return Visit(photo, str(photos.restored_name(Path(Path(path).name), kind)), notes)


def shown(photo: Photo) -> np.ndarray:
    """A photograph as a browser shows it: (H, W, 3) uint8, on white where it is transparent."""
    image, alpha = (x if x is None else x / np.float32(np.iinfo(x.dtype).max) for x in (photo.pixels, photo.alpha))
    image = as_colour(image)
    return to_uint8(image if alpha is None else alpha[..., None] * image + 1 - alpha[..., None])


def blend(photo: Photo, restored: np.ndarray, strength: float) -> Photo:
    """The photograph y with pixels y + strength (x_K - y), of its own type and channels; x_K is (H, W, 3) in [0, 1]."""
    scale = np.float32(np.iinfo(photo.pixels.dtype).max)
    y = as_colour(photo.pixels) / scale
    x = np.clip(y + np.float32(strength) * (restored - y), 0, 1)
    x = x.mean(axis=2) if photo.pixels.ndim == 2 else x
    return replace(photo, pixels=(x * scale).round().astype(photo.pixels.dtype))


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


def degrade_example(name: str, way: str, strength: float, seed: int) -> Visit:
    image = examples()[name]
    degraded = degrade_image(image, WAYS[way].make(strength), int(seed), "demo")
    return Visit(Photo(degraded), f"{name}_{way.replace(' ', '_')}.png", truth=image)


def centre(photo: Photo, side: int = CROP_SIDE) -> Photo:
    top, left = (max(size - side, 0) // 2 for size in photo.pixels.shape[:2])
    return Photo(*(x if x is None else x[top : top + side, left : left + side] for x in (photo.pixels, photo.alpha)))


def luminance(visit: Visit | None) -> np.ndarray:
    """What compressive sensing measures of a photograph, or of an example: (H, W) uint8."""
    from PIL import Image

    return np.asarray(Image.fromarray(examples()["camera_face"] if visit is None else shown(visit.photo)).convert("L"))


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    return evaluate_pair(image, truth, "train_rgb")[0]


_COMPUTING = ThreadPoolExecutor(1, "restore")  # one restoration at a time, of all visitors


class _GaveWay(Exception):
    """Raised in a restoration that nobody waits for any more."""


def follow(compute: Callable, doing: str, status, wanted: Callable[[], bool] = lambda: True) -> Iterator[dict]:
    """Run ``compute(report)`` in another thread; yields its progress as updates of ``status``, returns its result.

    ``report(fraction, description)`` is called before each step. Once not ``wanted()``, it ends: None.
    """
    progress, begin, given_up = None, 0.0, threading.Event()

    def report(fraction: float, step: str):
        nonlocal progress, begin
        if given_up.is_set():
            raise _GaveWay
        now = time.monotonic()
        begin = begin or now
        progress = fraction, step, now + (now - begin) * (1 - fraction) / fraction if fraction else None

    future = _COMPUTING.submit(compute, report)
    try:
        while not wait([future], timeout=0.25).done:
            if not wanted():
                return None
            fraction, step, end = progress or (0, "waiting for another restoration to end", None)
            left = f", about {max(round(end - time.monotonic()), 1)} s left" if end else ""
            bar = f'<progress value="{fraction:.3f}" aria-label="progress"></progress>'
            text = f"{html.escape(doing)}: {100 * fraction:.0f} %{left} <small>({html.escape(step)})</small>"
            yield {status: f"{bar}<p>{text}</p>"}
        return future.result() if wanted() else None
    finally:
        given_up.set()


def compute_estimates(
    network: Network, image: np.ndarray, device: torch.device, report: Callable, ratio: float | None = None
) -> Estimates:
    """Of an image (H, W, 3) or (H, W), uint8 or uint16; ``report`` is of `follow`, ``ratio`` see `estimate_stages`."""
    begin = time.perf_counter()
    bf16 = image.dtype == np.uint8 and autocast_dtype("auto", device) is not None  # where it is faster, and fine enough
    y = image / np.float32(np.iinfo(image.dtype).max)
    y = y if network.task == SENSING else as_colour(y)
    options = dict(bf16=bf16, tile=TILE, overlap=OVERLAP, ratio=ratio, progress=report)
    estimates = estimate_stages(load(network, device), y, **options)
    place = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    took = f"{image.shape[1]}x{image.shape[0]} pixels, {time.perf_counter() - begin:.1f} s on the {place}"
    return Estimates([to_uint8(stage) for stage in estimates], estimates[-1], took)


TITLE = """# Remove noise, rain and blur from your photographs
On your own computer: nothing is sent to the internet, and your file stays as it is.
"""
PAPER = """---
The networks are DGUNets: proximal gradient descent, unrolled into stages that are learned, each a gradient step and a
U-Net as proximal mapping (*Deep Generalized Unfolding Networks for Image Restoration*, Mou, Wang, Zhang; CVPR 2022).
"""


def build(networks: list[Network], device: torch.device, pixels: int):
    """The page, a `gradio.Blocks`, with these networks; photographs of more than ``pixels`` are scaled down."""
    import gradio as gr

    with gr.Blocks(title="DGUNet", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(TITLE)
        heic = [".heic", ".heif", ".hif"] if importlib.util.find_spec("pillow_heif") else []
        own = gr.File(
            label="your photograph", show_label=False, file_types=["image", *heic], height=90, elem_id="own",
        )  # fmt: skip
        visit = gr.State(None, time_to_live=3600)
        with gr.Tab("Restore"):
            others = sorted((n for n in networks if n.task != SENSING), key=lambda network: TASKS.index(network.task))
            page = Restoring(others, device, pixels)
            opened = page.build(own, visit)
        with gr.Tab("Compressive sensing") as tab:
            sensing = Sensing([n for n in networks if n.task == SENSING], device)
            sensing.build(visit, [tab.select, *opened])
        gr.Markdown(PAPER)
    app.restoring, app.sensing = page, sensing
    return app


_QUIETLY = dict(api_visibility="private", show_progress="hidden", trigger_mode="multiple")
_EXPIRED = "⚠️ This photograph is no longer kept; drop it again."


def guarded(updates: Iterator[dict], status) -> Iterator[dict]:
    """The updates, and where they fail a sentence."""
    try:
        yield from updates
    except Exception as error:
        if (message := describe_error(error)) is None:
            raise
        yield {status: f"⚠️ {message}"}


class Restoring:
    """The tab for photographs. What a visitor does is kept in a `Visit`, in the page's state, none of it here.

    Its methods return or yield updates, by component.
    """

    def __init__(self, networks: list[Network], device: torch.device, pixels: int):
        self.networks, self.device, self.pixels = _by_label(networks), device, pixels

    def build(self, own, visit) -> list:
        """Returns the events after which there may be another photograph."""
        import gradio as gr

        self.own, self.visit = own, visit
        self.told = gr.Markdown(elem_id="told")
        self.status = gr.HTML(elem_id="status", elem_classes="status", visible=False)
        with gr.Row(visible=False) as self.row:
            with gr.Column(scale=3, min_width=340):
                self.view = gr.HTML(js_on_load=VIEW_JS, elem_id="photo_view", elem_classes="view")
            with gr.Column(scale=2, min_width=320):
                self.cards = gr.HTML(js_on_load=CARDS_JS, elem_id="cards", elem_classes="cards")
                self.strength = gr.Slider(0, 1, 1, step=0.01, label="Strength", visible=False, elem_id="strength")
                self.download = gr.Button("Download", variant="primary", visible=False, elem_id="download")
                self.file = gr.File(visible=False)  # that `download` has written
                labels = [(REMOVES.get(label, label), label) for label in self.networks]
                self.other = gr.Radio(labels, label="Or remove", elem_id="other")
                self.about = gr.Markdown(elem_id="about")
                with gr.Accordion("How it gets there, stage by stage", open=False, visible=False) as self.steps:
                    self.stage = gr.Slider(0, 7, 7, step=1, label="Show the estimate after stage", elem_id="stage")
                    self.table = gr.Markdown()
        with gr.Accordion("Try it on an example: add noise, rain or blur", open=False):
            images = examples()
            name = gr.State("motorcycle_left")
            gallery = gr.Gallery(
                list(images.values()), label="Examples", show_label=False, columns=6, height=90,
                allow_preview=False, object_fit="cover", buttons=[], interactive=False, elem_classes="gallery",
                selected_index=list(images).index(name.value),
            )  # fmt: skip
            way = gr.Radio(list(WAYS), value=next(iter(WAYS)), label="Degrade it by", elem_id="way")
            amount = gr.Slider(**self.amount(way.value), elem_id="amount")
            seed = gr.Slider(0, 20, 0, step=1, label="random seed")
            button = gr.Button("Degrade and restore the example")

        def example(event: gr.SelectData):  # Gradio reads the signatures of these two
            return list(images)[event.index]

        def pick(visit, event: gr.EventData):
            yield from self.pick(visit, event.index)

        outputs = [own, visit, self.told, self.status, self.row, self.view, self.cards, self.strength, self.download]
        outputs += [self.file, self.other, self.about, self.steps, self.stage, self.table]
        gallery.select(example, None, name, **_QUIETLY)
        way.input(lambda way: gr.update(**self.amount(way)), way, amount, **_QUIETLY)
        opened = [
            own.upload(self.open, [own, visit], outputs, **_QUIETLY),
            button.click(self.open_example, [name, way, amount, seed, visit], outputs, **_QUIETLY),
        ]
        for event in opened:
            event.then(self.examine, visit, outputs, **_QUIETLY)
        self.cards.click(pick, visit, outputs, **_QUIETLY)
        self.other.input(self.remove, [visit, self.other], outputs, **_QUIETLY)
        self.stage.input(self.show_stage, [visit, self.stage], self.view, **_QUIETLY | dict(trigger_mode="always_last"))
        self.strength.change(None, self.strength, None, js=STRENGTH_JS, api_visibility="private")
        saved = self.download.click(self.save, [visit, self.strength], [self.file, self.status], **_QUIETLY)
        saved.success(None, self.file, None, js=DOWNLOAD_JS, api_visibility="private")
        return [event.then for event in opened]

    def amount(self, way: str) -> dict:
        """The slider of a way to degrade."""
        label, low, high, usual = WAYS[way].slider or ("", 0, 1, 0)
        return dict(label=label, minimum=low, maximum=high, value=usual, step=1, visible=WAYS[way].slider is not None)

    def open(self, path: str, former: Visit | None) -> dict:
        """Show an uploaded photograph, or the reason why it cannot be read."""
        try:
            return self.start(read_photo(path, self.pixels), former)
        except Exception as error:
            if (message := describe_error(error)) is None:
                raise
            return {self.own: None, self.told: f"⚠️ {message}"}

    def open_example(self, name: str, way: str, amount: float, seed: int, former: Visit | None) -> dict:
        return self.start(degrade_example(name, way, amount, seed), former)

    def start(self, visit: Visit, former: Visit | None) -> dict:
        from gradio import update

        if former is not None:
            former.turn += 1
        hidden = dict.fromkeys((self.strength, self.download, self.steps), update(visible=False))
        return (
            hidden
            | dict.fromkeys((self.cards, self.about), "")
            | {
                self.own: None,  # so that another can be dropped
                self.visit: visit,
                self.told: "Looking at it …",
                self.status: update(value="", visible=True),
                self.row: update(visible=True),
                self.view: draw_view(shown(visit.photo)),
                self.other: None,
            }
        )

    def examine(self, visit: Visit | None) -> Iterator[dict]:
        """Say what is wrong with the photograph, show the choices on its centre, restore it by the first of them."""
        if visit is not None and not visit.choices:  # else the upload could not be read
            yield from guarded(self._examine(visit), self.status)

    def _examine(self, visit: Visit) -> Iterator[dict]:
        diagnosis = diagnose(visit.photo.pixels)
        known = {network.name: network for network in self.networks.values() if network.description}
        visit.choices = [
            Choice(f"Remove {_words(c.degradation)}", known[c.network], c.strength) if c.network else UNCHANGED
            for c in choose(diagnosis)
        ]
        visit.best = visit.choices[0]
        own = [Choice(f"Your {label}", network) for label, network in self.networks.items() if not network.description]
        visit.choices = own + visit.choices
        told = "Nothing seems to be wrong with it" if visit.best == UNCHANGED else "This looks like"
        yield {self.told: " ".join([f"{told}: **{_words(str(diagnosis))}**.", *visit.notes])}
        turn, crop, estimates = visit.turn, centre(visit.photo), {}
        for choice in visit.choices:
            if choice != UNCHANGED and choice.network not in estimates:
                compute = partial(compute_estimates, choice.network, crop.pixels, self.device)
                estimates[choice.network] = yield from follow(
                    compute, "Comparing what may help", self.status, lambda: visit.turn == turn
                )
                if visit.turn != turn:
                    return
            restored = crop if choice == UNCHANGED else blend(crop, estimates[choice.network].last, choice.strength)
            visit.crops.append(shown(restored))
        yield from self._show(visit, visit.choices[0])

    def pick(self, visit: Visit | None, index: int) -> Iterator[dict]:
        """Show the choice of a card."""
        if visit is None or index >= len(visit.choices):
            yield {self.status: _EXPIRED}
        else:
            yield from guarded(self._show(visit, visit.choices[index]), self.status)

    def remove(self, visit: Visit | None, label: str) -> Iterator[dict]:
        """Restore by the network of this label."""
        if visit is None:
            yield {self.status: _EXPIRED}
        else:
            yield from guarded(self._show(visit, Choice("", self.networks[label])), self.status)

    def _show(self, visit: Visit, choice: Choice) -> Iterator[dict]:
        """Show a choice, which is computed if it has not been."""
        from gradio import update

        visit.turn += 1
        turn, visit.chosen, network = visit.turn, choice, choice.network
        label = next((label for label, one in self.networks.items() if one is network), None)
        cards = [(str(one), crop, one == visit.best) for one, crop in zip(visit.choices, visit.crops, strict=False)]
        pressed = visit.choices.index(choice) if choice in visit.choices else -1
        yield {
            self.cards: draw_cards(cards, pressed),
            self.other: label,
            self.about: f"<small>{network.name}: {network.description}</small>" if network else "",
        }
        if choice == UNCHANGED:
            hidden = dict.fromkeys((self.strength, self.download, self.steps), update(visible=False))
            view = draw_view(shown(visit.photo))
            yield hidden | {self.view: view, self.status: "As it is: there is nothing to download."}
            return
        if network not in visit.estimates:
            compute = partial(compute_estimates, network, visit.photo.pixels, self.device)
            doing = choice.title or f"Removing {REMOVES.get(label, label)}"
            found = yield from follow(compute, doing, self.status, lambda: visit.turn == turn)
            if visit.turn != turn:
                return
            visit.estimates[network] = found
        found = visit.estimates[network]
        last = len(found.stages) - 1
        height, width = found.last.shape[:2]
        scores = [] if visit.truth is None else [psnr(stage, visit.truth) for stage in found.stages]
        gain = f"; PSNR {scores[0]:.2f} dB before, {scores[-1]:.2f} dB restored at full strength" if scores else ""
        size = f", scaled down to {width}x{height} pixels" if visit.notes else ""
        yield {
            self.view: self.show_stage(visit, last),
            self.status: f"{found.took}{gain}",
            self.strength: update(value=choice.strength, visible=True),
            self.download: update(value=f"Download {visit.name}{size}", visible=True),
            self.steps: update(visible=True),
            self.stage: update(value=last, maximum=last),
            self.table: _table(scores),
        }

    def show_stage(self, visit: Visit | None, k: int) -> str:
        """The photograph, and its estimate after stage k."""
        if visit is None or visit.chosen is None or visit.chosen.network not in visit.estimates:
            from gradio import skip

            return skip()
        stage = visit.estimates[visit.chosen.network].stages[int(k)]
        return draw_view(shown(visit.photo), shown(blend(visit.photo, unit_range(stage), 1.0)))

    def save(self, visit: Visit | None, strength: float) -> tuple[str | None, str]:
        """The file to download, and what to say of it."""
        if visit is None or visit.chosen is None or visit.chosen.network not in visit.estimates:
            return None, _EXPIRED
        network = visit.chosen.network
        path = Path(tempfile.mkdtemp(dir=cache_folder()), visit.name)
        try:
            restored = blend(visit.photo, visit.estimates[network].last, strength)
            photos.write_photo(path, restored, f"{OURS} {__version__}, {network.name}, strength {strength:g}")
        except Exception as error:
            if (message := describe_error(error)) is None:
                raise
            return None, f"⚠️ {message}"
        return str(path), visit.estimates[network].took


class Sensing:
    """The tab of compressive sensing: the luminance of the visitor's photograph, or of an example, is measured."""

    def __init__(self, networks: list[Network], device: torch.device):
        self.networks, self.device = _by_label(networks), device

    def build(self, visit, events: list):
        """``events`` bind a function to what may change the photograph."""
        import gradio as gr

        label = "25 %" if "25 %" in self.networks else next(iter(self.networks))
        gr.Markdown(
            "As a camera would that takes few measurements, each a weighted sum of a block of pixels, not all pixels."
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                self.status = gr.HTML(elem_id="sensing_status", elem_classes="status")
                view = gr.HTML(js_on_load=VIEW_JS, elem_id="sensing_view", elem_classes="view")
            with gr.Column(scale=2, min_width=320):
                chosen = gr.Radio(
                    list(self.networks), value=label, visible=len(self.networks) > 1,
                    label="Measurements, as a part of the pixels",
                )  # fmt: skip
                ratio = gr.Slider(step=1, label="percent of the pixels that are measured", **self.ratios(label))
                button = gr.Button("Reconstruct", variant="primary")
                stage = gr.Slider(0, 7, 7, step=1, label="Show the estimate after stage", visible=False)
                table = gr.Markdown()
        self.view, self.stage, self.table = view, stage, table
        found = self.found = gr.State(None, time_to_live=3600)
        outputs = [view, self.status, stage, table, found]
        for event in [*events, ratio.release]:
            event(self.preview, [visit, chosen, ratio], outputs, **_QUIETLY)
        # After the slider is within the network's ratios.
        changed = chosen.input(lambda label: gr.update(**self.ratios(label)), chosen, ratio, **_QUIETLY)
        changed.then(self.preview, [visit, chosen, ratio], outputs, **_QUIETLY)
        button.click(self.reconstruct, [visit, chosen, ratio], outputs, **_QUIETLY | dict(trigger_mode="once"))
        stage.input(self.show_stage, [found, stage], view, **_QUIETLY | dict(trigger_mode="always_last"))

    def ratios(self, label) -> dict:
        """The slider of a network for a range of ratios, in percent; hidden for others."""
        known = load(self.networks[label], self.device).degradation
        if not isinstance(known, ScalableSampling):
            return dict(minimum=0, maximum=100, value=0, visible=False)
        least, most = (float(percentage(rows, known.block)) for rows in (known.lowest, len(known.matrix)))
        return dict(minimum=least, maximum=most, value=min(max(25.0, least), most), visible=True)

    def ratio(self, label, percent) -> float | None:
        """What `BlockSampling.at` takes, of a network for a range of ratios."""
        return percent / 100 if self.ratios(label)["visible"] else None

    def preview(self, visit: Visit | None, label: str, percent: float = 0) -> dict:
        """The luminance beside what its measurements show without a network."""
        from gradio import update

        luma = luminance(visit)
        operator = load(self.networks[label], self.device).degradation.at(self.ratio(label, percent))
        start = initial_estimate(operator, luma)
        whose = "An example (drop a photograph above to measure yours)" if visit is None else "Your photograph"
        text = (
            f"{whose}: before the luminance, after Aᵀy of {len(operator.matrix)} measurements a block of "
            f"{operator.block}x{operator.block}, {psnr(start, luma):.2f} dB."
        )
        view = draw_view(luma, start, ("luminance", "Aᵀy"))
        return {self.view: view, self.status: text, self.stage: update(visible=False), self.table: "", self.found: None}

    def reconstruct(self, visit: Visit | None, label: str, percent: float) -> Iterator[dict]:
        yield from guarded(self._reconstruct(luminance(visit), label, percent), self.status)

    def _reconstruct(self, luma: np.ndarray, label: str, percent: float) -> Iterator[dict]:
        from gradio import update

        compute = partial(compute_estimates, self.networks[label], luma, self.device, ratio=self.ratio(label, percent))
        found = yield from follow(compute, "Reconstructing", self.status)
        scores, last = [psnr(stage, luma) for stage in found.stages], len(found.stages) - 1
        yield {
            self.found: found,
            self.view: self.show_stage(found, last),
            self.status: f"{found.took}; before Aᵀy, {scores[0]:.2f} dB, after {scores[-1]:.2f} dB",
            self.stage: update(visible=True, value=last, maximum=last),
            self.table: _table(scores),
        }

    def show_stage(self, found: Estimates | None, k: int) -> str:
        if found is None:
            from gradio import skip

            return skip()
        return draw_view(found.stages[0], found.stages[int(k)], ("Aᵀy", "reconstructed"))


def initial_estimate(operator: BlockSampling | FirstRows, luma: np.ndarray) -> np.ndarray:
    """A_adjoint(A(x)) of a luminance (H, W), as uint8."""
    height, width = luma.shape
    with torch.inference_mode():
        x = pad_to_blocks(unit_range(to_tensor(luma)[None]), operator.block)
        start = operator.A_adjoint(operator.A(x.to(operator.matrix.device)))
    return to_uint8(start[0, 0, :height, :width].cpu().numpy())


def _label(network: Network) -> str:
    ratio = network.name.rpartition("_")[2].replace("to", " to ")  # 25, or 1to50
    known = network.task == SENSING and re.fullmatch(r"\d+( to \d+)?", ratio)
    return f"{ratio} %" if known else network.name


def _by_label(networks: list[Network]) -> dict[str, Network]:
    """Networks by unique labels: a name, if needed with the folder's name and a number."""
    found = {}
    for network in networks:
        label, folder = _label(network), network.path.resolve().parent.name
        candidates = (label, f"{label} ({folder})", *(f"{label} ({folder}, {k})" for k in range(2, len(networks) + 1)))
        found[next(candidate for candidate in candidates if candidate not in found)] = network
    return found


def _words(diagnosis: str) -> str:
    return diagnosis.replace("gaussian noise", "Gaussian noise").replace("jpeg", "JPEG blocks")


def _table(scores: list[float]) -> str:
    """A row for each stage; nothing without scores."""
    if not scores:
        return ""
    rows = ["| stage | PSNR |", "| --- | --- |", *(f"| {k} | {score:.2f} dB |" for k, score in enumerate(scores))]
    return "\n".join(rows)
