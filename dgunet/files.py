"""Opening files that may be anything, writing files that are whole or not there, and what their names say."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dgunet.errors import UserError

RAW_SUFFIXES = frozenset(
    ".dng .cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .raf .orf .rw2 .rwl .pef .srw .x3f .3fr .iiq .erf .kdc .mrw".split()
)
# What a folder's images are known by. Not all of them can be read everywhere: what cannot is refused by name.
IMAGE_SUFFIXES = RAW_SUFFIXES | frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .jif .mpo .bmp .dib .gif .tif .tiff .webp .avif .avifs .heic .heif .hif .jxl "
    ".jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm .pam .pfm .tga .pcx .ras .sgi .hdr .exr".split()
)


@contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open an ordinary file for reading.

    Raises:
        UserError: it cannot be read, or is none: opening a pipe would wait for ever for someone to write to it.
    """
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "a pipe or device"
            raise UserError(f"{path} is {what}, not a file; move it away")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write to, beside ``path``, whose folder is made if needed; renamed to it at the end.

    Whatever happens, ``path`` is whole, or what it was. An OSError names ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename in (None, str(temporary)) or error.filename2 is not None:
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
        raise


def normal_form(name: str) -> str:
    """A name in Unicode's form NFC: names that differ in form alone look the same, and are one."""
    return unicodedata.normalize("NFC", name)


def escaped(name: str) -> str:
    """A name in which everything beyond ASCII is written as escapes, so that forms can be told apart."""
    return ascii(str(name))[1:-1]


def in_its_form(path: str | Path) -> Path:
    """The path as it lies on the disk, where it is there in another Unicode form; else as it is."""
    path = Path(path)
    if os.path.lexists(path) or path == path.parent:
        return path
    folder = in_its_form(path.parent)
    try:
        alike = [name for name in os.listdir(folder) if normal_form(name) == normal_form(path.name)]
    except OSError:
        return path
    return folder / (alike[0] if len(alike) == 1 else path.name)
