"""Logging of a run: its history as a table, as curves and in TensorBoard, lines in a log, a progress bar."""

import csv
import logging
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from dgunet.runtime.files import atomic_write
from dgunet.runtime.fonts import set_title
from dgunet.runtime.progress import progress_bar
from dgunet.training.config import format_config

log = logging.getLogger("dgunet")


class RunLogger:
    """Writes the history of a run to its ``folder`` and logs it on the console, within ``with``.

    In the folder: ``history.csv``, ``curves.png``, ``train.log``, and TensorBoard's files where that is installed.

    Args:
        folder: the run's.
        title: of the curves.
        epochs, steps: number of epochs, and of steps in each.
        main: whether this process is the one that writes and logs; the others only keep the rows.
    """

    def __init__(self, folder: Path, title: str, epochs: int, steps: int, main: bool):
        self.folder, self.title, self.epochs, self.steps, self.main = folder, title, epochs, steps, main
        self.rows: list[dict] = []  # one at each validation, and at the end of an epoch without one
        self.handlers: list[logging.Handler] = []
        self.board = None  # TensorBoard's writer
        self.began = self.last_line = time.monotonic()

    def __enter__(self):
        self.began = self.last_line = time.monotonic()
        if self.main:
            file = logging.FileHandler(self.folder / "train.log", encoding="utf-8", errors="backslashreplace")
            file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            self.handlers = [_ConsoleHandler(), file]
            log.setLevel(logging.INFO)
            for handler in self.handlers:
                log.addHandler(handler)
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                pass
            else:
                self.board = SummaryWriter(self.folder / "tensorboard")
        return self

    def __exit__(self, *_):
        while self.handlers:
            handler = self.handlers.pop()
            log.removeHandler(handler)
            handler.close()
        if self.board is not None:
            self.board.close()

    def bar(self, epoch: int, step: int):
        """A progress bar over an epoch, on a terminal."""
        return progress_bar(
            total=self.steps, initial=step, desc=f"epoch {epoch}/{self.epochs}", unit="step",
            disable=None if self.main else True, leave=False, dynamic_ncols=True,  # None: only on a terminal
        )  # fmt: skip

    def progress(self, bar, epoch: int, step: int, status: str, seconds: float):
        """Show the status on the bar, or log it now and then; ``seconds`` is the duration of a step."""
        bar.set_postfix_str(status, refresh=False)
        now = time.monotonic()
        # Without a terminal a line every 20 seconds at first, in a run of days some hundreds in all.
        if self.main and bar.disable and now - self.last_line > max(20, (now - self.began) / 100):
            left = tqdm.format_interval(((self.epochs + 1 - epoch) * self.steps - step) * seconds)
            log.info("epoch %d/%d  step %d/%d  %s, %s left", epoch, self.epochs, step, self.steps, status, left)
            self.last_line = now

    def record(self, row: dict, best_epoch: int):
        """Add a row to the history and log it."""
        self.rows.append(row)
        if not self.main:
            return
        score = skipped = ""
        if row["psnr"] is not None:
            best = -math.inf if row["best_psnr"] is None else row["best_psnr"]
            score = f"PSNR {row['psnr']:.3f} (best {best:.3f} in epoch {best_epoch})  "
        if row["skipped_steps"]:
            skipped = f"  {row['skipped_steps']} steps skipped"
        log.info(
            "epoch %d/%d  step %d/%d  loss %.5f  lr %.2e  %s%.1f images/s%s",
            row["epoch"], self.epochs, row["step"], self.steps, row["loss"], row["lr"], score,
            row["images_per_second"], skipped,
        )  # fmt: skip
        columns = dict.fromkeys(column for each in (row, *self.rows) for column in each)  # other versions have others
        with atomic_write(self.folder / "history.csv") as temporary:
            with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)
        plot_history(self.rows, self.steps, self.folder / "curves.png", self.title)
        if self.board is not None:
            done = (row["epoch"] - 1) * self.steps + row["step"]
            for key in ("loss", "lr", "psnr"):
                if row[key] is not None:
                    self.board.add_scalar(key, row[key], done)


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record))


def describe(trainer, config: bool = False, missing: list[str] = ()):
    """Print what a `Trainer` is about to do, what is ``missing`` for that, and with ``config`` also every key."""
    cfg, model = trainer.cfg, trainer.train_state.model
    if not trainer.main:
        return
    count = sum(p.numel() for p in model.parameters())
    hardware = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "CPU"
    epochs = "" if trainer.resumed is None else f", continuing in epoch {trainer.epoch} after step {trainer.step}"
    precision = "bf16 autocast" if trainer.train_state.amp else "float32"
    if config:
        print(f"config (# * marks what differs from the defaults)\n{format_config(cfg)}\n")
    source = cfg.TRAINING.INPUT_DIR or cfg.TRAINING.TRAIN_DIR
    held_out = "them, the last ones, held out" if source else "the other data set"
    val_source = cfg.TRAINING.VAL_INPUT_DIR or cfg.TRAINING.VAL_DIR or held_out
    lines = [
        f"model       {cfg.MODEL.NAME}, {count:,} parameters, {model.stages} stages",
        *(f"missing     {what}" for what in missing),
        f"training    {len(trainer.train_set) // trainer.train_set.repeat} images of {source or 'the data set'}, "
        f"{trainer.train_set.repeat} crops of {cfg.TRAINING.TRAIN_PS} px from each in an epoch",
        f"validation  {len(trainer.val_set)} images of {val_source}",
        f"batch       {cfg.OPTIM.BATCH_SIZE} = {trainer.world} processes x {cfg.OPTIM.ACCUMULATE} passes x "
        f"{trainer.train_state.micro_batch_size}",
        f"schedule    {cfg.OPTIM.NUM_EPOCHS} epochs"
        + (f" of {trainer.batches.steps} steps{epochs}" if len(trainer.train_set) else ""),
        f"device      {trainer.world} x {hardware}, {precision}",
        f"writes to   {trainer.folder.absolute()} (the whole config as well; --dry_run shows it)",
    ]
    for line in lines:
        print(line)
    for note in trainer.notes:
        print(f"note        {note}")
    if trainer.changed:
        print(f"note        these keys differ from the run being continued: {', '.join(trainer.changed)}")
    if trainer.validation_changed:
        print("note        validation is different than before: the best score begins anew")
    sys.stdout.flush()


def plot_history(history: list[dict], steps: int, path: Path, title: str):
    """Plot loss, validation PSNR and learning rate over the epochs into a PNG, the last values in the titles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for place, (key, label) in enumerate(
        (("loss", "training loss"), ("psnr", "validation PSNR [dB]"), ("lr", "learning rate")), start=1
    ):
        rows = [row for row in history if row.get(key) is not None and math.isfinite(row[key])]
        epochs, values = [row["epoch"] - 1 + row["step"] / steps for row in rows], [row[key] for row in rows]
        axes = figure.add_subplot(1, 3, place)
        axes.plot(epochs, values, marker="." if len(values) > 1 else "o")
        axes.set(xlabel="epoch", title=f"{label}: {values[-1]:.4g}" if values else f"{label}: none")
        axes.set_xlim(0, 1.05 * history[-1]["epoch"])
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if key == "loss" and values and max(values) > 10 * min(values) > 0:
            axes.set_yscale("log")
        if key == "lr":
            axes.set_ylim(0, 1.1 * max(values))
            axes.ticklabel_format(axis="y", scilimits=(0, 0))
        axes.grid(alpha=0.3)
    set_title(figure, title)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(path))
