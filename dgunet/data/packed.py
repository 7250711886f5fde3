"""Images packed into one HDF5 file."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgunet.data.photos import MAX_PIXELS
from dgunet.runtime.errors import UserError

PACK_FORMAT = "dgunet images 1"


class Packed(NamedTuple):
    """An image in a file that scripts/pack_dataset.py wrote."""

    file: Path
    key: str  # of the HDF5 dataset: NAME, input/NAME or target/NAME

    def __str__(self) -> str:
        return f"{self.file}:{self.key}"


def list_packed(file: Path, group: str) -> list[str]:
    """Names in one group of a packed file (``input``, ``target``, or ``/`` for images without a partner), sorted.

    Raises:
        UserError: not such a file, a damaged one, or one of the other kind.
    """
    from natsort import natsorted

    with _damage_named(file):
        content = _packed_file(file)
        if ("input" in content) != (group != "/"):
            kind = "image pairs" if "input" in content else "single images"
            raise UserError(f"{file} holds {kind}, which is not what this task trains on; see scripts/pack_dataset.py")
        names = natsorted(map(os.fsdecode, content[group]))
    if not names:
        raise UserError(f"no images in {file}; pack the folder again")
    return names


@contextlib.contextmanager
def _damage_named(source: Path | Packed) -> Iterator[None]:
    """Around reading a packed file: its damage, which shows in many ways, becomes a UserError."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:
        advice = "pack the folder again with scripts/pack_dataset.py"
        reason = " ".join(str(error).split())
        raise UserError(f"{source} is not a packed data set, or is damaged; {advice} ({reason})") from error


class _PackedImage:
    """An image in a packed file; of a pair (H, W, 3), a single one (H, W)."""

    def __init__(self, source: Packed):
        self.source = source
        channels = (3,) if "/" in source.key else ()
        with _damage_named(source):
            self.pixels = _packed_file(source.file)[os.fsencode(source.key)]  # names need not be UTF-8
            self.shape = tuple(self.pixels.shape)
            if self.pixels.dtype != np.uint8 or len(self.shape) != 2 + len(channels) or self.shape[2:] != channels:
                raise ValueError("no image")
            if not 0 < self.size <= MAX_PIXELS:
                raise ValueError("no size of an image")

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def __getitem__(self, area) -> np.ndarray:
        with _damage_named(self.source):
            return self.pixels[area]


_open_files: dict = {}  # packed files by path


def _packed_file(file: Path):
    """The open file; damage is for `_damage_named`."""
    if file not in _open_files:
        import h5py

        content = h5py.File(file)
        if content.attrs.get("format") != PACK_FORMAT:
            content.close()
            raise UserError(f"{file} was not written by scripts/pack_dataset.py")
        _open_files[file] = content
    return _open_files[file]


def _close_packed_files():
    while _open_files:
        _open_files.popitem()[1].close()
