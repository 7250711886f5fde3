"""A demo in the browser: drop a photograph, and noise, rain or blur are removed from it (``dgunet demo``)."""

import argparse
import contextlib
import importlib.util
import os
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dgunet import __version__
from dgunet.apps.batch import OURS
from dgunet.apps.demo_html import CARDS_JS, CSS, DOWNLOAD_JS, STRENGTH_JS, VIEW_JS, cache_folder, draw_cards, draw_view
from dgunet.apps.demo_visit import (
    SENSING,
    TASKS,
    UNCHANGED,
    WAYS,
    Choice,
    Estimates,
    Network,
    Visit,
    blend,
    by_label,
    centre,
    compute_estimates,
    degrade_example,
    examples,
    follow,
    initial_estimate,
    list_networks,
    load,
    luminance,
    psnr,
    read_photo,
    shown,
)
from dgunet.automatic import Diagnosis, choose, diagnose
from dgunet.data import photos
from dgunet.data.transforms import unit_range
from dgunet.model.sampling import BlockSampling, ScalableSampling, percentage
from dgunet.runtime.errors import UserError, describe_error
from dgunet.runtime.hardware import pick_device

PORTS = range(7860, 7960)  # the first free one, where none is asked for
MAX_FILE_SIZE = "300mb"
# What the networks that come with dgunet remove, in a visitor's words.
REMOVES = {
    "denoising_gaussian": "noise",
    "denoising_photo": "camera noise, JPEG blocks",
    "deraining_mixture": "rain",
    "deblurring_motion": "blur",
}


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
            label="your photograph", show_label=False, file_types=["image", *heic], height=80, elem_id="own",
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


def guarded(updates: Iterator[dict], status) -> Iterator[dict]:
    """The updates, and where they fail a sentence."""
    try:
        yield from updates
    except Exception as error:
        if (message := describe_error(error)) is None:
            raise
        yield {status: f"⚠️ {message}"}


def _check_kept(visit: Visit | None):
    if visit is None:
        raise UserError("this photograph is no longer kept; drop it again")


class Restoring:
    """The tab for photographs. What a visitor does is kept in a `Visit`, in the page's state, none of it here.

    Its methods return or yield updates, by component.
    """

    def __init__(self, networks: list[Network], device: torch.device, pixels: int):
        self.networks, self.device, self.pixels = by_label(networks), device, pixels

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
        with gr.Accordion("Try an example: add noise, rain, blur", open=False):
            images = examples()
            name = gr.State("motorcycle_left")
            gallery = gr.Gallery(
                list(images.values()), label="Examples", show_label=False, columns=6, height=90,
                allow_preview=False, object_fit="cover", buttons=[], interactive=False, elem_classes="gallery",
                selected_index=list(images).index(name.value),
            )  # fmt: skip
            way = gr.Radio(list(WAYS), value=next(iter(WAYS)), label="Degrade it by", elem_id="way")
            amount = gr.Slider(**self.amount(way.value), elem_id="amount")
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
            button.click(self.open_example, [name, way, amount, visit], outputs, **_QUIETLY),
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

    def open(self, path: str, former: Visit | None) -> Iterator[dict]:
        """Show an uploaded photograph, or the reason why it cannot be read."""
        yield {self.own: None}  # so that another can be dropped
        yield from guarded(self._start(lambda: read_photo(path, self.pixels), former), self.told)

    def open_example(self, name: str, way: str, amount: float, former: Visit | None) -> Iterator[dict]:
        yield from self._start(lambda: degrade_example(name, way, amount), former)

    def _start(self, make: Callable[[], Visit], former: Visit | None) -> Iterator[dict]:
        from gradio import update

        visit = make()
        if former is not None:
            former.turn += 1  # what is computed for it ends
        yield {
            self.visit: visit,
            self.told: "Looking at it …",
            self.status: update(value="", visible=True),
            self.row: update(visible=True),
            self.cards: "",
            **self._unchanged(visit),
        }

    def _unchanged(self, visit: Visit) -> dict:
        from gradio import update

        hidden = dict.fromkeys((self.strength, self.download, self.steps), update(visible=False))
        return hidden | {self.view: draw_view(shown(visit.photo)), self.other: None, self.about: ""}

    def examine(self, visit: Visit | None) -> Iterator[dict]:
        """Say what is wrong with the photograph, show the choices on its centre, restore it by the first of them."""
        yield {self.own: None}  # a generator without any update would empty the page
        if visit is not None and not visit.choices:  # else the upload could not be read
            yield from guarded(self._examine(visit), self.status)

    def _examine(self, visit: Visit) -> Iterator[dict]:
        diagnosis = diagnose(visit.photo.pixels)
        known = {network.name: network for network in self.networks.values() if network.description}
        own = [Choice(f"Your {label}", network) for label, network in self.networks.items() if not network.description]
        found = [
            Choice(f"Remove {_word(one.degradation)}", known[one.network], one.strength) if one.network else UNCHANGED
            for one in choose(diagnosis)
        ]
        visit.choices, visit.best = own + found, found[0]
        yield {self.told: " ".join([_sentence(diagnosis, visit.best), *visit.notes])}
        turn, crop, estimates = visit.turn, centre(visit.photo), {}
        for choice in visit.choices:
            network = choice.network
            if network is not None and network not in estimates:
                compute = partial(compute_estimates, network, crop.pixels, self.device)
                wanted = lambda: visit.turn == turn  # noqa: E731
                estimates[network] = yield from follow(compute, "Comparing what may help", self.status, wanted)
                if estimates[network] is None:
                    return
            restored = crop if network is None else blend(crop, estimates[network].last, choice.strength)
            visit.crops.append(shown(restored))
        yield from self._show(visit, visit.choices[0])

    def pick(self, visit: Visit | None, index: int) -> Iterator[dict]:
        """Show the choice of a card."""
        yield from guarded(self._show(visit, visit and visit.choices[index]), self.status)

    def remove(self, visit: Visit | None, label: str) -> Iterator[dict]:
        """Restore by the network of this label."""
        yield from guarded(self._show(visit, Choice("", self.networks[label])), self.status)

    def _show(self, visit: Visit | None, choice: Choice) -> Iterator[dict]:
        """Show a choice, which is computed if it has not been."""
        from gradio import update

        _check_kept(visit)
        visit.turn += 1
        turn, network = visit.turn, choice.network
        cards = [(str(one), crop, one == visit.best) for one, crop in zip(visit.choices, visit.crops, strict=False)]
        yield {self.cards: draw_cards(cards, visit.choices.index(choice) if choice in visit.choices else None)}
        if network is None:
            visit.chosen = choice
            yield {**self._unchanged(visit), self.status: "As it is: there is nothing to download."}
            return
        label = next(label for label, one in self.networks.items() if one is network)
        yield {self.other: label, self.about: f"<small>{network.name}: {network.description}</small>"}
        if network not in visit.estimates:
            compute = partial(compute_estimates, network, visit.photo.pixels, self.device)
            doing = f"Removing {REMOVES[label]}" if label in REMOVES else f"Restoring by {label}"
            found = yield from follow(compute, doing, self.status, lambda: visit.turn == turn)
            if found is None:
                return
            visit.estimates[network] = found
        visit.chosen, found = choice, visit.estimates[network]
        last, (height, width) = len(found.stages) - 1, visit.photo.pixels.shape[:2]
        scores = [] if visit.truth is None else [psnr(stage, visit.truth) for stage in found.stages]
        gain = f"; PSNR {scores[0]:.2f} dB before, {scores[-1]:.2f} dB at full strength" if scores else ""
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
        from gradio import skip

        found = visit and visit.chosen and visit.estimates.get(visit.chosen.network)
        if not found:
            return skip()
        return draw_view(shown(visit.photo), shown(blend(visit.photo, unit_range(found.stages[int(k)]), 1.0)))

    def save(self, visit: Visit | None, strength: float) -> Iterator[dict]:
        """Write the file to download."""
        yield from guarded(self._save(visit, strength), self.status)

    def _save(self, visit: Visit | None, strength: float) -> Iterator[dict]:
        _check_kept(visit)
        if visit.chosen is None or (network := visit.chosen.network) is None:
            raise UserError("nothing is restored yet; choose what to remove")
        path = Path(tempfile.mkdtemp(dir=cache_folder()), visit.name)
        restored = blend(visit.photo, visit.estimates[network].last, strength)
        photos.write_photo(path, restored, f"{OURS} {__version__}, {network.name}, strength {strength:g}")
        yield {self.file: str(path)}


class Sensing:
    """The tab of compressive sensing: the luminance of the visitor's photograph, or of an example, is measured."""

    def __init__(self, networks: list[Network], device: torch.device):
        self.networks, self.device = by_label(networks), device

    def build(self, visit, events: list):
        """``events`` bind a function to what may change the photograph."""
        import gradio as gr

        label = "25 %" if "25 %" in self.networks else next(iter(self.networks))
        gr.Markdown(
            "A camera could take few measurements, each a weighted sum of the pixels of a block. A network "
            "reconstructs the image from them."
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
            f"{whose}: left its luminance, right what {len(operator.matrix)} measurements of each block of "
            f"{operator.block}x{operator.block} pixels show without a network (Aᵀy), {psnr(start, luma):.2f} dB."
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
            self.status: f"{found.took}; left Aᵀy, {scores[0]:.2f} dB, right reconstructed, {scores[-1]:.2f} dB",
            self.stage: update(visible=True, value=last, maximum=last),
            self.table: _table(scores),
        }

    def show_stage(self, found: Estimates | None, k: int) -> str:
        if found is None:
            from gradio import skip

            return skip()
        return draw_view(found.stages[0], found.stages[int(k)], ("Aᵀy", "reconstructed"))


def _word(degradation: str) -> str:
    return degradation.replace("gaussian", "Gaussian")


def _sentence(diagnosis: Diagnosis, best: Choice) -> str:
    """What is wrong with a photograph, and how sure that is."""
    sure = f"({100 * diagnosis.confidence:.0f} % sure)"
    if diagnosis.degradation == "clean":
        return f"**Nothing seems to be wrong** with this photograph {sure}."
    unsure = " That is too unsure to change it." if best == UNCHANGED else ""
    return f"This photograph seems to have **{_word(diagnosis.degradation)}** {sure}.{unsure}"


def _table(scores: list[float]) -> str:
    """A row for each stage; nothing without scores."""
    if not scores:
        return ""
    rows = ["| stage | PSNR |", "| --- | --- |", *(f"| {k} | {score:.2f} dB |" for k, score in enumerate(scores))]
    return "\n".join(rows)
