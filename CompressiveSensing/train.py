"""Train DGUNet for compressive sensing, of 32x32 blocks where MODEL.BLOCK says nothing else.

    python CompressiveSensing/train.py MODEL.RATIO 0.25                   # step 1: blocks, one by one
    python CompressiveSensing/train.py --config configs/compressive_sensing/dgunet_step2.yaml MODEL.RATIO 0.25 \\
        MODEL.WEIGHTS checkpoints/compressive_sensing/DGUNet/model_best.pth    # step 2: deblocking
    python CompressiveSensing/train.py MODEL.RATIO "[0.01, 0.5]"          # one network for all ratios from 1 to 50 %
    python CompressiveSensing/train.py MODEL.MATRIX fixed                 # do not learn the sampling matrix
    python CompressiveSensing/train.py TRAINING.RESUME True               # continue where it stopped

Ratios of the paper: 0.01, 0.04, 0.1, 0.25, 0.5. Give each its own MODEL.SESSION. Config keys are explained in
dgunet/training/config.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.runtime.errors import command_imports, run_cli

with command_imports(__name__):
    from dgunet.training.cli import TASKS, train_command

if __name__ == "__main__":
    run_cli(lambda: train_command(TASKS["compressive_sensing"], __doc__))
