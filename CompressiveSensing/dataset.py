"""What is special about compressive sensing data: clean pictures only, their luminance, measured on the way in."""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dgunet.data import read_image
from dgunet.errors import UserError
from dgunet.transforms import pad_to


def read_luma(path: str | Path) -> np.ndarray:
    """Luminance of a picture, (H, W) uint8: OpenCV's full-range Y of YCrCb; grey pictures as they are.

    Reads what the published sets come in: grey, colour and palette pictures, .png, .tif, .jpg, ...

    Raises:
        UserError: unreadable, with transparency, or not 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode in ("1", "L"):
                return np.asarray(image.convert("L"))
            if mode == "P" and "transparency" not in image.info:
                return _luma(np.asarray(image.convert("RGB")))
    except OSError as error:
        raise UserError(f"{path} is not a picture that can be read, or is damaged; replace or remove it") from error
    return _luma(read_image(path))


def _luma(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[:, :, 0]


def to_tensor(luma: np.ndarray) -> Tensor:
    """(H, W) uint8 to a (1, H, W) float32 tensor in [0, 1]."""
    return torch.from_numpy(np.array(luma)).float().div_(255)[None]


class LumaPatches(Dataset):
    """Random crops of luminance for training: ``dataset[epoch, index]`` is ``(x, x)``; the network measures the first.

    Augmented by a left-right flip, an up-down flip and transposition, each with probability 1/2. (In the original the
    second flips the channel axis, of which there is one.)

    Args:
        paths: pictures.
        patch: side of the crops, a multiple of 32 pixels. Smaller pictures are extended by reflection.
        repeat: how often each picture counts in an epoch.
        flip: whether to augment.
        seed: of all randomness.
    """

    def __init__(self, paths: list[Path], patch: int, repeat: int = 200, flip: bool = True, seed: int = 1234):
        if patch % 32:
            raise UserError(f"TRAINING.TRAIN_PS must be a multiple of the 32-pixel blocks, got {patch}")
        self.paths, self.patch, self.repeat, self.flip, self.seed = paths, patch, repeat, flip, seed

    def __len__(self) -> int:
        return len(self.paths) * self.repeat

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        picture = read_luma(self.paths[index % len(self.paths)])
        top = rng.integers(max(picture.shape[0] - self.patch, 0) + 1)
        left = rng.integers(max(picture.shape[1] - self.patch, 0) + 1)
        x = to_tensor(picture[top : top + self.patch, left : left + self.patch])
        x = pad_to(x[None], self.patch, self.patch)[0]
        if self.flip:
            mirror, upend, transpose = rng.integers(2, size=3)
            x = x.flip(-1) if mirror else x
            x = x.flip(-2) if upend else x
            x = x.mT if transpose else x
        x = x.contiguous()
        return x, x


class LumaCentres(Dataset):
    """Central crops of luminance for validation, ``(x, x)``: sides at most ``patch`` (0: any), multiples of 32."""

    def __init__(self, paths: list[Path], patch: int):
        self.paths, self.patch = paths, patch
        self.sizes = {tuple(self[index][0].shape[1:]) for index in range(len(self))}  # those of one can be batched

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = read_luma(self.paths[index])
        height, width = (min(side, self.patch or side) // 32 * 32 for side in picture.shape)
        if not height or not width:
            raise UserError(f"{self.paths[index]} is smaller than a block of 32x32 pixels")
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
        x = to_tensor(picture[top : top + height, left : left + width])
        return x, x
