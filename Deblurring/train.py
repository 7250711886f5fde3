"""Train DGUNet for deblurring.

    python Deblurring/train.py                                   # the paper's DGUNet, every GPU here
    python Deblurring/train.py --config dgunet_plus              # the paper's DGUNet+
    python Deblurring/train.py TRAINING.RESUME True              # continue where it stopped

It is `dgunet train deblurring`, in a clone; --help says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.apps.cli import run_task
from dgunet.runtime.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: run_task("train", "deblurring", sys.argv[1:], "python Deblurring/train.py"))
