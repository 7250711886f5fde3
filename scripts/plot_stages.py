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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dgunet import load_model
from dgunet.data import find_pairs, list_images, read_image, read_luma, to_tensor
from dgunet.errors import UserError, run_cli
from dgunet.metrics import psnr_batch
from dgunet.proximal import MULTIPLE
from dgunet.transforms import pad_to_blocks, pad_to_multiple, to_uint8, unit_range


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
    names = [f"after stage {k}" for k in range(1, len(estimates))] + ["restored"]
    first, whole = ("degraded", degraded) if model.degradation is None else ("$A^T y$", target)
    tiles = [(first, degraded), *zip(names, estimates, strict=True), ("ground truth", target)]
    tiles = [(label, image[window], psnr(image, target)) for label, image in tiles]
    draw(whole, (top, left, side), tiles, args.out, args.title)
    before, after = (psnr(image, target) for image in (degraded, estimates[-1]))
    print(f"{args.pair[1]}: {before:.2f} dB -> {after:.2f} dB, drawn in {args.out.absolute()}")


def image_stages(model, folder: str, name: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Degraded picture, target, and the estimates x_1 ... x_K, all (H, W, 3) uint8."""
    pair = choose({pair.name: pair for pair in find_pairs(folder)}, name, folder)
    degraded, target = read_image(pair.input), read_image(pair.target)
    height, width = target.shape[:2]
    y = pad_to_multiple(unit_range(to_tensor(degraded)[None]), MULTIPLE)
    with torch.inference_mode():
        estimates = model(y)[::-1]
    return degraded, target, [to_uint8(x[0, :, :height, :width].permute(1, 2, 0).numpy()) for x in estimates]


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


def draw(whole: np.ndarray, crop: tuple[int, int, int], tiles: list, out: Path, title: str | None = None):
    """The whole picture with the crop's frame, then the crops ``tiles`` of (label, picture, PSNR), in two rows."""
    columns = -(-(len(tiles) + 1) // 2)
    figure = Figure(figsize=(2.3 * columns, 5.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    figure.suptitle(title)
    axes = figure.subplots(2, columns).ravel()
    top, left, side = crop
    grey = dict(cmap="gray", vmin=0, vmax=255)  # of pictures without colour
    axes[0].imshow(whole, **grey)
    axes[0].add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="yellow", linewidth=1.5))
    axes[0].set_title("the whole picture", fontsize=10)
    for axis, (label, image, score) in zip(axes[1:], tiles, strict=False):
        axis.imshow(image, interpolation="nearest", **grey)
        axis.set_title(label if np.isinf(score) else f"{label}\n{score:.2f} dB", fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    out.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(out))


if __name__ == "__main__":
    run_cli(main)
