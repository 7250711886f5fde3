"""When the learning rate changes and when to validate: functions of the epoch, counted from 1, or of the clock."""

import math
import time
import warnings

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from warmup_scheduler import GradualWarmupScheduler

from dgunet.runtime.errors import UserError
from dgunet.runtime.imports import import_object, is_object_name


def decay(epoch: int, optim) -> float:
    """The learning rate of an epoch after the warm-up, as a fraction of LR_INITIAL.

    cosine: from 1 in the first epoch after the warm-up to LR_MIN one epoch after the last (COSINE_EXTRA_EPOCHS later);
    step: LR_DECAY to the power of the milestones passed; constant: 1. A ``module:name`` is a function of the same
    arguments: the epoch, from WARMUP_EPOCHS + 1 on, and the config's OPTIM section.

    Raises:
        UserError: there is no such function, or it returns no number from 0 on.
    """
    if is_object_name(optim.SCHEDULE):
        factor = import_object(optim.SCHEDULE, "OPTIM.SCHEDULE")(epoch, optim)
        if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise UserError(
                f"OPTIM.SCHEDULE {optim.SCHEDULE} returns {factor!r:.60} in epoch {epoch}, not a factor >= 0"
            )
        return factor
    if optim.SCHEDULE == "constant":
        return 1.0
    if optim.SCHEDULE == "step":
        return optim.LR_DECAY ** sum(epoch > milestone for milestone in optim.LR_MILESTONES)
    period = optim.NUM_EPOCHS - optim.WARMUP_EPOCHS + optim.COSINE_EXTRA_EPOCHS
    progress = min((epoch - optim.WARMUP_EPOCHS - 1) / max(period, 1), 1)
    return _cosine(progress, optim)


def _cosine(progress: float, optim) -> float:
    lowest = optim.LR_MIN / optim.LR_INITIAL
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2


class RunClock:
    """How much of its time, ``limit`` seconds in all sessions together, a run has used; a limit of 0 is none.

    The last validation, and saving, take time, too: one and a half times the longest so far is kept for them, before
    the first a twentieth of the limit.
    """

    def __init__(self, limit: float):
        self.limit = limit or math.inf
        self.used_before, self.began = 0.0, time.monotonic()
        self.used, self.ending = 0.0, 0.0  # and the longest validation so far, seconds, as all processes have agreed

    def read(self) -> tuple[float, float]:
        """``used`` as it is now in this process, and ``ending``."""
        return self.used_before + time.monotonic() - self.began, self.ending

    @property
    def for_training(self) -> float:
        return self.limit - (1.5 * self.ending or self.limit / 20)

    @property
    def progress(self) -> float | None:
        """The share of the time for training that has passed, 0 to 1; None without a limit."""
        return min(self.used / max(self.for_training, 1e-9), 1.0) if self.limit < math.inf else None

    @property
    def is_over(self) -> bool:
        return self.limit < math.inf and self.used >= self.for_training


class EpochSchedule:
    """Linear warm-up (``LR_INITIAL * epoch / WARMUP_EPOCHS``), then `decay`.

    The original chains warmup-scheduler's GradualWarmupScheduler and PyTorch's CosineAnnealingLR, which multiplies the
    learning rate it finds. Epoch by epoch this is that schedule: LR_INITIAL in the first epoch after the warm-up,
    LR_MIN not quite reached. Only the overshoot is left out, by which the original's rates are above these: at most
    0.00003 % (deblurring), 0.004 % (deraining) and 0.018 % (denoising); 5 % in a run of 10 epochs.
    """

    def __init__(self, optimizer: Optimizer, optim):
        self.optimizer, self.epoch = optimizer, 0
        self.factor = 1.0  # of all learning rates, see `lower`
        self.optim, self.progress = optim, None  # of the run by the clock, see `follow`
        warmup = optim.WARMUP_EPOCHS
        if warmup:
            after = LambdaLR(optimizer, lambda step: decay(warmup + 1 + step, optim))
            self.scheduler = GradualWarmupScheduler(optimizer, 1, warmup, after)
        else:
            self.scheduler = LambdaLR(optimizer, lambda step: decay(max(step, 1), optim))
        self.rates = [group["lr"] for group in optimizer.param_groups]  # of the epoch, without the factor

    def go_to(self, epoch: int):
        """Set the optimizer's learning rate to that of an epoch, the current one or a later one."""
        groups = self.optimizer.param_groups
        kept = [group["lr"] for group in groups]  # tensors, where a recorded step reads them: not for the scheduler
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        with warnings.catch_warnings():
            # PyTorch warns that optimizer.step() should come first, as where schedulers are stepped after an epoch.
            warnings.simplefilter("ignore", UserWarning)
            while self.epoch < epoch:
                self.scheduler.step()
                self.epoch += 1
                self.rates = [group["lr"] for group in groups]
        for group, lr in zip(groups, kept, strict=True):
            group["lr"] = lr
        self._set_rates()

    def follow(self, progress: float | None):
        """Let the cosine follow the clock: the rates after this share of the run's time. The warm-up is by epochs."""
        if progress is not None and self.optim.SCHEDULE == "cosine":
            self.progress = progress
            self._set_rates()

    def lower(self, factor: float):
        """Multiply the learning rates of this epoch and of all that follow by a factor."""
        self.factor *= factor
        self._set_rates()

    def _set_rates(self):
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if self.progress is not None and self.epoch > self.optim.WARMUP_EPOCHS:
                rate = self.optim.LR_INITIAL * _cosine(self.progress, self.optim)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * self.factor)
            else:
                group["lr"] = rate * self.factor


def validation_steps(epoch: int, steps: int, cfg) -> set[int]:
    """After which of an epoch's steps (1 to ``steps``) to validate; always at the end of the last epoch."""
    training = cfg.TRAINING
    if training.VAL_EPOCHS or training.VAL_FROM_EPOCH:
        due = epoch in training.VAL_EPOCHS or (training.VAL_FROM_EPOCH and epoch >= training.VAL_FROM_EPOCH)
    else:
        due = epoch % training.VAL_AFTER_EVERY == 0
    if due:
        times = min(training.VAL_TIMES, steps)
        return {round(steps * k / times) for k in range(1, times + 1)}
    return {steps} if epoch == cfg.OPTIM.NUM_EPOCHS else set()
