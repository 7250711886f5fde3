"""One step of learning: the network, its loss, optimiser and averaged weights, and what is counted on the way."""

import copy
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dgunet import distributed
from dgunet.checkpoint import load_weights, weights_of
from dgunet.errors import UserError
from dgunet.hardware import autocast_dtype, memory_format, training_device
from dgunet.losses import LOSSES, StageLoss
from dgunet.model import DGUNet, FromImages
from dgunet.state import is_averaged, load_moments
from dgunet.transforms import centre, unit_range


class Counts(NamedTuple):
    """What `StepCounters` have counted."""

    loss: float
    counted: int
    skipped: int
    skipped_in_a_row: int

    @property
    def mean_loss(self) -> float:
        return self.loss / self.counted if self.counted else math.nan


class StepCounters:
    """Counters of an epoch's steps, kept on the device, so that a step need not wait for it.

    ``loss``: sum over the steps that are ``counted``; ``skipped``: those with a loss or gradient that is not finite;
    ``skipped_in_a_row``: the last so many, of this epoch or those before.
    """

    def __init__(self, device: torch.device):
        self.values = torch.zeros(4, dtype=torch.float64, device=device)
        self.loss, self.counted, self.skipped, self.skipped_in_a_row = self.values.unbind()  # views

    def add(self, loss: Tensor, finite: Tensor):
        skipped = (~finite).double()
        self.loss += torch.where(finite, loss, 0).double()
        self.counted += 1 - skipped
        self.skipped += skipped
        self.skipped_in_a_row.add_(1).mul_(skipped)

    def next_epoch(self):
        self.values[:3] = 0

    def read(self) -> Counts:
        loss, *counts = self.values.tolist()
        return Counts(loss, *map(int, counts))


class Learner:
    """A network in training, on this process's device: what each step changes.

    Args:
        cfg: see `config.py`.
        model: a DGUNet. One with a known degradation learns from clean pictures, which it is given measured.

    Raises:
        UserError: settings that do not go together.
    """

    def __init__(self, cfg, model: DGUNet):
        self.cfg, self.world = cfg, distributed.world_size()
        graphs = cfg.SPEED.COMPILE and cfg.SPEED.COMPILE_MODE in ("reduce-overhead", "max-autotune")
        if graphs and cfg.OPTIM.ACCUMULATE > 1:
            raise UserError(
                f"SPEED.COMPILE_MODE {cfg.SPEED.COMPILE_MODE} uses CUDA graphs, whose gradients the next pass "
                "overwrites; with OPTIM.ACCUMULATE take default or max-autotune-no-cudagraphs"
            )
        torch.backends.cudnn.benchmark = True  # crops are of one size: it pays to try cuDNN's algorithms once
        self.device = training_device(cfg)
        self.amp = autocast_dtype(cfg.SPEED.AMP, self.device)
        self.memory_format = memory_format(cfg.SPEED.CHANNELS_LAST, self.device, self.amp)
        self.model = model.to(self.device, memory_format=self.memory_format)
        self.network = FromImages(self.model)  # what runs the forward pass; after `join_group` distributed
        weights = {name: cfg.LOSS[name.upper()] for name in LOSSES}
        self.loss = StageLoss(weights, cfg.LOSS.CLAMP).to(self.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=cfg.OPTIM.LR_INITIAL, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=cfg.OPTIM.WEIGHT_DECAY, fused=True,
        )  # fmt: skip
        self.ema = copy.deepcopy(model).requires_grad_(False) if cfg.OPTIM.EMA_DECAY > 0 else None
        self.averaged = 0  # steps that went into it
        self.counters = StepCounters(self.device)
        if cfg.SPEED.COMPILE:
            self.model.compile(mode=cfg.SPEED.COMPILE_MODE)

    def join_group(self):
        """Share the gradients with the other processes, where there is a group: also one of one process."""
        if dist.is_initialized():
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids, gradient_as_bucket_view=True)

    def train_step(self, input: Tensor, target: Tensor):
        """One optimisation step on this process's share of a batch; nothing here waits for the device.

        Where the loss or the gradient is not finite the weights stay as they are and the step is counted as skipped.
        """
        passes = self.cfg.OPTIM.ACCUMULATE
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for i, (part, part_target) in enumerate(zip(input.chunk(passes), target.chunk(passes), strict=True)):
            if isinstance(self.network, DistributedDataParallel):
                self.network.require_backward_grad_sync = i == passes - 1  # gradients travel once, with the last pass
            with self.autocast():
                estimates = self.network(part)
            part_loss = self.loss(estimates, centre(part_target, *estimates[0].shape[-2:])) / passes
            part_loss.backward()
            loss += part_loss.detach()
        loss = distributed.sum_over_processes(loss) / self.world

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
        self.counters.add(loss, finite)

    @torch.no_grad()
    def _average(self):
        """As AveragedModel does, whose count of the steps is a tensor on the device: each step would wait for it."""
        if self.averaged == 0:
            self.ema.load_state_dict(self.model.state_dict())  # with what is not trained, such as a fixed matrix
        else:
            averaged, current = list(self.ema.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averaged, current, 1 - self.cfg.OPTIM.EMA_DECAY)
        self.averaged += 1

    @property
    def result(self) -> DGUNet:
        """The network that is validated and tested: the averaged one where EMA is on."""
        return self.model if self.ema is None else self.ema

    @property
    def share(self) -> int:
        """Crops of a batch that go through the network at once."""
        return self.cfg.OPTIM.BATCH_SIZE // (self.world * self.cfg.OPTIM.ACCUMULATE)

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def move(self, x: Tensor) -> Tensor:
        return unit_range(x.to(self.device, non_blocking=True)).contiguous(memory_format=self.memory_format)

    def state_dict(self) -> dict:
        """What it needs to go on, besides the weights of `result`: moments, counts, the weights behind an average."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "totals": self.counters.values.tolist(),
        }
        if self.ema is not None:
            state |= {"raw_state_dict": self.model.state_dict(), "averaged": self.averaged}
        return state

    def load_state_dict(self, state: dict, path):
        """Take up a state that `state.check_state` has found good; ``path`` is the file that it comes from.

        Raises:
            UserError: it is of another network.
        """
        averaged = is_averaged(state)
        raw = state["raw_state_dict" if averaged else "state_dict"]
        load_weights(self.model, weights_of({"state_dict": raw}, path), path)
        if averaged and self.ema is not None:
            load_weights(self.ema, weights_of(state, path), path)
            self.averaged = state["averaged"]
        load_moments(self.optimizer, state["optimizer"]["state"], path)
        self.counters.values.copy_(torch.tensor(state["totals"], dtype=torch.float64))
