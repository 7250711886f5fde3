"""Safe opening and atomic writing of files, image suffixes, and file names in Unicode."""

import contextlib
import functools
import hashlib
import os
import platform
import secrets
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dgunet.runtime.errors import UserError

RAW_SUFFIXES = frozenset(
    ".dng .cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .raf .orf .rw2 .rwl .pef .srw .x3f .3fr .iiq .erf .kdc .mrw".split()
)
# Suffixes of the images in a folder. What cannot be read is refused by name, not skipped.
IMAGE_SUFFIXES = RAW_SUFFIXES | frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .jif .mpo .bmp .dib .gif .tif .tiff .webp .avif .avifs .heic .heif .hif .jxl "
    ".jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm .pam .pfm .tga .pcx .ras .sgi .hdr .exr".split()
)


@contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open an ordinary file for reading.

    Raises:
        UserError: it cannot be read, or is not an ordinary file; opening a pipe would block.
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
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path``, to be written in the block and then renamed to ``path``.

    ``path`` is always complete: the new file or the old one. Its folder is created if needed. The temporary name is
    unique to the call, for concurrent writers; it is hidden and ends in ``.tmp``. Files left by killed writers of
    ``path`` are removed. A new file has the mode that the umask gives, one that replaces another has the other's. An
    OSError names ``path``.
    """
    path = Path(path)
    prefix = f".{_label(path.name)}.{platform.node()}."
    temporary = path.with_name(f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
            _remove_leftovers(path, temporary)  # before writing: the disk may be full of them
            replaced = _mode(path)
            if replaced is not None:  # already now: what was private stays so
                _chmod(temporary, replaced | stat.S_IWUSR)
            yield temporary
            if replaced is not None:
                _chmod(temporary, replaced)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename in (None, str(temporary)) or error.filename2 is not None:
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
        raise


def _mode(path: Path) -> int | None:
    """The permissions of a file, None where there is none."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode)
    return None


def _chmod(path: Path, mode: int):
    with contextlib.suppress(OSError):  # not every file system has modes
        path.chmod(mode)


def _label(name: str) -> str:
    """A file's name, or a short hash of a long one, for the names of its temporary files."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 128 else hashlib.sha256(encoded).hexdigest()[:32]


def _remove_leftovers(path: Path, mine: Path):
    """Remove the temporary files that killed writers of ``path`` left.

    Active writers, perhaps on another machine that shares the disk, keep theirs: a file of this machine is removed if
    its process has ended, any other if it is a day older than ``mine`` (by the disk's clock).
    """
    from psutil import pid_exists

    start = f".{_label(path.name)}."
    here = f"{start}{platform.node()}."
    for name in _temporaries(path.parent.absolute()):
        if not name.startswith(start) or name == mine.name:
            continue
        process = name.removeprefix(here).removesuffix(".tmp").partition(".")[0]
        local = name.startswith(here) and process.isdecimal()
        other = path.with_name(name)
        # A file that cannot be removed, or an impossible process id, is no reason to fail the write.
        with contextlib.suppress(OSError, OverflowError):
            day_old = other.stat().st_mtime < mine.stat().st_mtime - 24 * 3600
            if day_old or (local and not pid_exists(int(process))):
                other.unlink()


@functools.lru_cache(maxsize=256)
def _temporaries(folder: Path) -> list[str]:
    """Names of the temporary files in a folder when this process first wrote there, so that it is listed only once."""
    with contextlib.suppress(OSError):  # a writable folder need not be readable
        return [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(".tmp")]
    return []


def nfc(name: str) -> str:
    """A name in Unicode's form NFC, to compare names with: forms differ between systems and look the same."""
    return unicodedata.normalize("NFC", name)


def escaped(name: str) -> str:
    """A name with everything beyond ASCII escaped, which shows its Unicode form."""
    return ascii(str(name))[1:-1]


def match_unicode_form(path: str | Path, ignore_case: bool = False) -> Path:
    """The path of the one file that exists under another Unicode form of this path, or case; else the path itself."""
    path = Path(path)
    if os.path.lexists(path) or path == path.parent:
        return path
    folder = match_unicode_form(path.parent, ignore_case)

    def form(name: str) -> str:
        return nfc(name).lower() if ignore_case else nfc(name)

    try:
        alike = [name for name in os.listdir(folder) if form(name) == form(path.name)]
    except OSError:
        return path
    return folder / (alike[0] if len(alike) == 1 else path.name)


def read_array(path: Path):
    """The array in a .npy file, as float32; a ValueError where there are no finite numbers in it."""
    import numpy as np

    with open_file(path) as file:
        try:
            values = np.load(file, allow_pickle=False)
            kind = values.dtype.kind
        except Exception as error:  # a damaged file, or an .npz, fails in many ways
            raise ValueError("not a .npy file with an array, or damaged") from error
    if kind not in "iuf":
        raise ValueError(f"expected numbers, got {values.dtype}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    return values
