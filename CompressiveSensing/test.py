"""Test DGUNet for compressive sensing: measure images and reconstruct them.

    python CompressiveSensing/test.py                                            # our own weights, ratio 25 %
    python CompressiveSensing/test.py --weights model.pth                        # the paper's table: Set11 and BSD68
    python CompressiveSensing/test.py --weights model.pth --dataset path/to/images --save_images
    python CompressiveSensing/test.py --weights model.pth --whole                # whole images, not 128x128 tiles
    python CompressiveSensing/test.py --weights model.pth --ratio 0.17           # of a network for a range of ratios
    python CompressiveSensing/test.py --noise 5 --bits 8                         # measurements as a real sensor's
    python CompressiveSensing/test.py --score_only reconstructed                 # score reconstructed/Set11/...

PSNR and SSIM as the original's test script computes them: on the luminance of OpenCV, unrounded, 128x128 tiles that are
reconstructed separately. A network for a range of ratios is tested at those of the paper that are in it, where --ratio
says nothing else. "input" in the table is x_0 = A_adjoint(y). An interrupted test resumes.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.runtime.errors import command_imports, run_cli

with command_imports(__name__):
    import numpy as np
    from sensing import TILE, reconstruct_tiles, reconstruct_whole

    from dgunet import DGUNet
    from dgunet.data.images import read_luma
    from dgunet.evaluation.cli import Benchmark, command, custom_folder, noise_sigma
    from dgunet.evaluation.sets import ImageSet, image_samples
    from dgunet.model.sampling import RATIOS, ScalableSampling
    from dgunet.runtime.errors import UserError


def luma(source: Path) -> ImageSet:
    """Images that are their own targets: the network is given their measurements."""

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        image = read_luma(path)
        return image, image

    return image_samples(source, read, read_image=read_luma)


def benchmark(name: str, dgunet: list[tuple], plus: list[tuple]) -> Benchmark:
    both = {"dgunet": dgunet, "dgunet_plus": plus}
    paper = {f"{key} {r:g}": value for key, values in both.items() for r, value in zip(RATIOS, values, strict=True)}
    return Benchmark(name, "cs_y", paper, open=luma)


BENCHMARKS = {
    "Set11": benchmark(
        "Set11",
        [(22.09, 0.6096), (26.84, 0.8249), (31.07, 0.9123), (36.11, 0.9611), (41.22, 0.9836)],
        [(22.15, 0.6114), (26.83, 0.8230), (30.93, 0.9088), (36.18, 0.9616), (41.24, 0.9837)],
    ),
    "BSD68": benchmark(
        "BSD68",
        [(22.65, 0.5396), (25.55, 0.7008), (28.26, 0.8193), (31.90, 0.9155), (37.01, 0.9714)],
        [(22.70, 0.5406), (25.45, 0.6987), (28.14, 0.8165), (31.98, 0.9158), (37.04, 0.9718)],
    ),
}


def measure_and_reconstruct(model: DGUNet, image: np.ndarray, whole: bool, **how) -> tuple[np.ndarray, np.ndarray]:
    return (reconstruct_whole if whole else reconstruct_tiles)(model, image, **how)


def add_options(add: Callable):
    add("--whole", action="store_true", help=f"whole images, not tiles of {TILE}x{TILE}")
    several = "measurements per pixel, of a network for a range of ratios (default: those of the paper)"
    add("--ratio", type=float, nargs="+", metavar="R", help=several)
    add("--noise", type=noise_sigma, metavar="S", help="standard deviation of noise on measurements, in 8-bit levels")
    add("--bits", type=int, choices=range(1, 17), metavar="1..16", help="measurements rounded to so many bits")


def options(args: argparse.Namespace, benchmark: Benchmark) -> dict:
    disturbed = {"noise": args.noise, "bits": args.bits}
    return {"whole": args.whole} | {name: value for name, value in disturbed.items() if value}


def ratios(model: DGUNet, args: argparse.Namespace) -> dict[str, dict]:
    """The ratios that a network is tested at, by what each adds to a data set's name; nothing of one for one ratio."""
    sampling = model.degradation
    if TILE % sampling.block and not args.whole:
        raise UserError(
            f"blocks of {sampling.block}x{sampling.block} pixels do not fill the original's tiles of {TILE}x{TILE}; "
            "test whole images, --whole"
        )
    for ratio in args.ratio or ():
        sampling.at(ratio)  # refuses those that the network is not for
    if not isinstance(sampling, ScalableSampling):
        return {"": {}}
    inside = [ratio for ratio in RATIOS if sampling.covers(ratio)]
    chosen = args.ratio or inside or [len(sampling.matrix) / sampling.block**2]
    return {f"_{100 * ratio:g}%": {"ratio": ratio} for ratio in chosen}


def paper_key(name: str, model: DGUNet, args: argparse.Namespace, ratio: float | None = None) -> str:
    if args.noise or args.bits:
        return ""
    ratio = ratio or len(model.degradation.matrix) / model.degradation.block**2
    nearest = min(RATIOS, key=lambda r: abs(r - ratio))
    return f"{name} {nearest:g}" if abs(nearest - ratio) < 0.001 else ""


def main():
    how = dict(method=measure_and_reconstruct, add_options=add_options, options=options, variants=ratios)
    own = custom_folder("cs_y", luma)
    command("compressive_sensing", __doc__, BENCHMARKS, own, "compressive_sensing_25", paper_key=paper_key, **how)


if __name__ == "__main__":
    run_cli(main)
