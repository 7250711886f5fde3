"""Scores of a network on a data set: `evaluate`, what it goes through, and what it keeps.

A test that is interrupted and started again goes on where it was: the scores of a data set are written as they arrive,
each with a fingerprint of its image's files, next to a note of the weights and settings that they belong to.
"""

import contextlib
import csv
import hashlib
import inspect
import json
import math
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from natsort import natsorted

from dgunet.data import Pair, find_pairs, images_by_name, read_image, write_image
from dgunet.degradations import KINDS
from dgunet.distributed import lock_dir
from dgunet.errors import UserError
from dgunet.files import IMAGE_SUFFIXES, atomic_write, nfc
from dgunet.inference import automatic_tile, check_tiles, restore, temporarily_set
from dgunet.local import check_windows
from dgunet.metrics import AlignmentError, Metric, evaluate_pair, find_protocol, mean_psnr
from dgunet.progress import progress_bar
from dgunet.transforms import to_uint8, unit_range

TEXT = dict(newline="", encoding="utf-8", errors="surrogateescape")  # of a table: names need not be UTF-8

# An image; or several, as an array (N, H, W, C) or, of different sizes, a list.
Images = np.ndarray | list[np.ndarray]


@dataclass(frozen=True)
class Sample:
    """What is restored at a time: an image, or several that belong together."""

    name: str
    files: tuple[Path, ...]  # that it is read from; where they have changed, it is scored anew
    read: Callable[[], tuple[Images, Images | None]]  # degraded (8-bit, or floats in [0, 1]) and 8-bit target
    parts: tuple[str, ...] | None = None  # the names of its images, where it has several
    title: str = ""  # in messages; else the first of the files

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.parts is None else self.parts


@dataclass
class ImageSet:
    """A data set: what a test goes through.

    One whose benchmark wants something of its own to be written overrides `keep`, `kept` and `finish`.
    """

    samples: list[Sample]
    targets: bool = True  # whether its samples have some; what has none is restored, not scored
    save: bool = False  # whether the restored images are what is wanted
    read_image: Callable[[Path], np.ndarray] = read_image  # how restored images are read that lie elsewhere

    def keep(self, folder: Path, sample: Sample, restored: Images):
        """Write into the folder of the scores what is wanted of a sample."""

    def kept(self, folder: Path, sample: Sample) -> bool:
        """Whether that is there."""
        return True

    def finish(self, folder: Path, complete: bool) -> str | None:
        """Write what is wanted of the whole; one line that tells the user of it."""


class Row(NamedTuple):
    """The scores of an image; None where it has no target."""

    name: str
    psnr: float | None
    ssim: float | None
    input_psnr: float | None
    input_ssim: float | None
    note: str
    files: str  # their fingerprint
    tile: str = ""  # side of the tiles that it was restored in, "whole", or nothing where the method knows none
    metrics: Mapping[str, float] = MappingProxyType({})  # further scores by name


@dataclass
class Result:
    """Mean scores of one data set, nan where nothing was scored.

    The mean PSNR is of the images that do not equal their targets, see `metrics.mean_psnr`; all others are of all.
    """

    dataset: str
    protocol: str
    images: int  # that were scored
    psnr: float  # dB
    ssim: float
    input_psnr: float  # of the degraded images, by the same protocol
    input_ssim: float
    paper: tuple[float, float] | None = None  # PSNR, SSIM
    metrics: dict[str, float] = field(default_factory=dict)  # means of further scores by name
    seconds_per_image: float = math.nan  # restoring alone, of the images of this call
    settings: dict = field(default_factory=dict)
    missing: int = 0  # images of the data set that could not be tested
    identical: int = 0  # images that equal their targets when restored, and are left out of the mean PSNR
    identical_inputs: int = 0  # the same of the degraded images
    version: int = 1  # of the protocol
    rows: list[Row] = field(default_factory=list, repr=False)  # each image's
    failures: list[str] = field(default_factory=list, repr=False)  # what could not be tested, and why

    @property
    def label(self) -> str:
        """The data set's name in tables; the mean of a part of it is not taken for the whole's."""
        part = f" (incomplete: {self.images} of {self.images + self.missing})" if self.missing else ""
        return self.dataset + part


def restore_images(
    model: torch.nn.Module, degraded: Images, tile: int | str | None = None, **options
) -> tuple[Images, Images]:
    """Restore a sample's images by `dgunet.restore`, which takes the options: not rounded, and the degraded ones."""
    options["tile"] = tile
    if isinstance(degraded, list):
        return restore(model, [unit_range(image) for image in degraded], **options), degraded
    batches = [degraded] if degraded.ndim < 4 else np.split(degraded, range(8, len(degraded), 8))
    return np.concatenate([restore(model, unit_range(batch), **options) for batch in batches]), degraded


def evaluate(
    model: torch.nn.Module | Callable,
    data: str | Path | ImageSet,
    protocol: str | None,
    folder: str | Path | None = None,
    *,
    name: str = "",
    method: Callable = restore_images,
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
        model: a network; or a function of a `Sample` and its degraded image(s), as they were read, that gives the
            restored one(s), uint8 or floats in [0, 1], and those to be scored as the input. Of another method:
            ``evaluate(lambda sample, y: (my_method(y), y), ...)``.
        data: a folder with pairs in ``input/`` and ``target/``; a folder of images or an image, to be restored only;
            or any `ImageSet`.
        protocol: one of `metrics.PROTOCOLS`; None where nothing has a target.
        folder: where the scores and images are written. Called again with the same model, settings and files, it
            goes on with what is missing. (What a function, or a degradation of the user's own, computes is not known:
            its scores are always begun anew. A method is known by its name.) None to write nothing.
        name: of the data set, in the result and in what is told; by default the folder's.
        method: how the network restores: a function of it, a sample's degraded image(s) and the options, that gives
            what a function given as ``model`` does.
        settings: what else the scores depend on; noted with them. So are the protocol's version and the tiles.
        metrics: further scores of the restored images by name, see `metrics.find_metrics`. Images that were scored
            without one are scored anew.
        save_images: whether restored images are written; None where they are scored as they lie on the disk, or are
            all that is wanted.
        say: given a line of text now and then, e.g. ``print``.
        **options: of the method; by default those of `restore`: ``tile``, ``self_ensemble``, ``bf16``, ... But where no
            ``tile`` is given, neither here nor in ``local``, images are scored as the network restores them whole,
            whatever the memory (what would not fit on a CPU is refused; None tries it), and only what has no target is
            restored with "auto". Of "auto" the tiles that were used are in the rows and settings of the result.
    Returns:
        The means, each image's scores, and what could not be tested: one image's failure costs no other.

    Raises:
        UserError: no such data, an unsuitable network, or another process that writes to the folder.
        ValueError: unknown protocol.
    """
    seconds, count = 0.0, 0  # restoring, and images restored
    if not isinstance(data, ImageSet):
        name, data = name or Path(data).name, pairs_or_images(Path(data))
    folder = Path(folder) if folder is not None else None
    network = isinstance(model, torch.nn.Module)
    tiles = None
    if network and inspect.unwrap(method) is restore_images:
        if options.get("local") is None:  # noted with the scores: a record may change
            options["local"] = getattr(model, "local", None) or False
        tiles = _Tiles(model, options, data)
    settings = options | ({"tile": tiles.asked} if tiles else {}) | (settings or {})
    degradation = getattr(model, "degradation", None)
    known = degradation is None or type(degradation) in KINDS.values()
    known &= getattr(method, "__name__", "<lambda>") != "<lambda>"  # partials and other objects have no name either
    if network and known:
        note = settings | {"weights": digest_of(model)}
        if tiles is None:
            note["method"] = f"{method.__module__}.{method.__qualname__}"
    else:
        note = {"scored": time.time()}
    # of what test.py's options for other methods are, nothing is known here
    advice = "use smaller images" if tiles is None else "restore it in tiles, --tile 512, which changes its score"
    note["protocol_version"] = version = find_protocol(protocol).version if protocol else 1
    if metrics and not data.targets:
        raise UserError(f"{name}: --metrics are of images with targets, in input/ and target/; leave it out")
    stamps = {
        name: stamp for sample in data.samples for stamp in [_file_fingerprint(sample.files)] for name in sample.names
    }
    rounded = data.targets and find_protocol(protocol).rounded
    keep = folder is not None and save_images is not False
    save = keep and (save_images or data.save or rounded)

    def written(sample: Sample) -> bool:
        images = not save or all((folder / f"{name}.png").exists() for name in sample.names)
        return images and (not keep or data.kept(folder, sample))

    with contextlib.closing(ScoreSheet(folder, protocol or "none", note, stamps, metrics)) as sheet, _disable_tf32():
        if sheet.continued:
            say(f"{name}: {sheet.continued} of {len(stamps)} images are done already")
        done = {sample.name for sample in data.samples if all(map(sheet.done, sample.names)) and written(sample)}
        if sheet.found and network:
            _remove_old_results(folder, [sample for sample in data.samples if sample.name not in done])
        for sample in progress_bar(data.samples, desc=name, unit="image"):
            if sample.name in done:
                continue
            with _attempt(sample.title or str(sample.files[0]), sheet.failures, advice):
                degraded, target = sample.read()
                used = "" if tiles is None else tiles.choose(options, degraded)
                begun = time.monotonic()
                if network:
                    restored, before = method(model, degraded, **options)
                else:
                    restored, before = model(sample, degraded)
                seconds += time.monotonic() - begun
                count += len(sample.names)
                if keep:
                    data.keep(folder, sample, restored)
                before = None if before is target else before  # what is only degraded on the way by a network
                images = (_per_image(sample, given) for given in (restored, target, before))
                for part, x, x_true, y in zip(sample.names, *images, strict=True):
                    if rounded:
                        x, y = to_uint8(x), None if y is None else to_uint8(y)
                    if save:
                        write_image(folder / f"{part}.png", to_uint8(x))
                    if x_true is None:
                        sheet.mark_done(part, used)
                    else:
                        sheet.add(part, x, x_true, y, used)
        result = sheet.finish(name)
    line = data.finish(folder, complete=not result.missing) if keep else None
    if line:
        say(line)
    if settings.get("tile") == "auto":
        settings["tile"] = f"auto({'+'.join(natsorted({row.tile for row in result.rows}))})"
    result.settings, result.version = settings, version
    result.seconds_per_image = seconds / count if count else math.nan
    return result


class _Tiles:
    """Which tiles a data set is restored in, so that this is known of each score.

    Args:
        model: a network.
        options: of `restore`. Where they have no ``tile``, and none in ``local``, what is scored is restored whole,
            and what is only to be restored "auto".
        data: which of the two.
    """

    def __init__(self, model, options: dict, data: ImageSet):
        local = check_windows(options["local"]).get("tile")
        self.model, self.given = model, "tile" in options or local is not None
        unasked = "auto" if local is not None or (data.save and not data.targets) else None
        tile = options.get("tile", unasked)
        if tile == "auto":
            tile = local or tile
        check_tiles(tile, options.get("tile_overlap"))
        self.tile, self.asked = tile, "whole" if tile is None else tile  # the second in words

    def choose(self, options: dict, degraded: Images) -> str:
        """Put the tile of a sample's images into the options; what it is, in words.

        Raises:
            UserError: they are to be restored whole without having been asked for, and do not fit into the memory of a
                CPU, which would end the process without a word. (A GPU's is an error that can be told.)
        """
        options["tile"] = self.tile
        device = next((value.device for value in self.model.parameters()), torch.device("cpu"))
        unasked = self.tile is None and not self.given
        if isinstance(self.tile, str) or (unasked and device.type == "cpu"):
            tile = self._automatic(degraded, device)
            if unasked and tile is not None:
                raise UserError(
                    "it may need more memory than is free to be restored whole, as scores are by default; --tile 512 "
                    "restores it in tiles, which changes its score, --tile whole tries nevertheless"
                )
            options["tile"] = tile
        return "whole" if options["tile"] is None else str(options["tile"])

    def _automatic(self, degraded: Images, device: torch.device) -> int | None:
        """The tile that the memory allows for the largest of the images; None for all of them whole."""
        if not all(hasattr(self.model, name) for name in ("channels", "arguments")):
            return None  # `restore` says what it needs
        batches = degraded if isinstance(degraded, list) else [degraded[:8] if degraded.ndim == 4 else degraded]
        sizes = [batch.shape[:2] if batch.ndim == 2 else batch.shape[-3:-1] for batch in batches]
        height, width = max(sizes, key=math.prod)
        batch = len(batches[0]) if batches[0].ndim == 4 else 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tiles are noted with the scores
            return automatic_tile(self.model, (batch, self.model.channels, height, width), device)


def _remove_old_results(folder: Path, samples: list[Sample]):
    """Remove the images that another network, or other settings, made of samples: they would pass for these'."""
    read = {file.absolute() for sample in samples for file in sample.files}
    for path in (folder.absolute() / f"{name}.png" for sample in samples for name in sample.names):
        if path not in read:
            path.unlink(missing_ok=True)


def paired(source: Path) -> ImageSet:
    """The pairs in ``input/`` and ``target/``."""

    def read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        degraded, target = read_image(pair.input), read_image(pair.target)
        if target.shape != degraded.shape:
            raise UserError(f"{pair.input} and {pair.target} differ in size: {degraded.shape} and {target.shape}")
        return degraded, target

    pairs = find_pairs(source, check_sizes=False)
    return ImageSet([Sample(pair.name, (pair.input, pair.target), partial(read, pair)) for pair in pairs])


def pairs_or_images(source: Path) -> ImageSet:
    """Pairs, or where there is no ``input/``, images without targets."""
    if (source / "input").is_dir():
        return paired(source)
    return image_samples(source, lambda path: (read_image(path), None), targets=False, save=True)


def image_samples(source: Path, read: Callable[[Path], tuple], **options) -> ImageSet:
    """The images of a folder, or one, each a sample: ``read`` gives what is degraded and the target of a path."""
    found = images(source).items()
    return ImageSet([Sample(name, (path,), partial(read, path)) for name, path in found], **options)


def images(source: Path) -> dict[str, Path]:
    """The images of a folder by name, or the one image that ``source`` is.

    Raises:
        UserError: neither of the two, no image in the folder, or two of one name.
    """
    if not source.is_file():
        return images_by_name(source)
    if source.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{source} is neither a folder nor an image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return {nfc(source.stem): source}


class ScoreSheet:
    """The scores of one data set, computed on other threads and kept in ``folder/scores.csv``.

    Args:
        folder: where the sheet and the note of its settings lie; None to keep them in memory alone.
        protocol: see `metrics.evaluate_pair`.
        settings: what all of the scores depend on. A sheet that was begun with the same settings is continued, and
            `done` knows its images; another one is begun anew.
        files: the images that the data set consists of, by name, each with a fingerprint of its files. An image
            whose fingerprint has changed is not `done`.
        metrics: further scores by name, functions of the restored image and its target. An image that lacks one is
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
            self.folder_lock.enter_context(lock_dir(folder.absolute(), "test", advice))
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
        self.slots = threading.BoundedSemaphore(2 * threads)  # images that wait take memory
        self.lock = threading.Lock()
        self.jobs = []
        self.failures: list[str] = []

    def done(self, name: str) -> bool:
        return name in self.rows and self.metrics.keys() <= self.rows[name].metrics.keys()

    def add(
        self, name: str, restored: np.ndarray, target: np.ndarray, degraded: np.ndarray | None, tile: str = ""
    ):  # fmt: skip
        """Score an image against its target in the background; ``degraded``, if any, for comparison; see `Row`."""
        self.slots.acquire()
        job = self.pool.submit(self._score, name, restored, target, degraded, tile)
        job.add_done_callback(lambda _: self.slots.release())
        self.jobs.append((name, job))

    def mark_done(self, name: str, tile: str = ""):
        """Note an image that has no target as done."""
        self._append(Row(name, None, None, None, None, "", self.files[name], tile))

    def finish(self, dataset: str) -> Result:
        """Wait for all scores; what they come to."""
        for name, job in self.jobs:
            try:
                job.result()
            except ValueError as error:  # an image that the protocol cannot score
                self.failures.append(f"{name}: {error}")
        self.rows = {name: self.rows[name] for name in natsorted(self.rows) if self.done(name)}
        self._write()
        self.close()
        rows = list(self.rows.values())
        scored = [row[1:5] for row in rows if row.psnr is not None]
        columns = list(zip(*scored, strict=True)) or [()] * 4
        (psnr, identical), (input_psnr, identical_inputs) = map(mean_psnr, columns[::2])
        ssim, input_ssim = (statistics.fmean(column) if column else math.nan for column in columns[1::2])
        return Result(
            dataset, self.protocol, len(scored), psnr, ssim, input_psnr, input_ssim, identical=identical,
            identical_inputs=identical_inputs, missing=len(self.files) - len(rows), rows=rows,
            metrics={
                name: statistics.fmean(row.metrics[name] for row in rows) if rows else math.nan for name in self.metrics
            },
            failures=self.failures,
        )  # fmt: skip

    def close(self):
        """Score no more, and leave the folder to others."""
        self.pool.shutdown(cancel_futures=True)
        self.folder_lock.close()

    def _score(self, name: str, restored: np.ndarray, target: np.ndarray, degraded: np.ndarray | None, tile: str):
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
        self._append(Row(name, *scores, *before, note, self.files[name], tile, further))

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
                    continue  # of another image, or the line under way when the test was killed
                with contextlib.suppress(TypeError, ValueError):  # a damaged line
                    scores = [float(row[key]) if row[key] else None for key in Row._fields[1:5]]
                    further = {key: float(row[key]) for key in self.columns if row.get(key)}
                    self.rows[name] = Row(name, *scores, row["note"], row["files"], row["tile"] or "", further)

    def _write(self):
        if self.path is None:
            return
        with atomic_write(self.path) as temporary, open(temporary, "w", **TEXT) as file:
            writer = csv.writer(file)
            writer.writerow([*Row._fields[:-1], *self.columns])
            writer.writerows(map(self._cells, self.rows.values()))


def _per_image(sample: Sample, given: Images | None) -> Images | list:
    """A sample's image by image."""
    if given is None:
        return [None] * len(sample.names)
    return given if sample.parts is not None else [given]


@contextlib.contextmanager
def _disable_tf32() -> Iterator[None]:
    """Inside, GPUs convolve float32 as such, not as TF32: digits before speed; for speed there is bfloat16."""
    with temporarily_set([torch.backends.cudnn], "allow_tf32", False):
        yield


@contextlib.contextmanager
def _attempt(title: str, failures: list[str], advice: str) -> Iterator[None]:
    """Around the work on a sample: where that cannot be done, it is noted as a failure, and the test goes on.

    ``advice`` is what to do where memory is short.
    """
    try:
        yield
    except UserError as error:
        failures.append(str(error) if title in str(error) else f"{title}: {error}")
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        failures.append(f"{title}: out of GPU memory; {advice}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):  # of every image
            reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
            raise UserError(f"--compile does not work here ({reason}); test without it") from error
        short = "can't allocate memory" in str(error) or "out of memory" in str(error)  # of the CPU; of other devices
        if isinstance(error, RuntimeError) and not short:
            raise
        failures.append(f"{title}: out of memory; {advice}")


def digest_of(model: torch.nn.Module) -> str:
    """What a network computes, as a number: of its arguments and weights."""
    digest = hashlib.sha256(json.dumps(getattr(model, "arguments", None), sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _file_fingerprint(paths: tuple[Path, ...]) -> str:
    """A fingerprint of files as they are now."""
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.exists()]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
