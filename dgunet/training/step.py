"""What a training step changes: the network, its optimiser and averaged weights, and the counters of the steps."""

import copy
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgunet.checkpoints.load import check_tensors, load_weights, weights_of
from dgunet.data.transforms import center_crop, unit_range
from dgunet.model.degradations import Degradation, may_measure_randomly, measure
from dgunet.model.network import DGUNet
from dgunet.runtime import distributed
from dgunet.runtime.errors import UserError, shorten_list
from dgunet.runtime.hardware import autocast_dtype, memory_format, training_device
from dgunet.training import optimizers
from dgunet.training.capture import GRAPH_MODES, make_captured_step
from dgunet.training.losses import loss_from_config

# Measured on an H100: compiling takes a minute, and saves 20 ms in each step of a small network, more of a large one.
STEPS_THAT_REPAY_COMPILING = 5000


class MeasureThenRestore(nn.Module):
    """What training and validation run: images x (B, C, H, W) to the network's estimates.

    With a known degradation, x are clean images, which are measured first; the estimates are of x's centre where
    `Degradation.measure` crops. With a learned one, x are the degraded images. ``y`` is the last measurement.

    Args:
        generators: of random numbers, shared and one for each image, see `Degradation`.
        measuring: measures in place of the network's operator.
    """

    def __init__(self, model: DGUNet):
        super().__init__()
        self.model, self.y = model, None

    def forward(self, x: Tensor, *generators, measuring: Degradation | None = None) -> list[Tensor]:
        known = self.model.degradation if measuring is None else measuring
        self.y = x if known is None else measure(known, x, *generators)
        return self.model(self.y)


class StepCounts(NamedTuple):
    """The values of `StepCounters`."""

    loss: float = 0.0
    counted: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    norm: float = 0.0
    norm_max: float = 0.0

    @property
    def mean_loss(self) -> float:
        return self.loss / self.counted if self.counted else math.nan

    @property
    def mean_norm(self) -> float:
        return self.norm / self.counted if self.counted else math.nan

    def since(self, earlier: "StepCounts") -> "StepCounts":
        """The sums of loss and norm, and their number, over the steps since an earlier reading in this epoch."""
        return StepCounts(self.loss - earlier.loss, self.counted - earlier.counted, norm=self.norm - earlier.norm)


class StepCounters:
    """Counters of an epoch's steps, kept on the device, so that a step need not wait for it.

    ``loss``: sum over the ``counted`` steps; ``skipped``: steps with a loss or gradient that is not finite;
    ``skipped_in_a_row``: the number of those since the last other one, in this epoch or before; ``norm`` and
    ``norm_max``: sum and maximum of the gradient's norm before clipping over the counted steps.
    """

    def __init__(self, device: torch.device):
        self.values = torch.zeros(6, dtype=torch.float64, device=device)
        views = self.values.unbind()
        self.loss, self.counted, self.skipped, self.skipped_in_a_row, self.norm, self.norm_max = views

    def add(self, loss: Tensor, norm: Tensor, finite: Tensor):
        skipped = (~finite).double()
        self.loss += torch.where(finite, loss, 0).double()
        self.counted += 1 - skipped
        self.skipped += skipped
        self.skipped_in_a_row.add_(1).mul_(skipped)
        norm = torch.where(finite, norm, 0).double()
        self.norm += norm
        self.norm_max.copy_(torch.maximum(self.norm_max, norm))

    def next_epoch(self):
        self.values[:3] = 0
        self.values[4:] = 0

    def read(self) -> StepCounts:
        loss, *counts, norm, norm_max = self.values.tolist()
        return StepCounts(loss, *map(int, counts), norm, norm_max)

    def load(self, totals: list[float]):
        """Continue from values that were read; earlier versions have no norms: those of their epoch are NaN."""
        totals = totals + [math.nan] * (len(self.values) - len(totals))
        self.values.copy_(torch.tensor(totals, dtype=torch.float64))


class TrainState:
    """A network in training on this process's device, with all that a training step reads and changes.

    Args:
        cfg: see `config.py`.
        model: a DGUNet. One with a known degradation is trained on clean images, from which its input is measured.
        steps: of the whole run, for SPEED.COMPILE auto.

    Raises:
        UserError: settings that do not go together.
    """

    def __init__(self, cfg, model: DGUNet, steps: int = 0):
        self.cfg, self.rank, self.world = cfg, distributed.rank(), distributed.world_size()
        self.device = training_device(cfg)
        repays = self.device.type == "cuda" and steps >= STEPS_THAT_REPAY_COMPILING
        self.compiled = repays if cfg.SPEED.COMPILE == "auto" else cfg.SPEED.COMPILE
        if self.compiled and cfg.SPEED.COMPILE_MODE in GRAPH_MODES and cfg.OPTIM.ACCUMULATE > 1:
            raise UserError(
                f"SPEED.COMPILE_MODE {cfg.SPEED.COMPILE_MODE} uses CUDA graphs, whose gradients the next pass "
                "overwrites; with OPTIM.ACCUMULATE take default or max-autotune-no-cudagraphs"
            )
        torch.backends.cudnn.benchmark = True  # crops are of one size: it pays to try cuDNN's algorithms once
        self.amp = autocast_dtype(cfg.SPEED.AMP, self.device)
        self.memory_format = memory_format(cfg.SPEED.CHANNELS_LAST, self.device, self.amp)
        self.model = model.to(self.device, memory_format=self.memory_format)
        self.network = MeasureThenRestore(self.model)  # what runs the forward pass; after `wrap_ddp` distributed
        self.measured = may_measure_randomly(model.degradation)
        self.loss = loss_from_config(cfg.LOSS).to(self.device)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.optimizer = optimizers.make_optimizer(cfg.OPTIM, self.parameters)
        self.ema = copy.deepcopy(model).requires_grad_(False) if cfg.OPTIM.EMA_DECAY > 0 else None
        self.averaged = 0  # steps since its first weights, which are those of the first good step
        self.good: dict[str, Tensor] | None = None  # trained weights, see `save_rollback_weights`
        self.good_is_current = False  # they are the present ones
        self.counters = StepCounters(self.device)
        if self.compiled:
            self.model.compile(mode=cfg.SPEED.COMPILE_MODE)
        self.captured_step = make_captured_step(self)

    def wrap_ddp(self):
        """Share the gradients with the other processes, where there is a process group (also of one process)."""
        if dist.is_initialized():
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids, gradient_as_bucket_view=True)

    def random_draws(self, shared: tuple[int, ...], own: list[tuple[int, ...]]) -> tuple:
        """The generators for `Degradation.measure`, seeded by SEED and the numbers given; () if none are needed.

        Args:
            shared: numbers for what the images of a batch have in common.
            own: numbers for each image.
        """
        seeded = lambda device, key: torch.Generator(device).manual_seed(hash((self.cfg.SEED, *key)))  # noqa: E731
        return (seeded("cpu", shared), [seeded(self.device, key) for key in own]) if self.measured else ()

    def train_step(self, input: Tensor, target: Tensor, time: tuple[int, int] | None = None):
        """One optimisation step on this process's part of a batch, without waiting for the device.

        With SPEED.CAPTURE it is replayed, see `capture.CapturedStep`.

        Args:
            input, target: images (B, C, H, W) in [0, 1]; B is BATCH_SIZE / processes.
            time: (epoch, step), which seed a random measurement; default: it is drawn from PyTorch's generator.

        Raises:
            UserError: the loss does not depend on a parameter.
        """
        self.good_is_current = False
        averaging = self.is_averaging
        if self.captured_step is None:
            self.compute_step(input, target, time)
        else:
            self.captured_step(input, target)
        if self.ema is not None and averaging:
            self.averaged += 1

    def compute_step(self, input: Tensor, target: Tensor, time: tuple[int, int] | None = None):
        """`train_step` as it is computed: tensors change in place, and nothing else that later steps depend on.

        The batch goes through the network in ACCUMULATE chunks of b = B / ACCUMULATE images. Of each chunk the network
        returns K estimates (b, C, H, W), one of each stage, whose losses are summed; a known degradation may
        return smaller ones, which are compared with the centres of the targets. Where the loss or the gradient is not
        finite the weights, also the averaged ones, stay as they are and the step is counted as skipped. (Until the
        first step that is not, averaging does wait for the device, and so does an optimizer that is not fused.)
        """
        passes = self.cfg.OPTIM.ACCUMULATE
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for i, (part, part_target) in enumerate(zip(input.chunk(passes), target.chunk(passes), strict=True)):
            if isinstance(self.network, DistributedDataParallel):
                self.network.require_backward_grad_sync = i == passes - 1  # gradients travel once, with the last pass
            first = (self.rank * passes + i) * len(part)  # index in the batch of all processes
            draws = () if time is None else self.random_draws(time, [(*time, first + k) for k in range(len(part))])
            with self.autocast():
                estimates = self.network(part, *draws)
            network = getattr(self.network, "module", self.network)
            part_loss = self.loss(estimates, center_crop(part_target, *estimates[0].shape[-2:]), network.y) / passes
            part_loss.backward()
            network.y = None  # it would keep the graph of a learned measurement until the next step
            loss += part_loss.detach()
        loss = distributed.sum_over_processes(loss) / self.world

        unused = [name for name, p in self.trained.items() if p.grad is None]
        if unused:  # DistributedDataParallel cannot train them, and Adam would have no moments to save
            raise UserError(
                f"the loss has no gradient for {shorten_list(unused)}; leave out what the network does not use, or "
                "freeze it with requires_grad_(False) before the Trainer is made"
            )
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        if self.cfg.OPTIM.CLIP_NORM > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.cfg.OPTIM.CLIP_NORM, norm)
        finite = torch.isfinite(loss + norm)
        skipped = (~finite).float()
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # A fused one leaves weights and moments alone where found_inf is 1: the skip of torch.amp.GradScaler.
            self.optimizer.found_inf = skipped
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        if self.ema is not None:
            self._average(skipped)
        self.counters.add(loss, norm, finite)

    @torch.no_grad()
    def _average(self, skipped: Tensor):
        """Update the averaged weights as AveragedModel does, which would wait for the device, where its counter is."""
        if self.averaged == 0:
            self.ema.load_state_dict(self.model.state_dict())  # with what is not trained, such as a fixed matrix
            self.averaged = 1 - int(skipped)
            return
        averaged, current = list(self.ema.parameters()), list(self.model.parameters())
        # Towards the weights, or after a skipped step towards the average itself, which leaves it exactly as it is.
        aim = torch._foreach_mul(current, 1 - skipped)
        torch._foreach_add_(aim, torch._foreach_mul(averaged, skipped))
        torch._foreach_lerp_(averaged, aim, 1 - self.cfg.OPTIM.EMA_DECAY)

    @torch.no_grad()
    def save_rollback_weights(self):
        """Keep a copy of the weights for `roll_back`; not with EMA, which goes back to the averaged ones."""
        if self.ema is None and self.cfg.OPTIM.ROLLBACK_AFTER_BAD_STEPS:
            self.good = {name: p.clone() for name, p in self.trained.items()}
            self.good_is_current = True

    @torch.no_grad()
    def roll_back(self) -> bool:
        """Go back to the averaged weights, or those kept, and clear the moments; False if they are not finite."""
        good = self.good if self.ema is None else dict(self.ema.named_parameters())
        if good is None or not all(good[name].isfinite().all() for name in self.trained):
            return False
        torch._foreach_copy_(self.parameters, [good[name] for name in self.trained])
        optimizers.clear_state(self.optimizer, self.cfg.OPTIM)
        self.counters.skipped_in_a_row.zero_()
        self.good_is_current = True
        return True

    @property
    def eval_model(self) -> DGUNet:
        """The network that is validated and tested: the averaged one where EMA is on."""
        return self.model if self.ema is None else self.ema

    @property
    def micro_batch_size(self) -> int:
        """Crops that go through this process's network at once."""
        return self.cfg.OPTIM.BATCH_SIZE // (self.world * self.cfg.OPTIM.ACCUMULATE)

    @property
    def is_averaging(self) -> bool:
        """The averaged weights, if any, have been begun."""
        return self.ema is None or self.averaged > 0

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def to_device(self, x: Tensor) -> Tensor:
        return unit_range(x.to(self.device, non_blocking=True)).contiguous(memory_format=self.memory_format)

    def state_dict(self) -> dict:
        """What training needs to continue besides the weights of `eval_model`: moments, counts, raw weights."""
        state = {
            "optimizer": optimizers.saved_state(self.optimizer, self.cfg.OPTIM),
            "totals": self.counters.values.tolist(),
        }
        if self.ema is not None:
            state |= {"raw_state_dict": self.model.state_dict(), "averaged": self.averaged}
        if self.good is not None and not self.good_is_current:
            state["good_weights"] = self.good
        return state

    def load_state_dict(self, state: dict, path):
        """Continue from a state that `resume.check_state` has found good; ``path`` is the file that it comes from.

        Raises:
            UserError: it is of another network.
        """
        averaged = "averaged" in state
        raw = state["raw_state_dict" if averaged else "state_dict"]
        load_weights(self.model, weights_of({"state_dict": raw}, path), path)
        if averaged and self.ema is not None:
            load_weights(self.ema, weights_of(state, path), path)
            self.averaged = state["averaged"]
        optimizers.load_state(self.optimizer, self.cfg.OPTIM, state["optimizer"], path)
        self.counters.load(state["totals"])
        if self.captured_step is not None and self.captured_step.batch is not None:
            self.captured_step = make_captured_step(self)  # what was recorded changes the former moments
        self.save_rollback_weights()
        if self.good is not None and "good_weights" in state:
            check_tensors(self.good, state["good_weights"], path, "the good weights of this run")
            for name, weights in self.good.items():
                weights.copy_(state["good_weights"][name])
            self.good_is_current = False
