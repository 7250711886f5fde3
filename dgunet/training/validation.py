"""Validation while training: the mean PSNR of the network as it is, whatever the number of processes."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Subset

from dgunet.data.datasets import ValidationSet
from dgunet.data.loader import make_dataloader
from dgunet.data.transforms import center_crop, to_uint8, unit_range
from dgunet.evaluation.metrics import psnr_batch
from dgunet.model.degradations import Degradation
from dgunet.model.sampling import percentage
from dgunet.runtime import distributed
from dgunet.training.step import MeasureThenRestore, TrainState

log = logging.getLogger("dgunet")
LOGGED_IMAGES, LOGGED_SIDE = 4, 256  # how many images a validation gives to the loggers, and their largest side


@torch.inference_mode()
def validate(
    train_state: TrainState, val_set: ValidationSet, should_stop: Callable[[], bool],
    panels: list[ndarray] | None = None,
) -> float | None:  # fmt: skip
    """Mean PSNR (protocol ``train_rgb``) of the final estimates over the validation set.

    Images that are restored exactly, whose PSNR is infinite, are left out of the mean, and counted in the log; only
    where all are is it infinite. A network for a range of ratios is scored at each of its ``validation_operators``.

    Args:
        should_stop: asked between two batches, by all processes equally often.
        panels: where given, `side_by_side` of the first LOGGED_IMAGES images of this process are added to it.

    Returns:
        dB, or None where ``should_stop`` has interrupted it.
    """
    network = MeasureThenRestore(train_state.eval_model)
    network.eval()
    torch.backends.cudnn.benchmark = len(val_set.sizes) == 1
    operators = getattr(network.model.degradation, "validation_operators", [None])
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
                    wanted = panels if column == 0 else None
                    scores[indices, column] = _psnr(train_state, network, input, target, indices, operator, wanted)
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


def _psnr(
    train_state: TrainState, network, input: Tensor, target: Tensor, indices: list[int], operator,
    panels: list[ndarray] | None,
) -> Tensor:  # fmt: skip
    """PSNR of each of a batch's images (B, C, H, W), or (B, N, C, h, w) in N blocks that are restored one by one."""
    x = train_state.to_device(input.flatten(0, -4))
    # Random measurements are the same in each validation, whatever the processes.
    draws = () if operator else train_state.random_draws((indices[0],), [(i,) for i in indices])
    with train_state.autocast():
        restored = network(x, *draws, measuring=operator)[0].float()
    truth = unit_range(center_crop(target, *restored.shape[-2:]).to(train_state.device))
    if panels is not None and len(panels) < LOGGED_IMAGES:
        known = network.model.degradation if operator is None else operator
        sides = _as_images(network.y, known, restored.shape), restored, truth
        images = zip(*(side.reshape(len(indices), -1, *side.shape[-3:]) for side in sides), strict=True)
        panels += map(side_by_side, itertools.islice(images, LOGGED_IMAGES - len(panels)))
    truth = truth.flatten(1, -3)  # blocks side by side again, as channels
    restored = restored.reshape(truth.shape)
    if train_state.cfg.MODEL.COMPLEX:
        restored, truth = (image.norm(dim=1, keepdim=True) for image in (restored, truth))  # magnitudes
    return psnr_batch(restored, truth).double()


def _as_images(y, degradation: Degradation | None, shape: torch.Size) -> Tensor:
    """The network's input y, or A_adjoint(y) where it has not the ``shape`` (B, C, H, W) of the restored images."""
    if degradation is None or getattr(y, "shape", None) == shape:
        return y
    if getattr(y, "dtype", None) in (torch.bfloat16, torch.float16):  # as autocast measures, unlike A_adjoint here
        y = y.float()
    return degradation.A_adjoint(y)


def side_by_side(sides: Iterable[Tensor]) -> ndarray:
    """Images (N, C, h, w), each in N blocks, put together where N is a square; of others the first block is shown.

    Returns:
        Their centres, at most 256 pixels wide and high, next to each other: RGB, (h, sum of w, 3), uint8.
    """
    columns = []
    for x in sides:
        side = math.isqrt(len(x))
        if side**2 != len(x):
            x, side = x[:1], 1
        x = x.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (C, H, W)
        x = center_crop(x, *(min(size, LOGGED_SIDE) for size in x.shape[1:]))
        x = x if len(x) == 3 else x[:1].expand(3, -1, -1)
        columns.append(to_uint8(x.float().nan_to_num().permute(1, 2, 0).cpu().numpy()))
    height = min(map(len, columns))
    return np.concatenate([image[:height] for image in columns], axis=1)


def validation_batch_size(train_state: TrainState, val_set: ValidationSet) -> int:
    """Images at once: no more pixels than in a training pass; 1 where they, or their measurements, differ in size."""
    random = train_state.measured and not hasattr(train_state.model.degradation, "validation_operators")
    if len(val_set.sizes) > 1 or random:
        return 1
    pixels = max(map(math.prod, val_set.sizes))
    return max(1, train_state.micro_batch_size * train_state.cfg.TRAINING.TRAIN_PS**2 // pixels)
