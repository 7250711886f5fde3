"""The training loop, one for all tasks and any number of processes; `training` is its command line."""

import contextlib
import functools
import logging
import math
import operator
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
from dgunet.errors import UserError
from dgunet.learner import Learner
from dgunet.metrics import psnr_batch
from dgunet.model import DGUNet, FromImages
from dgunet.patches import EpochBatches, TrainingSet, ValidationSet, loading
from dgunet.runlog import RunLog, describe
from dgunet.schedule import EpochSchedule, validation_steps
from dgunet.state import cannot_be_resumed, check_state
from dgunet.transforms import centre, unit_range

log = logging.getLogger("dgunet")

# Keys that may differ between a run and its continuation without a word.
_FREE_TO_CHANGE = ("GPU", "DEVICE", "PROCESSES", "TRAINING.RESUME", "TRAINING.WORKERS", "TRAINING.SAVE_MINUTES")

# What a validation's score depends on besides the pictures and the weights, or how that begins.
_VALIDATION = ("SEED", "TRAINING.VAL_PS", "SYNTHESIS", "MODEL.KERNEL", "MODEL.NOISE", "MODEL.GREY")


def changed_settings(cfg, then) -> list[str]:
    """The keys in which a run's config differs from what it was begun with, but for those that are free to change."""
    return [key for key in changed_keys(cfg, then) if key not in _FREE_TO_CHANGE]


def _run_folder(cfg) -> Path:
    return Path(cfg.TRAINING.SAVE_DIR) / cfg.MODEL.SESSION


def latest_to_resume(cfg) -> Path | None:
    """The state that a run is to continue from, if there is one."""
    latest = _run_folder(cfg) / "model_latest.pth"
    return latest if cfg.TRAINING.RESUME and latest.exists() else None


class Trainer:
    """Trains a model as a config says, and keeps everything needed to continue exactly where it stopped.

    In the run's folder, SAVE_DIR/SESSION: ``model_latest.pth`` (the whole training state), ``model_best.pth`` (the same
    at the best validation), ``model_epoch_N.pth`` (weights of each validation), ``config.yaml``, what `RunLog` writes,
    and ``.lock``, by which only one training at once writes there. Nothing is looked at there before `take_up`, nor
    written before `fit`.

    Args:
        cfg: see `config.py`.
        model: a DGUNet. One with a known degradation is trained on clean pictures, which it is given measured.
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
        self.batches = EpochBatches(len(train_set), cfg.OPTIM.BATCH_SIZE, cfg.SEED, self.rank, self.world)
        self.learner = Learner(cfg, model)
        self.device = self.learner.device
        self.measured = hasattr(model.degradation, "measure")  # with random numbers
        self.schedule = EpochSchedule(self.learner.optimizer, cfg.OPTIM)

        self.epoch, self.step = 1, 0  # the epoch under way and the steps done in it
        self.best = {"psnr": float("-inf"), "epoch": 0}
        self.last_psnr = float("nan")
        self.log = RunLog(self.folder, cfg.MODEL.SESSION, cfg.OPTIM.NUM_EPOCHS, self.batches.steps, self.main)
        self.resumed: Path | None = None  # the file that the run was continued from
        self.changed: list[str] = []  # keys of the config that were others then
        self.validation_changed = False  # its pictures, or what it does with them
        self.signal_received = self.stopped = 0  # signals' numbers: this process's, and the one all agree to stop for
        self.look_every = 1  # steps between two looks at the counters, which make the CPU wait for the device
        self.last_save = time.monotonic()

    # --------------------------------------------------------------------------------------------------------- a run

    def fit(self):
        """Train until the last epoch; SIGTERM or Ctrl-C saves and exits with 128 + the signal's number.

        Raises:
            UserError: another training is at work in the folder; as `take_up` does; a picture that cannot be used;
                too many steps in a row without a finite loss.
        """
        with self._alone_in_folder():
            self.take_up()
            describe(self)
            if self.main:
                _ = self.data, self.val_data  # as they are now, before the first step
                (self.folder / "config.yaml").write_text(format_config(self.cfg) + "\n")
            self.learner.join_group()
            with self.log, self._signals_noted(), self._loading() as loader:
                if self.resumed is not None:
                    log.info("continuing %s: epoch %d, step %d", self.resumed, self.epoch, self.step)
                if self.step == self.batches.steps:  # saved at the end of an epoch
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
        started, first, rate = time.monotonic(), self.step, float("nan")
        with self.log.bar(self.epoch, self.step) as bar:
            for input, target in loader:
                if self.measured:  # drawn anew for each step, by nothing that came before it
                    torch.manual_seed(hash((cfg.SEED, self.epoch, self.step)))
                self.learner.train_step(self.learner.move(input), self.learner.move(target))
                self.step += 1
                bar.update()
                if self.step % self.look_every == 0 or self.step == steps or self.step in validations:
                    seconds = (time.monotonic() - started) / (self.step - first)
                    rate = cfg.OPTIM.BATCH_SIZE / seconds
                    self._tell_progress(bar, rate, seconds)
                    self._agree_on_stopping(seconds)
                if self.step in validations:
                    self.last_psnr = self.validate()
                    self._after_validation(rate)
                elif self.step < steps and time.monotonic() - self.last_save > 60 * cfg.TRAINING.SAVE_MINUTES:
                    self._save_latest()  # after the last step only with the epoch's row in the history
                if self.stopped and self.step < steps:
                    self._save_latest()
                    break
        if self.step == steps and steps not in validations:
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
        self.learner.counters.next_epoch()

    def _tell_progress(self, bar, rate: float, seconds: float):
        """Read the counters and show them; after too many bad steps give up."""
        counts = self.learner.counters.read()
        psnr = f"{self.last_psnr:.2f}" if self.last_psnr == self.last_psnr else "-"
        status = f"loss {counts.mean_loss:.4f}, PSNR {psnr}, lr {self.learner.rate:.1e}, {rate:.1f} images/s"
        self.log.progress(bar, self.epoch, self.step, status, seconds)
        if counts.skipped_in_a_row >= self.cfg.OPTIM.MAX_BAD_STEPS:
            best = self.folder / "model_best.pth"
            again = f"; start again from {best} (MODEL.WEIGHTS)" if best.exists() else ""
            raise UserError(
                f"loss or gradient was not finite in {counts.skipped_in_a_row} steps in a row (epoch {self.epoch})"
                f"{again}. Try a lower OPTIM.LR_INITIAL, OPTIM.CLIP_NORM 0.01, or SPEED.AMP fp32, and check the data "
                "for broken pictures"
            )

    def _agree_on_stopping(self, seconds: float):
        """A signal may have reached only some of the processes; nor are their steps equally fast."""
        agreed = torch.tensor([self.signal_received, seconds], dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        self.stopped, seconds = int(agreed[0]), agreed[1].item()
        # Often enough to stop within some seconds; on the CPU a look costs nothing.
        self.look_every = 1 if self.device.type == "cpu" else max(1, min(20, int(3 / seconds)))

    @torch.inference_mode()
    def validate(self) -> float:
        """Mean PSNR (protocol ``train_rgb``) of the final estimate over the validation set, whatever the processes."""
        model = FromImages(self.learner.result)
        model.eval()
        torch.backends.cudnn.benchmark = len(self.val_set.sizes) == 1
        scores = torch.zeros(len(self.val_set), dtype=torch.float64, device=self.device)
        mine = range(self.rank, len(self.val_set), self.world)
        subset, done = Subset(self.val_set, mine), 0
        loaded = loading(subset, self.cfg.TRAINING.WORKERS, batch_size=self._validation_batch())
        with torch.random.fork_rng(range(torch.cuda.device_count())), loaded as loader:
            for input, target in loader:
                if self.measured:  # each picture the same way each time, whatever the processes
                    torch.manual_seed(hash((self.cfg.SEED, mine[done])))
                with self.learner.autocast():
                    restored = model(self.learner.move(input.flatten(0, -4)))[0]  # blocks as pictures of their own
                indices = list(mine)[done : done + len(input)]
                target = centre(target, *restored.shape[-2:])
                target = unit_range(target.to(self.device)).flatten(1, -3)  # and side by side again
                scores[indices] = psnr_batch(restored.float().reshape(target.shape), target).double()
                done += len(input)
        model.train()
        torch.backends.cudnn.benchmark = True
        return distributed.sum_over_processes(scores).mean().item()

    def _validation_batch(self) -> int:
        """Pictures at once: no more pixels than in a training pass, as far as they are of one size."""
        sizes = self.val_set.sizes
        if len(sizes) > 1 or self.measured:
            return 1
        pixels = max(map(math.prod, sizes))
        return max(1, self.learner.share * self.cfg.TRAINING.TRAIN_PS**2 // pixels)

    def _after_validation(self, rate: float):
        better = self.last_psnr > self.best["psnr"]
        if better:
            self.best = {"psnr": self.last_psnr, "epoch": self.epoch}
        self._record(rate, validated=True)
        if not (self.folder / "model_latest.pth").exists():
            self.save("model_latest.pth")  # without one there is nothing to continue
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
        counts = self.learner.counters.read()
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.learner.rate,
            "loss": counts.mean_loss,
            "psnr": self.last_psnr if validated else None,
            "best_psnr": self.best["psnr"] if self.best["epoch"] else None,
            "images_per_second": round(rate, 2),
            "skipped_steps": counts.skipped,
        }
        self.log.record(row, self.best["epoch"])

    # ------------------------------------------------------------------------------------------- saving and resuming

    def take_up(self):
        """Continue the run in the folder, if it is to be continued; one that is not must not be there.

        Raises:
            UserError: there is another run; a state that is damaged, or of another network or other data; a folder
                that not all processes see.
        """
        latest = latest_to_resume(self.cfg)
        found = torch.tensor(float(latest is not None), device=self.device)
        everywhere = distributed.sum_over_processes(found).item()
        if everywhere not in (0, self.world):
            raise UserError(
                f"only {everywhere:.0f} of {self.world} processes see {self.folder / 'model_latest.pth'}; "
                "TRAINING.SAVE_DIR must be on a disk that all machines share"
            )
        if latest is not None:
            self.load_state_dict(read_checkpoint(latest), latest)
            # By another measure, what was best would stay for ever; or killed before it was written for the first time.
            if self.validation_changed or not (self.folder / "model_best.pth").exists():
                self.best = {"psnr": float("-inf"), "epoch": 0}
        elif self.main and any(self.folder.glob("model_*.pth")):
            raise UserError(
                f"{self.folder} holds another run; continue it with TRAINING.RESUME True, "
                "or give this one its own name with MODEL.SESSION NAME"
            )

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
            **self.learner.state_dict(),
            "epoch": self.epoch,  # the schedule is a function of this and the config
            "step": self.step,
            "best": self.best,
            "last_psnr": self.last_psnr,
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
        self.learner.load_state_dict(state, path)
        self.epoch, self.step = state["epoch"], state["step"]
        self.best, self.last_psnr = state["best"], state["last_psnr"]
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
        result = self.learner.result
        return {"state_dict": result.state_dict(), "model": describe_model(result), "config": self.cfg.dump()}

    def save(self, *names: str, state: dict | None = None):
        if self.main:
            state = self.state_dict() if state is None else state
            for name in names:
                save_checkpoint(state, self.folder / name)
        self.last_save = time.monotonic()

    def _save_latest(self):
        """Replace ``model_latest.pth``; not while steps are skipped one after the other, perhaps for bad weights."""
        if self.learner.counters.read().skipped_in_a_row < 2 or not (self.folder / "model_latest.pth").exists():
            self.save("model_latest.pth")

    # ------------------------------------------------------------------------------------------------------ plumbing

    @contextlib.contextmanager
    def _alone_in_folder(self):
        """Make the run's folder and lock it, in the main process; the others wait for that."""
        with contextlib.ExitStack() as lock:
            if self.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                advice = "wait for its end, or give this one its own name with MODEL.SESSION NAME"
                lock.enter_context(distributed.sole_writer(self.folder, "training", advice))
            distributed.barrier()
            yield

    def _loading(self) -> contextlib.AbstractContextManager[DataLoader]:
        pinned = self.device.type == "cuda"
        return loading(self.train_set, self.cfg.TRAINING.WORKERS, batch_sampler=self.batches, pin_memory=pinned)

    @contextlib.contextmanager
    def _signals_noted(self):
        """Within, SIGTERM and Ctrl-C are noted, for the loop to stop at the end of a step."""

        def note(number, _):
            self.signal_received = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
