"""The training loop, one for all tasks and any number of processes."""

import copy
import csv
import ctypes
import functools
import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dgunet import distributed
from dgunet.checkpoint import (
    check_tensors,
    describe_model,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    weights_of,
)
from dgunet.config import changed_keys, format_config, parse_args
from dgunet.data import changed_items, exclude, find_images, find_pairs, fingerprint, hold_back
from dgunet.degradations import sampling_operator
from dgunet.distributed import launch
from dgunet.errors import UserError, optional, shorten
from dgunet.files import replacing
from dgunet.losses import StageLoss
from dgunet.metrics import psnr_batch
from dgunet.model import Measured, create_model
from dgunet.patches import Centres, EpochBatches, SyntheticPatches, TrainingSet, ValidationSet
from dgunet.schedule import EpochSchedule, validation_steps
from dgunet.synthesis import find_degradation
from dgunet.transforms import unit_range

tqdm = optional("tqdm").tqdm
log = logging.getLogger("dgunet")

# Keys that may differ between a run and its continuation without a word.
_FREE_TO_CHANGE = ("GPU", "DEVICE", "PROCESSES", "TRAINING.RESUME", "TRAINING.WORKERS", "TRAINING.SAVE_MINUTES")


def train_command(
    description: str,
    default_config: str,
    make_train_set: Callable,
    make_val_set: Callable = lambda cfg, pairs: Centres(pairs, cfg.TRAINING.VAL_PS),
    find: Callable = find_pairs,
):
    """A task's ``train.py``: read the command line, open the data, train in every process.

    Args:
        description: for ``--help``.
        default_config: file under ``configs/``.
        make_train_set: from the config and what ``find`` found to a data set indexed with (epoch, index).
        make_val_set: likewise to one for validation.
        find: lists the pairs, or the pictures, of a folder or of a packed file.
    """
    cfg, args = parse_args(description, default_config)
    sensing = "compressive_sensing"
    if cfg.MODEL.NAME.startswith(sensing) != default_config.startswith(sensing):
        raise UserError(f"{cfg.MODEL.NAME} is not a network for this task; see MODEL.NAME in configs/{default_config}")
    training, missing = cfg.TRAINING, []

    def look(find: Callable, folder: str) -> list:
        try:
            return find(folder)
        except UserError as error:
            if not args.dry_run:
                raise
            missing.append(str(error))
            return []

    if cfg.SYNTHESIS.NAME:
        degrade = find_degradation(cfg.SYNTHESIS.NAME, cfg.SYNTHESIS.OPTIONS)
        items = look(find_images, training.TRAIN_DIR)

        def make_train_set(cfg, items):
            options = dict(repeat=training.REPEAT, flip=cfg.AUGMENT.FLIP, seed=cfg.SEED)
            return SyntheticPatches(items, degrade, training.TRAIN_PS, **options)

    else:
        items = look(find, training.TRAIN_DIR)
    if training.EXCLUDE and items:
        items = exclude(items, training.EXCLUDE)
    if training.VAL_DIR:
        val_items = look(find, training.VAL_DIR)
    elif items:
        items, val_items = hold_back(items, training.VAL_HOLD_BACK, training.TRAIN_DIR)
        if cfg.SYNTHESIS.NAME:
            make_val_set = lambda cfg, items: Centres(items, training.VAL_PS, degrade=degrade, seed=cfg.SEED)  # noqa: E731
    else:
        val_items = []
    launch(train, cfg, make_train_set(cfg, items), make_val_set(cfg, val_items), args.dry_run, missing)


def train(cfg, train_set: TrainingSet, val_set: ValidationSet, dry_run: bool = False, missing: list[str] = ()):
    """Build the config's model and train it; what is launched in every process.

    A dry run only describes what would be done, and the data that are ``missing`` for it.
    """
    if distributed.pick_device(cfg).type == "cpu":
        keep_freed_memory()
    torch.manual_seed(cfg.SEED)
    overrides = dict(cfg.MODEL.OVERRIDES)
    if cfg.MODEL.NAME.startswith("compressive_sensing"):
        start = cfg.MODEL.MATRIX_START
        if start == "pca" and not len(train_set):
            start = "orthonormal"  # a dry run before there are pictures to take components of
        overrides["degradation"] = sampling_operator(
            cfg.MODEL.RATIO, cfg.MODEL.MATRIX, start, lambda: train_set.blocks()
        )
    model = create_model(cfg.MODEL.NAME, checkpointing=cfg.SPEED.CHECKPOINTING, **overrides)
    trainer = Trainer(cfg, model, train_set, val_set, list(missing) if dry_run else None)
    trainer.describe(config=dry_run)
    if dry_run:
        return
    try:
        trainer.fit()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of GPU memory; try OPTIM.ACCUMULATE 2 (4, 8), SPEED.CHECKPOINTING True, or a smaller OPTIM.BATCH_SIZE"
        ) from error


def _is_a(kind, value) -> bool:
    """Whether a value is of a type; of a list, all values; of a dict, exactly its keys with values of its types."""
    if isinstance(kind, dict):
        same = isinstance(value, dict) and value.keys() == kind.keys()
        return same and all(_is_a(kind[key], value[key]) for key in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is_a(kind[0], item) for item in value)
    if kind is int:
        return type(value) is int and 0 <= value < 2**31
    return isinstance(value, kind)


_ROW = {
    "epoch": int, "step": int, "lr": float, "loss": float, "psnr": float | None, "best_psnr": float | None,
    "images_per_second": float, "skipped_steps": int,
}  # fmt: skip

# What a saved state must hold to be continued, besides the random states and the config proving themselves in use.
_STATE = {
    "state_dict": lambda x: _is_a(dict, x),
    "optimizer": lambda x: (
        _is_a({"state": dict, "param_groups": list}, x) and all(_is_a(dict, y) for y in x["state"].values())
    ),
    "epoch": lambda x: _is_a(int, x) and x > 0,
    "step": lambda x: _is_a(int, x),
    "best": lambda x: _is_a({"psnr": float, "epoch": int}, x) and not math.isnan(x["psnr"]),
    "last_psnr": lambda x: _is_a(float, x),
    "totals": lambda x: _is_a([float], x) and len(x) == 4 and all(0 <= total < math.inf for total in x),
    "history": lambda x: _is_a([_ROW], x),
    "random": lambda x: _is_a({"cpu": torch.Tensor, "cuda": torch.Tensor | None}, x),
    "config": lambda x: _is_a(str, x),
}
_AVERAGED = {"raw_state_dict": lambda x: _is_a(dict, x), "averaged": lambda x: _is_a(int, x)}


class Trainer:
    """Trains a model as a config says, and keeps everything needed to continue exactly where it stopped.

    In the run's folder, SAVE_DIR/SESSION: ``model_latest.pth`` (the whole training state), ``model_best.pth`` (the same
    at the best validation), ``model_epoch_N.pth`` (weights of each validation), ``config.yaml``, ``history.csv``,
    ``curves.png``, ``train.log``, and ``.lock``, by which only one training at once writes there.

    Args:
        cfg: see `config.py`.
        model: a DGUNet. One with a known degradation is trained on clean pictures, which it is given measured.
        train_set, val_set: see `patches.TrainingSet` and `patches.ValidationSet`.
        missing: for a dry run, what is not there yet; weights to start from that are not are added to it.

    Raises:
        UserError: impossible batch size, a run of that name exists, a checkpoint that does not fit, ...
    """

    def __init__(
        self, cfg, model: nn.Module, train_set: TrainingSet, val_set: ValidationSet, missing: list[str] | None = None
    ):
        self.cfg, self.missing = cfg, missing
        self.device = distributed.pick_device(cfg)
        self.main = distributed.rank() == 0
        self.folder = Path(cfg.TRAINING.SAVE_DIR) / cfg.MODEL.SESSION
        self.amp = autocast_dtype(cfg.SPEED.AMP, self.device)
        self.train_set, self.val_set = train_set, val_set

        world = distributed.world_size()
        if cfg.OPTIM.BATCH_SIZE % (world * cfg.OPTIM.ACCUMULATE):
            raise UserError(
                f"OPTIM.BATCH_SIZE is the total and must be a multiple of {world} processes times "
                f"{cfg.OPTIM.ACCUMULATE} accumulation steps, got {cfg.OPTIM.BATCH_SIZE}"
            )
        self.batches = EpochBatches(len(train_set), cfg.OPTIM.BATCH_SIZE, cfg.SEED, distributed.rank(), world)

        resume = self._found_to_resume()
        path = cfg.MODEL.WEIGHTS
        if path and missing is not None and not Path(path).exists():
            missing.append(f"no checkpoint at {path}")
        elif path and not resume:
            weights, matrix = weights_of(read_checkpoint(path), path), model.state_dict().get("degradation.matrix")
            given = weights.get("degradation.matrix", matrix)
            if cfg.MODEL.MATRIX_START and matrix is not None and matrix.shape != given.shape:
                weights["degradation.matrix"] = matrix  # a network of another ratio: all the rest is taken over
            load_weights(model, weights, path)
        self.memory_format = memory_format(cfg.SPEED.CHANNELS_LAST, self.device, self.amp)
        self.model = model.to(self.device, memory_format=self.memory_format)
        torch.backends.cudnn.benchmark = True  # crops are of one size: it pays to try cuDNN's algorithms once
        self.loss = StageLoss({name.lower(): w for name, w in cfg.LOSS.items() if name != "CLAMP"}, cfg.LOSS.CLAMP)
        self.loss.to(self.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=cfg.OPTIM.LR_INITIAL, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=cfg.OPTIM.WEIGHT_DECAY, fused=True,
        )  # fmt: skip
        self.schedule = EpochSchedule(self.optimizer, cfg.OPTIM)
        self.ema = copy.deepcopy(model).requires_grad_(False) if cfg.OPTIM.EMA_DECAY > 0 else None
        self.averaged = 0  # steps that went into it

        self.epoch, self.step = 1, 0  # the epoch under way and the steps done in it
        self.best = {"psnr": float("-inf"), "epoch": 0}
        self.last_psnr = float("nan")
        self.history: list[dict] = []
        # Kept on the device, so that a step need not wait for it: loss sum, steps counted in it, steps skipped in
        # this epoch, steps skipped in a row.
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.signal_received = self.stopped = 0  # numbers of signals: this process's, and the one all agree to stop for
        self.last_save = time.monotonic()
        if resume:
            self._resume(self.folder / "model_latest.pth")
            if not (self.folder / "model_best.pth").exists():  # killed before it was written for the first time
                self.best = {"psnr": float("-inf"), "epoch": 0}

        if cfg.SPEED.COMPILE:
            if cfg.SPEED.COMPILE_MODE in ("reduce-overhead", "max-autotune") and cfg.OPTIM.ACCUMULATE > 1:
                raise UserError(
                    f"SPEED.COMPILE_MODE {cfg.SPEED.COMPILE_MODE} uses CUDA graphs, whose gradients the next pass "
                    "overwrites; with OPTIM.ACCUMULATE take default or max-autotune-no-cudagraphs"
                )
            self.model.compile(mode=cfg.SPEED.COMPILE_MODE)
        self.network = self._takes_images(self.model)  # what runs the forward pass: measuring, distributed
        if dist.is_initialized():  # a group of one as well, so that one GPU runs what several do
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids, gradient_as_bucket_view=True)

    # ---------------------------------------------------------------------------------------------- the run's folder

    def _found_to_resume(self) -> bool:
        """Whether there is a run to continue in the folder; a run that shall not be continued must not be there."""
        latest = self.folder / "model_latest.pth"
        self.latest_seen = _stamp(latest)
        found = self.cfg.TRAINING.RESUME and latest.exists()
        everywhere = distributed.sum_over_processes(torch.tensor(float(found), device=self.device)).item()
        if everywhere not in (0, distributed.world_size()):
            raise UserError(
                f"only {everywhere:.0f} of {distributed.world_size()} processes see {latest}; "
                "TRAINING.SAVE_DIR must be on a disk that all machines share"
            )
        if not found and self.main and any(self.folder.glob("model_*.pth")):
            raise UserError(
                f"{self.folder} holds another run; continue it with TRAINING.RESUME True, "
                "or give this one its own name with MODEL.SESSION NAME"
            )
        return found

    def _resume(self, path: Path):
        def refuse(*keys: str):
            raise UserError(
                f"{path} cannot be resumed: {', '.join(keys)} missing, or not as train.py writes it; start another run "
                f"(MODEL.SESSION) from its weights (MODEL.WEIGHTS {path})"
            )

        state = read_checkpoint(path)
        averaged = "averaged" in state or "raw_state_dict" in state
        needed = _STATE | (_AVERAGED if averaged else {})
        damaged = [key for key, holds in needed.items() if key not in state or not holds(state[key])]
        if damaged:
            refuse(*damaged)
        raw = state["raw_state_dict" if averaged else "state_dict"]
        load_weights(self.model, weights_of({"state_dict": raw}, path), path)
        if averaged and self.ema is not None:
            load_weights(self.ema, weights_of(state, path), path)
            self.averaged = state["averaged"]
        self._load_moments(state["optimizer"]["state"], path)
        self.epoch, self.step = state["epoch"], state["step"]
        self.best, self.history, self.last_psnr = state["best"], state["history"], state["last_psnr"]
        self.totals = torch.tensor(state["totals"], dtype=torch.float64, device=self.device)
        try:
            torch.set_rng_state(state["random"]["cpu"])
            if self.device.type == "cuda" and state["random"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        except (RuntimeError, TypeError):
            refuse("random")
        try:
            then = type(self.cfg).load_cfg(state["config"])
            self.changed = [k for k in changed_keys(self.cfg, then) if k not in _FREE_TO_CHANGE]
            done = self.step * then.OPTIM.BATCH_SIZE // self.cfg.OPTIM.BATCH_SIZE  # the same share of the epoch
            self.step = min(done, self.batches.steps)
        except Exception:  # what is no config makes its reader fail in any way there is
            refuse("config")
        if not _is_a(int, self.step):
            refuse("config")
        try:
            changes = changed_items(self.train_set.items, state["data"]) if "data" in state else ""
        except UserError:
            raise
        except Exception:
            refuse("data")
        if changes:
            raise UserError(
                f"{self.cfg.TRAINING.TRAIN_DIR} is not what {path} was trained on: {changes}. Put that back, "
                f"or start a run of its own from its weights: MODEL.SESSION NAME MODEL.WEIGHTS {path}"
            )
        self.resumed = path

    def _load_moments(self, saved: dict, path: Path):
        """Load the optimizer's moments in their parameters' layout; its rate, decay, ... are the config's."""
        expected = {}
        for i, parameter in enumerate(self.parameters):
            expected |= {f"{i}.step": torch.zeros(()), f"{i}.exp_avg": parameter, f"{i}.exp_avg_sq": parameter}
        found = {f"{i}.{key}": value for i, moments in saved.items() for key, value in moments.items()}
        check_tensors(expected, found, path, "the optimizer of this run", exact=True)
        negative = [name for name, value in found.items() if not name.endswith(".exp_avg") and (value < 0).any()]
        if negative:
            raise UserError(f"{path} holds negative squares in its optimizer state: {shorten(negative)}")
        state = self.optimizer.state_dict()
        for i in range(len(self.parameters)):
            names = {key: f"{i}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
            state["state"][i] = {k: torch.empty_like(expected[name]).copy_(found[name]) for k, name in names.items()}
        self.optimizer.load_state_dict(state)

    resumed, changed = None, ()

    @functools.cached_property
    def data(self) -> dict:
        """What tells the training data from others, for `_resume`."""
        return fingerprint(self.train_set.items)

    def state(self) -> dict:
        """Everything needed to continue, in types that load with ``weights_only=True``."""
        random = {"cpu": torch.get_rng_state(), "cuda": None}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,  # the schedule is a function of this and the config
            "step": self.step,
            "best": self.best,
            "last_psnr": self.last_psnr,
            "totals": self.totals.tolist(),
            "history": self.history,
            "random": random,
            "data": self.data,
        }
        if self.ema is not None:
            state["raw_state_dict"] = self.model.state_dict()
            state["averaged"] = self.averaged
        return state

    def weights(self) -> dict:
        """What using the network needs: its weights (the averaged ones where EMA is on), name and config."""
        used = self.model if self.ema is None else self.ema
        return {"state_dict": used.state_dict(), "model": describe_model(self.model), "config": self.cfg.dump()}

    def save(self, *names: str, state: dict | None = None):
        if self.main:
            state = self.state() if state is None else state
            for name in names:
                save_checkpoint(state, self.folder / name)
        self.last_save = time.monotonic()

    def _save_latest(self):
        """Replace ``model_latest.pth``; not while steps are skipped one after the other, perhaps for bad weights."""
        if self.totals[3] < 2 or not (self.folder / "model_latest.pth").exists():
            self.save("model_latest.pth")

    def describe(self, config: bool = False):
        """Print what is about to be done, and why it can be; with ``config`` also every key."""
        cfg, world = self.cfg, distributed.world_size()
        if not self.main:
            return
        count = sum(p.numel() for p in self.model.parameters())
        hardware = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        share = cfg.OPTIM.BATCH_SIZE // world // cfg.OPTIM.ACCUMULATE
        epochs = "" if self.resumed is None else f", continuing in epoch {self.epoch} after step {self.step}"
        precision = "bf16 autocast" if self.amp else "float32"
        if config:
            print(f"config (# * marks what differs from the defaults)\n{format_config(cfg)}\n")
        lines = [
            f"model       {cfg.MODEL.NAME}, {count:,} parameters, {self.model.stages} stages",
            *(f"missing     {what}" for what in self.missing or ()),
            f"training    {len(self.train_set) // self.train_set.repeat} pictures of {cfg.TRAINING.TRAIN_DIR}, "
            f"{self.train_set.repeat} crops of {cfg.TRAINING.TRAIN_PS} px from each in an epoch",
            f"validation  {len(self.val_set)} pictures of {cfg.TRAINING.VAL_DIR or 'them, the last ones, held back'}",
            f"batch       {cfg.OPTIM.BATCH_SIZE} = {world} processes x {cfg.OPTIM.ACCUMULATE} passes x {share}",
            f"schedule    {cfg.OPTIM.NUM_EPOCHS} epochs"
            + (f" of {self.batches.steps} steps{epochs}" if len(self.train_set) else ""),
            f"device      {world} x {hardware}, {precision}",
            f"writes to   {self.folder.absolute()} (the whole config as well; --dry_run shows it)",
        ]
        for line in lines:
            print(line)
        if self.changed:
            print(f"note        these keys differ from the run being continued: {', '.join(self.changed)}")
        sys.stdout.flush()

    # ------------------------------------------------------------------------------------------------------ training

    def fit(self):
        """Train until the last epoch; SIGTERM or Ctrl-C saves and exits with 128 + the signal's number."""
        if not self.main:
            return self._fit()
        _ = self.data  # as they are now, before the first step
        self.folder.mkdir(parents=True, exist_ok=True)
        advice = "wait for its end, or give this one its own name with MODEL.SESSION NAME"
        with distributed.sole_writer(self.folder, "training", advice):
            latest = self.folder / "model_latest.pth"
            if _stamp(latest) != self.latest_seen:
                raise UserError(f"{latest} has just been written by another training; start this one again")
            (self.folder / "config.yaml").write_text(format_config(self.cfg) + "\n")
            self._fit()

    def _fit(self):
        distributed.barrier()
        self.began = self.last_word = time.monotonic()
        handlers = self._start_log(), self._catch_signals()
        loader = self._train_loader()
        try:
            if self.step == self.batches.steps:  # saved at the end of an epoch
                self._next_epoch()
            while self.epoch <= self.cfg.OPTIM.NUM_EPOCHS and self._run_epoch(loader):
                self._next_epoch()
            if not self.stopped:
                log.info("done: best PSNR %.2f dB in epoch %d", self.best["psnr"], self.best["epoch"])
        finally:
            _end_workers(loader._iterator)  # persistent ones would live until the interpreter ends
            self._restore(*handlers)
        if self.stopped:
            distributed.barrier()
            sys.exit(128 + self.stopped)

    def _next_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0
        self.totals[:3] = 0

    def _run_epoch(self, loader) -> bool:
        """Train to the end of the epoch under way; False if a signal stopped it before."""
        cfg, steps = self.cfg, self.batches.steps
        self.schedule.go_to(self.epoch)
        self.batches.epoch, self.batches.start = self.epoch, self.step
        validations = validation_steps(self.epoch, steps, cfg)
        started, first, rate = time.monotonic(), self.step, float("nan")
        bar = tqdm(
            total=steps, initial=self.step, desc=f"epoch {self.epoch}/{cfg.OPTIM.NUM_EPOCHS}", unit="step",
            disable=None if self.main else True, leave=False, dynamic_ncols=True,  # None: only on a terminal
        )  # fmt: skip
        with bar:
            for input, target in loader:
                self.train_step(self._move(input), self._move(target))
                self.step += 1
                bar.update()
                if self.step % self.look_every == 0 or self.step == steps or self.step in validations:
                    seconds = (time.monotonic() - started) / (self.step - first)
                    rate = cfg.OPTIM.BATCH_SIZE / seconds
                    self._look(bar, rate, seconds)
                if self.step in validations:
                    self.last_psnr = self.validate()
                    self._after_validation(rate)
                elif self.step < steps and time.monotonic() - self.last_save > 60 * cfg.TRAINING.SAVE_MINUTES:
                    self._save_latest()  # after the last step only with the epoch's row in the history
                if self.stopped and self.step < steps:
                    self._save_latest()
                    log.info(
                        "stopped by signal %d in epoch %d after step %d; continue with TRAINING.RESUME True",
                        self.stopped, self.epoch, self.step,
                    )  # fmt: skip
                    return False
        if steps not in validations:
            self._record(rate, validated=False)
            self._save_latest()
        if self.stopped:
            log.info(
                "stopped by signal %d after epoch %d; continue with TRAINING.RESUME True", self.stopped, self.epoch
            )
        return not self.stopped

    def train_step(self, input: torch.Tensor, target: torch.Tensor):
        """One optimisation step on this process's share of a batch; nothing here waits for the device.

        Where the loss or the gradient is not finite the weights stay as they are and the step is counted as skipped.
        """
        passes = self.cfg.OPTIM.ACCUMULATE
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for i, (part, part_target) in enumerate(zip(input.chunk(passes), target.chunk(passes), strict=True)):
            if isinstance(self.network, DistributedDataParallel):
                self.network.require_backward_grad_sync = i == passes - 1  # gradients travel once, with the last pass
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                estimates = self.network(part)
            part_loss = self.loss(estimates, part_target) / passes
            part_loss.backward()
            loss += part_loss.detach()
        loss = distributed.sum_over_processes(loss) / distributed.world_size()

        gradients = [p.grad for p in self.parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.cfg.OPTIM.CLIP_NORM > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.cfg.OPTIM.CLIP_NORM, norm)
        finite = torch.isfinite(loss + norm)
        # The fused optimizer leaves weights and moments alone where found_inf is 1: the skip of torch.amp.GradScaler.
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        if self.ema is not None:
            self._average()

        skipped = (~finite).double()
        self.totals[0] += torch.where(finite, loss, 0).double()
        self.totals[1] += 1 - skipped
        self.totals[2] += skipped
        self.totals[3] = (self.totals[3] + 1) * skipped

    @torch.no_grad()
    def _average(self):
        """As AveragedModel does, whose count of the steps is a tensor on the device: each step would wait for it."""
        if self.averaged == 0:
            self.ema.load_state_dict(self.model.state_dict())  # with what is not trained, such as a fixed matrix
        else:
            averaged, current = list(self.ema.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averaged, current, 1 - self.cfg.OPTIM.EMA_DECAY)
        self.averaged += 1

    look_every = 1  # steps between two looks at the device's counters, which make the CPU wait for it

    def _look(self, bar, rate: float, seconds: float):
        """Read the counters, show them, and act on them: give up after too many bad steps, stop when told to."""
        loss_sum, counted, _, in_a_row = self.totals.tolist()
        lr = self.optimizer.param_groups[0]["lr"]
        psnr = f"{self.last_psnr:.2f}" if self.last_psnr == self.last_psnr else "-"
        status = f"loss {loss_sum / max(counted, 1):.4f}, PSNR {psnr}, lr {lr:.1e}, {rate:.1f} images/s"
        bar.set_postfix_str(status, refresh=False)
        now, steps = time.monotonic(), self.batches.steps
        # Without a terminal a line now and then: at first every 20 seconds, in a run of days some hundreds in all.
        if self.main and bar.disable and now - self.last_word > max(20, (now - self.began) / 100):
            left = ((self.cfg.OPTIM.NUM_EPOCHS + 1 - self.epoch) * steps - self.step) * seconds
            log.info(
                "epoch %d/%d  step %d/%d  %s, %s left", self.epoch, self.cfg.OPTIM.NUM_EPOCHS, self.step, steps, status,
                tqdm.format_interval(left),
            )  # fmt: skip
            self.last_word = now
        if in_a_row >= self.cfg.OPTIM.MAX_BAD_STEPS:
            best = self.folder / "model_best.pth"
            again = f"; start again from {best} (MODEL.WEIGHTS)" if best.exists() else ""
            raise UserError(
                f"loss or gradient was not finite in {int(in_a_row)} steps in a row (epoch {self.epoch}){again}. Try "
                "a lower OPTIM.LR_INITIAL, OPTIM.CLIP_NORM 0.01, or SPEED.AMP fp32, and check the data for broken "
                "pictures"
            )
        agreed = torch.tensor([self.signal_received, seconds], dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(agreed, dist.ReduceOp.MAX)  # a signal may have reached only some of the processes
        self.stopped, seconds = int(agreed[0]), agreed[1].item()
        # Often enough to stop within some seconds; on the CPU a look costs nothing.
        self.look_every = 1 if self.device.type == "cpu" else max(1, min(20, int(3 / seconds)))

    # ---------------------------------------------------------------------------------------------------- validation

    @torch.inference_mode()
    def validate(self) -> float:
        """Mean PSNR (protocol ``train_rgb``) of the final estimate over the validation set, whatever the processes."""
        model = self._takes_images(self.model if self.ema is None else self.ema)
        model.eval()
        torch.backends.cudnn.benchmark = len(self.val_set.sizes) == 1
        rank, world = distributed.rank(), distributed.world_size()
        scores = torch.zeros(len(self.val_set), dtype=torch.float64, device=self.device)
        mine = range(rank, len(self.val_set), world)
        loader = DataLoader(
            torch.utils.data.Subset(self.val_set, mine), self._validation_batch(), worker_init_fn=_init_worker,
            num_workers=self.cfg.TRAINING.WORKERS,
        )  # fmt: skip
        done = 0
        batches = iter(loader)
        try:
            for input, target in batches:
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    restored = model(self._move(input.flatten(0, -4)))[0]  # blocks as pictures of their own
                indices = list(mine)[done : done + len(input)]
                target = unit_range(target.to(self.device)).flatten(1, -3)  # and side by side again
                scores[indices] = psnr_batch(restored.float().reshape(target.shape), target).double()
                done += len(input)
        finally:
            _end_workers(batches)
        model.train()
        torch.backends.cudnn.benchmark = True
        return distributed.sum_over_processes(scores).mean().item()

    def _validation_batch(self) -> int:
        """Pictures at once: no more pixels than in a training pass, as far as they are of one size."""
        sizes = self.val_set.sizes
        if len(sizes) > 1:
            return 1
        pixels = max(map(math.prod, sizes))
        share = self.cfg.OPTIM.BATCH_SIZE // distributed.world_size() // self.cfg.OPTIM.ACCUMULATE
        return max(1, share * self.cfg.TRAINING.TRAIN_PS**2 // pixels)

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
        loss_sum, counted, skipped, _ = self.totals.tolist()
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": loss_sum / counted if counted else float("nan"),
            "psnr": self.last_psnr if validated else None,
            "best_psnr": self.best["psnr"] if self.best["epoch"] else None,
            "images_per_second": round(rate, 2),
            "skipped_steps": int(skipped),
        }
        self.history.append(row)
        if not self.main:
            return
        score = f"PSNR {self.last_psnr:.3f} (best {self.best['psnr']:.3f} in epoch {self.best['epoch']})"
        log.info(
            "epoch %d/%d  step %d/%d  loss %.5f  lr %.2e  %s%.1f images/s%s",
            self.epoch, self.cfg.OPTIM.NUM_EPOCHS, self.step, self.batches.steps, row["loss"], row["lr"],
            f"{score}  " if validated else "", rate, f"  {int(skipped)} steps skipped" if skipped else "",
        )  # fmt: skip
        self._write_history()
        if self.board is not None:
            done = (self.epoch - 1) * self.batches.steps + self.step
            for key in ("loss", "lr", "psnr"):
                if row[key] is not None:
                    self.board.add_scalar(key, row[key], done)

    def _write_history(self):
        with replacing(self.folder / "history.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self.history[0].keys())
            writer.writeheader()
            writer.writerows(self.history)
        plot_history(self.history, self.batches.steps, self.folder / "curves.png", self.cfg.MODEL.SESSION)

    # ------------------------------------------------------------------------------------------------------ plumbing

    def _train_loader(self) -> DataLoader:
        workers = self.cfg.TRAINING.WORKERS
        return DataLoader(
            self.train_set, batch_sampler=self.batches, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda", worker_init_fn=_init_worker,
        )  # fmt: skip

    @staticmethod
    def _takes_images(model: nn.Module) -> nn.Module:
        """With a known degradation the data are clean pictures, which are measured on the way into the network."""
        return model if model.degradation is None else Measured(model)

    def _move(self, x: torch.Tensor) -> torch.Tensor:
        return unit_range(x.to(self.device, non_blocking=True)).contiguous(memory_format=self.memory_format)

    board = None  # TensorBoard's writer, where it is installed

    def _start_log(self) -> list[logging.Handler]:
        if not self.main:
            return []
        console = _ConsoleHandler()
        file = logging.FileHandler(self.folder / "train.log", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.setLevel(logging.INFO)
        for handler in (console, file):
            log.addHandler(handler)
        if self.resumed is not None:
            log.info("continuing %s: epoch %d, step %d", self.resumed, self.epoch, self.step)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            pass
        else:
            self.board = SummaryWriter(self.folder / "tensorboard")
        return [console, file]

    def _catch_signals(self) -> dict:
        def remember(number, _):
            self.signal_received = number

        return {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def _restore(self, log_handlers: list[logging.Handler], signal_handlers: dict):
        for handler in log_handlers:
            log.removeHandler(handler)
            handler.close()
        for number, handler in signal_handlers.items():
            signal.signal(number, handler)
        if self.board is not None:
            self.board.close()


def keep_freed_memory():
    """Let glibc keep what a training step on the CPU frees: the next one needs it again.

    Given back to the system it would return page by page, each of them cleared first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc, with the numbers of its malloc.h
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets pages of its own


def autocast_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None (float32) for SPEED.AMP; ``auto`` takes bfloat16 where the hardware computes it."""
    if choice == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # PyTorch has no public question for this
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            fast = fast and _has_avx512()  # which ATEN_CPU_CAPABILITY may have taken away
        choice = "bf16" if fast else "fp32"
    return torch.bfloat16 if choice == "bf16" else None


def memory_format(choice: str | bool, device: torch.device, amp: torch.dtype | None) -> torch.memory_format:
    """The memory format for SPEED.CHANNELS_LAST; ``auto`` takes the one that trains faster.

    That is channels_last, without which oneDNN and cuDNN reorder the maps around each convolution; but for float32 on
    processors without AVX-512, where oneDNN needs twice as long for a weight's gradient as in NCHW.
    """
    if choice == "auto":
        choice = device.type == "cuda" or amp is not None or _has_avx512()
    return torch.channels_last if choice else torch.contiguous_format


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def plot_history(history: list[dict], steps: int, path: Path, title: str):
    """Draw loss, validation PSNR and learning rate over the epochs into a PNG, the last of each in its title."""
    figure = optional("matplotlib.figure").Figure(figsize=(11, 3.4), layout="constrained")
    for place, (key, label) in enumerate(
        (("loss", "training loss"), ("psnr", "validation PSNR [dB]"), ("lr", "learning rate")), start=1
    ):
        rows = [row for row in history if row[key] is not None and math.isfinite(row[key])]
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
    figure.suptitle(title)
    optional("matplotlib.backends.backend_agg").FigureCanvasAgg(figure).print_png(str(path))


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


class _ConsoleHandler(logging.Handler):
    """Prints above the progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record))


def _end_workers(batches):
    """End a loader's processes now, also while an exception holds on to its iterator."""
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


def _init_worker(_):
    optional("cv2").setNumThreads(0)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A cluster's scheduler signals every process of a job, but the trainer needs its workers to finish the step before
    # it saves. A worker therefore outlives its first SIGTERM: until the trainer ends it, a second one, or a minute.
    signal.signal(signal.SIGTERM, _outlive_sigterm)


def _outlive_sigterm(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(60)
