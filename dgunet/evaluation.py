"""What the test scripts share: going through test sets, scoring in the background, and telling the outcome.

A test that is interrupted and started again goes on where it was: the scores of a data set are written as they arrive,
each with a fingerprint of its picture's files, next to a note of the weights and settings that they belong to.
"""

import argparse
import contextlib
import csv
import datetime
import hashlib
import io
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from natsort import natsorted

from dgunet.checkpoint import load_model, read_checkpoint
from dgunet.data import IMAGE_SUFFIXES, Pair, find_pairs, images_by_name, read_image, write_image
from dgunet.distributed import sole_writer
from dgunet.errors import UserError, optional
from dgunet.files import replacing
from dgunet.inference import check_tiles, restore, use_huge_pages
from dgunet.metrics import AlignmentError, evaluate_pair

tqdm = optional("tqdm").tqdm

# Protocols that score the unrounded output; the others score pictures as they are written to disk.
UNROUNDED = ("sidd_unit_range", "cs_y", "train_rgb")
TEXT = dict(newline="", encoding="utf-8", errors="surrogateescape")  # of a table: names need not be UTF-8


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] as an 8-bit picture: clamped, times 255, rounded to nearest."""
    return (np.clip(image, 0, 1) * np.float32(255)).round().astype(np.uint8)


@dataclass(frozen=True)
class TestSet:
    """A published test set: where it lies under the data root, how it is scored, what the paper has."""

    folder: str
    protocol: str
    paper: dict[str, tuple[float, float]] = field(default_factory=dict)  # by model: PSNR, SSIM

    __test__ = False  # not a test case, whatever pytest thinks of the name


@dataclass
class Result:
    """Mean scores of one data set."""

    dataset: str
    protocol: str
    images: int
    psnr: float  # dB
    ssim: float
    input_psnr: float  # of the degraded pictures, by the same protocol
    input_ssim: float
    paper: tuple[float, float] | None = None  # PSNR, SSIM
    seconds_per_image: float = float("nan")  # restoring and scoring, of the pictures of this call
    settings: dict = field(default_factory=dict)
    missing: int = 0  # pictures of the data set that could not be tested

    @property
    def label(self) -> str:
        """The data set's name in tables; the mean of a part of it is not taken for the whole's."""
        part = f" (incomplete: {self.images} of {self.images + self.missing})" if self.missing else ""
        return self.dataset + part


class ScoreSheet:
    """The scores of one data set, computed on other threads and kept in ``folder/scores.csv``.

    Args:
        folder: where the sheet and the note of its settings lie.
        protocol: see `metrics.evaluate_pair`.
        settings: what all of the scores depend on. A sheet that was begun with the same settings is continued, and
            `done` knows its pictures; another one is begun anew.
        files: the pictures that the data set consists of, by name, each with a fingerprint of its files. A picture
            whose fingerprint has changed is not `done`.
        threads: how many; None for one per core.

    Raises:
        UserError: another process has a sheet open in this folder. It is free again after `finish`, or once that
            process has ended, however it did.
    """

    COLUMNS = ("name", "psnr", "ssim", "input_psnr", "input_ssim", "note", "files")

    def __init__(self, folder: Path, protocol: str, settings: dict, files: dict[str, str], threads: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder_lock = contextlib.ExitStack()
        advice = "wait for its end, or give --results another folder"
        self.folder_lock.enter_context(sole_writer(folder.absolute(), "test", advice))
        self.path, self.protocol, self.files = folder / "scores.csv", protocol, files
        self.rows: dict[str, tuple] = {}
        note, settings = folder / "settings.json", json.dumps(settings | {"protocol": protocol}, sort_keys=True)
        if note.exists() and note.read_bytes() == settings.encode():
            self._read()
        self._write()  # before the note: killed in between, the former scores must not pass for these settings'
        note.write_text(settings)
        self.continued = len(self.rows)
        # The filters behind the metrics work outside of Python's lock, so threads use all cores.
        threads = threads or os.cpu_count()
        self.pool = ThreadPoolExecutor(threads)
        self.slots = threading.BoundedSemaphore(2 * threads)  # pictures that wait take memory
        self.lock = threading.Lock()
        self.jobs = []
        self.failures: list[str] = []

    def done(self, name: str) -> bool:
        return name in self.rows

    def add(self, name: str, restored: np.ndarray, target: np.ndarray, degraded: np.ndarray | None):
        """Score a picture against its target in the background; ``degraded`` for comparison."""
        self.slots.acquire()
        job = self.pool.submit(self._score, name, restored, target, degraded)
        job.add_done_callback(lambda _: self.slots.release())
        self.jobs.append((name, job))

    def tick(self, name: str):
        """Note a picture that has no target as done."""
        self._append((name, None, None, None, None, ""))

    def finish(self, dataset: str) -> Result | None:
        """Wait for all scores; their means, or None where nothing was scored."""
        for name, job in self.jobs:
            try:
                job.result()
            except ValueError as error:  # a picture that the protocol cannot score
                self.failures.append(f"{name}: {error}")
        self.pool.shutdown()
        self.rows = {name: self.rows[name] for name in natsorted(self.rows)}
        self._write()
        self.folder_lock.close()
        scored = [row[1:5] for row in self.rows.values() if row[1] is not None]
        if not scored:
            return None
        means = (statistics.fmean(column) for column in zip(*scored, strict=True))
        return Result(dataset, self.protocol, len(scored), *means, missing=len(self.files) - len(self.rows))

    def notes(self) -> list[str]:
        return [f"{name}: {row[5]}" for name, row in self.rows.items() if row[5]]

    def _score(self, name: str, restored: np.ndarray, target: np.ndarray, degraded: np.ndarray | None):
        note, align = "", True
        try:
            scores = evaluate_pair(restored, target, self.protocol)
        except AlignmentError:
            note, align = "could not be aligned, scored as it is", False
            scores = evaluate_pair(restored, target, self.protocol, align=False)
        try:
            before = evaluate_pair(degraded, target, self.protocol, align=align)
        except AlignmentError:
            before = evaluate_pair(degraded, target, self.protocol, align=False)
        self._append((name, *scores, *before, note))

    def _append(self, row: tuple):
        row = (*row, self.files[row[0]])
        with self.lock:
            self.rows[row[0]] = row
            with open(self.path, "a", **TEXT) as file:
                csv.writer(file).writerow(row)

    def _read(self):
        with contextlib.suppress(FileNotFoundError, csv.Error), open(self.path, **TEXT) as file:
            for row in csv.DictReader(file):
                name = row.get("name")
                if name not in self.files or row.get("files") != self.files[name]:
                    continue  # of another picture, or the line under way when the test was killed
                with contextlib.suppress(TypeError, ValueError):  # a damaged line
                    scores = [float(row[key]) if row[key] else None for key in self.COLUMNS[1:5]]
                    self.rows[name] = (name, *scores, row["note"], row["files"])

    def _write(self):
        with replacing(self.path) as temporary, open(temporary, "w", **TEXT) as file:
            writer = csv.writer(file)
            writer.writerow(self.COLUMNS)
            writer.writerows(self.rows.values())


class TestRun:
    """A whole run of a ``test.py``: its command line, its test sets one after the other, its table.

    Args:
        task: e.g. ``"denoising"``; weights of another task are refused.
        description: the script's docstring.
        test_sets: the published ones, by name.
        protocol: for folders of the user's own.
        ensembled: test sets that the original scores with the self-ensemble.
        average: where the mean over all test sets is a row of its own: the paper's, by model.
        shipped: this repository's own weights for the task, tested where none are given.
    """

    __test__ = False

    def __init__(
        self,
        task: str,
        description: str,
        test_sets: dict[str, TestSet],
        protocol: str,
        ensembled: tuple[str, ...] = (),
        average: dict[str, tuple[float, float]] | None = None,
        shipped: Path | None = None,
    ):
        self.task, self.test_sets, self.protocol = task, test_sets, protocol
        self.ensembled, self.average = ensembled, average
        self.args = self._parse(description)
        use_huge_pages()
        self.results: list[Result] = []
        self.failures: list[str] = []
        self.noise: list[float] = []  # of a data set's pictures, where the weights say what noise they are for
        self.model, self.name, self.noise_sigma = None, "score_only", None
        torch.backends.cudnn.allow_tf32 = False  # digits before speed; for speed there is --bf16
        if self.args.score_only is None:
            self.source = self.args.weights or shipped
            if self.source is None:
                raise UserError(
                    "give --weights MODEL.pth, or --score_only FOLDER for pictures that are already restored"
                )
            weights = Path(self.source)
            content = read_checkpoint(weights)  # once: the file may be another one a moment later
            if not self.args.weights:
                print(f"no --weights given: this repository's own ({content['about']})")
            self.model = load_model(weights, task=task, device=pick_device(self.args.device), content=content)
            self.name = self.model.name or "DGUNet"
            self.digest = _digest(self.model)
            match content.get("noise_sigma"):
                case [int() | float() as low, int() | float() as high]:  # anything else is not an entry of ours
                    self.noise_sigma = (low, high)
            self.folder = self.args.results / task / f"{weights.absolute().parent.name}_{weights.stem}"
            count = sum(p.numel() for p in self.model.parameters())
            print(f"{self.name}, {count:,} parameters, from {weights}")
            if self.args.compile:
                self.model.compile()  # once for the first size, and once more for all other sizes
        else:
            self.source = self.args.score_only
            if not self.source.is_dir():
                raise UserError(f"no folder {self.args.score_only.absolute()} with restored pictures")
            self.listings: dict[Path, dict[str, Path]] = {}
            self.folder = self.args.results / task / f"scores_of_{self.args.score_only.absolute().name}"

    def _parse(self, description: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = parser.add_argument
        names = ", ".join(self.test_sets)
        add("--weights", help="checkpoint, yours or the original authors' (default: pretrained_models/, if there)")
        add(
            "--dataset",
            nargs="+",
            default=list(self.test_sets),
            help=f"{names}; folders or pictures (default: all of these)",
        )
        add("--data_root", type=Path, default=Path("Datasets"), help="holds the test sets (default: Datasets)")
        add("--results", type=Path, default=Path("results"), help="where everything is written (default: results)")
        add("--score_only", type=Path, metavar="FOLDER", help="score the pictures in FOLDER/DATASET, restore nothing")
        add("--save_images", action="store_true", help="write restored pictures also where the scores do not need it")
        add("--device", default="auto", help="auto (a CUDA GPU where there is one), cpu, cuda, cuda:1, mps, ...")
        add("--bf16", action="store_true", help="bfloat16 autocast: faster, some thousandths of a dB off")
        add("--compile", action="store_true", help="torch.compile: faster after a minute or more of compiling")
        self.add_arguments(add)
        args = parser.parse_args()
        known = {name.lower(): name for name in self.test_sets}
        names = [d if Path(d).exists() else known.get(d.lower(), d) for d in args.dataset]
        args.dataset = list(dict.fromkeys(names))
        labels = [self.label(dataset) for dataset in args.dataset]
        for dataset, label in zip(args.dataset, labels, strict=True):
            if labels.count(label) > 1:
                raise UserError(f"{dataset} and another --dataset would both be written to {label}; test one at a time")
        return args

    def add_arguments(self, add: Callable):
        """Options of how to restore; a task with others changes this method and `options`."""
        add(
            "--self_ensemble",
            action=argparse.BooleanOptionalAction,
            help=f"mean over 8 flips and rotations (default: {', '.join(self.ensembled) or 'no'}, as in the original)",
        )
        add("--tile", type=_tile_side, default="auto", help="tile side in pixels, whole, or auto (default)")
        add("--tile_overlap", type=int, help="pixels that tiles share (default: a quarter of the tile, at most 64)")

    def options(self, dataset: str) -> dict:
        """Those options for a data set, as `restore` takes them."""
        chosen = self.args.self_ensemble
        ensemble = dataset in self.ensembled if chosen is None else chosen
        check_tiles(self.args.tile, self.args.tile_overlap)
        return dict(self_ensemble=ensemble, tile=self.args.tile, tile_overlap=self.args.tile_overlap)

    def settings(self, dataset: str) -> dict:
        """All options that change a data set's results; scores computed with others are not continued."""
        return self.options(dataset) | dict(bf16=self.args.bf16, compile=self.args.compile)

    def paper_key(self) -> str:
        """Under which name the paper's values for this network stand in the test sets."""
        return self.name

    def restore(self, dataset: str, images: np.ndarray) -> np.ndarray:
        """Restore a picture or a batch of them, floats in [0, 1]."""
        if self.noise_sigma is not None and np.isfinite(level := noise_level(images)):
            self.noise.append(255 * level)
        return restore(self.model, images, bf16=self.args.bf16, **self.options(dataset))

    def label(self, dataset: str) -> str:
        """Name of a data set in tables and of its folder; of the user's own folders, so many are called ``test``."""
        if dataset in self.test_sets:
            return dataset
        path = Path(os.path.abspath(dataset))
        if path.is_file():
            path = path.with_suffix("")
        return "_".join(path.parts[1:][-2:]) or "root"  # relative, wherever the folder is

    def find(self, dataset: str) -> Path:
        """The folder of a published test set under --data_root, or what else --dataset names."""
        if dataset in self.test_sets:
            folder = find_folder(self.args.data_root, self.test_sets[dataset].folder)
            if not folder.exists():
                raise UserError(
                    f"no folder {folder.absolute()}; --data_root names the folder that holds "
                    f"{self.test_sets[dataset].folder}, see the task's README for the data layout"
                )
            return folder
        if not Path(dataset).exists():
            raise UserError(
                f"no folder or picture {Path(dataset).absolute()}; check the path, or name a test set: "
                f"{', '.join(self.test_sets)}"
            )
        return Path(dataset)

    def sheet(self, dataset: str, folder: Path, protocol: str, files: dict[str, tuple[Path, ...]]) -> ScoreSheet:
        """The data set's scores so far: those of the same weights, settings and files, as they are now.

        ``files`` are each picture's, by the picture's name.
        """
        stamps = {name: _stamp(paths) for name, paths in files.items()}
        if self.model is None:  # never continued: the restored pictures may have changed
            return ScoreSheet(folder, protocol, {"scored": time.time()}, stamps)
        return ScoreSheet(folder, protocol, self.settings(dataset) | {"weights": self.digest}, stamps)

    @contextlib.contextmanager
    def attempt(self, name):
        """Around the work on a picture: where that cannot be done, it is noted as a failure, and the test goes on."""
        try:
            yield
        except UserError as error:
            self.failures.append(str(error) if str(name) in str(error) else f"{name}: {error}")
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.failures.append(f"{name}: out of GPU memory; restore it in tiles, --tile 512")
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, torch._dynamo.exc.TorchDynamoException):  # of every picture
                reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
                raise UserError(f"--compile does not work here ({reason}); test without it") from error
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            self.failures.append(f"{name}: out of memory; restore it in tiles, --tile 512")

    def run(self, special: dict[str, Callable] | None = None) -> None:
        """Test every data set asked for; ``special`` handles those that are not folders of pairs.

        Raises:
            UserError: at the end, listing the pictures that could not be tested.
        """
        for dataset in self.args.dataset:
            started = time.monotonic()
            self.noise.clear()
            try:
                if special and dataset in special:
                    sheet = special[dataset](self, self.folder / dataset)
                else:
                    sheet = self._folder(dataset)
            except UserError as error:
                if len(self.args.dataset) == 1:
                    raise
                self.failures.append(f"{dataset}: {error}")
                continue
            result = sheet.finish(self.label(dataset))
            self.failures += sheet.failures
            notes = sheet.notes()
            if notes:
                print(f"note: {len(notes)} of {len(sheet.rows)} in {self.label(dataset)}:", *notes, sep="\n  ")
            self._tell_of_noise(dataset)
            if result is not None:
                fresh = len(sheet.jobs)
                result.seconds_per_image = (time.monotonic() - started) / fresh if fresh else float("nan")
                if dataset in self.test_sets and not result.missing:
                    result.paper = self.test_sets[dataset].paper.get(self.paper_key())
                result.settings = self.settings(dataset) if self.model is not None else {}
                self.results.append(result)
        self._report()

    def items(self, dataset: str) -> list[Pair]:
        """What a data set consists of: pairs in ``input/`` and ``target/``, or pictures without targets."""
        source = self.find(dataset)
        if dataset in self.test_sets or (source / "input").is_dir():
            return find_pairs(source, check_sizes=False)
        if self.model is None:
            raise UserError(f"{source} has no input/ and target/, so there is nothing to score against")
        return [Pair(name, path, None) for name, path in pictures(source).items()]

    def _folder(self, dataset: str) -> ScoreSheet:
        protocol = self.test_sets[dataset].protocol if dataset in self.test_sets else self.protocol
        items = self.items(dataset)
        if self.model is None:
            self.restored_elsewhere(dataset)
        out = self.folder / self.label(dataset)
        files = {item.name: (item.input, item.target) if item.target else (item.input,) for item in items}
        sheet = self.sheet(dataset, out, protocol, files)
        if sheet.continued:
            print(f"{dataset}: {sheet.continued} of {len(items)} pictures are done already")
        for item in tqdm(items, desc=Path(dataset).name, unit="picture", disable=None):
            if sheet.done(item.name) and ((out / f"{item.name}.png").exists() or not self.writes(item, sheet)):
                continue
            with self.attempt(item.input):
                self.test_one(dataset, item, sheet, out)
        return sheet

    def writes(self, item: Pair, sheet: ScoreSheet) -> bool:
        """Whether the restored picture goes to disk: asked for, scored as it lies there, or all that is wanted."""
        if self.model is None:
            return False
        return self.args.save_images or item.target is None or sheet.protocol not in UNROUNDED

    def test_one(self, dataset: str, item: Pair, sheet: ScoreSheet, out: Path):
        """Restore a picture, or read it from where it has been restored, and hand it to the sheet."""
        degraded = read_image(item.input)
        target = read_image(item.target) if item.target else None
        if target is not None and target.shape != degraded.shape:
            raise UserError(f"{item.input} and {item.target} differ in size: {degraded.shape} and {target.shape}")
        unrounded = sheet.protocol in UNROUNDED
        if self.model is None:
            restored = read_image(self.restored_picture(dataset, item.name))
            if restored.shape != target.shape:
                raise UserError(f"{item.name} in {self.args.score_only} has another size than its target")
        else:
            restored = self.restore(dataset, degraded.astype(np.float32) / np.float32(255))
            picture = to_uint8(restored)
            if self.writes(item, sheet):
                write_image(out / f"{item.name}.png", picture)
            restored = restored if unrounded else picture
        if target is None:
            sheet.tick(item.name)
        else:
            sheet.add(item.name, restored, target, degraded)

    def restored_elsewhere(self, dataset: str) -> dict[str, Path]:
        """The pictures that --score_only finds, by name: in FOLDER/DATASET, or in FOLDER itself."""
        folders = (find_folder(self.args.score_only, name) for name in (self.label(dataset), Path(dataset).name))
        folder = next((folder for folder in folders if folder.is_dir()), self.args.score_only)
        if folder not in self.listings:
            self.listings[folder] = images_by_name(folder)
        return self.listings[folder]

    def restored_picture(self, dataset: str, name: str) -> Path:
        there = self.restored_elsewhere(dataset)
        if name not in there:
            raise UserError(f"no restored {name} in {next(iter(there.values())).parent}")
        return there[name]

    def _tell_of_noise(self, dataset: str):
        """One sentence where pictures have other noise than the weights are for."""
        if not self.noise:
            return
        low, high = self.noise_sigma
        # The estimates are 0.7 to 1.1 of the truth where noise is visible, more where it is weaker than texture.
        unlike = [level for level in self.noise if not 2 / 3 * low <= level <= 4 / 3 * high]
        if unlike:
            trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            weakest, strongest = f"{min(unlike):.0f}", f"{max(unlike):.0f}"
            found = weakest if weakest == strongest else f"{weakest} to {strongest}"
            print(
                f"note: {len(unlike)} of {len(self.noise)} in {self.label(dataset)}: noise of about sigma {found}, but "
                f"these weights were trained for sigma {trained}: they blur where it is weaker, and leave some where "
                "it is stronger"
            )

    def _report(self):
        scored = {result.dataset for result in self.results if not result.missing}
        if self.average is not None and scored >= self.test_sets.keys():
            mean = average([r for r in self.results if r.dataset in self.test_sets])
            mean.paper = self.average.get(self.name)
            self.results.append(mean)
        if self.results:
            print(format_table(self.results))
            table = self.args.results / f"{self.task}.csv"
            append_results(table, self.results, str(self.source), self.name)
            print(f"appended to {table}")
        if self.model is not None:
            print(f"pictures and scores of each picture are in {self.folder}")
        if self.failures:
            for failure in self.failures:
                print(f"not tested: {UserError(failure)}", file=sys.stderr)
            raise UserError(f"{len(self.failures)} not tested, all others were")


def pick_device(name: str) -> torch.device:
    """``auto`` (a CUDA GPU where there is one, else the CPU) or a device by PyTorch's name.

    Raises:
        UserError: no such device here, or one that cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()
    except Exception as error:  # each kind of device that is not there fails in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
        raise UserError(
            f"cannot use --device {name}, which is not here ({reason}); auto takes what there is"
        ) from error
    return device


def find_folder(root: Path, relative: str) -> Path:
    """``root/relative``, or where that is not there, the one folder whose name differs in upper and lower case."""
    folder = root
    for part in Path(relative).parts:
        exact = folder / part
        alike = [] if exact.exists() or not folder.is_dir() else [p for p in folder.iterdir() if p.is_dir()]
        alike = [p for p in alike if p.name.lower() == part.lower()]
        folder = alike[0] if len(alike) == 1 else exact
    return folder


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


def noise_level(image: np.ndarray) -> float:
    """Estimate of the standard deviation of white noise in (..., H, W, C) pictures, in their unit; nan for tiny ones.

    The median of the absolute second differences along both axes (Immerkaer's mask), which smooth areas make and edges
    do not reach. Fine texture counts as noise.
    """
    differences = np.diff(np.diff(image[..., :1024, :1024, :], 2, axis=-3), 2, axis=-2)
    return float(np.median(np.abs(differences)) / (0.6745 * 6)) if differences.size else float("nan")


def _digest(model: torch.nn.Module) -> str:
    """What a network computes, as a number: of its arguments and weights."""
    digest = hashlib.sha256(json.dumps(model.arguments, sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _stamp(paths: tuple[Path, ...]) -> str:
    """A fingerprint of files as they are now."""
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.exists()]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def _tile_side(text: str) -> int | str | None:
    """``auto``, ``whole`` (None) or a number, for `restore`."""
    return {"auto": "auto", "whole": None}[text] if text in ("auto", "whole") else int(text)


def average(results: list[Result]) -> Result:
    """The mean of the sets' means, each with equal weight whatever its size."""
    means = [statistics.fmean(getattr(r, key) for r in results) for key in ("psnr", "ssim", "input_psnr", "input_ssim")]
    return Result("average", results[0].protocol, sum(r.images for r in results), *means, settings=results[0].settings)


def format_table(results: list[Result]) -> str:
    """The measured values beside the paper's, a line for each data set."""
    header = ["dataset", "images", "input PSNR/SSIM", "PSNR/SSIM", "paper", "difference"]
    rows = [header]
    for r in results:
        paper = difference = "-"
        if r.paper is not None:
            digits = 3 if round(r.paper[1], 3) == r.paper[1] else 4  # as many as the paper has
            paper = f"{r.paper[0]:.2f}/{r.paper[1]:.{digits}f}"
            difference = f"{r.psnr - r.paper[0]:+.2f}/{r.ssim - r.paper[1]:+.{digits}f}"
        degraded, restored = f"{r.input_psnr:.2f}/{r.input_ssim:.4f}", f"{r.psnr:.2f}/{r.ssim:.4f}"
        rows.append([r.label, str(r.images), degraded, restored, paper, difference])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def append_results(path: Path, results: list[Result], weights: str, model: str):
    """Add a row for each result to a CSV file of all results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text)
    for r in results:
        settings = " ".join(f"{key}={value}" for key, value in r.settings.items())
        writer.writerow(
            [datetime.datetime.now().isoformat(timespec="seconds"), weights, model, r.label, r.protocol, r.images,
             f"{r.psnr:.4f}", f"{r.ssim:.6f}", f"{r.input_psnr:.4f}", f"{r.input_ssim:.6f}",
             f"{r.seconds_per_image:.3f}", settings, " ".join(sys.argv)]
        )  # fmt: skip
    with sole_writer(path.parent, "test", wait=True):  # tests that end together do not mix their rows
        before = path.read_bytes() if path.exists() else b""
        start = "" if before.endswith(b"\n") else "\r\n"  # after a line that was cut off
        if not before:
            start = (
                "date,weights,model,dataset,protocol,images,psnr,ssim,input_psnr,input_ssim,seconds_per_image,"
                "settings,command\r\n"
            )
        with open(path, "a", **TEXT) as file:
            file.write(start + text.getvalue())
