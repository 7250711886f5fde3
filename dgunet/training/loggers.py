"""Loggers of a run: CSV with curves, console, images, TensorBoard, Weights & Biases, MLflow, or a user's own."""

import contextlib
import csv
import logging
import math
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dgunet.data.images import write_image
from dgunet.runtime.errors import UserError, describe_error
from dgunet.runtime.files import atomic_write
from dgunet.runtime.fonts import set_title
from dgunet.runtime.hardware import peak_memory
from dgunet.runtime.imports import import_object, is_object_name
from dgunet.runtime.progress import progress_bar
from dgunet.training.config import flat_config, format_config
from dgunet.training.step import StepCounts

log = logging.getLogger("dgunet")


@dataclass(frozen=True)
class Run:
    """What a logger is told of a run when it starts.

    Args:
        name: MODEL.SESSION.
        folder: the run's, which exists.
        config: by dotted key, ``{"OPTIM.BATCH_SIZE": 16, ...}``.
        epochs, steps: number of epochs, and of steps in each.
        epoch, step: where it starts: (1, 0), or where it is resumed.
        resumed: whether it is.
        rows: its history so far, oldest row first; not to be changed.
    """

    name: str
    folder: Path
    config: dict
    epochs: int
    steps: int
    epoch: int
    step: int
    resumed: bool
    rows: list[dict]

    def global_step(self, epoch: int, step: int) -> int:
        """Steps since the run's beginning."""
        return (epoch - 1) * self.steps + step


class Logger:
    """A logger; one's own is a subclass with some of these methods. Only the main process has loggers.

    What `start` raises ends a run that begins. Later a logger that fails is reported in one line and the training goes
    on: `log_step` is not called any more then, `log_row` is, because a full disk may have space again.
    """

    def start(self, run: Run):
        """The training begins, or is resumed."""

    def log_step(self, epoch: int, step: int, values: dict[str, float]):
        """Some steps were done: on the CPU each one, on a GPU those of up to three seconds.

        ``values``: ``loss`` and ``grad_norm`` (before clipping), means over these steps; ``epoch_loss``, the mean over
        the epoch so far; ``lr``; ``peak_memory_mib``, of the tensors on a GPU, or of the process; over the epoch so far
        ``images_per_second``, ``step_seconds``, ``data_wait``, the share of the time in which the training waited for
        data, and on GPUs ``share_of_peak``, of what they compute in plain matrix products (MFU).
        """

    def log_row(self, row: dict, images: list[np.ndarray]):
        """The history got a row: at each validation, and at the end of an epoch without one.

        Args:
            row: the columns of ``history.csv``; ``psnr`` is None without a validation.
            images: the first validation images, up to four, each as input, restored and target side by side: RGB
                (h, 3 w, 3) uint8, w and h at most 256; none without a validation.
        """

    def close(self, failed: bool):
        """The training ends: at its end, by a signal, or by an error (``failed``)."""


class CSVLogger(Logger):
    """Writes the history to ``history.csv`` and draws ``curves.png``, in the run's folder."""

    def start(self, run):
        self.run = run

    def log_row(self, row, images):
        rows = self.run.rows
        columns = dict.fromkeys(column for each in (row, *rows) for column in each)  # other versions have others
        with atomic_write(self.run.folder / "history.csv") as temporary:
            with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
        plot_history(rows, self.run.steps, self.run.folder / "curves.png", self.run.name)


class ConsoleLogger(Logger):
    """Prints lines, also into the run's ``train.log``, and a progress bar over an epoch where there is a terminal."""

    def start(self, run):
        self.run = run
        self.began = self.last_line = time.monotonic()
        self.psnr = next((row["psnr"] for row in reversed(run.rows) if row.get("psnr") is not None), math.nan)
        file = logging.FileHandler(run.folder / "train.log", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.handlers = [_ConsoleHandler(), file]
        log.setLevel(logging.INFO)
        for handler in self.handlers:
            log.addHandler(handler)
        self.bar = self._new_bar(run.epoch, run.step)

    def _new_bar(self, epoch: int, step: int):
        return progress_bar(
            total=self.run.steps, initial=step, desc=f"epoch {epoch}/{self.run.epochs}", unit="step",
            leave=False, dynamic_ncols=True,
        )  # fmt: skip

    def log_step(self, epoch, step, values):
        psnr = "-" if math.isnan(self.psnr) else f"{self.psnr:.2f}"
        status = f"loss {values['epoch_loss']:.4f}, PSNR {psnr}, lr {values['lr']:.1e}"
        status = f"{status}, {values['images_per_second']:.1f} images/s"
        if step <= self.bar.n:  # of the next epoch
            self.bar.close()
            self.bar = self._new_bar(epoch, 0)
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(step - self.bar.n)
        now = time.monotonic()
        # Without a terminal a line every 20 seconds at first, in a run of days some hundreds in all.
        if self.bar.disable and now - self.last_line > max(20, (now - self.began) / 100):
            steps = self.run.global_step(self.run.epochs, self.run.steps) - self.run.global_step(epoch, step)
            left = tqdm.format_interval(min(steps * values["step_seconds"], values.get("seconds_left", math.inf)))
            status = f"{status}, gradient {values['grad_norm']:.3g}, {_format_speed(values)}"
            log.info("epoch %d/%d  step %d/%d  %s, %s left", epoch, self.run.epochs, step, self.run.steps, status, left)
            self.last_line = now

    def log_row(self, row, images):
        score = skipped = ""
        if row["psnr"] is not None:
            self.psnr = row["psnr"]
            best = -math.inf if row["best_psnr"] is None else row["best_psnr"]
            score = f"PSNR {row['psnr']:.3f} (best {best:.3f} in epoch {row['best_epoch'] or 0})  "
        if row["skipped_steps"]:
            skipped = f"  {row['skipped_steps']} steps skipped"
        log.info(
            "epoch %d/%d  step %d/%d  loss %.5f  lr %.2e  %sgradient %.3g  %.1f images/s, %s%s",
            row["epoch"], self.run.epochs, row["step"], self.run.steps, row["loss"], row["lr"], score,
            row["grad_norm"], row["images_per_second"], _format_speed(row), skipped,
        )  # fmt: skip

    def close(self, failed):
        self.bar.close()
        for handler in self.handlers:
            log.removeHandler(handler)
            handler.close()


def _format_speed(values: dict[str, float]) -> str:
    """``3% waiting for data, 21% of peak, 19886 MiB``: the share of a GPU's peak, where there is one."""
    peak = f"{values['share_of_peak']:.0%} of peak, " if values.get("share_of_peak") else ""
    return f"{values['data_wait']:.0%} waiting for data, {peak}{values['peak_memory_mib']:.0f} MiB"


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record))


class ImageLogger(Logger):
    """Writes the validation images to ``images/`` in the run's folder, ``epoch_3_step_100_image_1.png``."""

    def start(self, run):
        self.folder = run.folder / "images"

    def log_row(self, row, images):
        for number, image in enumerate(images, start=1):
            write_image(self.folder / f"epoch_{row['epoch']}_step_{row['step']}_image_{number}.png", image)


class _MetricsLogger(Logger):
    """A logger of numbers by name and of images, which a subclass logs at a step counted from the run's beginning."""

    def start(self, run):
        self.run = run

    def log(self, done: int, values: dict[str, float], images: list[np.ndarray]):
        raise NotImplementedError

    def log_step(self, epoch, step, values):
        self.log(self.run.global_step(epoch, step), {f"step/{name}": value for name, value in values.items()}, [])

    def log_row(self, row, images):
        values = {name: value for name, value in row.items() if value is not None and name != "step"}
        self.log(self.run.global_step(row["epoch"], row["step"]), values, images)


class TensorBoardLogger(_MetricsLogger):
    """Writes TensorBoard's files to ``tensorboard/`` in the run's folder."""

    def __init__(self):
        from torch.utils.tensorboard import SummaryWriter

        self.make_writer = SummaryWriter

    def start(self, run):
        super().start(run)
        self.writer = self.make_writer(run.folder / "tensorboard")

    def log(self, done, values, images):
        for name, value in values.items():
            self.writer.add_scalar(name, value, done)
        for number, image in enumerate(images, start=1):
            self.writer.add_image(f"validation/{number}", image, done, dataformats="HWC")

    def close(self, failed):
        self.writer.close()


class WandbLogger(_MetricsLogger):
    """Logs to Weights & Biases; a resumed run goes on there, its id is kept in the run's folder as ``wandb_run_id``.

    With ``WANDB_MODE=offline`` everything stays in the run's folder, for ``wandb sync`` some day.

    Args:
        options: arguments of `wandb.init`, such as ``project`` (default: ``WANDB_PROJECT``, or dgunet), ``entity``.
    """

    def __init__(self, **options):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports go out also when offline
        import wandb

        self.wandb = wandb
        self.options = {"project": os.environ.get("WANDB_PROJECT", "dgunet")} | options

    def start(self, run):
        super().start(run)
        kept = run.folder / "wandb_run_id"
        options = dict(
            name=run.name, dir=run.folder, config=run.config, id=_kept_id(kept, run), resume="allow",
            settings=self.wandb.Settings(console="off"),  # train.log has the lines; a bar would be torn
        )  # fmt: skip
        try:
            self.session = self.wandb.init(**options | self.options)
        except self.wandb.errors.Error as error:
            if run.resumed and not isinstance(error, self.wandb.errors.UsageError):
                raise  # no network, perhaps
            raise UserError(f"wandb: {error} Or set WANDB_MODE=offline to keep the run on this machine") from error
        kept.write_text(self.session.id)
        # Steps of ours, not W&B's, which may never go back: a run that was killed is resumed at an earlier step.
        self.session.define_metric("*", step_metric="global_step")

    def log(self, done, values, images):
        if images:
            values["validation"] = [self.wandb.Image(image, caption="input | restored | target") for image in images]
        self.session.log({"global_step": done} | values)

    def close(self, failed):
        self.session.finish(exit_code=int(failed))


class MLflowLogger(_MetricsLogger):
    """Logs to MLflow; a resumed run goes on there, its id is kept in the run's folder as ``mlflow_run_id``.

    Args:
        uri: of the tracking server or folder; default: ``MLFLOW_TRACKING_URI``, or ``mlruns`` beside the run's folder,
            which ``MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri checkpoints/mlruns`` shows.
        experiment: default: ``MLFLOW_EXPERIMENT_NAME``, or dgunet.
    """

    seconds = 10  # between two steps that are logged: a call may wait for a server

    def __init__(self, uri: str | None = None, experiment: str | None = None):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 wants to be asked for plain files
        import mlflow

        self.mlflow = mlflow
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "dgunet")

    def start(self, run):
        super().start(run)
        self.last_step = -math.inf
        try:
            self._open(run)
        except self.mlflow.MlflowException as error:
            if run.resumed:
                raise
            raise UserError(f"mlflow: {error}; check MLFLOW_TRACKING_URI") from error

    def _open(self, run: Run):
        self.client = self.mlflow.MlflowClient(self.uri or (run.folder.absolute().parent / "mlruns").as_uri())
        kept = run.folder / "mlflow_run_id"
        self.id = _kept_id(kept, run)
        if self.id:
            self.client.update_run(self.id, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(self.experiment)
        self.id = self.client.create_run(experiment, run_name=run.name).info.run_id
        kept.write_text(self.id)
        params = [self.mlflow.entities.Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(params), 100):  # as many as a server takes at once
            self.client.log_batch(self.id, params=params[first : first + 100])

    def log_step(self, epoch, step, values):
        if time.monotonic() - self.last_step >= self.seconds:
            super().log_step(epoch, step, values)
            self.last_step = time.monotonic()

    def log(self, done, values, images):
        now = int(time.time() * 1000)
        metrics = [self.mlflow.entities.Metric(name, value, now, done) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)
        for number, image in enumerate(images, start=1):
            self.client.log_image(self.id, image, key=f"validation_{number}", step=done)

    def close(self, failed):
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def _kept_id(path: Path, run: Run) -> str | None:
    return path.read_text().strip() if run.resumed and path.exists() else None


LOGGERS = {
    "csv": CSVLogger,
    "console": ConsoleLogger,
    "images": ImageLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MLflowLogger,
}


def make_loggers(given: str | list, key: str = "TRAINING.LOGGERS") -> list[Logger]:
    """The loggers of a list of names of `LOGGERS`, ``module:name`` of one's own, which is called, and loggers.

    ``"auto"``: csv, console, and tensorboard where that is installed.

    Raises:
        UserError: an unknown name, or an object that is no `Logger`.
        ModuleNotFoundError: a logger's package is not installed.
    """
    if given == "auto":
        with contextlib.suppress(ImportError):
            return make_loggers(["csv", "console", "tensorboard"], key)
        return make_loggers(["csv", "console"], key)
    loggers = []
    for logger in given:
        if isinstance(logger, str):
            if logger not in LOGGERS and not is_object_name(logger):
                known = ", ".join(LOGGERS)
                raise UserError(f"{key}: there is no logger {logger!r:.100}; take {known} or module:name of your own")
            make = LOGGERS[logger] if logger in LOGGERS else import_object(logger, key)
            name, logger = logger, make() if callable(make) else make
        else:
            name = repr(logger)
        if not isinstance(logger, Logger):
            raise UserError(f"{key}: {name:.100} is no dgunet.training.loggers.Logger; derive its class from that")
        loggers.append(logger)
    return loggers


class RunLogger:
    """Keeps the history of a run and tells its loggers of it, within ``with opened(trainer)``.

    Args:
        loggers: none in processes other than the main one, which only keep the rows.
    """

    def __init__(self, loggers: list[Logger]):
        self.loggers = loggers
        self.rows: list[dict] = []  # one at each validation, and at the end of an epoch without one
        self.started: list[Logger] = []
        self.failed: list[Logger] = []
        self.last = (0, StepCounts())  # the epoch of the last `log_step`, and what it had counted

    @contextlib.contextmanager
    def opened(self, trainer):
        """Start the loggers for a `Trainer`'s run, and close them."""
        run = Run(
            trainer.cfg.MODEL.SESSION, trainer.folder, flat_config(trainer.cfg), trainer.cfg.OPTIM.NUM_EPOCHS,
            trainer.batches.steps, trainer.epoch, trainer.step, trainer.resumed is not None, self.rows,
        )  # fmt: skip
        failed = True
        try:
            for logger in self.loggers:
                self._start(logger, run)
            if self.loggers:
                trainer.timer.peak_rate = _peak_image_rate(trainer)
            yield
            failed = False
        finally:
            for logger in reversed(self.started):
                self._tell(logger, "close", failed)
            self.started, self.failed = [], []

    def _start(self, logger: Logger, run: Run):
        try:
            logger.start(run)
        except (UserError, ImportError):
            raise
        except Exception as error:
            if not run.resumed:
                raise
            self._warn(logger, error)  # a run of days that a queue starts again, perhaps without a network
        else:
            self.started.append(logger)

    def _tell(self, logger: Logger, method: str, *args):
        try:
            getattr(logger, method)(*args)
        except Exception as error:
            if logger not in self.failed:
                self.failed.append(logger)
                self._warn(logger, error)

    def _warn(self, logger: Logger, error: Exception):
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = describe_error(error) or " ".join(f"{type(error).__name__}: {error}".split())
        log.warning(
            "%s fails, the training goes on without it: %.500s (%s:%d)",
            type(logger).__name__, what, Path(place.filename).name, place.lineno,
        )  # fmt: skip

    def log_step(self, epoch: int, step: int, counts: StepCounts, lr: float, speed: dict[str, float]):
        """Tell of the steps since the last call, or since the epoch's first that this process has done.

        Args:
            counts: of the epoch so far.
            speed: see `Timer`.
        """
        if not self.started:
            return
        since = counts.since(self.last[1] if self.last[0] == epoch else StepCounts())
        self.last = (epoch, counts)
        values = {"loss": since.mean_loss, "grad_norm": since.mean_norm, "epoch_loss": counts.mean_loss, "lr": lr}
        for logger in self.started:
            if logger not in self.failed:
                self._tell(logger, "log_step", epoch, step, values | speed)

    def log_row(self, row: dict, images: list[np.ndarray]):
        """Add a row to the history and tell of it."""
        self.rows.append(row)
        for logger in self.started:
            self._tell(logger, "log_row", row, images)


class Timer:
    """How fast an epoch is trained since it began, or was resumed, without validations and saves.

    ``speed``, after `read`: ``images_per_second``, ``step_seconds``, and ``data_wait``, the share of the time in which
    the training waited for data; ``peak_memory_mib``, see `hardware.peak_memory`; with a ``peak_rate``, see
    `cost.peak_image_rate`, also ``share_of_peak``.
    """

    def __init__(self, batch_size: int, device: torch.device):
        self.batch_size, self.device, self.peak_rate = batch_size, device, None
        self.restart()

    def restart(self):
        self.since, self.steps, self.waited = time.monotonic(), 0, 0.0
        self.speed = dict.fromkeys(("images_per_second", "step_seconds", "data_wait"), math.nan)

    def batches(self, loader):
        """The batches of a loader, each a step; the time of waiting for them is counted."""
        iterator = iter(loader)
        while True:
            before = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - before
            if batch is None:
                return
            self.steps += 1
            yield batch

    @contextlib.contextmanager
    def paused(self):
        before = time.monotonic()
        try:
            yield
        finally:
            self.since += time.monotonic() - before

    def read(self) -> dict[str, float]:
        """``speed`` as it is now, at the end of a step."""
        seconds = time.monotonic() - self.since
        self.speed = {
            "images_per_second": self.steps * self.batch_size / seconds,
            "step_seconds": seconds / self.steps,
            "data_wait": self.waited / seconds,
            "peak_memory_mib": round(peak_memory(self.device) / 2**20),
        }
        if self.peak_rate:
            self.speed["share_of_peak"] = self.speed["images_per_second"] / self.peak_rate
        return self.speed


def history_row(trainer, counts: StepCounts, validated: bool) -> dict:
    """A `Trainer`'s row of the history: its present epoch, step and scores, and how fast it is."""
    best, speed = trainer.best, trainer.timer.speed
    return {
        "epoch": trainer.epoch, "step": trainer.step, "lr": trainer.train_state.lr, "loss": counts.mean_loss,
        "psnr": trainer.last_psnr if validated else None, "best_psnr": best["psnr"] if best["epoch"] else None,
        "images_per_second": round(speed["images_per_second"], 2),
        "skipped_steps": counts.skipped, "rollbacks": trainer.rollbacks,
        "grad_norm": counts.mean_norm, "grad_norm_max": counts.norm_max, "data_wait": round(speed["data_wait"], 4),
        "peak_memory_mib": round(peak_memory(trainer.device) / 2**20), "best_epoch": best["epoch"] or None,
        "share_of_peak": round(speed["share_of_peak"], 4) if "share_of_peak" in speed else None,
    }  # fmt: skip


def describe(trainer, config: bool = False, missing: list[str] = ()):
    """Print what a `Trainer` is about to do, what is ``missing`` for that, and with ``config`` also every key."""
    cfg, model = trainer.cfg, trainer.train_state.model
    if not trainer.main:
        return
    count = sum(p.numel() for p in model.parameters())
    hardware = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "CPU"
    epochs = "" if trainer.resumed is None else f", continuing in epoch {trainer.epoch} after step {trainer.step}"
    state = trainer.train_state
    how = "bf16 autocast" if state.amp else "float32"
    how += ", compiled" * state.compiled + ", steps replayed as a CUDA graph" * (state.captured_step is not None)
    if config:
        print(f"config (# * marks what differs from the defaults)\n{format_config(cfg)}\n")
    source = cfg.TRAINING.INPUT_DIR or cfg.TRAINING.TRAIN_DIR
    held_out = "them, the last ones, held out" if source else "the other data set"
    lines = [
        f"model       {cfg.MODEL.NAME}, {count:,} parameters, {model.stages} stages",
        *(f"missing     {what}" for what in missing),
        f"training    {len(trainer.train_set) // trainer.train_set.repeat} images of {source or 'the data set'}, "
        f"{trainer.train_set.repeat} crops of {cfg.TRAINING.TRAIN_PS} px from each in an epoch",
        f"validation  {len(trainer.val_set)} images of "
        f"{cfg.TRAINING.VAL_INPUT_DIR or cfg.TRAINING.VAL_DIR or held_out}",
        f"batch       {cfg.OPTIM.BATCH_SIZE} = {trainer.world} processes x {cfg.OPTIM.ACCUMULATE} passes x "
        f"{trainer.train_state.micro_batch_size}",
        f"schedule    {cfg.OPTIM.NUM_EPOCHS} epochs"
        + (f" of {trainer.batches.steps} steps{epochs}" if len(trainer.train_set) else "")
        + (f", or {tqdm.format_interval(cfg.TRAINING.SECONDS)} in all" if cfg.TRAINING.SECONDS else ""),
        f"device      {trainer.world} x {hardware}, {how}",
        *([f"memory      {_format_memory(trainer)}"] if config else []),
        f"writes to   {trainer.folder.absolute()} (the whole config as well; --dry_run shows it)",
    ]
    notes = list(trainer.notes)
    if trainer.changed:
        notes.append(f"these keys differ from the run being continued: {', '.join(trainer.changed)}")
    if trainer.validation_changed:
        notes.append("validation is different than before: the best score begins anew")
    print(*lines, *(f"note        {note}" for note in notes), sep="\n", flush=True)


def _peak_image_rate(trainer) -> float | None:
    if trainer.device.type != "cuda":
        return None
    from dgunet.training.cost import peak_image_rate  # which takes half a second to import

    return peak_image_rate(trainer.train_state, trainer.cfg.TRAINING.TRAIN_PS)


def _format_memory(trainer) -> str:
    from dgunet.training.cost import step_memory

    try:
        gibibytes = step_memory(trainer.train_state, trainer.cfg.TRAINING.TRAIN_PS) / 2**30
    except Exception as error:  # a module of the user's own that tensors without values do not go through
        return f"not known beforehand ({' '.join(str(error).split()):.100})"
    less = "" if trainer.cfg.SPEED.CHECKPOINTING else "; SPEED.CHECKPOINTING True needs less"
    return f"{gibibytes:.1f} GiB for the tensors of a step, in each process{less}"


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
    figure.savefig(path, format="png")
