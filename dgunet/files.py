"""Opening files that may be anything, and writing files that are whole or not there."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dgunet.errors import UserError


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
