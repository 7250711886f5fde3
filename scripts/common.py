"""What the scripts share. Importing this puts the clone's ``dgunet`` before an installed one."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.runtime.errors import ROOT, UserError, command_imports, run_cli

__all__ = ["ROOT", "Parser", "UserError", "at_least", "command_imports", "is_free", "run_cli"]


class Parser(argparse.ArgumentParser):
    """A parser that prints descriptions as they are written, and an error as one line instead of the whole usage."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def at_least(least: int) -> Callable[[str], int]:
    """The ``type`` of an option that is an integer of at least ``least``."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return int(text)

    return number


def is_free(out: Path) -> bool:
    """Whether a folder is new or empty."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; choose another --out")
    return not out.exists() or not any(out.iterdir())
