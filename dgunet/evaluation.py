"""What the test scripts share: going through test sets, scoring in the background, and telling the outcome.

A test that is interrupted and started again goes on where it was: the scores of a data set are written as they arrive,
next to a note of the weights and settings that they belong to.
"""

import argparse
import csv
import datetime
import hashlib
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
from dgunet.data import Pair, find_pairs, list_images, read_image, write_image
from dgunet.errors import UserError, optional
from dgunet.inference import restore, use_huge_pages
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


class ScoreSheet:
    """The scores of one data set, computed on other threads and kept in ``folder/scores.csv``.

    Args:
        folder: where the sheet and the note of its settings lie.
        protocol: see `metrics.evaluate_pair`.
        settings: what the scores depend on. A sheet that was begun with the same settings is continued, and `done`
            knows its pictures; another one is begun anew.
        threads: how many; None for one per core.
    """

    COLUMNS = ("name", "psnr", "ssim", "input_psnr", "input_ssim", "note")

    def __init__(self, folder: Path, protocol: str, settings: dict, threads: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.protocol = folder / "scores.csv", protocol
        self.rows: dict[str, tuple] = {}
        note, settings = folder / "settings.json", json.dumps(settings | {"protocol": protocol}, sort_keys=True)
        if note.exists() and note.read_text() == settings:
            self._read()
        note.write_text(settings)
        self._write()
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
        scored = [row[1:5] for row in self.rows.values() if row[1] is not None]
        if not scored:
            return None
        return Result(dataset, self.protocol, len(scored), *(statistics.fmean(column) for column in zip(*scored)))  # noqa: B905

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
        with self.lock:
            self.rows[row[0]] = row
            with open(self.path, "a", **TEXT) as file:
                csv.writer(file).writerow(row)

    def _read(self):
        with open(self.path, **TEXT) as file:
            for row in csv.DictReader(file):
                try:
                    scores = [float(row[key]) if row[key] else None for key in self.COLUMNS[1:5]]
                except (TypeError, ValueError):
                    continue  # the line under way when the test was killed
                if row["note"] is not None:
                    self.rows[row["name"]] = (row["name"], *scores, row["note"])

    def _write(self):
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", **TEXT) as file:
            writer = csv.writer(file)
            writer.writerow(self.COLUMNS)
            writer.writerows(self.rows.values())
        os.replace(temporary, self.path)


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
        self.model, self.name = None, "score_only"
        torch.backends.cudnn.allow_tf32 = False  # digits before speed; for speed there is --bf16
        if self.args.score_only is None:
            self.source = self.args.weights or shipped
            if self.source is None:
                raise UserError(
                    "give --weights MODEL.pth, or --score_only FOLDER for pictures that are already restored"
                )
            weights = Path(self.source)
            if not self.args.weights:
                print(f"no --weights given: this repository's own ({read_checkpoint(weights)['about']})")
            self.model = load_model(weights, task=task, device=pick_device(self.args.device))
            self.name = self.model.name or "DGUNet"
            self.digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            self.folder = self.args.results / task / f"{weights.absolute().parent.name}_{weights.stem}"
            count = sum(p.numel() for p in self.model.parameters())
            print(f"{self.name}, {count:,} parameters, from {weights}")
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
        add("--dataset", nargs="+", default=list(self.test_sets), help=f"{names}, or folders (default: all of these)")
        add("--data_root", type=Path, default=Path("Datasets"), help="holds the test sets (default: Datasets)")
        add("--results", type=Path, default=Path("results"), help="where everything is written (default: results)")
        add("--score_only", type=Path, metavar="FOLDER", help="score the pictures in FOLDER/DATASET, restore nothing")
        add("--save_images", action="store_true", help="write restored pictures also where the scores do not need it")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
        self.add_arguments(add)
        return parser.parse_args()

    def add_arguments(self, add: Callable):
        """Options of how to restore; a task with others changes these three methods."""
        add(
            "--self_ensemble",
            action=argparse.BooleanOptionalAction,
            help=f"mean over 8 flips and rotations (default: {', '.join(self.ensembled) or 'no'}, as in the original)",
        )
        add("--tile", type=_tile_side, default="auto", help="tile side in pixels, whole, or auto (default)")
        add("--tile_overlap", type=int, help="pixels that tiles share (default: a quarter of the tile, at most 64)")
        add("--bf16", action="store_true", help="bfloat16 autocast: faster, some thousandths of a dB off")

    def settings(self, dataset: str) -> dict:
        """Options of `restore` for a data set; scores computed with others are not continued."""
        chosen = self.args.self_ensemble
        ensemble = dataset in self.ensembled if chosen is None else chosen
        args = self.args
        return dict(self_ensemble=ensemble, tile=args.tile, tile_overlap=args.tile_overlap, bf16=args.bf16)

    def paper_key(self) -> str:
        """Under which name the paper's values for this network stand in the test sets."""
        return self.name

    def restore(self, dataset: str, images):
        return restore(self.model, images, **self.settings(dataset))

    def label(self, dataset: str) -> str:
        """Name of a data set in tables and of its folder; of the user's own folders, so many are called ``test``."""
        return dataset if dataset in self.test_sets else "_".join(Path(dataset).absolute().parts[-2:])

    def sheet(self, dataset: str, folder: Path, protocol: str, files: list[Path]) -> ScoreSheet:
        """The data set's scores so far: those of the same weights, settings and ``files``, as they are now."""
        if self.model is None:
            return ScoreSheet(folder, protocol, {"scored": time.time()})  # never continued: pictures may have changed
        stamps = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.exists()]
        data = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
        return ScoreSheet(folder, protocol, self.settings(dataset) | {"weights": self.digest, "data": data})

    def run(self, special: dict[str, Callable] | None = None) -> None:
        """Test every data set asked for; ``special`` handles those that are not folders of pairs.

        Raises:
            UserError: at the end, listing the pictures that could not be tested.
        """
        for dataset in self.args.dataset:
            started = time.monotonic()
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
            if result is not None:
                fresh = len(sheet.jobs)
                result.seconds_per_image = (time.monotonic() - started) / fresh if fresh else float("nan")
                result.paper = (
                    self.test_sets[dataset].paper.get(self.paper_key()) if dataset in self.test_sets else None
                )
                result.settings = self.settings(dataset) if self.model is not None else {}
                self.results.append(result)
        self._report()

    def items(self, dataset: str) -> list[Pair]:
        """What a data set consists of: pairs in ``input/`` and ``target/``, or pictures without targets."""
        known = self.test_sets.get(dataset)
        folder = self.args.data_root / known.folder if known else Path(dataset)
        if known is not None or (folder / "input").is_dir():
            return find_pairs(folder, check_sizes=False)
        if self.model is None:
            raise UserError(f"{folder} has no input/ and target/, so there is nothing to score against")
        return [Pair(path.stem, path, None) for path in list_images(folder)]

    def _folder(self, dataset: str) -> ScoreSheet:
        protocol = self.test_sets[dataset].protocol if dataset in self.test_sets else self.protocol
        items = self.items(dataset)
        out = self.folder / self.label(dataset)
        files = [path for item in items for path in (item.input, item.target) if path is not None]
        sheet = self.sheet(dataset, out, protocol, files)
        if sheet.continued:
            print(f"{dataset}: {sheet.continued} of {len(items)} pictures are done already")
        for item in tqdm(items, desc=Path(dataset).name, unit="picture", disable=None):
            if sheet.done(item.name) and ((out / f"{item.name}.png").exists() or not self.writes(item, sheet)):
                continue
            try:
                self.test_one(dataset, item, sheet, out)
            except UserError as error:
                self.failures.append(str(error))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                self.failures.append(f"{item.input}: out of GPU memory; restore it in tiles, --tile 512")
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
            restored = read_image(self.restored_elsewhere(dataset, item.name))
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

    def restored_elsewhere(self, dataset: str, name: str) -> Path:
        """Where --score_only finds a picture: in FOLDER/DATASET, or in FOLDER itself."""
        folder = self.args.score_only / self.label(dataset)
        if not folder.is_dir():
            folder = self.args.score_only / Path(dataset).name
        folder = folder if folder.is_dir() else self.args.score_only
        if folder not in self.listings:
            self.listings[folder] = {path.stem: path for path in list_images(folder)}
        if name not in self.listings[folder]:
            raise UserError(f"no restored {name} in {folder}")
        return self.listings[folder][name]

    def _report(self):
        scored = {result.dataset for result in self.results}
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
            raise UserError(f"{len(self.failures)} not tested, all others were\n" + "\n".join(self.failures))


def pick_device(name: str) -> torch.device:
    """``auto`` (a GPU where there is one) or a device by PyTorch's name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from error
    return device


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
        rows.append([r.dataset, str(r.images), degraded, restored, paper, difference])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def append_results(path: Path, results: list[Result], weights: str, model: str):
    """Add a row for each result to a CSV file of all results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", **TEXT) as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["date", "weights", "model", "dataset", "protocol", "images", "psnr", "ssim",
                 "input_psnr", "input_ssim", "seconds_per_image", "settings", "command"]
            )  # fmt: skip
        for r in results:
            settings = " ".join(f"{key}={value}" for key, value in r.settings.items())
            writer.writerow(
                [datetime.datetime.now().isoformat(timespec="seconds"), weights, model, r.dataset, r.protocol, r.images,
                 f"{r.psnr:.4f}", f"{r.ssim:.6f}", f"{r.input_psnr:.4f}", f"{r.input_ssim:.6f}",
                 f"{r.seconds_per_image:.3f}", settings, " ".join(sys.argv)]
            )  # fmt: skip
