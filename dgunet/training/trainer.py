"""The training loop, one for all tasks and any number of processes; `training` is its command line."""

import functools
import logging
import math
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.data.datasets import TrainingSet, ValidationSet
from dgunet.data.loader import ResumableBatchSampler, make_dataloader
from dgunet.data.pairs import fingerprint
from dgunet.model.degradations import is_ours, try_operator
from dgunet.model.network import DGUNet
from dgunet.runtime import distributed
from dgunet.runtime.errors import UserError
from dgunet.training.config import format_config
from dgunet.training.loggers import Logger, RunLogger, Timer, describe, history_row, make_loggers
from dgunet.training.resume import load_state, lock_run_dir, resume, run_dir
from dgunet.training.schedule import EpochSchedule, RunClock, validation_steps
from dgunet.training.step import StepCounts, TrainState
from dgunet.training.validation import validate

log = logging.getLogger("dgunet")


class Trainer:
    """Trains a model as a config says, and saves everything needed to continue exactly where it stopped.

    In the run's folder, SAVE_DIR/SESSION: ``model_latest.pth`` (the whole training state), ``model_best.pth`` (the same
    at the best validation), ``model_epoch_N.pth`` (weights of each validation), ``config.yaml``, what the loggers
    write, and ``.lock``, which lets only one training write there. Nothing is read before `resume`, nor written before
    `fit`.

    Args:
        cfg: see `config.py`.
        model: a DGUNet. One with a known degradation is trained on clean images, from which its input is measured.
        train_set, val_set: see `datasets.TrainingSet` and `datasets.ValidationSet`.
        loggers: instead of TRAINING.LOGGERS, names as there or a `loggers.Logger` each; unused but in process 0.

    Raises:
        UserError: an impossible batch size, or settings that do not go together.
    """

    def __init__(
        self, cfg, model: DGUNet, train_set: TrainingSet, val_set: ValidationSet,
        loggers: list[str | Logger] | None = None,
    ):  # fmt: skip
        self.cfg, self.train_set, self.val_set = cfg, train_set, val_set
        rank, self.world = distributed.rank(), distributed.world_size()
        self.main, self.folder = rank == 0, run_dir(cfg)
        if cfg.OPTIM.BATCH_SIZE % (self.world * cfg.OPTIM.ACCUMULATE):
            raise UserError(
                f"OPTIM.BATCH_SIZE is the total and must be a multiple of {self.world} processes times "
                f"{cfg.OPTIM.ACCUMULATE} accumulation steps, got {cfg.OPTIM.BATCH_SIZE}"
            )
        self.batches = ResumableBatchSampler(len(train_set), cfg.OPTIM.BATCH_SIZE, cfg.SEED, rank, self.world)
        self.train_state = TrainState(cfg, model, cfg.OPTIM.NUM_EPOCHS * self.batches.steps)
        self.device = self.train_state.device
        if model.degradation is not None and not is_ours(model.degradation):
            _try_operator(cfg, self.train_state, sorted(val_set.sizes))
        self.schedule = EpochSchedule(self.train_state.optimizer, cfg.OPTIM)
        self.clock = RunClock(cfg.TRAINING.SECONDS)

        self.epoch, self.step = 1, 0  # the current epoch and the steps done in it
        self.best = {"psnr": float("-inf"), "epoch": 0}
        self.last_psnr = float("nan")
        self.validation_due = False  # that of the last step was interrupted
        self.rollbacks = 0  # to good weights, after steps without a finite loss
        self.log = RunLogger(make_loggers(cfg.TRAINING.LOGGERS if loggers is None else loggers) if self.main else [])
        self.panels: list = []  # some images of the last validation, see `validation.side_by_side`
        self.resumed: Path | None = None  # the file that the run was resumed from
        self.changed: list[str] = []  # keys of the config that were different then
        self.validation_changed = False  # its images, or what it does with them
        self.notes: list[str] = []  # what the user should know about how the run begins
        self.stop = distributed.StopSignal()
        self.timer = Timer(cfg.OPTIM.BATCH_SIZE, self.device)
        self.sync_interval = 1  # steps between two reads of the counters, which make the CPU wait for the device
        self.last_save = time.monotonic()

    # --------------------------------------------------------------------------------------------------------- a run

    def fit(self):
        """Train until the last epoch; SIGTERM or Ctrl-C saves and exits with 128 + the signal's number.

        They also interrupt a validation, which is done again when the run is resumed. A second signal, some seconds
        after the first, ends the run at once.

        Raises:
            UserError: another training writes to the folder; as `resume` does; an image that cannot be used; too many
                steps in a row without a finite loss.
        """
        with lock_run_dir(self.folder, self.main):
            self.resume()
            describe(self)
            if self.main:
                _ = self.fingerprints  # of the data as they are now, before the first step
                (self.folder / "config.yaml").write_text(format_config(self.cfg) + "\n")
            self.train_state.wrap_ddp()
            loading = make_dataloader(
                self.train_set, self.cfg.TRAINING.WORKERS, batch_sampler=self.batches,
                pin_memory=self.device.type == "cuda",
            )  # fmt: skip
            with self.log.opened(self), self.stop, loading as loader:
                for note in self.notes:
                    log.info(note)
                if self.resumed is not None:
                    log.info("continuing %s: epoch %d, step %d", self.resumed, self.epoch, self.step)
                else:
                    self.train_state.save_rollback_weights()
                if self.step == self.batches.steps and not self.validation_due:  # saved at the end of an epoch
                    self._next_epoch()
                while self.epoch <= self.cfg.OPTIM.NUM_EPOCHS and self._run_epoch(loader):
                    self._next_epoch()
                if not self.stop.agreed and self.best["epoch"]:
                    log.info("done: best PSNR %.2f dB in epoch %d", self.best["psnr"], self.best["epoch"])
            if self.stop.agreed:
                distributed.barrier()
                sys.exit(128 + self.stop.agreed)

    def _run_epoch(self, loader: DataLoader) -> bool:
        """Train to the end of the current epoch; False if a signal or the run's clock stopped it before."""
        steps = self.batches.steps
        self.schedule.go_to(self.epoch)
        self.batches.epoch, self.batches.start = self.epoch, self.step
        validations = validation_steps(self.epoch, steps, self.cfg)
        self.timer.restart()
        if self.validation_due:
            with self.timer.paused():
                self._validate_and_save()
        self.schedule.follow(self.clock.progress)
        for batch in () if self.stop.agreed or self.clock.is_over else self.timer.batches(loader):
            self.train_state.train_step(*map(self.train_state.to_device, batch), (self.epoch, self.step))
            self.step += 1
            if self.step % self.sync_interval and self.step != steps and self.step not in validations:
                continue
            counts = self.train_state.counters.read()  # waits for the device
            speed = self.timer.read()
            if self.cfg.TRAINING.SECONDS:
                speed["seconds_left"] = max(self.clock.for_training - self.clock.used, 0)
            self.log.log_step(self.epoch, self.step, counts, self.train_state.lr, speed)
            self._handle_skipped_steps(counts)
            self._sync_stop_flag(speed["step_seconds"])
            with self.timer.paused():
                due = time.monotonic() - self.last_save > 60 * self.cfg.TRAINING.SAVE_MINUTES
                if self.step in validations or self.clock.is_over:
                    self._validate_and_save()
                elif self.step < steps and (due or self.stop.agreed):
                    self._save_latest()  # after the last step only with the epoch's row in the history
            if self.stop.agreed or self.clock.is_over:
                break
        if self.timer.steps and self.step == steps and steps not in validations and not self.clock.is_over:
            self._record(validated=False)
            self._save_latest()
        if self.stop.agreed:
            log.info(
                "stopped by signal %d in epoch %d after step %d; continue with TRAINING.RESUME True",
                self.stop.agreed, self.epoch, self.step,
            )  # fmt: skip
        return not (self.stop.agreed or self.clock.is_over)

    def _next_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0
        self.train_state.counters.next_epoch()

    def _handle_skipped_steps(self, counts: StepCounts):
        """After some steps in a row without a finite loss go back to good weights, after too many give up."""
        optim, bad, after = self.cfg.OPTIM, counts.skipped_in_a_row, self.cfg.OPTIM.ROLLBACK_AFTER_BAD_STEPS
        due = 0 < after <= bad and after < optim.MAX_BAD_STEPS and self.rollbacks < optim.MAX_ROLLBACKS
        if due and self.train_state.roll_back():
            self.rollbacks += 1
            self.schedule.lower(optim.ROLLBACK_LR_FACTOR)
            log.info(
                "epoch %d, step %d: loss or gradient was not finite in %d steps in a row; back to the %s weights, "
                "cleared the optimizer's moments and lowered the lr to %.2e (rollback %d of at most %d)",
                self.epoch, self.step, bad, "averaged" if optim.EMA_DECAY else "last good", self.train_state.lr,
                self.rollbacks, optim.MAX_ROLLBACKS,
            )  # fmt: skip
        elif bad >= optim.MAX_BAD_STEPS:
            best = self.folder / "model_best.pth"
            again = f"; start again from {best} (MODEL.WEIGHTS)" if best.exists() else ""
            rolled_back = f", also after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise UserError(
                f"loss or gradient was not finite in {bad} steps in a row (epoch {self.epoch}){rolled_back}{again}. "
                "Try a lower OPTIM.LR_INITIAL, OPTIM.CLIP_NORM 0.01, or SPEED.AMP fp32; look for broken images"
            )

    def _sync_stop_flag(self, seconds: float = 0.0) -> bool:
        """Agree on whether to stop, and on how many steps of so many seconds to take before the next sync."""
        seconds, self.clock.used, self.clock.ending = self.stop.sync(self.device, seconds, *self.clock.read())
        self.schedule.follow(self.clock.progress)
        # Often enough to stop within some seconds; on the CPU reading the counters costs nothing.
        if seconds:
            self.sync_interval = 1 if self.device.type == "cpu" else max(1, min(20, int(3 / seconds)))
        return bool(self.stop.agreed)

    def validate(self) -> float | None:
        """Mean PSNR over the validation set, see `validation.validate`; None if a signal has interrupted it."""
        self.panels.clear()
        return validate(self.train_state, self.val_set, self._sync_stop_flag, self.panels if self.main else None)

    def _validate_and_save(self):
        """Validate, unless the run is stopped before the end of that: it is then done when the run is resumed.

        The state is saved first: a validation may take longer than a scheduler waits, or more memory than there is.
        """
        began = time.monotonic()
        if not self.validation_due:
            self.validation_due = True
            self._save_latest()
        psnr = None if self.stop.agreed else self.validate()
        if psnr is None:
            return
        self.last_psnr, self.validation_due = psnr, False
        if better := psnr > self.best["psnr"]:
            self.best = {"psnr": psnr, "epoch": self.epoch}
        self._record(validated=True)
        # The state comes last: a run that is killed before it repeats the validation and writes all three.
        if self.cfg.TRAINING.SAVE_EACH_VALIDATION:
            part = "" if self.step == self.batches.steps else f"_step_{self.step}"
            self.save(f"model_epoch_{self.epoch}{part}.pth", state=self.weights() if self.main else None)
        self.save("model_best.pth", "model_latest.pth") if better else self._save_latest()
        self.clock.ending = max(self.clock.ending, time.monotonic() - began)
        self._sync_stop_flag()

    def _record(self, validated: bool):
        """Add a row to the history: at each validation, and at the end of an epoch without one."""
        counts = self.train_state.counters.read()
        self.log.log_row(history_row(self, counts, validated), self.panels if validated else [])
        if counts.skipped_in_a_row == 0 and not (validated and math.isnan(self.last_psnr)):
            self.train_state.save_rollback_weights()

    # ------------------------------------------------------------------------------------------- saving and resuming

    def resume(self):
        """Resume the run in the folder, see `resume.resume`."""
        resume(self)

    def load_state_dict(self, state: dict, path: Path):
        """Continue from a state that was saved at ``path``, see `resume.load_state`."""
        load_state(self, state, path)

    @functools.cached_property
    def fingerprints(self) -> dict:
        """What identifies the training and the validation images when a run is resumed."""
        return {"data": fingerprint(self.train_set.items), "val_data": fingerprint(self.val_set.items)}

    def state_dict(self) -> dict:
        """Everything needed to continue, in types that load with ``weights_only=True``.

        All that is random in training is drawn from the seed, the epoch, the step and the image: there are no
        generators to save.
        """
        return {
            **self.weights(),
            **self.train_state.state_dict(),
            "epoch": self.epoch,  # the schedule is a function of this and the config
            "step": self.step,
            "best": self.best,
            "last_psnr": self.last_psnr,
            "validation_due": self.validation_due,
            "rollbacks": self.rollbacks,
            "lr_factor": self.schedule.factor,
            "seconds": self.clock.read()[0],
            "history": self.log.rows,
            **self.fingerprints,
        }

    def weights(self) -> dict:
        """What using the network needs: its weights (the averaged ones where EMA is on), name and config."""
        model = self.train_state.eval_model
        return {"state_dict": model.state_dict(), "model": describe_model(model), "config": self.cfg.dump()}

    def save(self, *names: str, state: dict | None = None):
        if self.main:
            state = self.state_dict() if state is None else state
            for name in names:
                save_checkpoint(state, self.folder / name)
        self.last_save = time.monotonic()

    def _save_latest(self):
        """Replace ``model_latest.pth``; not while steps are skipped one after the other, perhaps for bad weights."""
        if self.train_state.counters.read().skipped_in_a_row < 2 or not (self.folder / "model_latest.pth").exists():
            self.save("model_latest.pth")


def _try_operator(cfg, train_state: TrainState, sizes: list[tuple[int, ...]]):
    """Measure an image of each size once: what the user's operator cannot do shows now, not after an epoch."""
    known, channels = train_state.model.degradation, train_state.model.channels
    crop = ("TRAINING.TRAIN_PS", (cfg.TRAINING.TRAIN_PS,) * 2)
    for key, size in (crop, *(("TRAINING.VAL_PS", size) for size in dict.fromkeys(sizes[:1] + sizes[-1:]))):
        x = torch.zeros(1, channels, *size[-2:], device=train_state.device)
        name = f"{cfg.MODEL.DEGRADATION or type(known).__name__} ({key})"
        try_operator(known, x, train_state.random_draws((0,), [(0,)]), name)
