"""Train DGUNet for compressive sensing, of 32x32 blocks where MODEL.BLOCK says nothing else.

    python CompressiveSensing/train.py MODEL.RATIO 0.25                   # step 1: blocks, one by one
    python CompressiveSensing/train.py --config configs/compressive_sensing/dgunet_step2.yaml MODEL.RATIO 0.25 \\
        MODEL.WEIGHTS checkpoints/compressive_sensing/DGUNet/model_best.pth    # step 2: deblocking
    python CompressiveSensing/train.py MODEL.RATIO "[0.01, 0.5]"          # one network for all ratios from 1 to 50 %
    python CompressiveSensing/train.py MODEL.MATRIX fixed                 # do not learn the sampling matrix
    python CompressiveSensing/train.py TRAINING.RESUME True               # continue where it stopped

Ratios of the paper: 0.01, 0.04, 0.1, 0.25, 0.5. Give each its own MODEL.SESSION. Config keys are explained in
dgunet/config.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.errors import command_imports, run_cli

with command_imports(__name__):
    from luma import LumaPatches

    from dgunet.data import find_images
    from dgunet.degradations import BlockSampling, sampling_operator
    from dgunet.patches import CenterCropDataset
    from dgunet.training import crop_options, train_command


def train_set(cfg, paths) -> LumaPatches:
    return LumaPatches(paths, block=cfg.MODEL.BLOCK, **crop_options(cfg))


def val_set(cfg, paths) -> CenterCropDataset:
    """Validates as the original does: in blocks as large as those trained on, which know nothing of each other."""
    return CenterCropDataset(paths, cfg.TRAINING.VAL_PS, luma=True, multiple=cfg.MODEL.BLOCK, area=256)


def degradation(cfg, train_set: LumaPatches) -> BlockSampling:
    start = cfg.MODEL.MATRIX_START
    if start == "pca" and not len(train_set):
        start = "orthonormal"  # a dry run before there are images to take components of
    return sampling_operator(cfg.MODEL.RATIO, cfg.MODEL.MATRIX, start, lambda: train_set.blocks(), cfg.MODEL.BLOCK)


USES = ("MODEL.RATIO", "MODEL.BLOCK", "MODEL.MATRIX")

if __name__ == "__main__":
    run_cli(lambda: train_command("compressive_sensing", __doc__, USES, train_set, val_set, find_images, degradation))
