"""Test DGUNet for deraining.

    python Deraining/test.py --weights model.pth             # the paper's table: all five test sets
    python Deraining/test.py --dataset path/to/folder        # our own weights

It is `dgunet test deraining`, in a clone; --help says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.apps.cli import run_task
from dgunet.runtime.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: run_task("test", "deraining", sys.argv[1:], "python Deraining/test.py"))
