"""Scores of each image, written as they come, so that an interrupted test resumes."""

import contextlib
import csv
import json
import math
import os
import statistics
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from natsort import natsorted

from dgunet.evaluation.metrics import AlignmentError, Metric, evaluate_pair, mean_psnr
from dgunet.runtime.distributed import lock_dir
from dgunet.runtime.files import atomic_write

TEXT = dict(newline="", encoding="utf-8", errors="surrogateescape")  # of a table: file names need not be UTF-8


class Row(NamedTuple):
    """The scores of an image; None where it has no target."""

    name: str
    psnr: float | None
    ssim: float | None
    input_psnr: float | None
    input_ssim: float | None
    note: str
    files: str  # their fingerprint
    tile: str = ""  # side of the tiles that it was restored in, "whole", or nothing where the method has no tiles
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


class ScoreSheet:
    """The scores of one data set, computed on other threads and kept in ``folder/scores.csv``.

    Args:
        folder: where the sheet and ``settings.json`` lie; None to keep the scores in memory alone.
        protocol: see `metrics.evaluate_pair`.
        settings: what all of the scores depend on. A sheet with the same settings is continued, and `done` knows its
            images; with others it starts again.
        files: the images of the data set by name, each with a fingerprint of its files. An image whose fingerprint has
            changed is not `done`.
        metrics: further scores by name, functions of the restored image and its target. An image that lacks one is
            not `done`.

    Raises:
        UserError: another process has a sheet open in this folder. It is free again after `finish`, or once that
            process has ended, however it did.
    """

    def __init__(
        self, folder: Path | None, protocol: str, settings: dict, files: dict[str, str],
        metrics: Mapping[str, Metric] = MappingProxyType({}),
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
            stored = folder / "settings.json"
            self.found = stored.exists()
            if self.found and stored.read_bytes() == settings.encode():
                self._read()
            self._write()  # before the settings: killed in between, old scores must not be taken for theirs
            stored.write_text(settings)
        self.continued = sum(map(self.done, self.rows))
        # The filters behind the metrics work outside of Python's lock, so threads use all cores.
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.slots = threading.BoundedSemaphore(2 * os.cpu_count())  # images that wait take memory
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
        """Record an image without a target as done."""
        self._append(Row(name, None, None, None, None, "", self.files[name], tile))

    def finish(self, dataset: str) -> Result:
        """Wait for all scores; their means."""
        for name, job in self.jobs:
            try:
                job.result()
            except ValueError as error:  # an image that the protocol cannot score
                self.failures.append(f"{name}: {error}")
        self.rows = {name: self.rows[name] for name in natsorted(self.rows) if self.done(name)}
        self._write()
        self.close()
        rows = list(self.rows.values())
        scored = [row for row in rows if row.psnr is not None]
        psnr, identical = mean_psnr(row.psnr for row in scored)
        input_psnr, identical_inputs = mean_psnr(row.input_psnr for row in scored)
        return Result(
            dataset, self.protocol, len(scored), psnr, _mean(row.ssim for row in scored), input_psnr,
            _mean(row.input_ssim for row in scored), identical=identical, identical_inputs=identical_inputs,
            metrics={name: _mean(row.metrics[name] for row in rows) for name in self.metrics},
            missing=len(self.files) - len(rows), rows=rows, failures=self.failures,
        )  # fmt: skip

    def close(self):
        """Score no more, and leave the folder to others."""
        self.pool.shutdown(cancel_futures=True)
        self.folder_lock.close()

    def _score(self, name: str, restored: np.ndarray, target: np.ndarray, degraded: np.ndarray | None, tile: str):
        def score(image: np.ndarray, align: bool) -> tuple[tuple[float, float], bool]:
            try:
                return evaluate_pair(image, target, self.protocol, align=align), align
            except AlignmentError:
                return evaluate_pair(image, target, self.protocol, align=False), False

        scores, aligned = score(restored, True)
        note = "" if aligned else "could not be aligned, scored as it is"
        before = (math.nan, math.nan) if degraded is None else score(degraded, aligned)[0]
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


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else math.nan
