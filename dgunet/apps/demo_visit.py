"""What the demo computes: a visitor's photograph, its estimates, and examples that are degraded. Without Gradio."""

import html
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from dgunet.apps.figures import centre_crop, estimate_stages
from dgunet.checkpoints.load import load_model
from dgunet.checkpoints.registry import list_pretrained
from dgunet.data import photos
from dgunet.data.images import to_tensor
from dgunet.data.photos import Photo
from dgunet.data.samples import MIN_SIDE, sample_photos
from dgunet.data.synthesis import (
    Degrade,
    added_rain,
    bayer_noise,
    degrade_image,
    gaussian_noise,
    jpeg_compress,
    motion_blur,
)
from dgunet.data.transforms import as_colour, pad_to_blocks, to_uint8, unit_range
from dgunet.evaluation.metrics import evaluate_pair
from dgunet.model.network import DGUNet
from dgunet.model.sampling import BlockSampling, FirstRows
from dgunet.runtime.errors import UserError
from dgunet.runtime.hardware import autocast_dtype

MAX_READ = 80_000_000  # pixels; an image with more is not even decoded
TILE, OVERLAP = 512, 64  # pixels
CROP_SIDE = 192  # pixels of the centre, which the candidates are compared on
EXAMPLE_SIDE = 400  # pixels: restored in some seconds on a CPU
EXAMPLES = {"test": ("astronaut", "cat", "coffee"), "train": ("rocket", "motorcycle_left"), "val": ("camera_face",)}
SENSING = "compressive_sensing"
TASKS = ("denoising", "deraining", "deblurring", SENSING)


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
    "camera noise": Way(lambda _: bayer_noise),
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
    chosen: Choice | None = None  # that is shown
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
        sizes = f"from {before[1]}x{before[0]} to {after[1]}x{after[0]} pixels"
        notes = [f"It was scaled down {sizes}, so that it does not take long (`dgunet restore` takes any size)."]
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


def degrade_example(name: str, way: str, strength: float) -> Visit:
    image = examples()[name]
    return Visit(Photo(degrade_image(image, WAYS[way].make(strength), 0, "demo")), f"{name}.png", truth=image)


def centre(photo: Photo, side: int = CROP_SIDE) -> Photo:
    return Photo(*(x if x is None else centre_crop(x, side) for x in (photo.pixels, photo.alpha)))


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


def by_label(networks: list[Network]) -> dict[str, Network]:
    """Networks by unique labels: a name, if needed with the folder's name and a number."""
    found = {}
    for network in networks:
        label, folder = _label(network), network.path.resolve().parent.name
        candidates = (label, f"{label} ({folder})", *(f"{label} ({folder}, {k})" for k in range(2, len(networks) + 1)))
        found[next(candidate for candidate in candidates if candidate not in found)] = network
    return found
