"""What the test scripts share: scoring restored pictures in the background, and telling the outcome."""

import csv
import datetime
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dgunet.metrics import evaluate_pair


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] as an 8-bit picture: clamped, times 255, rounded to nearest."""
    return (np.clip(image, 0, 1) * np.float32(255)).round().astype(np.uint8)


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
    seconds_per_image: float = float("nan")
    paper: tuple[float, float] | None = None  # PSNR, SSIM
    settings: dict = field(default_factory=dict)


class Scorer:
    """Scores pictures on other threads while the next ones are being restored.

    Args:
        protocol: see `metrics.evaluate_pair`.
        threads: how many; None for one per core.
    """

    def __init__(self, protocol: str, threads: int | None = None):
        self.protocol = protocol
        self.pool = ThreadPoolExecutor(threads)  # the filters behind the metrics work outside of Python's lock
        self.jobs = []

    def add(self, name: str, restored: np.ndarray, target: np.ndarray, degraded: np.ndarray):
        self.jobs.append((name, self.pool.submit(self._score, restored, target, degraded)))

    def _score(self, restored, target, degraded):
        return evaluate_pair(restored, target, self.protocol) + evaluate_pair(degraded, target, self.protocol)

    def finish(self, dataset: str, per_image_csv: str | Path) -> Result:
        """Wait for all scores, write one row for each picture, and return the means."""
        rows = [(name, *job.result()) for name, job in self.jobs]
        self.pool.shutdown()
        path = Path(per_image_csv)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "psnr", "ssim", "input_psnr", "input_ssim"])
            writer.writerows(rows)
        means = [statistics.fmean(column) for column in list(zip(*rows, strict=True))[1:]]
        return Result(dataset, self.protocol, len(rows), *means)


def format_table(results: list[Result]) -> str:
    """The measured values beside the paper's, a line for each data set."""
    header = ["dataset", "images", "input PSNR/SSIM", "PSNR/SSIM", "paper", "difference"]
    rows = [header]
    for r in results:
        paper = difference = "-"
        if r.paper is not None:
            paper = f"{r.paper[0]:.2f}/{r.paper[1]:.3f}"
            difference = f"{r.psnr - r.paper[0]:+.2f}/{r.ssim - r.paper[1]:+.3f}"
        degraded, restored = f"{r.input_psnr:.2f}/{r.input_ssim:.4f}", f"{r.psnr:.2f}/{r.ssim:.4f}"
        rows.append([r.dataset, str(r.images), degraded, restored, paper, difference])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def append_results(path: str | Path, results: list[Result], weights: str, model: str):
    """Add a row for each result to a CSV file of all results so far."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["date", "weights", "model", "dataset", "protocol", "images", "psnr", "ssim",
                 "input_psnr", "input_ssim", "seconds_per_image", "settings"]
            )  # fmt: skip
        for r in results:
            settings = " ".join(f"{key}={value}" for key, value in r.settings.items())
            writer.writerow(
                [datetime.datetime.now().isoformat(timespec="seconds"), weights, model, r.dataset, r.protocol, r.images,
                 f"{r.psnr:.4f}", f"{r.ssim:.6f}", f"{r.input_psnr:.4f}", f"{r.input_ssim:.6f}",
                 f"{r.seconds_per_image:.3f}", settings]
            )  # fmt: skip
