"""Train DGUNet for deraining.

    python Deraining/train.py                                   # the paper's DGUNet, every GPU here
    python Deraining/train.py --config dgunet_plus              # the paper's DGUNet+
    python Deraining/train.py TRAINING.RESUME True              # continue where it stopped

It is `dgunet train deraining`, in a clone; --help says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.apps.cli import run_task
from dgunet.runtime.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: run_task("train", "deraining", sys.argv[1:], "python Deraining/train.py"))
