"""What the studies share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from common import ROOT, Parser, UserError, at_least, command_imports, run_cli

__all__ = ["ROOT", "Parser", "UserError", "at_least", "command_imports", "markdown_table", "matching", "run_cli"]


def matching(names: list[str], only: list[str] | None) -> list[str]:
    """The names that contain one of the words of ``--only``; all of them without it."""
    chosen = [name for name in names if not only or any(words in name for words in only)]
    if not chosen:
        raise UserError(f"--only matches none of {'; '.join(names)}")
    return chosen


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])
