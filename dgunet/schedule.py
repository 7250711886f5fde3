"""When the learning rate changes and when to validate: pure functions of the epoch, counted from 1."""

import math
import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dgunet.errors import UserError, optional

GradualWarmupScheduler = optional("warmup_scheduler").GradualWarmupScheduler


def decay(epoch: int, optim) -> float:
    """The learning rate of an epoch after the warm-up, as a fraction of LR_INITIAL.

    cosine: from 1 at the end of the warm-up to LR_MIN in the last epoch (or COSINE_EXTRA_EPOCHS beyond it);
    step: LR_DECAY to the power of the milestones passed; constant: 1.
    """
    if optim.SCHEDULE == "constant":
        return 1.0
    if optim.SCHEDULE == "step":
        return optim.LR_DECAY ** sum(epoch > milestone for milestone in optim.LR_MILESTONES)
    if optim.SCHEDULE == "cosine":
        period = optim.NUM_EPOCHS - optim.WARMUP_EPOCHS + optim.COSINE_EXTRA_EPOCHS
        progress = min((epoch - optim.WARMUP_EPOCHS) / max(period, 1), 1)
        lowest = optim.LR_MIN / optim.LR_INITIAL
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2
    raise UserError(f"OPTIM.SCHEDULE is cosine, constant or step, got {optim.SCHEDULE!r}")


class EpochSchedule:
    """Linear warm-up (``LR_INITIAL * epoch / WARMUP_EPOCHS``), then `decay`.

    The warm-up is GradualWarmupScheduler's. Chained onto CosineAnnealingLR, which multiplies the rate it finds, it
    overshoots by 5 % right after the warm-up and misses LR_MIN; the after-scheduler is therefore a closed form.
    """

    def __init__(self, optimizer: Optimizer, optim):
        self.epoch = 0
        warmup = optim.WARMUP_EPOCHS
        decay(1, optim)  # an unknown SCHEDULE is told now, not after the warm-up
        if warmup:
            after = LambdaLR(optimizer, lambda step: decay(warmup + 1 + step, optim))
            self.scheduler = GradualWarmupScheduler(optimizer, 1, warmup, after)
        else:
            self.scheduler = LambdaLR(optimizer, lambda step: decay(max(step, 1), optim))

    def go_to(self, epoch: int):
        """Set the optimizer's learning rate to that of an epoch, not before the present one."""
        with warnings.catch_warnings():
            # PyTorch wants optimizer.step() first, which is for schedulers that are stepped after an epoch.
            warnings.simplefilter("ignore", UserWarning)
            while self.epoch < epoch:
                self.scheduler.step()
                self.epoch += 1


def validation_steps(epoch: int, steps: int, cfg) -> set[int]:
    """After which of an epoch's steps (1 to ``steps``) to validate; always at the end of the last epoch."""
    training = cfg.TRAINING
    if training.VAL_EPOCHS or training.VAL_FROM_EPOCH:
        due = epoch in training.VAL_EPOCHS or (training.VAL_FROM_EPOCH and epoch >= training.VAL_FROM_EPOCH)
    else:
        due = epoch % max(training.VAL_AFTER_EVERY, 1) == 0
    if due:
        times = min(max(training.VAL_TIMES, 1), steps)
        return {round(steps * k / times) for k in range(1, times + 1)}
    return {steps} if epoch == cfg.OPTIM.NUM_EPOCHS else set()
