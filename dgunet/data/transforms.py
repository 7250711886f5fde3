"""Flips, rotations, padding and value range of images (..., H, W), for training and inference."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def dihedral(x: Tensor, k: int) -> Tensor:
    """The k-th of the 8 flips and rotations of (..., H, W): k % 4 quarter turns, then a left-right flip if k > 3."""
    x = torch.rot90(x, k % 4, dims=(-2, -1))
    return x.flip(-1) if k > 3 else x


def undo_dihedral(x: Tensor, k: int) -> Tensor:
    """Inverse of `dihedral` with the same k."""
    if k > 3:
        x = x.flip(-1)
    return torch.rot90(x, -(k % 4), dims=(-2, -1))


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Pad (B, C, H, W) at the right and bottom to the given size: by reflection, by replication where too small."""
    if x.dtype == torch.uint8 and (x.shape[2] < height or x.shape[3] < width):
        return pad_to(x.float(), height, width).to(x.dtype)  # torch pads floats only
    for size, current, place in ((height, x.shape[2], (0, 0, 0, 1)), (width, x.shape[3], (0, 1, 0, 0))):
        missing = size - current
        if missing > 0:
            mode = "reflect" if missing < current else "replicate"
            x = F.pad(x, [missing * side for side in place], mode=mode)
    return x


def center_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of (..., H, W), of the given size."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """`pad_to` the next multiples of a number."""
    return pad_to(x, *(-(-side // multiple) * multiple for side in x.shape[2:]))


def pad_to_blocks(x: Tensor, block: int) -> Tensor:
    """Pad (B, C, H, W) at the right and bottom by zeros to the next multiples of ``block``."""
    return F.pad(x, (0, -x.shape[3] % block, 0, -x.shape[2] % block))


def unit_range(x: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """8-bit values, in a tensor or an array, as float32 in [0, 1]; floats as they are."""
    if isinstance(x, np.ndarray):
        return x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] as an 8-bit image: clamped, times 255, rounded to nearest; 8-bit images as they are."""
    return image if image.dtype == np.uint8 else (np.clip(image, 0, 1) * np.float32(255)).round().astype(np.uint8)


def as_colour(image: np.ndarray) -> np.ndarray:
    """A grey image (H, W) as three equal channels, which changes neither MSE nor per-channel SSIM."""
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def apply_orientation(image: np.ndarray, turn: int) -> np.ndarray:
    """An image (H, W, ...) flipped and rotated as its EXIF orientation (1 to 8) asks for."""
    if turn >= 5:
        image = image.swapaxes(0, 1)
    down = -1 if turn in (3, 4, 7, 8) else 1
    right = -1 if turn in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(image[::down, ::right])
