"""Train DGUNet for denoising.

    python Denoising/train.py                                             # the paper's DGUNet on SIDD, every GPU here
    python Denoising/train.py --config configs/denoising/dgunet_plus.yaml GPU "[0, 1]" OPTIM.BATCH_SIZE 8
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 Denoising/train.py
    python Denoising/train.py TRAINING.RESUME True                        # continue where it stopped

Config keys are explained in dgunet/training/config.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.runtime.errors import command_imports, run_cli

with command_imports(__name__):
    from dgunet.training.cli import TASKS, train_command

if __name__ == "__main__":
    run_cli(lambda: train_command(TASKS["denoising"], __doc__))
