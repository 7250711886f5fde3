"""Deraining."""

from pathlib import Path

import numpy as np

from dgunet.data.images import read_image
from dgunet.evaluation.cli import Benchmark, Evaluation, custom_folder
from dgunet.evaluation.sets import ImageSet, image_samples, paired
from dgunet.runtime.errors import UserError
from dgunet.tasks import Task, own_variants
from dgunet.training.cli import Training

TRAIN = """Train DGUNet for deraining.

    dgunet train deraining                                             # the paper's DGUNet on Rain13K, all GPUs
    dgunet train deraining --config dgunet_plus GPU "[0, 1]" OPTIM.BATCH_SIZE 8
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m dgunet train deraining
    dgunet train deraining TRAINING.RESUME True                        # continue where it stopped

--help_config explains the config keys.
"""

TEST = """Test DGUNet for deraining, or remove the rain from images.

    dgunet test deraining --weights model.pth                             # the paper's table: all five test sets
    dgunet test deraining --dataset Rain100L                              # our own weights
    dgunet test deraining --weights model.pth --dataset Rain100L Test100
    dgunet test deraining --weights model.pth --dataset path/to/folder    # pairs in input/ and target/, or images
    dgunet test deraining --score_only restored                           # score restored/Rain100L/...

PSNR and SSIM as in the literature on deraining: on the rounded luma of MATLAB's rgb2ycbcr, of images rounded to 8
bits. The average is that of the sets' means. An interrupted test resumes.
"""


def read_halves(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The rainy (right) and the clean (left) half of an image of Test100, as it was published."""
    image = read_image(path)
    if image.shape[1] % 2:
        raise UserError(f"{path} is {image.shape[1]} pixels wide, which are not two halves; replace or remove it")
    clean, rainy = np.hsplit(image, 2)
    return rainy, clean


def pairs_or_halves(source: Path) -> ImageSet:
    """Pairs in ``input/`` and ``target/``, or where there is no such folder, images of two halves."""
    return paired(source) if (source / "input").is_dir() else image_samples(source, read_halves)


PAPER = {
    "Test100": dict(dgunet=(30.32, 0.899), dgunet_plus=(30.86, 0.907)),
    "Rain100H": dict(dgunet=(30.66, 0.891), dgunet_plus=(31.06, 0.897)),
    "Rain100L": dict(dgunet=(37.42, 0.969), dgunet_plus=(38.25, 0.974)),
    "Test2800": dict(dgunet=(33.68, 0.938), dgunet_plus=(34.01, 0.942)),
    "Test1200": dict(dgunet=(33.23, 0.920), dgunet_plus=(33.08, 0.916)),
}

TASK = Task(
    "deraining",
    own_variants("deraining"),
    training=Training(syntheses=("rain_streaks", "added_rain")),
    evaluation=Evaluation(
        benchmarks={
            name: Benchmark(f"test/{name}", "deraining_y", paper, pairs_or_halves if name == "Test100" else paired)
            for name, paper in PAPER.items()
        },
        own=custom_folder("deraining_y"),
        default_weights="deraining_mixture",
        paper_average=dict(dgunet=(33.06, 0.923), dgunet_plus=(33.46, 0.927)),  # of all five
    ),
    train_help=TRAIN,
    test_help=TEST,
)
