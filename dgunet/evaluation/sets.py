"""Test sets: what is restored, and what it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dgunet.data.images import read_image
from dgunet.data.pairs import Pair, find_pairs, has_pairs, images_by_name
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


def image_samples(source: Path, read: Callable[[Path], tuple], **options) -> ImageSet:
    """The images of a folder, or one image, as samples: ``read`` returns a path's degraded image and its target.

    Raises:
        UserError: neither of the two, no image in the folder, or two of one name.
    """
    found = {nfc(source.stem): source} if source.is_file() else images_by_name(source)
    if source.is_file() and source.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{source} is neither a folder nor an image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return ImageSet([Sample(name, (path,), partial(read, path)) for name, path in found.items()], **options)
