"""Test DGUNet for deraining, or remove the rain from images.

    python Deraining/test.py --weights model.pth                             # the paper's table: all five test sets
    python Deraining/test.py --dataset Rain100L                              # our own weights
    python Deraining/test.py --weights model.pth --dataset Rain100L Test100
    python Deraining/test.py --weights model.pth --dataset path/to/folder    # pairs in input/ and target/, or images
    python Deraining/test.py --score_only restored                           # score what lies in restored/Rain100L/...

PSNR and SSIM as in the literature on deraining: on the rounded luma of MATLAB's rgb2ycbcr, of images rounded to 8
bits. The average is that of the sets' means. A test that was interrupted goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.errors import command_imports, run_cli

with command_imports(__name__):
    import numpy as np

    from dgunet.data import read_image
    from dgunet.errors import UserError
    from dgunet.evaluation import ImageSet, image_samples, paired
    from dgunet.testing import Benchmark, command, custom_folder


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


def benchmark(name: str, dgunet: tuple[float, float], plus: tuple[float, float], **options) -> Benchmark:
    paper = {"deraining_dgunet": dgunet, "deraining_dgunet_plus": plus}
    return Benchmark(f"test/{name}", "deraining_y", paper, **options)


BENCHMARKS = {
    "Test100": benchmark("Test100", (30.32, 0.899), (30.86, 0.907), open=pairs_or_halves),
    "Rain100H": benchmark("Rain100H", (30.66, 0.891), (31.06, 0.897)),
    "Rain100L": benchmark("Rain100L", (37.42, 0.969), (38.25, 0.974)),
    "Test2800": benchmark("Test2800", (33.68, 0.938), (34.01, 0.942)),
    "Test1200": benchmark("Test1200", (33.23, 0.920), (33.08, 0.916)),
}
AVERAGE = {"deraining_dgunet": (33.06, 0.923), "deraining_dgunet_plus": (33.46, 0.927)}  # the paper's, of all five


def main():
    weights = "deraining_mixture"
    command(
        "deraining", __doc__, BENCHMARKS, custom_folder("deraining_y"), paper_average=AVERAGE, default_weights=weights
    )


if __name__ == "__main__":
    run_cli(main)
