"""What is special about compressive sensing data: clean pictures only, their luminance, measured on the way in."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dgunet.data import Packed, RandomPatches, open_image, read_image, to_tensor
from dgunet.errors import UserError, optional
from dgunet.transforms import unit_range


def read_luma(path: str | Path) -> np.ndarray:
    """Luminance of a picture, (H, W) uint8: OpenCV's full-range Y of YCrCb; grey pictures as they are.

    Reads what the published sets come in: grey, colour and palette pictures, .png, .tif, .jpg, ...

    Raises:
        UserError: unreadable, with transparency, or not 8 bits per channel.
    """
    return _luma(read_image(path, grey=True))


def open_luma(source: Path | Packed):
    """A picture's luminance to take a crop from, as `dgunet.data.open_image`; packed pictures are luminance already."""
    return open_image(source) if isinstance(source, Packed) else read_luma(source)


def _luma(picture: np.ndarray) -> np.ndarray:
    if picture.ndim == 2:
        return picture
    cv2 = optional("cv2")
    return cv2.cvtColor(picture, cv2.COLOR_RGB2YCrCb)[:, :, 0]


class LumaPatches(RandomPatches):
    """Random crops of luminance for training: ``dataset[epoch, index]`` is ``(x, x)``, (1, patch, patch) uint8.

    The network measures the first. Augmented by a left-right flip, an up-down flip and transposition, each with
    probability 1/2. (In the original the second flips the channel axis, of which there is one.)

    Args:
        paths: pictures.
        patch: side of the crops, a multiple of 32 pixels. Smaller pictures are extended by reflection.
        repeat, flip, seed: see `RandomPatches`.
    """

    multiple = 32  # of the blocks

    def __init__(self, paths: list, patch: int, repeat: int = 200, flip: bool = True, seed: int = 1234):
        super().__init__(paths, patch, repeat, flip, seed)

    def blocks(self, count: int = 16384) -> Tensor:
        """Blocks of all pictures at random places, (N, 1024), N at least ``count``, range [0, 1]."""
        rng = np.random.default_rng(self.seed)
        found, size = [], self.multiple
        for item in self.items:
            picture = open_luma(item)[:, :]
            rows, columns = (side - size + 1 for side in picture.shape)
            if min(rows, columns) < 1:
                raise UserError(f"{item} is smaller than a block of {size}x{size} pixels")
            for _ in range(-(-count // len(self.items))):
                top, left = rng.integers(rows), rng.integers(columns)
                found.append(picture[top : top + size, left : left + size].ravel())
        return unit_range(torch.from_numpy(np.stack(found)))

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        epoch, index = self.key(key)
        rng = self.generator(epoch, index)
        (crop,) = self.crop(rng, open_luma(self.items[index % len(self.items)]))
        x = self.extend(crop)
        if self.flip:
            mirror, upend, transpose = rng.integers(2, size=3)
            x = x.flip(-1) if mirror else x
            x = x.flip(-2) if upend else x
            x = x.mT if transpose else x
        x = x.contiguous()
        return x, x


class LumaCentres(Dataset):
    """Centres of pictures' luminance in separate blocks for validation, ``(x, x)``, (N, 1, height, width) uint8.

    As the original validates: the network reconstructs blocks as large as it is trained on, which know nothing of each
    other. They make up the central 256x256 pixels of a picture, or what it has of them.

    Args:
        paths: pictures.
        patch: side of the blocks, a multiple of 32 pixels; 0: each picture is one. Smaller where a picture is.
    """

    area = 256

    def __init__(self, paths: list, patch: int):
        if patch % 32:
            raise UserError(f"TRAINING.VAL_PS must be a multiple of 32 pixels, got {patch}")
        self.paths, self.patch = paths, patch
        self.sizes = {tuple(self[index][0].shape) for index in range(len(self))}  # those of one can be batched

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = open_luma(self.paths[index])
        height, width = (min(side, self.patch or side) // 32 * 32 for side in picture.shape)
        if not height or not width:
            raise UserError(f"{self.paths[index]} is smaller than a block of 32x32 pixels")
        rows, columns = (max(self.area // side, 1) for side in (height, width))
        rows, columns = min(rows, picture.shape[0] // height), min(columns, picture.shape[1] // width)
        top, left = (picture.shape[0] - rows * height) // 2, (picture.shape[1] - columns * width) // 2
        x = to_tensor(picture[top : top + rows * height, left : left + columns * width])
        x = x.reshape(rows, height, columns, 1, width).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()
        return x, x
