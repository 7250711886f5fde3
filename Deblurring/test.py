"""Test DGUNet for motion deblurring, or deblur images.

    python Deblurring/test.py --weights model.pth --dataset GoPro HIDE       # the paper's table
    python Deblurring/test.py --weights model.pth --dataset RealBlur_J RealBlur_R
    python Deblurring/test.py --weights model.pth --dataset path/to/folder   # pairs in input/ and target/, or images
    python Deblurring/test.py --dataset path/to/folder                       # our own weights
    python Deblurring/test.py --weights model.pth --degradation my_module:make --dataset path/to/clean/images
    python Deblurring/test.py --score_only restored                          # score restored/GoPro/...

GoPro and HIDE: PSNR and SSIM of MATLAB on 8-bit RGB, SSIM over three dimensions. RealBlur: after alignment to the
target; an image that cannot be aligned is scored as it is, with a note. An interrupted test resumes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.runtime.errors import command_imports, run_cli

with command_imports(__name__):
    from dgunet.evaluation.cli import Benchmark, command, custom_folder

BENCHMARKS = {
    "GoPro": Benchmark("GoPro/test", "rgb_matlab", dict(dgunet=(32.71, 0.960), dgunet_plus=(33.17, 0.963))),
    "HIDE": Benchmark("HIDE/test", "rgb_matlab", dict(dgunet=(30.96, 0.940), dgunet_plus=(31.40, 0.944))),
    "RealBlur_J": Benchmark("RealBlur_J/test", "realblur_aligned"),
    "RealBlur_R": Benchmark("RealBlur_R/test", "realblur_aligned"),
}


def main():
    command("deblurring", __doc__, BENCHMARKS, custom_folder("rgb_matlab"), "deblurring_motion", operators=True)


if __name__ == "__main__":
    run_cli(main)
