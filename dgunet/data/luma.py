"""Training data of compressive sensing: clean images only, their luminance, measured on the way in."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgunet.data.datasets import RandomPatches
from dgunet.data.images import open_luma
from dgunet.data.packed import Packed
from dgunet.data.transforms import unit_range
from dgunet.runtime.errors import UserError


class LumaPatches(RandomPatches):
    """Random crops of images' luminance for training: a sample is ``(x, x)``, (1, patch, patch) uint8.

    The network measures the first. Augmented by a left-right flip, an up-down flip and transposition, each with
    probability 1/2. (In the original the second flips the channel axis, of which there is one.)

    Args:
        *args, **kwargs: see `RandomPatches`.
        block: side of the blocks that are measured, pixels.
    """

    def __init__(self, *args, block: int = 32, **kwargs):
        self.multiple = block
        super().__init__(*args, **kwargs)

    def blocks(self, count: int = 16384) -> Tensor:
        """Blocks of all images at random places, (N, block^2), N at least ``count``, range [0, 1]."""
        rng = np.random.default_rng(self.seed)
        found, size = [], self.multiple
        for item in self.items:
            image = open_luma(item)[:, :]
            rows, columns = (side - size + 1 for side in image.shape)
            if min(rows, columns) < 1:
                raise UserError(f"{item} is smaller than a block of {size}x{size} pixels")
            for _ in range(-(-count // len(self.items))):
                top, left = rng.integers(rows), rng.integers(columns)
                found.append(image[top : top + size, left : left + size].ravel())
        return unit_range(torch.from_numpy(np.stack(found)))

    def sample(self, item: Path | Packed, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        (x,) = self.crop(rng, open_luma(item))
        if self.flip:
            mirror, upend, transpose = rng.integers(2, size=3)
            x = x.flip(-1) if mirror else x
            x = x.flip(-2) if upend else x
            x = x.mT if transpose else x
        x = x.contiguous()
        return x, x
