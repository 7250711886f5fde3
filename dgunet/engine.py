"""The training loop, one for all tasks and any number of processes; `training` is its command line."""

import contextlib
import functools
import itertools
import logging
import math
import operator
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset

from dgunet import distributed
from dgunet.checkpoint import describe_model, read_checkpoint, save_checkpoint
from dgunet.config import changed_keys, format_config
from dgunet.data import changed_items, fingerprint
from dgunet.degradations import percentage
from dgunet.errors import UserError, shorten_list
from dgunet.metrics import psnr_batch
from dgunet.model import DGUNet, MeasureThenRestore
from dgunet.patches import ResumableBatchSampler, TrainingSet, ValidationSet, make_dataloader
from dgunet.runlog import RunLogger, describe
from dgunet.schedule import EpochSchedule, validation_steps
from dgunet.state import cannot_be_resumed, check_state
from dgunet.train_state import StepCounts, TrainState
from dgunet.transforms import center_crop, unit_range

log = logging.getLogger("dgunet")

# Keys that may differ between a run and its continuation without a word.
_FREE_TO_CHANGE = ("GPU", "DEVICE", "PROCESSES", "TRAINING.RESUME", "TRAINING.WORKERS", "TRAINING.SAVE_MINUTES")

# What a validation's score depends on besides the images and the weights, or how that begins.
_VALIDATION = ("SEED", "TRAINING.VAL_PS", "SYNTHESIS", "MODEL.KERNEL", "MODEL.NOISE", "MODEL.GREY", "MODEL.RATIO")


def changed_settings(cfg, then) -> list[str]:
    """The keys in which a run's config differs from what it was begun with, but for those that are free to change."""
    return [key for key in changed_keys(cfg, then) if key not in _FREE_TO_CHANGE]


def _run_folder(cfg) -> Path:
    return Path(cfg.TRAINING.SAVE_DIR) / cfg.MODEL.SESSION


# The files of a run's folder that it can be resumed from, the one to prefer first.
_STATES = ("model_latest.pth", "model_best.pth")

# A second signal that comes so many seconds after the first is no echo of it.
_LATE = 5


def checkpoint_to_resume(cfg) -> Path | None:
    """The state that a run is to continue from, if there is one."""
    states = [_run_folder(cfg) / name for name in _STATES]
    return next((path for path in states if cfg.TRAINING.RESUME and path.exists()), None)


class Trainer:
    """Trains a model as a config says, and keeps everything needed to continue exactly where it stopped.

    In the run's folder, SAVE_DIR/SESSION: ``model_latest.pth`` (the whole training state), ``model_best.pth`` (the same
    at the best validation), ``model_epoch_N.pth`` (weights of each validation), ``config.yaml``, what `RunLogger`
    writes, and ``.lock``, by which only one training at once writes there. Nothing is read there before `resume`, nor
    written before `fit`.

    Args:
        cfg: see `config.py`.
        model: a DGUNet. One with a known degradation is trained on clean images, which it is given measured.
        train_set, val_set: see `patches.TrainingSet` and `patches.ValidationSet`.

    Raises:
        UserError: an impossible batch size, or settings that do not go together.
    """

    def __init__(self, cfg, model: DGUNet, train_set: TrainingSet, val_set: ValidationSet):
        self.cfg, self.train_set, self.val_set = cfg, train_set, val_set
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.main = self.rank == 0
        self.folder = _run_folder(cfg)
        if cfg.OPTIM.BATCH_SIZE % (self.world * cfg.OPTIM.ACCUMULATE):
            raise UserError(
                f"OPTIM.BATCH_SIZE is the total and must be a multiple of {self.world} processes times "
                f"{cfg.OPTIM.ACCUMULATE} accumulation steps, got {cfg.OPTIM.BATCH_SIZE}"
            )
        self.batches = ResumableBatchSampler(len(train_set), cfg.OPTIM.BATCH_SIZE, cfg.SEED, self.rank, self.world)
        self.train_state = TrainState(cfg, model)
        self.device = self.train_state.device
        self.schedule = EpochSchedule(self.train_state.optimizer, cfg.OPTIM)

        self.epoch, self.step = 1, 0  # the epoch under way and the steps done in it
        self.best = {"psnr": float("-inf"), "epoch": 0}
        self.last_psnr = float("nan")
        self.validation_due = False  # that of the last step was interrupted
        self.rollbacks = 0  # to good weights, after steps without a finite loss
        self.log = RunLogger(self.folder, cfg.MODEL.SESSION, cfg.OPTIM.NUM_EPOCHS, self.batches.steps, self.main)
        self.resumed: Path | None = None  # the file that the run was continued from
        self.changed: list[str] = []  # keys of the config that were others then
        self.validation_changed = False  # its images, or what it does with them
        self.notes: list[str] = []  # what the user should know about how the run begins
        self.signal_received = self.stopped = 0  # signals' numbers: this process's, and the one all agree to stop for
        self.signal_time = 0.0
        self.training_since = 0.0  # when the epoch's training began, later by what was spent on other things
        self.sync_interval = 1  # steps between two looks at the counters, which make the CPU wait for the device
        self.last_save = time.monotonic()

    # --------------------------------------------------------------------------------------------------------- a run

    def fit(self):
        """Train until the last epoch; SIGTERM or Ctrl-C saves and exits with 128 + the signal's number.

        A validation under way is interrupted for that, and done when the run is resumed. A second signal, some seconds
        after the first, ends the run at once.

        Raises:
            UserError: another training is at work in the folder; as `resume` does; an image that cannot be used;
                too many steps in a row without a finite loss.
        """
        with self._lock_run_dir():
            self.resume()
            describe(self)
            if self.main:
                _ = self.data, self.val_data  # as they are now, before the first step
                (self.folder / "config.yaml").write_text(format_config(self.cfg) + "\n")
            self.train_state.wrap_ddp()
            with self.log, self._graceful_shutdown(), self._make_dataloader() as loader:
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
                if not self.stopped and self.best["epoch"]:
                    log.info("done: best PSNR %.2f dB in epoch %d", self.best["psnr"], self.best["epoch"])
            if self.stopped:
                distributed.barrier()
                sys.exit(128 + self.stopped)

    def _run_epoch(self, loader: DataLoader) -> bool:
        """Train to the end of the epoch under way; False if a signal stopped it before."""
        cfg, steps = self.cfg, self.batches.steps
        self.schedule.go_to(self.epoch)
        self.batches.epoch, self.batches.start = self.epoch, self.step
        validations = validation_steps(self.epoch, steps, cfg)
        first, rate = self.step, float("nan")
        with self.log.bar(self.epoch, self.step) as bar:
            if self.validation_due:
                self._validate_and_save(rate)
            self.training_since = time.monotonic()
            for input, target in () if self.stopped else loader:
                self.train_state.train_step(
                    self.train_state.to_device(input), self.train_state.to_device(target), (self.epoch, self.step)
                )
                self.step += 1
                bar.update()
                if self.step % self.sync_interval and self.step != steps and self.step not in validations:
                    continue
                counts = self.train_state.counters.read()  # waits for the device
                seconds = (time.monotonic() - self.training_since) / (self.step - first)
                rate = cfg.OPTIM.BATCH_SIZE / seconds
                self._log_progress(bar, counts, rate, seconds)
                self._handle_skipped_steps(counts)
                self._sync_stop_flag(seconds)
                with self._eval_mode():
                    due = time.monotonic() - self.last_save > 60 * cfg.TRAINING.SAVE_MINUTES
                    if self.step in validations:
                        self._validate_and_save(rate)
                    elif self.step < steps and (due or self.stopped):
                        self._save_latest()  # after the last step only with the epoch's row in the history
                if self.stopped:
                    break
        if first < self.step == steps and steps not in validations:
            self._record(rate, validated=False)
            self._save_latest()
        if self.stopped:
            log.info(
                "stopped by signal %d in epoch %d after step %d; continue with TRAINING.RESUME True",
                self.stopped, self.epoch, self.step,
            )  # fmt: skip
        return not self.stopped

    def _next_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0
        self.train_state.counters.next_epoch()

    @contextlib.contextmanager
    def _eval_mode(self):
        """What is done within does not count for the images that are trained on in a second."""
        before = time.monotonic()
        yield
        self.training_since += time.monotonic() - before

    def _log_progress(self, bar, counts: StepCounts, rate: float, seconds: float):
        psnr = f"{self.last_psnr:.2f}" if self.last_psnr == self.last_psnr else "-"
        status = f"loss {counts.mean_loss:.4f}, PSNR {psnr}, lr {self.train_state.lr:.1e}, {rate:.1f} images/s"
        self.log.progress(bar, self.epoch, self.step, status, seconds)

    def _handle_skipped_steps(self, counts: StepCounts):
        """After some steps in a row without a finite loss go back to good weights, after too many give up."""
        optim, bad = self.cfg.OPTIM, counts.skipped_in_a_row
        may_roll_back = optim.ROLLBACK_AFTER_BAD_STEPS < optim.MAX_BAD_STEPS and self.rollbacks < optim.MAX_ROLLBACKS
        due = may_roll_back and 0 < optim.ROLLBACK_AFTER_BAD_STEPS <= bad
        if due and self.train_state.roll_back():
            self.rollbacks += 1
            self.schedule.lower(optim.ROLLBACK_LR_FACTOR)
            log.info(
                "epoch %d, step %d: loss or gradient was not finite in %d steps in a row; rolled back to the %s, "
                "cleared Adam's moments and lowered the lr to %.2e (rollback %d of at most %d)",
                self.epoch, self.step, bad, "averaged weights" if optim.EMA_DECAY else "last good weights",
                self.train_state.lr, self.rollbacks, optim.MAX_ROLLBACKS,
            )  # fmt: skip
        elif bad >= optim.MAX_BAD_STEPS:
            best = self.folder / "model_best.pth"
            again = f"; start again from {best} (MODEL.WEIGHTS)" if best.exists() else ""
            returned = f", also after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise UserError(
                f"loss or gradient was not finite in {bad} steps in a row (epoch {self.epoch}){returned}{again}. Try "
                "a lower OPTIM.LR_INITIAL, OPTIM.CLIP_NORM 0.01, or SPEED.AMP fp32, and check the data for broken "
                "images"
            )

    def _sync_stop_flag(self, seconds: float):
        """A signal may have reached only some of the processes; nor are their steps equally fast."""
        agreed = torch.tensor([self.signal_received, seconds], dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        self.stopped, seconds = int(agreed[0]), agreed[1].item()
        # Often enough to stop within some seconds; on the CPU a look costs nothing.
        if seconds:
            self.sync_interval = 1 if self.device.type == "cpu" else max(1, min(20, int(3 / seconds)))

    @torch.inference_mode()
    def validate(self) -> float | None:
        """Mean PSNR (protocol ``train_rgb``) of the final estimate over the validation set, whatever the processes.

        Images that are restored exactly, whose PSNR is infinite, are left out of the mean, and counted in the log; only
        where all are is it infinite. None where a signal has interrupted the validation.
        """
        model = MeasureThenRestore(self.train_state.eval_model)
        model.eval()
        torch.backends.cudnn.benchmark = len(self.val_set.sizes) == 1
        measuring = getattr(model.model.degradation, "validation_ratios", [None])  # each image with each of them
        scores = torch.zeros(len(self.val_set), len(measuring), dtype=torch.float64, device=self.device)
        mine = range(self.rank, len(self.val_set), self.world)
        subset, done, batch_size = Subset(self.val_set, mine), 0, self._validation_batch()
        rounds = -(-len(range(0, len(self.val_set), self.world)) // batch_size)  # of the process with the most images
        loaded = make_dataloader(subset, self.cfg.TRAINING.WORKERS, batch_size=batch_size)
        with torch.random.fork_rng(range(torch.cuda.device_count())), loaded as loader:
            batches = iter(loader)
            for k in range(rounds):
                for input, target in itertools.islice(batches, 1):
                    indices = list(mine)[done : done + len(input)]
                    x = self.train_state.to_device(input.flatten(0, -4))  # blocks as images of their own
                    for which, operator in enumerate(measuring):
                        # Random measurements are the same each time, whatever the processes.
                        draws = (
                            () if operator else self.train_state.random_draws((indices[0],), [(i,) for i in indices])
                        )
                        with self.train_state.autocast():
                            restored = model(x, *draws, measuring=operator)[0]
                        truth = center_crop(target, *restored.shape[-2:])
                        truth = unit_range(truth.to(self.device)).flatten(1, -3)  # and side by side again
                        scores[indices, which] = psnr_batch(restored.float().reshape(truth.shape), truth).double()
                    done += len(input)
                if k + 1 < rounds:
                    self._sync_stop_flag(0.0)
                if self.stopped:
                    break
        model.train()
        torch.backends.cudnn.benchmark = True
        if self.stopped:
            return None
        scores = distributed.sum_over_processes(scores)
        finite = scores != math.inf
        exact = int((~finite).sum())
        if exact:
            log.info("%d of %d validation images are restored exactly and left out of the mean", exact, scores.numel())
        if len(measuring) > 1:
            means = [column[keep].mean().item() for column, keep in zip(scores.T, finite.T, strict=True)]
            told = (f"{percentage(len(A.matrix), A.block)} %: {m:.2f}" for A, m in zip(measuring, means, strict=True))
            log.info("PSNR in dB by ratio: %s", ", ".join(told))
        return scores[finite].mean().item() if finite.any() else math.inf

    def _validation_batch(self) -> int:
        """Images at once: no more pixels than in a training pass, as far as they are of one size."""
        sizes = self.val_set.sizes
        if len(sizes) > 1 or (
            self.train_state.measured and not hasattr(self.train_state.model.degradation, "validation_ratios")
        ):
            return 1
        pixels = max(map(math.prod, sizes))
        return max(1, self.train_state.micro_batch_size * self.cfg.TRAINING.TRAIN_PS**2 // pixels)

    def _validate_and_save(self, rate: float):
        """Validate, unless the run ends before the end of that: it is then done when the run is resumed.

        The state is saved first: a validation may take longer than a scheduler waits, or more memory than there is.
        """
        if not self.validation_due:
            self.validation_due = True
            self._save_latest()
        psnr = None if self.stopped else self.validate()
        if psnr is not None:
            self.last_psnr, self.validation_due = psnr, False
            self._after_validation(rate)
            self._sync_stop_flag(0.0)

    def _after_validation(self, rate: float):
        better = self.last_psnr > self.best["psnr"]
        if better:
            self.best = {"psnr": self.last_psnr, "epoch": self.epoch}
        self._record(rate, validated=True)
        # The state comes last: a run that is killed before it repeats the validation and writes all three.
        if self.cfg.TRAINING.SAVE_EACH_VALIDATION:
            part = "" if self.step == self.batches.steps else f"_step_{self.step}"
            self.save(f"model_epoch_{self.epoch}{part}.pth", state=self.weights() if self.main else None)
        if better:
            self.save("model_best.pth", "model_latest.pth")
        else:
            self._save_latest()

    def _record(self, rate: float, validated: bool):
        """One row of the history: at each validation, and at the end of an epoch without one."""
        counts = self.train_state.counters.read()
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.train_state.lr,
            "loss": counts.mean_loss,
            "psnr": self.last_psnr if validated else None,
            "best_psnr": self.best["psnr"] if self.best["epoch"] else None,
            "images_per_second": round(rate, 2),
            "skipped_steps": counts.skipped,
            "rollbacks": self.rollbacks,
        }
        self.log.record(row, self.best["epoch"])
        if counts.skipped_in_a_row == 0 and not (validated and math.isnan(self.last_psnr)):
            self.train_state.save_rollback_weights()

    # ------------------------------------------------------------------------------------------- saving and resuming

    def resume(self):
        """Continue the run in the folder, if it is to be continued; one that is not must not be there.

        Raises:
            UserError: there is another run, or none to continue; a state that is damaged, or of another network or
                other data; a folder that not all processes see.
        """
        path = checkpoint_to_resume(self.cfg)
        found = torch.tensor(float(path is not None), device=self.device)
        everywhere = distributed.sum_over_processes(found).item()
        if everywhere not in (0, self.world):
            raise UserError(
                f"only {everywhere:.0f} of {self.world} processes see {self.folder / 'model_latest.pth'}; "
                "TRAINING.SAVE_DIR must be on a disk that all machines share"
            )
        self.notes = []
        if path is not None:
            self._resume_from(path)
            # By another measure, what was best would stay for ever; or killed before it was written for the first time.
            if self.validation_changed or not (self.folder / "model_best.pth").exists():
                self.best = {"psnr": float("-inf"), "epoch": 0}
        elif self.main:
            self._check_run_dir_is_free()

    def _resume_from(self, path: Path):
        latest, best = (self.folder / name for name in _STATES)
        try:
            self.load_state_dict(read_checkpoint(path), path)
        except UserError as error:
            if path == best:
                raise UserError(f"{latest} is missing, and the other state of the run is of no use: {error}") from error
            try:
                self.load_state_dict(read_checkpoint(best), best)
            except UserError:
                raise error from None
            raise UserError(
                f"{error}. {best} can be resumed (epoch {self.epoch}, step {self.step}): move {latest} away for that"
            ) from error
        if path == best:
            self.notes.append(f"{latest} is missing: the run is resumed from {best}, which may be older")

    def _check_run_dir_is_free(self):
        resume, weights = self.cfg.TRAINING.RESUME, [*self.folder.glob("model_*.pth")]
        if weights and resume:
            newest = max(weights, key=lambda path: path.stat().st_mtime)
            raise UserError(
                f"{self.folder} holds a run, but neither {' nor '.join(_STATES)} to resume it from; put one back, or "
                f"start another run from its weights with MODEL.SESSION NAME MODEL.WEIGHTS {newest}"
            )
        if weights:
            resumable = any(path.name in _STATES for path in weights)
            advice = "continue it with TRAINING.RESUME True, or " if resumable else ""
            raise UserError(
                f"{self.folder} holds another run; {advice}give this one its own name with MODEL.SESSION NAME"
            )
        if resume is True:
            others = sorted(path.parent.name for path in self.folder.parent.glob(f"*/{_STATES[0]}"))
            there = f" (runs there: {shorten_list(others)})" if others else ""
            raise UserError(
                f"there is no run to resume in {self.folder}; check MODEL.SESSION and TRAINING.SAVE_DIR{there}, or "
                "begin one with TRAINING.RESUME auto, which resumes it later"
            )
        if resume:
            self.notes.append(f"nothing to resume in {self.folder}: starting from scratch")

    @functools.cached_property
    def data(self) -> dict:
        """What tells the training data from others, when a run is continued."""
        return fingerprint(self.train_set.items)

    @functools.cached_property
    def val_data(self) -> dict:
        """The same of the validation's."""
        return fingerprint(self.val_set.items)

    def state_dict(self) -> dict:
        """Everything needed to continue, in types that load with ``weights_only=True``."""
        random = {"cpu": torch.get_rng_state(), "cuda": None}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
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
            "history": self.log.rows,
            "random": random,
            "data": self.data,
            "val_data": self.val_data,
        }

    def load_state_dict(self, state: dict, path: Path):
        """Continue from a state; ``path`` is the file that it comes from.

        Raises:
            UserError: it is none, or of another network or other data.
        """
        check_state(state, path)
        self.train_state.load_state_dict(state, path)
        self.epoch, self.step = state["epoch"], state["step"]
        self.best, self.last_psnr = state["best"], state["last_psnr"]
        self.validation_due = state.get("validation_due", False)
        self.rollbacks, self.schedule.factor = state.get("rollbacks", 0), state.get("lr_factor", 1.0)
        self.log.rows = state["history"]
        loaders = {
            "random": self._load_random, "config": self._compare_config, "data": self._compare_data,
            "val_data": self._compare_val_data,
        }  # fmt: skip
        for key, load in loaders.items():
            try:
                if key in state:  # the oldest states have no data
                    load(state[key], path)
            except UserError:
                raise
            except Exception as error:  # what is none of ours fails in any way there is
                raise cannot_be_resumed(path, key) from error
        self.resumed = path

    def _load_random(self, random: dict, _):
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda" and random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def _compare_config(self, text: str, _):
        """Note what has changed; with another batch size, go on at the same share of the epoch."""
        then = type(self.cfg).load_cfg(text)
        self.changed = changed_settings(self.cfg, then)
        self.validation_changed = any(key.startswith(_VALIDATION) for key in self.changed)
        done = self.step * then.OPTIM.BATCH_SIZE // self.cfg.OPTIM.BATCH_SIZE
        self.step = operator.index(min(done, self.batches.steps))
        if self.step < 0:
            raise ValueError("no step of an epoch")

    def _compare_data(self, then: dict, path: Path):
        changes = changed_items(self.train_set.items, then)
        if changes:
            raise UserError(
                f"{self.cfg.TRAINING.TRAIN_DIR} is not what {path} was trained on: {changes}. Put that back, "
                f"or start a run of its own from its weights: MODEL.SESSION NAME MODEL.WEIGHTS {path}"
            )

    def _compare_val_data(self, then: dict, _):
        self.validation_changed |= bool(changed_items(self.val_set.items, then))

    def weights(self) -> dict:
        """What using the network needs: its weights (the averaged ones where EMA is on), name and config."""
        result = self.train_state.eval_model
        return {"state_dict": result.state_dict(), "model": describe_model(result), "config": self.cfg.dump()}

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

    # ------------------------------------------------------------------------------------------------------ plumbing

    @contextlib.contextmanager
    def _lock_run_dir(self):
        """Make the run's folder and lock it, in the main process; the others wait for that."""
        with contextlib.ExitStack() as lock:
            if self.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                advice = "wait for its end, or give this one its own name with MODEL.SESSION NAME"
                lock.enter_context(distributed.lock_dir(self.folder, "training", advice))
            distributed.barrier()
            yield

    def _make_dataloader(self) -> contextlib.AbstractContextManager[DataLoader]:
        pinned = self.device.type == "cuda"
        return make_dataloader(self.train_set, self.cfg.TRAINING.WORKERS, batch_sampler=self.batches, pin_memory=pinned)

    @contextlib.contextmanager
    def _graceful_shutdown(self):
        """Within, SIGTERM and Ctrl-C are noted, for the loop to stop at the end of a step; a late second one exits."""

        def note(number, _):
            if not self.signal_received:
                self.signal_received, self.signal_time = number, time.monotonic()
            elif time.monotonic() - self.signal_time > _LATE:
                if dist.is_initialized():
                    os._exit(128 + number)  # nothing that would wait for the others
                sys.exit(128 + number)

        self.signal_received = self.stopped = 0
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
