"""Test sets: what is restored, and what it is compared with."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from natsort import natsorted

from dgunet.data.images import open_complex, read_image, read_luma, to_tensor
from dgunet.data.pairs import Pair, find_pairs, has_pairs, images_by_name
from dgunet.data.transforms import unit_range
from dgunet.model.degradations import try_operator
from dgunet.model.network import DGUNet
from dgunet.runtime.errors import UserError
from dgunet.runtime.files import IMAGE_SUFFIXES, nfc

# An image; or several, as an array (N, H, W, C) or, of different sizes, a list.
Images = np.ndarray | list[np.ndarray]


@dataclass(frozen=True)
class Sample:
    """What is restored at a time: an image, or several that belong together."""

    name: str
    files: tuple[Path, ...]  # that it is read from; when they change, it is scored again
    read: Callable[[], tuple[Images, Images | None]]  # degraded (8-bit, or floats in [0, 1]) and 8-bit target
    parts: tuple[str, ...] | None = None  # the names of its images, where it has several
    title: str = ""  # in messages; by default the first of the files

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.parts is None else self.parts


@dataclass
class ImageSet:
    """A data set. A benchmark with output files of its own overrides `keep`, `kept` and `finish`."""

    samples: list[Sample]
    targets: bool = True  # whether its samples have targets; without, they are restored, not scored
    save: bool = False  # whether the restored images are always written
    read_image: Callable[[Path], np.ndarray] = read_image  # reads restored images of another method (--score_only)

    def keep(self, folder: Path, sample: Sample, restored: Images):
        """Write a sample's own output into the folder of the scores."""

    def kept(self, folder: Path, sample: Sample) -> bool:
        """Whether that output is there."""
        return True

    def finish(self, folder: Path, complete: bool) -> str | None:
        """Write the output of the whole data set; returns a line to report it."""


def paired(source: Path, names: tuple[str, str] | None = None) -> ImageSet:
    """The pairs in ``input/`` and ``target/``, or in another layout, see `find_pairs`."""

    def read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        degraded, target = read_image(pair.input), read_image(pair.target)
        if target.shape != degraded.shape:
            raise UserError(f"{pair.input} and {pair.target} differ in size: {degraded.shape} and {target.shape}")
        return degraded, target

    pairs = find_pairs(source, check_sizes=False, names=names)
    return ImageSet([Sample(pair.name, (pair.input, pair.target), partial(read, pair)) for pair in pairs])


def pairs_or_images(source: Path) -> ImageSet:
    """Pairs, or where no layout of pairs is recognised, images without targets."""
    if has_pairs(source):
        return paired(source)
    return image_samples(source, lambda path: (read_image(path), None), targets=False, save=True)


def measured(source: str | Path, model: DGUNet) -> ImageSet:
    """Clean images, in ``target/`` if there is one, which a network's known degradation measures when they are read.

    Its noise is seeded by each image's name. A folder of .npy files has measurements (1, ...) instead, without targets.

    Raises:
        UserError: no images, or a network that is not for 1 (luminance), 2 (complex) or 3 channels (RGB).
    """
    source, known, channels = Path(source), model.degradation, model.channels
    if channels not in (1, 2, 3):
        raise UserError(f"the network restores {channels} channels; test it in Python, dgunet.evaluation.evaluate")
    device = next(model.parameters()).device
    open_image = read_image if channels == 3 else read_luma

    def read(path: Path) -> tuple[torch.Tensor, np.ndarray]:
        image = open_image(path)
        x = to_tensor(open_complex(path) if channels == 2 else image)[None].to(device)
        seed = zlib.crc32(path.stem.encode())
        generators = torch.Generator().manual_seed(seed), [torch.Generator(device).manual_seed(seed)]
        y, initial = try_operator(known, unit_range(x), generators)
        if initial.shape[-2:] != x.shape[-2:]:  # of x's centre
            top, left = ((a - b) // 2 for a, b in zip(x.shape[-2:], initial.shape[-2:], strict=True))
            image = image[top : top + initial.shape[-2], left : left + initial.shape[-1]]
        return y, image

    def read_measurement(path: Path) -> tuple[torch.Tensor, None]:
        try:
            y = torch.from_numpy(np.load(path, allow_pickle=False))
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"{path} is not a .npy file with a measurement, or damaged") from error
        if y.dim() < 2 or len(y) != 1:
            raise UserError(f"{path} holds {tuple(y.shape)}; a measurement is (1, ...), as A gives it")
        return y.to(device), None

    if source.is_dir() and (files := natsorted(source.glob("*.npy"))):
        samples = [Sample(nfc(path.stem), (path,), partial(read_measurement, path)) for path in files]
        return ImageSet(samples, targets=False, save=True)
    folder = source / "target"
    return image_samples(folder if folder.is_dir() else source, read, read_image=open_image)


def image_samples(source: Path, read: Callable[[Path], tuple], **options) -> ImageSet:
    """The images of a folder, or one image, as samples: ``read`` returns a path's degraded image and its target.

    Raises:
        UserError: neither of the two, no image in the folder, or two of one name.
    """
    found = {nfc(source.stem): source} if source.is_file() else images_by_name(source)
    if source.is_file() and source.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{source} is neither a folder nor an image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return ImageSet([Sample(name, (path,), partial(read, path)) for name, path in found.items()], **options)
