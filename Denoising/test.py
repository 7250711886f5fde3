"""Test DGUNet for denoising.

    python Denoising/test.py --weights model.pth --dataset SIDD       # the paper's table
    python Denoising/test.py --dataset path/to/folder                 # our own weights: Gaussian noise

It is `dgunet test denoising`, in a clone; --help says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.apps.cli import run_task
from dgunet.runtime.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: run_task("test", "denoising", sys.argv[1:], "python Denoising/test.py"))
