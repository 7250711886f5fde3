"""Crops of images for training and validation, and the order in which training sees them.

A training sample is a function of (seed, epoch, index) alone: data sets are indexed with (epoch, index), and draw
from a generator seeded with these numbers. Neither the number of loading workers nor that of training processes
changes a sample, and a resumed epoch sees what the first one would have seen.
"""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dgunet.data.images import image_size, open_complex, open_image, open_luma, to_tensor
from dgunet.data.packed import Packed
from dgunet.data.pairs import Pair, find_pairs
from dgunet.data.synthesis import Degrade
from dgunet.data.transforms import dihedral, pad_to, unit_range
from dgunet.model.proximal import MULTIPLE
from dgunet.runtime.errors import UserError

Item = Path | Packed | Pair | int  # an int: the number of a sample of another data set


@runtime_checkable
class TrainingSet(Protocol):
    """What the engine needs of a training set; `RandomPatches` is one."""

    items: Sequence[Item]  # compared when a run is resumed, see `pairs.fingerprint`
    repeat: int  # crops of each in an epoch

    def __len__(self) -> int:
        """Crops in an epoch."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(input, target) for (epoch, index), (C, H, W) of one size: uint8, or float32 in [0, 1].

        The index may lie beyond the length, where the last batch is filled with other crops. With a known degradation
        the network measures the input, which is then the clean image.
        """


@runtime_checkable
class ValidationSet(Protocol):
    """What the engine needs of a validation set; `CenterCropDataset` is one."""

    items: Sequence[Item]  # as of `TrainingSet`
    sizes: set[tuple[int, ...]]  # all sizes, without channels: items of one size can be batched

    def __len__(self) -> int:
        """Images."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(input, target), always the same, (C, H, W), or of several blocks that are restored one by one (N, C, H, W).

        Types as of `TrainingSet`.
        """


class RandomPatches(Dataset):
    """Base class of training sets, whose crops are a function of (seed, epoch, index). A subclass has `sample`.

    Training uses ``dataset[epoch, index]``. A plain ``dataset[index]``, as in an ordinary DataLoader, is of epoch
    ``dataset.epoch``: 1, with the same crops each time, unless you set it.

    Crops are uint8, a fourth of the bytes to transfer, and become floats on the device (`transforms.unit_range`).

    Args:
        items: images or pairs.
        patch: side of the crops in pixels, a multiple of ``multiple``.
        repeat: crops of each item in an epoch.
        flip: whether to augment by flips and rotations.
        seed: of all randomness.
    """

    multiple = MULTIPLE
    epoch = 1  # of plain indices

    def __init__(self, items: list[Item], patch: int, repeat: int = 1, flip: bool = True, seed: int = 1234):
        if patch < self.multiple or patch % self.multiple:
            raise UserError(f"TRAINING.TRAIN_PS must be a multiple of {self.multiple} pixels, got {patch}")
        self.items, self.patch, self.repeat, self.flip, self.seed = items, patch, repeat, flip, seed

    def __len__(self) -> int:
        return len(self.items) * self.repeat

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        epoch, index = self.key(key)
        return self.sample(self.items[index % len(self.items)], self.generator(epoch, index))

    def sample(self, item: Item, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(input, target), crops of one item, (C, patch, patch)."""
        raise NotImplementedError

    def key(self, key: tuple[int, int] | int) -> tuple[int, int]:
        """A key as (epoch, index).

        Raises:
            IndexError: a plain index is out of range, which ends a loop over the data set.
        """
        if isinstance(key, tuple):
            return key
        return self.epoch, range(len(self))[operator.index(key)]

    def generator(self, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
        """The generator of one sample; another ``stream`` is independent of the crop and augmentation."""
        return np.random.default_rng([self.seed, epoch, index, stream])

    def crop(self, rng: np.random.Generator, *images) -> list[Tensor]:
        """The same random area of each image, (C, patch, patch), extended by reflection where they are too small."""
        height, width = images[0].shape[:2]
        top = int(rng.integers(max(height - self.patch, 0) + 1))
        left = int(rng.integers(max(width - self.patch, 0) + 1))
        crops = [p[top : min(top + self.patch, height), left : min(left + self.patch, width)] for p in images]
        return [pad_to(to_tensor(crop)[None], self.patch, self.patch)[0] for crop in crops]


class PairedPatches(RandomPatches):
    """Random aligned crops of image pairs: a sample is ``(input, target)``, two (3, patch, patch) tensors.

    They are uint8, or float32 in [0, 1] after an augmentation that computes. A subclass may override `augment`.

    Args:
        items: pairs, or their folder with ``input/`` and ``target/``, whose sizes are checked now, or their
            packed file.
        *args, **kwargs: see `RandomPatches`.
        luma: whether to use luminance, (1, patch, patch).
        complex: whether to use complex images, (2, patch, patch), see `images.open_complex`.
    """

    def __init__(
        self, items: str | Path | list[Pair], *args, luma: bool = False, complex: bool = False, **kwargs
    ):  # fmt: skip
        super().__init__(items if isinstance(items, list) else find_pairs(items), *args, **kwargs)
        self.open = open_complex if complex else open_luma if luma else open_image

    def sample(self, item: Pair, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        input = self.open(item.input)
        target = input if item.target == item.input else self.open(item.target)  # of a known degradation they are one
        return self.augment(rng, *self.crop(rng, input, target))

    def augment(self, rng: np.random.Generator, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The original's flips and rotations: of 9 equally likely choices, two are the identity."""
        k = int(rng.integers(9)) % 8 if self.flip else 0
        return dihedral(input, k).contiguous(), dihedral(target, k).contiguous()


class SaturationPatches(PairedPatches):
    """Pairs of crops; in a third of them both change saturation by one factor from U(1 - s, 1 + s).

    Args:
        saturation: s, 0.2 in the original's deblurring; 0 switches it off.
        *args, **kwargs: see `PairedPatches`.
    """

    def __init__(self, *args, saturation: float = 0.2, **kwargs):
        super().__init__(*args, **kwargs)
        self.saturation = saturation

    def augment(self, rng: np.random.Generator, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        input, target = super().augment(rng, input, target)
        if not self.saturation or len(input) == 2:  # complex images have none
            return input, target
        input, target = unit_range(input), unit_range(target)
        if rng.integers(3) == 0:
            from torchvision.transforms.functional import adjust_saturation

            factor = rng.uniform(1 - self.saturation, 1 + self.saturation)
            input, target = adjust_saturation(input, factor), adjust_saturation(target, factor)
        return input, target


class MixupPatches(PairedPatches):
    """Crops with mix-up: a sample is blended with another one of the data set.

    From epoch ``mixup_from`` on, ``(input, target)`` becomes ``l * (input, target) + (1 - l) * (input', target')`` with
    l from Beta(alpha, alpha). The original, in denoising, blends within a batch; drawing the partner from the whole
    data set is the same in distribution and keeps a sample independent of the number of processes.

    Args:
        mixup: alpha; 0 switches it off.
        mixup_from: first epoch with mix-up.
        *args, **kwargs: see `PairedPatches`.
    """

    def __init__(self, *args, mixup: float = 0.6, mixup_from: int = 6, **kwargs):
        super().__init__(*args, **kwargs)
        self.mixup, self.mixup_from = mixup, mixup_from

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        epoch, index = self.key(key)
        sample = super().__getitem__((epoch, index))
        if not self.mixup or epoch < self.mixup_from:
            return sample
        rng = self.generator(epoch, index, stream=1)
        weight = float(rng.beta(self.mixup, self.mixup))
        partner = super().__getitem__((epoch, int(rng.integers(len(self)))))
        return tuple(
            weight * unit_range(one) + (1 - weight) * unit_range(other)
            for one, other in zip(sample, partner, strict=True)
        )


class SyntheticPatches(RandomPatches):
    """Random crops of clean images, degraded on the fly: a sample is ``(input, target)``, float32 and uint8.

    No crop is seen twice with the same degradation.

    Args:
        items: images.
        degrade: one of `dgunet.data.synthesis`.
        patch, **kwargs: see `RandomPatches`.
        margin: pixels around the crop that are degraded with it, so that rain and blur reach in from outside.
    """

    def __init__(self, items: list, degrade: Degrade, patch: int, margin: int = 32, **kwargs):
        super().__init__(items, patch, **kwargs)
        self.patch += 2 * margin
        self.degrade, self.margin = degrade, margin

    def sample(self, item: Path | Packed, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        (target,) = self.crop(rng, open_image(item))
        if self.flip:
            target = dihedral(target, int(rng.integers(8)))
        inside = (..., slice(self.margin, -self.margin or None), slice(self.margin, -self.margin or None))
        return degraded(target, self.degrade, rng)[inside].contiguous(), target[inside].contiguous()


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


def degraded(target: Tensor, degrade: Degrade, rng: np.random.Generator) -> Tensor:
    """A clean image (3, H, W) uint8, degraded: (3, H, W) float32, in [0, 1] but for noise that is not clipped."""
    return to_tensor(degrade(unit_range(target).permute(1, 2, 0).numpy(), rng))


class CenterCropDataset(Dataset):
    """Centre crops for validation: ``dataset[index]`` is ``(input, target)``, (C, H, W) uint8.

    For a single image they are the same, or the input (float32) is degraded with a seed of its own.

    Args:
        items: pairs, their folder or packed file, or images.
        patch: side of the crops in pixels, 0 for whole images; smaller images give smaller crops. All are cut to
            multiples of ``multiple``.
        degrade: one of `dgunet.data.synthesis`, for images.
        seed: of the degradations.
        luma: whether to use luminance, (1, H, W).
        complex: whether to use complex images, (2, H, W), see `images.open_complex`.
        area: if given, an item is as many adjacent crops as fit into a centre of this side, (N, C, H, W), which the
            network restores one by one.

    Raises:
        UserError: an image is too small, ...
    """

    def __init__(
        self, items: str | Path | list[Item], patch: int, *, degrade: Degrade | None = None, seed: int = 1234,
        luma: bool = False, complex: bool = False, multiple: int = MULTIPLE, area: int = 0,
    ):  # fmt: skip
        if area and patch % multiple:
            raise UserError(f"TRAINING.VAL_PS must be a multiple of {multiple} pixels, got {patch}")
        self.items = items if isinstance(items, list) else find_pairs(items)
        self.patch, self.degrade, self.seed = patch, degrade, seed
        self.open = open_complex if complex else open_luma if luma else open_image
        self.multiple, self.area = multiple, area
        self.sizes = set()
        for item in self.items:
            source = item.input if isinstance(item, Pair) else item
            rows, columns, *size = self.grid(image_size(source, grey=luma or complex), source)
            self.sizes.add((rows * columns, *size) if area else tuple(size))

    def __len__(self) -> int:
        return len(self.items)

    def grid(self, size: tuple[int, int], source: Path | Packed) -> tuple[int, int, int, int]:
        """(rows, columns) of crops in an image of this size, and their (height, width)."""
        height, width = (min(side, self.patch or side) // self.multiple * self.multiple for side in size)
        if not height or not width:
            least = f"{self.multiple}x{self.multiple}"
            raise UserError(f"{source} is smaller than {least} pixels, too small to validate with; remove it")
        rows, columns = (max(self.area // side, 1) for side in (height, width))
        return min(rows, size[0] // height), min(columns, size[1] // width), height, width

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        item = self.items[index]
        if isinstance(item, Pair):
            input = self.center_crop(item.input)
            return input, input if item.target == item.input else self.center_crop(item.target)
        target = self.center_crop(item)
        if self.degrade is None:
            return target, target
        return degraded(target, self.degrade, np.random.default_rng([self.seed, index])), target

    def center_crop(self, source: Path | Packed) -> Tensor:
        image = self.open(source)
        rows, columns, height, width = self.grid(image.shape[:2], source)
        top, left = (image.shape[0] - rows * height) // 2, (image.shape[1] - columns * width) // 2
        x = to_tensor(image[top : top + rows * height, left : left + columns * width])
        if not self.area:
            return x
        return x.view(-1, rows, height, columns, width).permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous()
