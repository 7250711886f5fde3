"""Opening files that may be anything, and writing files that are whole or not there."""

import contextlib
import functools
import hashlib
import os
import platform
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dgunet.errors import UserError, optional


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

    Whatever happens, ``path`` is whole, or what it was. The name is of this call alone, so that of several writers,
    processes or threads, each publishes its own file; it is hidden, and ends in ``.tmp``. What killed writers of
    ``path`` left is removed. An OSError names ``path``.
    """
    path = Path(path)
    prefix = f".{_label(path.name)}.{platform.node()}."
    temporary = path.with_name(f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
            _remove_leftovers(path, temporary)  # before writing: the disk may be full of them
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename in (None, str(temporary)) or error.filename2 is not None:
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
        raise


def _label(name: str) -> str:
    """What stands for a file's name in those of its temporary files, which have to be longer than it."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 128 else hashlib.sha256(encoded).hexdigest()[:32]


def _remove_leftovers(path: Path, mine: Path):
    """Remove the temporary files that killed writers of ``path`` left.

    Those of writers at work, perhaps on another machine that shares the disk, stay: of this machine's files the process
    is gone, any other must be a day older than ``mine`` (by the disk's clock; those of the machines may differ).
    """
    pid_exists = optional("psutil").pid_exists
    start = f".{_label(path.name)}."
    here = f"{start}{platform.node()}."
    for name in _temporaries(path.parent.absolute()):
        if not name.startswith(start) or name == mine.name:
            continue
        process = name.removeprefix(here).removesuffix(".tmp").partition(".")[0]
        local = name.startswith(here) and process.isdecimal()
        other = path.with_name(name)
        # Gone meanwhile, or someone else's, or of no process there can be: nothing to fail a write for.
        with contextlib.suppress(OSError, OverflowError):
            day_old = other.stat().st_mtime < mine.stat().st_mtime - 24 * 3600
            if day_old or (local and not pid_exists(int(process))):
                other.unlink()


@functools.lru_cache(maxsize=256)
def _temporaries(folder: Path) -> list[str]:
    """Names of the temporary files in a folder when this process first wrote there: it is not listed for each file."""
    with contextlib.suppress(OSError):  # a folder may be written to that may not be listed
        return [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(".tmp")]
    return []
