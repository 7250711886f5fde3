"""Train DGUNet for compressive sensing of 32x32 blocks.

    python CompressiveSensing/train.py MODEL.RATIO 0.25                   # step 1: blocks, one by one
    python CompressiveSensing/train.py --config configs/compressive_sensing/dgunet_step2.yaml MODEL.RATIO 0.25 \\
        MODEL.WEIGHTS checkpoints/compressive_sensing/DGUNet/model_best.pth    # step 2: deblocking
    python CompressiveSensing/train.py MODEL.MATRIX fixed                 # do not learn the sampling matrix
    python CompressiveSensing/train.py TRAINING.RESUME True               # continue where it stopped

Ratios of the paper: 0.01, 0.04, 0.1, 0.25, 0.5. Give each its own MODEL.SESSION. Config keys are explained in
dgunet/config.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from luma import LumaPatches

from dgunet.data import find_images
from dgunet.engine import train_command
from dgunet.errors import run_cli
from dgunet.patches import Centres


def train_set(cfg, paths) -> LumaPatches:
    training = cfg.TRAINING
    return LumaPatches(paths, training.TRAIN_PS, repeat=training.REPEAT, flip=cfg.AUGMENT.FLIP, seed=cfg.SEED)


def val_set(cfg, paths) -> Centres:
    """Validates as the original does: in blocks as large as those trained on, which know nothing of each other."""
    return Centres(paths, cfg.TRAINING.VAL_PS, luma=True, multiple=LumaPatches.multiple, area=256)


if __name__ == "__main__":
    run_cli(lambda: train_command(__doc__, "compressive_sensing/dgunet.yaml", train_set, val_set, find=find_images))
