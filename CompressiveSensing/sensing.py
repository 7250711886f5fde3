"""Measuring images block by block and reconstructing them, for test.py."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dgunet import DGUNet
from dgunet.data.images import to_tensor
from dgunet.data.transforms import pad_to_blocks, unit_range
from dgunet.inference import estimate

TILE = 128  # side of the original's tiles, pixels
BATCH = 16  # tiles at a time


def disturb(y: Tensor, matrix: Tensor, noise: float = 0, bits: int = 0) -> Tensor:
    """Measurements as a real sensor gives them.

    Args:
        y: an image's, (B, M, h, w).
        matrix: that measured it, (M, N).
        noise: standard deviation of Gaussian noise, in 8-bit levels: on a row's measurements ``noise / 255`` times the
            row's length, as if each pixel had it. The same random numbers every time.
        bits: of a uniform quantiser, of each row between its least and its largest measurement; 0 for none.
    """
    if noise:
        random = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        y = y + noise / 255 * matrix.norm(dim=1)[:, None, None] * random
    if bits:
        least, largest = y.amin(dim=(0, 2, 3), keepdim=True), y.amax(dim=(0, 2, 3), keepdim=True)
        step = ((largest - least) / (2**bits - 1)).clamp_min(1e-12)
        y = least + step * ((y - least) / step).round()
    return y


@torch.inference_mode()
def reconstruct_whole(
    model: DGUNet, luma: np.ndarray, bf16: bool = False, noise: float = 0, bits: int = 0, ratio: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Measure a whole image and reconstruct it at once: x_K and x_0 = A_adjoint(y), (H, W) float32, not clipped.

    ``bf16`` as for `restore`, ``noise`` and ``bits`` as for `disturb`, ``ratio`` as for
    `BlockSampling.at`, by default that of all rows.
    """
    height, width = luma.shape
    operator = model.degradation.at(ratio)
    x = pad_to_blocks(unit_range(to_tensor(luma)[None]), operator.block)
    y = disturb(operator.A(x.to(operator.matrix.device)), operator.matrix, noise, bits)
    results = estimate(model, y, bf16), operator.A_adjoint(y)
    return tuple(x[0, 0, :height, :width].float().cpu().numpy() for x in results)


@torch.inference_mode()
def reconstruct_tiles(
    model: DGUNet, luma: np.ndarray, bf16: bool = False, noise: float = 0, bits: int = 0, ratio: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same in separate tiles, as the original's test script does.

    Zeros are added to the next multiple of `TILE`; a side that is one already gets another whole tile of them, as in
    the original. (They change nothing: what is added is cropped again.)

    Raises:
        ValueError: tiles that are not of whole blocks.
    """
    height, width = luma.shape
    operator = model.degradation.at(ratio)
    padded = F.pad(unit_range(to_tensor(luma)), (0, TILE - width % TILE, 0, TILE - height % TILE))
    rows, columns = (side // TILE for side in padded.shape[1:])
    tiles = padded.view(rows, TILE, columns, TILE).transpose(1, 2).reshape(-1, 1, TILE, TILE)
    finals, initials = [], []
    measured = disturb(operator.A(tiles.to(operator.matrix.device)), operator.matrix, noise, bits)
    for y in measured.split(BATCH):
        finals.append(estimate(model, y, bf16).cpu())
        initials.append(operator.A_adjoint(y).cpu())

    def stitch(parts: list[torch.Tensor]) -> np.ndarray:
        whole = torch.cat(parts).view(rows, columns, TILE, TILE).transpose(1, 2).reshape(rows * TILE, columns * TILE)
        return whole[:height, :width].numpy().copy()

    return stitch(finals), stitch(initials)
