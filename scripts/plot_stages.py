"""Show how a picture is restored: degraded, the estimate after each stage, restored, ground truth.

    python scripts/plot_stages.py --weights W --pair Datasets/demo/denoising/test astronaut --out stages.png
    python scripts/plot_stages.py --weights W --pair Datasets/Set11 barbara --out stages.png

Of compressive sensing, FOLDER holds the pictures, and what is shown as degraded is x_0 = A_adjoint(y).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from dgunet import load_model
from dgunet.data import find_pairs, list_images, read_image, read_luma, to_tensor
from dgunet.errors import UserError, run_cli
from dgunet.figures import draw_stages, label_stages, stages_of
from dgunet.metrics import psnr_batch
from dgunet.transforms import pad_to_blocks, to_uint8, unit_range


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="checkpoint")
    parser.add_argument(
        "--pair", nargs=2, required=True, metavar=("FOLDER", "NAME"), help="folder with input/, target/, or pictures"
    )
    parser.add_argument(
        "--crop", nargs=3, type=int, metavar=("TOP", "LEFT", "SIDE"), help="part shown (default: centre)"
    )
    parser.add_argument("--title", help="above the pictures")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()

    model = load_model(args.weights)
    degraded, target, estimates = (image_stages if model.degradation is None else sensing_stages)(model, *args.pair)
    height, width = target.shape[:2]
    side = min(160, height, width)
    top, left, side = args.crop or ((height - side) // 2, (width - side) // 2, side)
    if min(top, left) < 0 or side < 8 or top + side > height or left + side > width:
        raise UserError(f"the crop does not fit into {args.pair[1]}, which is {width}x{height}")

    window = (slice(top, top + side), slice(left, left + side))
    first, whole = ("degraded", degraded) if model.degradation is None else ("$A^T y$", target)
    tiles = [(first, degraded), *label_stages(estimates), ("ground truth", target)]
    tiles = [(label, image[window], psnr(image, target)) for label, image in tiles]
    draw_stages(whole, (top, left, side, side), tiles, args.out, args.title)
    before, after = (psnr(image, target) for image in (degraded, estimates[-1]))
    print(f"{args.pair[1]}: {before:.2f} dB -> {after:.2f} dB, drawn in {args.out.absolute()}")


def image_stages(model, folder: str, name: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Degraded picture, target, and the estimates x_1 ... x_K, all (H, W, 3) uint8."""
    pair = choose({pair.name: pair for pair in find_pairs(folder)}, name, folder)
    degraded, target = read_image(pair.input), read_image(pair.target)
    return degraded, target, stages_of(model, degraded)


def sensing_stages(model, folder: str, name: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The same of a picture that is measured: x_0, luminance, and the estimates, all (H, W) uint8."""
    luma = read_luma(choose({path.stem: path for path in list_images(folder)}, name, folder))
    height, width = luma.shape
    with torch.inference_mode():
        y = model.degradation.A(pad_to_blocks(unit_range(to_tensor(luma)[None]), model.degradation.block))
        pictures = [model.degradation.A_adjoint(y), *model(y)[::-1]]
    initial, *estimates = [to_uint8(x[0, 0, :height, :width].numpy()) for x in pictures]
    return initial, luma, estimates


def choose(found: dict, name: str, folder: str):
    if name not in found:
        raise UserError(f"no picture {name} in {folder}; there are {', '.join(found)}")
    return found[name]


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    return psnr_batch(*(unit_range(to_tensor(picture)[None]) for picture in (image, target))).item()


if __name__ == "__main__":
    run_cli(main)
