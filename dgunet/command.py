"""The `dgunet` command; see `dgunet.apps.cli`."""

from dgunet.apps.cli import main

__all__ = ["main"]
