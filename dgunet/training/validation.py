"""Validation while training: the mean PSNR of the network as it is, whatever the number of processes."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Subset

from dgunet.data.datasets import ValidationSet
from dgunet.data.loader import make_dataloader
from dgunet.data.transforms import center_crop, unit_range
from dgunet.evaluation.metrics import psnr_batch
from dgunet.model.network import MeasureThenRestore
from dgunet.model.sampling import percentage
from dgunet.runtime import distributed
from dgunet.training.step import TrainState

log = logging.getLogger("dgunet")


@torch.inference_mode()
def validate(train_state: TrainState, val_set: ValidationSet, should_stop: Callable[[], bool]) -> float | None:
    """Mean PSNR (protocol ``train_rgb``) of the final estimates over the validation set.

    Images that are restored exactly, whose PSNR is infinite, are left out of the mean, and counted in the log; only
    where all are is it infinite. A network for a range of ratios is scored at each of its ``validation_ratios``.

    Args:
        should_stop: asked between two batches, by all processes equally often.

    Returns:
        dB, or None where ``should_stop`` has interrupted it.
    """
    network = MeasureThenRestore(train_state.eval_model)
    network.eval()
    torch.backends.cudnn.benchmark = len(val_set.sizes) == 1
    operators = getattr(network.model.degradation, "validation_ratios", [None])
    scores = torch.zeros(len(val_set), len(operators), dtype=torch.float64, device=train_state.device)
    mine = range(train_state.rank, len(val_set), train_state.world)
    batch_size = validation_batch_size(train_state, val_set)
    longest = len(range(0, len(val_set), train_state.world))  # the most images of any process
    stopped = False
    with make_dataloader(Subset(val_set, mine), train_state.cfg.TRAINING.WORKERS, batch_size=batch_size) as loader:
        batches = iter(loader)
        for start in range(0, longest, batch_size):
            stopped = start > 0 and should_stop()
            if stopped:
                break
            if indices := list(mine[start : start + batch_size]):
                input, target = next(batches)
                for column, operator in enumerate(operators):
                    scores[indices, column] = _psnr(train_state, network, input, target, indices, operator)
    network.train()
    torch.backends.cudnn.benchmark = True
    if stopped:
        return None
    scores = distributed.sum_over_processes(scores)
    finite = scores != math.inf
    if exact := int((~finite).sum()):
        log.info("%d of %d validation images are restored exactly and left out of the mean", exact, scores.numel())
    if len(operators) > 1:
        means = [column[keep].mean().item() for column, keep in zip(scores.T, finite.T, strict=True)]
        parts = (f"{percentage(len(A.matrix), A.block)} %: {m:.2f}" for A, m in zip(operators, means, strict=True))
        log.info("PSNR in dB by ratio: %s", ", ".join(parts))
    return scores[finite].mean().item() if finite.any() else math.inf


def _psnr(train_state: TrainState, network, input: Tensor, target: Tensor, indices: list[int], operator) -> Tensor:
    """PSNR of each of a batch's images (B, C, H, W), or (B, N, C, h, w) in N blocks that are restored one by one."""
    x = train_state.to_device(input.flatten(0, -4))
    # Random measurements are the same in each validation, whatever the processes.
    draws = () if operator else train_state.random_draws((indices[0],), [(i,) for i in indices])
    with train_state.autocast():
        restored = network(x, *draws, measuring=operator)[0]
    truth = center_crop(target, *restored.shape[-2:])
    truth = unit_range(truth.to(train_state.device)).flatten(1, -3)  # blocks side by side again, as channels
    restored = restored.float().reshape(truth.shape)
    if train_state.cfg.MODEL.COMPLEX:
        restored, truth = (image.norm(dim=1, keepdim=True) for image in (restored, truth))  # magnitudes
    return psnr_batch(restored, truth).double()


def validation_batch_size(train_state: TrainState, val_set: ValidationSet) -> int:
    """Images at once: no more pixels than in a training pass; 1 where they, or their measurements, differ in size."""
    random = train_state.measured and not hasattr(train_state.model.degradation, "validation_ratios")
    if len(val_set.sizes) > 1 or random:
        return 1
    pixels = max(map(math.prod, val_set.sizes))
    return max(1, train_state.micro_batch_size * train_state.cfg.TRAINING.TRAIN_PS**2 // pixels)
