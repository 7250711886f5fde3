"""Batch restoration of photographs, for `dgunet restore | denoise | derain | deblur`."""

import contextlib
import errno
import filecmp
import hashlib
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dgunet import __version__, automatic
from dgunet.apps.compare import COMPARISON, write_comparison
from dgunet.apps.figures import centre_crop, draw_stages, label_stages, middle, restore_stages
from dgunet.automatic import Candidate, Diagnosis, choose, diagnose
from dgunet.checkpoints.load import load_model, read_checkpoint
from dgunet.checkpoints.registry import locate
from dgunet.data.photos import (
    Photo,
    estimate_sigma,
    noise_warning,
    probe,
    read_comment,
    read_photo,
    restored_name,
    trained_sigma_range,
    write_photo,
)
from dgunet.data.transforms import to_uint8
from dgunet.inference import automatic_tile, restore, tile_grid
from dgunet.introspect import after_each_stage
from dgunet.runtime.errors import UserError, describe_error, is_out_of_memory, one_line, shorten_list
from dgunet.runtime.files import IMAGE_SUFFIXES, atomic_write, open_file
from dgunet.runtime.hardware import autocast_dtype, pick_device
from dgunet.runtime.progress import progress_bar

OURS = "restored by dgunet"  # start of the comment in a restored image
FIGURES = {"stages": ".stages.png", "candidates": ".candidates.png"}  # suffixes of figures, by their content
# Errors after which the next image would fail, too.
FATAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EPIPE}
FIGURE_FROM, FIGURE_SIDE = 512, 160  # side of the centre crop that a figure of stages computes, and of that it shows


@dataclass(frozen=True)
class Job:
    """An image to be restored: source, target, size, and the path of its figure if wanted."""

    source: Path
    target: Path
    height: int
    width: int
    figure: Path | None


@dataclass(frozen=True)
class Settings:
    """How images are restored, see `restore`; ``deep_bf16``: also those of 16 bits, which are finer than bfloat16."""

    tile: int | str | None
    local: bool
    bf16: bool
    deep_bf16: bool
    strength: float

    def __str__(self):  # in the digest of `Provenance`: that of the defaults is what it was in earlier versions
        return f"{self.tile} {self.bf16}" + " whole" * (not self.local) + f" {self.strength}" * (self.strength != 1)


@dataclass
class RunReport:
    """The outcome for each image, reported as it happens and at the end."""

    done: int = 0
    unchanged: int = 0  # of those, left as they are
    skipped: int = 0
    refused: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    printed: set[str] = field(default_factory=set)  # notes of which the first was printed at once

    def say(self, text: str, file=None):
        tqdm.write(text, file=file)  # above a progress bar, if there is one
        (file or sys.stdout).flush()

    def refuse(self, name: Path, reason: str):
        self.refused.append(str(name))
        name, reason = one_line(str(name)), one_line(reason)
        self.say(f"not restored: {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)

    def note(self, name: Path, text: str, now: str = ""):
        """Collect a note, which is printed once for all its images; ``now`` is printed at once for the first."""
        if now and text not in self.notes:
            self.say(f"note: {one_line(f'{name}: {now}')}")
            self.printed.add(text)
        self.notes.setdefault(text, []).append(str(name))

    def summary(self, out: Path) -> str:
        before = f", {self.unchanged} left as they are" if self.unchanged else ""
        before += f", {self.skipped} done before" if self.skipped else ""
        refused = f"; {len(self.refused)} not, see above: {shorten_list(self.refused)}" if self.refused else ""
        return f"{self.done - self.unchanged} restored{before}, in {out}{refused}"


class Networks:
    """The networks of a run, loaded when first needed: one for all images, or the best one for each.

    Args:
        weights: a name or a file; None: what `automatic.choose` finds best for each image.
        task: that the weights must be for; None: the best network of any task, or none for an image that looks clean.
        device: that they run on.
        local: see `restore_photographs`.
        say: prints a line.
    """

    def __init__(self, weights: str | Path | None, task: str | None, device: torch.device, local: bool, say: Callable):
        self.weights, self.task, self.device, self.local, self.say = weights, task, device, local, say
        self.choices = automatic.NETWORKS if task is None else automatic.DENOISERS
        chosen = sorted({name for name in self.choices.values() if name})
        self.files = [locate(weights)] if weights is not None else [*map(locate, chosen), automatic.WEIGHTS]
        self.may_copy = weights is None and None in self.choices.values()  # an image that is left as it is
        self.loaded: dict[str | Path, tuple[torch.nn.Module, tuple[float, float] | None]] = {}

    def load(self, name: str | Path) -> tuple[torch.nn.Module, tuple[float, float] | None]:
        """The network of this name or file, and the range of sigma of its training if it has one."""
        if name not in self.loaded:
            content = read_checkpoint(locate(name))
            model = load_model(locate(name), task=self.task, device=self.device, content=content)
            if not self.local:
                model.local = {}
            self.loaded[name] = model, trained_sigma_range(content)
            self.say(f"network: {name}")
            record = content.get("record") or {}
            for key, words in ("trained_for", "for"), ("not_for", "not for"):
                if key in record:
                    self.say(f"  {words}: {record[key]}")
        return self.loaded[name]

    def choose(self, pixels: np.ndarray) -> tuple[list[Candidate], Diagnosis | None]:
        """What may suit an image, (H, W, 3) or (H, W), the best first, and what is found to be wrong with it.

        A user's own network is for what it may be: nothing is looked for then.
        """
        if self.weights is not None and self.weights not in automatic.NETWORKS.values():
            return [Candidate("", self.weights, 1.0)], None
        diagnosis = diagnose(pixels)
        if self.weights is not None:
            return [Candidate("", self.weights, 1.0)], diagnosis
        candidates = choose(diagnosis, networks=self.choices)
        if self.task is not None:  # it is to be restored, only by which network is open
            candidates = [replace(candidate, strength=1.0) for candidate in candidates]
        return candidates, diagnosis


def restore_photographs(
    photos: list[Path],
    out: Path,
    weights: str | Path | None,
    task: str | None,
    *,
    overwrite: bool = False,
    stages: bool = False,
    explain: bool = False,
    tile: int | str | None = "auto",
    local: bool = True,
    device: str = "auto",
    bf16: bool | None = None,
    strength: float = 1.0,
    compare: bool = False,
) -> int:
    """Restore images and folders of images into a folder, with a report on stdout.

    Args:
        photos: files, and folders with their subfolders. They are never written to.
        out: created if needed. The images of a single folder go directly into it, those of several into subfolders of
            their names. An image restored before from the same file, weights and settings is skipped.
        weights, task: see `Networks`. Without both, an image that needs nothing is copied.
        overwrite: restore existing results again; files that are not from dgunet are never replaced.
        stages: also draw each image after each stage.
        explain: also draw what each of the candidates makes of an image, where the network is chosen for it.
        tile, strength: see `restore`.
        bf16: see `restore`; None where the hardware computes it, for images of 8 bits.
        compare: also write ``compare.html`` into ``out``, see `compare.write_comparison`.
        local: use the windows or tiles of the weights' record; False: statistics of whole images.
        device: see `hardware.pick_device`.

    Returns:
        How many could not be restored; the report has named them. All others are.

    Raises:
        UserError: not one could be restored, unsuitable weights, a folder that cannot be written to.
    """
    if stages or explain:
        import matplotlib  # noqa: F401, fail before the first image
    report = RunReport()
    target = pick_device(device)
    networks = Networks(weights, task, target, local, report.say)
    fast = autocast_dtype("auto", target) is not None if bf16 is None else bf16
    settings = Settings(tile, local, fast, bf16 is not None, strength)
    provenance = Provenance(networks.files, settings)
    figure = "candidates" if explain else "stages" if stages else None
    found = _jobs(_gather(photos, out, report), out, figure, report)
    jobs = _skip_done(found, provenance, overwrite, networks.may_copy, report)
    if report.skipped:
        report.say(f"{report.skipped} of {report.skipped + len(jobs)} done before; --overwrite does them again")
    if jobs:
        if weights is not None:
            networks.load(weights)
        if fast and bf16 is None:
            report.say("computing in bfloat16, which is faster here, but for images of 16 bits (--no-bf16: in float32)")
        out.mkdir(parents=True, exist_ok=True)
        try:
            total = sum(job.height * job.width for job in jobs)
            with progress_bar(total=total, unit="pixel", unit_scale=True, smoothing=0.1, leave=False) as bar:
                for job in jobs:
                    before = bar.n
                    with _attempt(job, report):
                        _restore_one(networks, job, report, settings, provenance, bar.update)
                    bar.update(before + job.height * job.width - bar.n)
        except BaseException:  # Ctrl-C, a full disk
            report.say(f"stopped: {report.summary(out)}; the same command goes on with the others")
            raise
    if compare and (pairs := [(job.source, job.target) for job in found if job.target.exists()]):
        report.say(f"before and after: {write_comparison(out / COMPARISON, pairs)}")
    for text, names in report.notes.items():
        if len(names) > 1 or text not in report.printed:
            report.say(f"note: {text}: {one_line(shorten_list(names))}")
    if report.refused and not report.done + report.skipped:
        raise UserError(f"nothing restored; {len(report.refused)} not, see above: {shorten_list(report.refused)}")
    report.say(one_line(report.summary(out)))
    return len(report.refused)


def _gather(photos: list[Path], out: Path, report: RunReport) -> Iterator[tuple[Path, Path]]:
    """(source, path relative to ``out``) of each image."""
    for given in photos:
        if not given.is_dir():
            if given.exists():
                yield given, Path(given.name)
            else:
                report.refuse(given, "there is no such file or folder; check the path")
            continue
        if out.exists() and os.path.samefile(given, out):
            raise UserError(f"--out is the folder of the photographs themselves, {given}; choose another")
        below = Path(given.resolve().name) if len(photos) > 1 else Path()
        found, refused = False, len(report.refused)
        for folder, folders, names in os.walk(
            given, onerror=lambda error: report.refuse(Path(error.filename), describe_error(error))
        ):
            here = Path(folder)
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and not (out.exists() and os.path.samefile(here / name, out))
            )
            for name in folders:
                if (here / name).is_symlink():
                    report.note(here / name, "a link to a folder, not followed; restore it by its own name")
            for name in sorted(names):
                if Path(name).suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
                    continue
                if name.lower().endswith(tuple(FIGURES.values())):
                    report.note(here / name, "a figure of dgunet, left out")
                    continue
                found = True
                yield here / name, below / (here / name).relative_to(given)
        if not found and len(report.refused) == refused:
            report.refuse(given, "there are no images in this folder")


def _jobs(found: Iterator[tuple[Path, Path]], out: Path, figure: str | None, report: RunReport) -> list[Job]:
    """A job for each image that can be read and written."""
    jobs: dict[Path, Job] = {}
    photographs = set()
    for source, relative in found:
        try:
            photographs.add(_identity(source))
            height, width, kind = probe(source)
        except (UserError, OSError) as error:
            report.refuse(source, describe_error(error) or str(error))
            continue
        target = out / restored_name(relative, kind)
        if target in jobs:
            other = jobs[target].source
            if not os.path.samefile(source, other):
                report.refuse(source, f"would be written to {target}, as {other} is; restore it to another --out")
            continue
        drawn = target.with_name(f"{target.name}{FIGURES[figure]}") if figure else None
        jobs[target] = Job(source, target, height, width, drawn)
    left = []
    for target, job in jobs.items():
        written = [target] if job.figure is None else [target, job.figure]
        photograph = next((path for path in written if os.path.exists(path) and _identity(path) in photographs), None)
        if photograph is not None:
            report.refuse(job.source, f"{photograph} is a photograph to be restored itself; choose another --out")
        elif job.figure in jobs:
            other = jobs[job.figure].source
            report.refuse(job.source, f"its figure would be drawn to {job.figure}, as {other} is; choose another --out")
        else:
            left.append(job)
    return left


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


class Provenance:
    """Makes the comment of a restored image, with a digest of its source file, weights and settings."""

    def __init__(self, weights: list[Path], settings: Settings):
        content = b"".join(path.read_bytes() for path in weights)
        self.settings = hashlib.sha256(content + str(settings).encode()).digest()

    def digest(self, source: Path) -> str:
        with open_file(source) as file:
            return hashlib.sha256(self.settings + file.read()).hexdigest()[:20]

    def comment(self, source: Path, done: str) -> str:
        return f"{OURS} {__version__}, {done}; {self.digest(source)}"


def _skip_done(
    jobs: list[Job], provenance: Provenance, overwrite: bool, may_copy: bool, report: RunReport
) -> list[Job]:
    left = []
    for job in jobs:
        there = os.path.exists(job.target)  # unlike Path's, of any name
        stays = there and not overwrite
        drawn = job.figure is not None and os.path.exists(job.figure)
        copied = there and may_copy and filecmp.cmp(job.source, job.target, shallow=False)
        if there and not copied and not (comment := read_comment(job.target) or "").startswith(OURS):
            report.refuse(job.source, f"{job.target} is there already, and not from dgunet; choose another --out")
        elif stays and not copied and comment.split()[-1] != provenance.digest(job.source):
            other = "is there already, of another image or with other weights or settings"
            report.refuse(job.source, f"{job.target} {other}; --overwrite replaces it, or choose another --out")
        elif stays and (drawn or job.figure is None):
            report.skipped += 1
        elif drawn and not (read_comment(job.figure) or "").startswith(OURS):
            report.refuse(job.source, f"{job.figure} is there already, and not from dgunet; choose another --out")
        else:
            left.append(job)
    return left


def _work(height: int, width: int, tile: int | None) -> int:
    """Pixels to process, those in the overlap of tiles counted repeatedly."""
    areas, _ = tile_grid(height, width, tile)
    return sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in areas)


@contextlib.contextmanager
def _attempt(job: Job, report: RunReport):
    """Around the work on an image: if it fails, the others go on."""
    try:
        yield
        report.done += 1
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if getattr(error, "errno", None) in FATAL_ERRNOS or (reason := describe_error(error)) is None:
            raise
        if is_out_of_memory(error):
            torch.cuda.empty_cache()
            reason = "out of memory; restore it in tiles, --tile 512"
        report.refuse(job.source, reason)


def _restore_one(
    networks: Networks, job: Job, report: RunReport, settings: Settings, provenance: Provenance, count: Callable
):
    image = read_photo(job.source)
    candidates, diagnosis = networks.choose(image.pixels)
    best = candidates[0]
    if networks.weights is None:
        report.say(one_line(f"{job.source}: {diagnosis}; {_describe_choice(best, diagnosis)}"))
    elif diagnosis is not None and (text := _objection(networks.weights, diagnosis)):
        report.note(job.source, text)
    if job.figure is not None and networks.weights is None:
        _explain(networks, candidates, diagnosis, job, image, settings)
    if best.network is None and job.target.name == job.source.name:
        report.unchanged += 1
        with atomic_write(job.target) as temporary:
            shutil.copyfile(job.source, temporary)
        return
    notes = image.notes + ([] if job.target.name == job.source.name else ["written as PNG"])
    if best.network is None:
        report.unchanged += 1
        done = "unchanged"
    else:
        model, noise = networks.load(best.network)
        y = _as_input(image, model)
        level = 255 * estimate_sigma(y)
        if noise is not None and (text := noise_warning(level, noise)):
            report.note(job.source, text, now=f"about sigma {level:.0f}, {text}")
        tile = _tile(model, y, job, settings, report)
        work = model.stages * _work(*y.shape[:2], tile)
        with _counting(model, lambda pixels: count(y.shape[0] * y.shape[1] * pixels / work)):
            x = _apply(model, y, image, settings, tile, best.strength)
        if job.figure is not None and networks.weights is not None:
            _draw(model, job, y, x)
        if image.pixels.ndim == 2:
            x = x.mean(axis=2)
        scale = np.iinfo(image.pixels.dtype).max
        image = replace(image, pixels=(x * np.float32(scale)).round().astype(image.pixels.dtype))
        path = locate(best.network)
        done = f"{path.parent.name}/{path.name}"
    write_photo(job.target, image, provenance.comment(job.source, done))
    for text in notes:
        report.note(job.source, text)


def _describe_choice(best: Candidate, diagnosis: Diagnosis) -> str:
    if best.network is not None:
        return best.network + (f" at strength {best.strength:g}" if best.strength < 1 else "")
    return "left as it is" + (", for it is not sure enough" if diagnosis.degradation != "clean" else "")


def _objection(weights: str, diagnosis: Diagnosis) -> str | None:
    """A sentence if an image surely is not what a shipped network is for."""
    other = automatic.NETWORKS[diagnosis.degradation]
    if other == weights or diagnosis.confidence < automatic.SURE:
        return None
    instead = f"{other} is for it" if other else "`dgunet restore` would leave it as it is"
    return f"recognised as {diagnosis.degradation}; {instead}"


def _as_input(image: Photo, model: torch.nn.Module) -> np.ndarray:
    """(H, W, C) float32 in [0, 1], a grey image with as many equal channels as the network has."""
    y = image.pixels.astype(np.float32) / np.float32(np.iinfo(image.pixels.dtype).max)
    y = y if y.ndim == 3 else y[..., None]
    return np.repeat(y, model.channels, axis=2) if y.shape[2] == 1 else y


def _tile(model: torch.nn.Module, y: np.ndarray, job: Job, settings: Settings, report: RunReport) -> int | None:
    tile = model.local.get("tile", "auto") if settings.tile == "auto" else settings.tile
    if tile == "auto":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reported below
            tile = automatic_tile(model, (1, model.channels, *y.shape[:2]), next(model.parameters()).device)
        if tile is not None:
            text = "larger than memory allows at once, restored in tiles (--tile whole forces it)"
            report.note(job.source, text, now=f"{text}, of {tile} pixels")
    return tile


def _apply(model, y: np.ndarray, image: Photo, settings: Settings, tile: int | None, strength: float) -> np.ndarray:
    bf16 = settings.bf16 and (settings.deep_bf16 or image.pixels.dtype == np.uint8)
    return restore(model, y, tile=tile, bf16=bf16, strength=settings.strength * strength)


def _counting(model, count: Callable[[int], None]) -> contextlib.AbstractContextManager[None]:
    """Inside, ``count`` is called after each stage, with the number of pixels that went through it."""
    return after_each_stage(model, lambda stage, inputs, result: count(inputs[0].shape[-2] * inputs[0].shape[-1]))


def _draw(model, job: Job, y: np.ndarray, x: np.ndarray):
    """Draw the stages of the image's centre, computed with some context around it."""
    around = centre_crop(y, FIGURE_FROM)
    estimates = restore_stages(model, around)[1:]
    _draw_crops(job, job.source.name, to_uint8(x), [("input", to_uint8(around)), *label_stages(estimates)])


def _explain(
    networks: Networks, candidates: list[Candidate], diagnosis: Diagnosis, job: Job, image: Photo, settings: Settings
):
    """Draw the image's centre as it is, and what each candidate makes of it, the best first."""
    shown = to_uint8(image.pixels / np.float32(np.iinfo(image.pixels.dtype).max))
    chosen = "\n(chosen)"
    crops = [("as it is" + chosen * (candidates[0].network is None), centre_crop(shown, FIGURE_FROM))]
    for candidate in candidates:
        if candidate.network is not None:
            model, _ = networks.load(candidate.network)
            y = centre_crop(_as_input(image, model), FIGURE_FROM)
            x = to_uint8(_apply(model, y, image, settings, model.local.get("tile"), candidate.strength))
            label = f"{candidate.network}\nstrength {settings.strength * candidate.strength:g}"
            crops.append((label + chosen * (candidate is candidates[0]), x))
    _draw_crops(job, f"{job.source.name}: {diagnosis}", shown, crops)


def _draw_crops(job: Job, title: str, whole: np.ndarray, crops: list[tuple[str, np.ndarray]]):
    """The figure: the image (H, W, C) uint8 with a frame, and what is in the frame, of crops with their labels."""
    top, left, height, width = middle(whole.shape, FIGURE_SIDE)
    step = max(1, max(whole.shape) // 1000)
    frame = tuple(value // step for value in (top, left, height, width))
    tiles = [(label, centre_crop(crop, FIGURE_SIDE).squeeze(), math.inf) for label, crop in crops]
    comment = f"{OURS} {__version__}"
    draw_stages(whole[::step, ::step].squeeze(), frame, tiles, job.figure, title, comment)
