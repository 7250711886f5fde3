"""Train DGUNet for compressive sensing.

    python CompressiveSensing/train.py MODEL.RATIO 0.25                  # step 1: blocks, one by one
    python CompressiveSensing/train.py --config dgunet_step2 MODEL.RATIO 0.25 MODEL.WEIGHTS STEP1   # step 2: deblocking
    python CompressiveSensing/train.py TRAINING.RESUME True              # continue where it stopped

It is `dgunet train compressive_sensing`, in a clone; --help says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.apps.cli import run_task
from dgunet.runtime.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: run_task("train", "compressive_sensing", sys.argv[1:], "python CompressiveSensing/train.py"))
