"""Scores of a network on a data set: `evaluate`, what it goes through, and what it keeps.

A test that is interrupted and started again goes on where it was: the scores of a data set are written as they arrive,
each with a fingerprint of its picture's files, next to a note of the weights and settings that they belong to.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from dgunet.data import IMAGE_SUFFIXES, Pair, find_pairs, images_by_name, read_image, write_image
from dgunet.degradations import KINDS
from dgunet.distributed import sole_writer
from dgunet.errors import UserError, optional
from dgunet.files import replacing
from dgunet.inference import holding, restore
from dgunet.metrics import AlignmentError, Metric, evaluate_pair, find_protocol
from dgunet.progress import progress_bar
from dgunet.transforms import to_uint8, unit_range

natsorted = optional("natsort").natsorted

TEXT = dict(newline="", encoding="utf-8", errors="surrogateescape")  # of a table: names need not be UTF-8

# A picture; or several, as an array (N, H, W, C) or, of different sizes, a list.
Pictures = np.ndarray | list[np.ndarray]


@dataclass(frozen=True)
class Sample:
    """What is restored at a time: a picture, or several that belong together."""

    name: str
    files: tuple[Path, ...]  # that it is read from; where they have changed, it is scored anew
    read: Callable[[], tuple[Pictures, Pictures | None]]  # degraded (8-bit, or floats in [0, 1]) and 8-bit target
    parts: tuple[str, ...] | None = None  # the names of its pictures, where it has several
    title: str = ""  # in messages; else the first of the files

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.parts is None else self.parts


@dataclass
class PictureSet:
    """A data set: what a test goes through.

    One whose benchmark wants something of its own to be written overrides `keep`, `kept` and `finish`.
    """

    samples: list[Sample]
    targets: bool = True  # whether its samples have some; what has none is restored, not scored
    save: bool = False  # whether the restored pictures are what is wanted
    read_image: Callable[[Path], np.ndarray] = read_image  # how restored pictures are read that lie elsewhere

    def keep(self, folder: Path, sample: Sample, restored: Pictures):
        """Write into the folder of the scores what is wanted of a sample."""

    def kept(self, folder: Path, sample: Sample) -> bool:
        """Whether that is there."""
        return True

    def finish(self, folder: Path, complete: bool) -> str | None:
        """Write what is wanted of the whole; one line that tells the user of it."""


class Row(NamedTuple):
    """The scores of a picture; None where it has no target."""

    name: str
    psnr: float | None
    ssim: float | None
    input_psnr: float | None
    input_ssim: float | None
    note: str
    files: str  # their fingerprint
    metrics: Mapping[str, float] = MappingProxyType({})  # further scores by name


@dataclass
class Result:
    """Mean scores of one data set, nan where nothing was scored."""

    dataset: str
    protocol: str
    images: int  # that were scored
    psnr: float  # dB
    ssim: float
    input_psnr: float  # of the degraded pictures, by the same protocol
    input_ssim: float
    paper: tuple[float, float] | None = None  # PSNR, SSIM
    metrics: dict[str, float] = field(default_factory=dict)  # means of further scores by name
    seconds_per_image: float = math.nan  # restoring and scoring, of the pictures of this call
    settings: dict = field(default_factory=dict)
    missing: int = 0  # pictures of the data set that could not be tested
    rows: list[Row] = field(default_factory=list, repr=False)  # each picture's
    failures: list[str] = field(default_factory=list, repr=False)  # what could not be tested, and why

    @property
    def label(self) -> str:
        """The data set's name in tables; the mean of a part of it is not taken for the whole's."""
        part = f" (incomplete: {self.images} of {self.images + self.missing})" if self.missing else ""
        return self.dataset + part


def restore_pictures(model: torch.nn.Module, degraded: Pictures, **options) -> tuple[Pictures, Pictures]:
    """Restore a sample's pictures by `dgunet.restore`, which takes the options: not rounded, and the degraded ones."""
    if isinstance(degraded, list):
        return restore(model, [unit_range(picture) for picture in degraded], **options), degraded
    batches = [degraded] if degraded.ndim < 4 else np.split(degraded, range(8, len(degraded), 8))
    return np.concatenate([restore(model, unit_range(batch), **options) for batch in batches]), degraded


def evaluate(
    model: torch.nn.Module | Callable,
    data: str | Path | PictureSet,
    protocol: str | None,
    folder: str | Path | None = None,
    *,
    name: str = "",
    method: Callable = restore_pictures,
    settings: dict | None = None,
    metrics: Mapping[str, Metric] = MappingProxyType({}),
    save_images: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    **options,
) -> Result:
    """Restore a data set and score it.

        result = evaluate(load_model("model_best.pth"), "Datasets/GoPro/test", "rgb_matlab", self_ensemble=True)
        print(result.psnr, result.ssim, [(row.name, row.psnr) for row in result.rows])

    Args:
        model: a network; or a function of a `Sample` and its degraded picture(s), as they were read, that gives the
            restored one(s), uint8 or floats in [0, 1], and those to be scored as the input. Of another method:
            ``evaluate(lambda sample, y: (my_method(y), y), ...)``.
        data: a folder with pairs in ``input/`` and ``target/``; a folder of pictures or a picture, to be restored only;
            or any `PictureSet`.
        protocol: one of `metrics.PROTOCOLS`; None where nothing has a target.
        folder: where the scores and pictures are written. Called again with the same model, settings and files, it
            goes on with what is missing. (What a function, or a degradation of the user's own, computes is not known:
            its scores are always begun anew. A method is known by its name.) None to write nothing.
        name: of the data set, in the result and in what is told; by default the folder's.
        method: how the network restores: a function of it, a sample's degraded picture(s) and the options, that gives
            what a function given as ``model`` does.
        settings: what else the scores depend on; noted with them.
        metrics: further scores of the restored pictures by name, see `metrics.find_metrics`. Pictures that were scored
            without one are scored anew.
        save_images: whether restored pictures are written; None where they are scored as they lie on the disk, or are
            all that is wanted.
        say: given a line of text now and then, e.g. ``print``.
        **options: of the method; by default those of `restore`: ``tile``, ``self_ensemble``, ``bf16``, ...

    Returns:
        The means, each picture's scores, and what could not be tested: one picture's failure costs no other.

    Raises:
        UserError: no such data, an unsuitable network, or another process that writes to the folder.
        ValueError: unknown protocol.
    """
    started = time.monotonic()
    if not isinstance(data, PictureSet):
        name, data = name or Path(data).name, pairs_or_pictures(Path(data))
    folder = Path(folder) if folder is not None else None
    settings = options | (settings or {})
    degradation = getattr(model, "degradation", None)
    known = degradation is None or type(degradation) in KINDS.values()
    known &= getattr(method, "__name__", "<lambda>") != "<lambda>"  # partials and other objects have no name either
    if isinstance(model, torch.nn.Module) and known:
        note = settings | {"weights": _digest(model)}
        if method is not restore_pictures:
            note["method"] = f"{method.__module__}.{method.__qualname__}"
    else:
        note = {"scored": time.time()}
    if metrics and not data.targets:
        raise UserError(f"{name}: --metrics are of pictures with targets, in input/ and target/; leave it out")
    stamps = {name: stamp for sample in data.samples for stamp in [_stamp(sample.files)] for name in sample.names}
    rounded = data.targets and find_protocol(protocol).rounded
    keep = folder is not None and save_images is not False
    save = keep and (save_images or data.save or rounded)

    def written(sample: Sample) -> bool:
        pictures = not save or all((folder / f"{name}.png").exists() for name in sample.names)
        return pictures and (not keep or data.kept(folder, sample))

    with contextlib.closing(ScoreSheet(folder, protocol or "none", note, stamps, metrics)) as sheet, _full_precision():
        if sheet.continued:
            say(f"{name}: {sheet.continued} of {len(stamps)} pictures are done already")
        done = {sample.name for sample in data.samples if all(map(sheet.done, sample.names)) and written(sample)}
        if sheet.found and isinstance(model, torch.nn.Module):
            _remove_former(folder, [sample for sample in data.samples if sample.name not in done])
        for sample in progress_bar(data.samples, desc=name, unit="picture"):
            if sample.name in done:
                continue
            with _attempt(sample.title or str(sample.files[0]), sheet.failures):
                degraded, target = sample.read()
                if isinstance(model, torch.nn.Module):
                    restored, before = method(model, degraded, **options)
                else:
                    restored, before = model(sample, degraded)
                if keep:
                    data.keep(folder, sample, restored)
                before = None if before is target else before  # what is only degraded on the way by a network
                pictures = (_each(sample, given) for given in (restored, target, before))
                for part, x, x_true, y in zip(sample.names, *pictures, strict=True):
                    if rounded:
                        x, y = to_uint8(x), None if y is None else to_uint8(y)
                    if save:
                        write_image(folder / f"{part}.png", to_uint8(x))
                    if x_true is None:
                        sheet.tick(part)
                    else:
                        sheet.add(part, x, x_true, y)
        result = sheet.finish(name)
    line = data.finish(folder, complete=not result.missing) if keep else None
    if line:
        say(line)
    result.settings = settings
    result.seconds_per_image = (time.monotonic() - started) / len(sheet.jobs) if sheet.jobs else math.nan
    return result


def _remove_former(folder: Path, samples: list[Sample]):
    """Remove the pictures that another network, or other settings, made of samples: they would pass for these'."""
    read = {file.absolute() for sample in samples for file in sample.files}
    for path in (folder.absolute() / f"{name}.png" for sample in samples for name in sample.names):
        if path not in read:
            path.unlink(missing_ok=True)


def paired(source: Path) -> PictureSet:
    """The pairs in ``input/`` and ``target/``."""

    def read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        degraded, target = read_image(pair.input), read_image(pair.target)
        if target.shape != degraded.shape:
            raise UserError(f"{pair.input} and {pair.target} differ in size: {degraded.shape} and {target.shape}")
        return degraded, target

    pairs = find_pairs(source, check_sizes=False)
    return PictureSet([Sample(pair.name, (pair.input, pair.target), partial(read, pair)) for pair in pairs])


def pairs_or_pictures(source: Path) -> PictureSet:
    """Pairs, or where there is no ``input/``, pictures without targets."""
    if (source / "input").is_dir():
        return paired(source)
    return picture_samples(source, lambda path: (read_image(path), None), targets=False, save=True)


def picture_samples(source: Path, read: Callable[[Path], tuple], **options) -> PictureSet:
    """The pictures of a folder, or one, each a sample: ``read`` gives what is degraded and the target of a path."""
    found = pictures(source).items()
    return PictureSet([Sample(name, (path,), partial(read, path)) for name, path in found], **options)


def pictures(source: Path) -> dict[str, Path]:
    """The pictures of a folder by name, or the one picture that ``source`` is.

    Raises:
        UserError: neither of the two, no picture in the folder, or two of one name.
    """
    if not source.is_file():
        return images_by_name(source)
    if source.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{source} is neither a folder nor a picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return {source.stem: source}


class ScoreSheet:
    """The scores of one data set, computed on other threads and kept in ``folder/scores.csv``.

    Args:
        folder: where the sheet and the note of its settings lie; None to keep them in memory alone.
        protocol: see `metrics.evaluate_pair`.
        settings: what all of the scores depend on. A sheet that was begun with the same settings is continued, and
            `done` knows its pictures; another one is begun anew.
        files: the pictures that the data set consists of, by name, each with a fingerprint of its files. A picture
            whose fingerprint has changed is not `done`.
        metrics: further scores by name, functions of the restored picture and its target. A picture that lacks one is
            not `done`.
        threads: how many; None for one per core.

    Raises:
        UserError: another process has a sheet open in this folder. It is free again after `finish`, or once that
            process has ended, however it did.
    """

    def __init__(
        self, folder: Path | None, protocol: str, settings: dict, files: dict[str, str],
        metrics: Mapping[str, Metric] = MappingProxyType({}), threads: int | None = None,
    ):  # fmt: skip
        self.metrics, self.metrics_lock = metrics, threading.Lock()
        self.columns = list(metrics)  # of further scores, also those from before
        self.path, self.protocol, self.files = folder and folder / "scores.csv", protocol, files
        self.rows: dict[str, Row] = {}
        self.folder_lock = contextlib.ExitStack()
        self.found = False  # whether there was a sheet, of whatever settings
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            advice = "wait for its end, or give --results another folder"
            self.folder_lock.enter_context(sole_writer(folder.absolute(), "test", advice))
            settings = settings | {"protocol": protocol}
            settings = json.dumps(settings, sort_keys=True, default=lambda number: number.item())  # NumPy's
            note = folder / "settings.json"
            self.found = note.exists()
            if self.found and note.read_bytes() == settings.encode():
                self._read()
            self._write()  # before the note: killed in between, the former scores must not pass for these settings'
            note.write_text(settings)
        self.continued = sum(map(self.done, self.rows))
        # The filters behind the metrics work outside of Python's lock, so threads use all cores.
        threads = threads or os.cpu_count()
        self.pool = ThreadPoolExecutor(threads)
        self.slots = threading.BoundedSemaphore(2 * threads)  # pictures that wait take memory
        self.lock = threading.Lock()
        self.jobs = []
        self.failures: list[str] = []

    def done(self, name: str) -> bool:
        return name in self.rows and self.metrics.keys() <= self.rows[name].metrics.keys()

    def add(self, name: str, restored: np.ndarray, target: np.ndarray, degraded: np.ndarray | None):
        """Score a picture against its target in the background; ``degraded``, if any, for comparison."""
        self.slots.acquire()
        job = self.pool.submit(self._score, name, restored, target, degraded)
        job.add_done_callback(lambda _: self.slots.release())
        self.jobs.append((name, job))

    def tick(self, name: str):
        """Note a picture that has no target as done."""
        self._append(Row(name, None, None, None, None, "", self.files[name]))

    def finish(self, dataset: str) -> Result:
        """Wait for all scores; what they come to."""
        for name, job in self.jobs:
            try:
                job.result()
            except ValueError as error:  # a picture that the protocol cannot score
                self.failures.append(f"{name}: {error}")
        self.rows = {name: self.rows[name] for name in natsorted(self.rows) if self.done(name)}
        self._write()
        self.close()
        rows = list(self.rows.values())
        scored = [row[1:5] for row in rows if row.psnr is not None]
        means = [statistics.fmean(column) for column in zip(*scored, strict=True)] or [math.nan] * 4
        return Result(
            dataset, self.protocol, len(scored), *means, missing=len(self.files) - len(rows), rows=rows,
            metrics={
                name: statistics.fmean(row.metrics[name] for row in rows) if rows else math.nan for name in self.metrics
            },
            failures=self.failures,
        )  # fmt: skip

    def close(self):
        """Score no more, and leave the folder to others."""
        self.pool.shutdown(cancel_futures=True)
        self.folder_lock.close()

    def _score(self, name: str, restored: np.ndarray, target: np.ndarray, degraded: np.ndarray | None):
        note, align = "", True
        try:
            scores = evaluate_pair(restored, target, self.protocol)
        except AlignmentError:
            note, align = "could not be aligned, scored as it is", False
            scores = evaluate_pair(restored, target, self.protocol, align=False)
        try:
            before = (math.nan, math.nan)
            if degraded is not None:
                before = evaluate_pair(degraded, target, self.protocol, align=align)
        except AlignmentError:
            before = evaluate_pair(degraded, target, self.protocol, align=False)
        with self.metrics_lock:  # networks, which use all cores, or the GPU, by themselves
            further = {name: metric(restored, target) for name, metric in self.metrics.items()}
        self._append(Row(name, *scores, *before, note, self.files[name], further))

    def _append(self, row: Row):
        with self.lock:
            self.rows[row.name] = row
            if self.path is not None:
                with open(self.path, "a", **TEXT) as file:
                    csv.writer(file).writerow(self._cells(row))

    def _cells(self, row: Row) -> list:
        return [*row[:-1], *(row.metrics.get(name) for name in self.columns)]

    def _read(self):
        with contextlib.suppress(FileNotFoundError, csv.Error), open(self.path, **TEXT) as file:
            reader = csv.DictReader(file)
            before = [name for name in reader.fieldnames or () if name not in (*Row._fields, *self.columns)]
            self.columns += before
            for row in reader:
                name = row.get("name")
                if name not in self.files or row.get("files") != self.files[name]:
                    continue  # of another picture, or the line under way when the test was killed
                with contextlib.suppress(TypeError, ValueError):  # a damaged line
                    scores = [float(row[key]) if row[key] else None for key in Row._fields[1:5]]
                    further = {key: float(row[key]) for key in self.columns if row.get(key)}
                    self.rows[name] = Row(name, *scores, row["note"], row["files"], further)

    def _write(self):
        if self.path is None:
            return
        with replacing(self.path) as temporary, open(temporary, "w", **TEXT) as file:
            writer = csv.writer(file)
            writer.writerow([*Row._fields[:-1], *self.columns])
            writer.writerows(map(self._cells, self.rows.values()))


def _each(sample: Sample, given: Pictures | None) -> Pictures | list:
    """A sample's picture by picture."""
    if given is None:
        return [None] * len(sample.names)
    return given if sample.parts is not None else [given]


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Inside, GPUs convolve float32 as such, not as TF32: digits before speed; for speed there is bfloat16."""
    with holding([torch.backends.cudnn], "allow_tf32", False):
        yield


@contextlib.contextmanager
def _attempt(title: str, failures: list[str]) -> Iterator[None]:
    """Around the work on a sample: where that cannot be done, it is noted as a failure, and the test goes on."""
    try:
        yield
    except UserError as error:
        failures.append(str(error) if title in str(error) else f"{title}: {error}")
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        failures.append(f"{title}: out of GPU memory; restore it in tiles, --tile 512")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):  # of every picture
            reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
            raise UserError(f"--compile does not work here ({reason}); test without it") from error
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        failures.append(f"{title}: out of memory; restore it in tiles, --tile 512")


def _digest(model: torch.nn.Module) -> str:
    """What a network computes, as a number: of its arguments and weights."""
    digest = hashlib.sha256(json.dumps(getattr(model, "arguments", None), sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stamp(paths: tuple[Path, ...]) -> str:
    """A fingerprint of files as they are now."""
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.exists()]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
