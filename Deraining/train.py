"""Train DGUNet for deraining.

    python Deraining/train.py                                             # the paper's DGUNet on Rain13K, all GPUs
    python Deraining/train.py --config configs/deraining/dgunet_plus.yaml GPU "[0, 1]" OPTIM.BATCH_SIZE 8
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 Deraining/train.py
    python Deraining/train.py TRAINING.RESUME True                        # continue where it stopped

Config keys are explained in dgunet/training/config.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.runtime.errors import command_imports, run_cli

with command_imports(__name__):
    from dgunet.training.cli import TASKS, train_command

if __name__ == "__main__":
    run_cli(lambda: train_command(TASKS["deraining"], __doc__))
