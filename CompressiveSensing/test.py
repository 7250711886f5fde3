"""Test DGUNet for compressive sensing.

    python CompressiveSensing/test.py --weights model.pth             # the paper's table: Set11 and BSD68
    python CompressiveSensing/test.py --dataset path/to/images        # our own weights, ratio 25 %

It is `dgunet test compressive_sensing`, in a clone; --help says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.apps.cli import run_task
from dgunet.runtime.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: run_task("test", "compressive_sensing", sys.argv[1:], "python CompressiveSensing/test.py"))
