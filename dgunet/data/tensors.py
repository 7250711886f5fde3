"""Any data set of pairs of tensors as one that training and validation take."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dgunet.data.transforms import center_crop
from dgunet.model.proximal import MULTIPLE
from dgunet.runtime.errors import UserError


class SeededPairs(Dataset):
    """Any data set of (input, target) as a `TrainingSet`: two tensors (C, H, W), all of the size of the first.

    The generators of PyTorch, NumPy and Python are seeded with (seed, epoch, index) for each sample: what augments by
    them draws other numbers in each epoch, and the same when a run is resumed.

    Raises:
        UserError: no samples, others than these, or sides that are no multiples of 8.
    """

    repeat = 1

    def __init__(self, data: Dataset, seed: int = 1234):
        if not len(data):
            raise UserError("the training set is empty")
        self.data, self.seed, self.items = data, seed, range(len(data))
        self.shape = None
        self.shape = tuple(self[1, 0][0].shape)
        if any(side % MULTIPLE or not side for side in self.shape[1:]):
            size = " x ".join(map(str, self.shape))
            raise UserError(f"training images must have sides that are multiples of {MULTIPLE}, got {size}; crop them")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        number = index % len(self.data)
        with seeded_generators(self.seed, epoch, index):
            sample = checked_pair(self.data[number], f"sample {number} of the training set")
        if self.shape not in (None, tuple(sample[0].shape)):
            one, other = (" x ".join(map(str, shape)) for shape in (sample[0].shape, self.shape))
            raise UserError(f"sample {number} of the training set is {one}, but others are {other}; crop to one size")
        return sample


class ValidationPairs(Dataset):
    """Any data set of (input, target) as a `ValidationSet`: two tensors (C, H, W), cut to multiples of 8.

    All samples are read once, for their sizes. What is random in them is seeded with (seed, index).
    """

    def __init__(self, data: Dataset, seed: int = 1234):
        if not len(data):
            raise UserError("the validation set is empty")
        self.data, self.seed, self.items = data, seed, range(len(data))
        self.sizes = {tuple(self[index][0].shape[1:]) for index in self.items}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        what = f"sample {index} of the validation set"
        with seeded_generators(self.seed, 0, index):
            sample = checked_pair(self.data[index], what)
        height, width = (side // MULTIPLE * MULTIPLE for side in sample[0].shape[1:])
        if not height or not width:
            raise UserError(f"{what} is smaller than {MULTIPLE}x{MULTIPLE} pixels, too small to validate with")
        return tuple(center_crop(image, height, width) for image in sample)


@contextlib.contextmanager
def seeded_generators(*numbers: int) -> Iterator[None]:
    """PyTorch's (of the CPU), NumPy's and Python's own generators seeded with these numbers; afterwards as before."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.random.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def checked_pair(sample, what: str) -> tuple[Tensor, Tensor]:
    """A data set's sample as (input, target), two tensors of one shape (C, H, W): uint8, or float32 in about [0, 1].

    Raises:
        UserError: it is something else; ``what`` names it.
    """
    pair = tuple(sample) if isinstance(sample, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(image, Tensor) and image.ndim == 3 for image in pair):
        raise UserError(f"{what} is not (input, target), two tensors (C, H, W)")
    if pair[0].shape != pair[1].shape:
        raise UserError(f"{what}: input {tuple(pair[0].shape)} and target {tuple(pair[1].shape)} differ in shape")
    for image in pair:
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise UserError(f"{what} is {image.dtype}; images are uint8, or floats in [0, 1]")
    if pair[1].is_floating_point() and not -0.5 <= pair[1].min() <= pair[1].max() <= 1.5:
        values = f"{pair[1].min().item():.4g} to {pair[1].max().item():.4g}"
        raise UserError(f"{what}: the target has values from {values}; floats are in [0, 1], or give uint8")
    return tuple(image.float() if image.is_floating_point() else image for image in pair)
