"""Show how an image is restored: degraded, the estimate after each stage, restored, ground truth.

    python scripts/plot_stages.py --weights W --pair Datasets/demo/denoising/test astronaut --out stages.png
    python scripts/plot_stages.py --weights W --pair Datasets/Set11 barbara --out stages.png

For compressive sensing FOLDER holds the images, and x_0 = A_adjoint(y) is shown as the degraded image.
"""

from pathlib import Path

from common import Parser, UserError, command_imports, run_cli

with command_imports(__name__):
    import numpy as np

    from dgunet import DGUNet, load_model
    from dgunet.apps.figures import draw_stages, label_stages, restore_stages
    from dgunet.data.images import read_image, read_luma
    from dgunet.data.pairs import find_pairs, images_by_name
    from dgunet.evaluation.metrics import evaluate_pair
    from dgunet.model.sampling import BlockSampling
    from dgunet.runtime.files import nfc


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", required=True, help="checkpoint")
    parser.add_argument(
        "--pair", nargs=2, required=True, metavar=("FOLDER", "NAME"), help="folder with input/, target/, or images"
    )
    parser.add_argument(
        "--crop", nargs=3, type=int, metavar=("TOP", "LEFT", "SIDE"), help="part shown (default: centre)"
    )
    parser.add_argument("--title", help="above the images")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()

    model = load_model(args.weights)
    image, target = read_pair(model, *args.pair)
    degraded, *estimates = restore_stages(model, image)
    top, left, side = find_window(target.shape[:2], args.crop, usual=160, least=8)
    window = (slice(top, top + side), slice(left, left + side))
    first = "degraded" if model.degradation is None else "$A^T y$"
    whole = target if isinstance(model.degradation, BlockSampling) else image
    tiles = [(first, degraded), *label_stages(estimates), ("ground truth", target)]
    tiles = [(label, image[window], psnr(image, target)) for label, image in tiles]
    draw_stages(whole, (top, left, side, side), tiles, args.out, args.title)
    before, after = (psnr(image, target) for image in (degraded, estimates[-1]))
    print(f"{args.pair[1]}: {before:.2f} dB -> {after:.2f} dB, drawn in {args.out.absolute()}")


def read_pair(model: DGUNet, folder: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The degraded image and the ground truth, (H, W, 3) or (H, W) uint8; of compressive sensing the luma, twice."""
    if isinstance(model.degradation, BlockSampling):
        luma = read_luma(choose(images_by_name(folder), name, folder))
        return luma, luma
    pair = choose({pair.name: pair for pair in find_pairs(folder)}, name, folder)
    read = read_luma if model.channels == 1 else read_image
    return read(pair.input), read(pair.target)


def find_window(size: tuple[int, int], crop: list[int] | None, usual: int, least: int) -> tuple[int, int, int]:
    """Top, left and side of the part of an image (H, W) to show: --crop, or the centre."""
    height, width = size
    side = min(usual, height, width)
    top, left, side = crop or ((height - side) // 2, (width - side) // 2, side)
    if min(top, left) < 0 or side < least or top + side > height or left + side > width:
        raise UserError(f"the crop does not fit: the image is {width}x{height}, and a part at least {least} a side")
    return top, left, side


def choose(found: dict, name: str, folder: str):
    name = nfc(name)
    if name not in found:
        raise UserError(f"no image {name} in {folder}; there are {', '.join(found)}")
    return found[name]


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    return evaluate_pair(image, target, "train_rgb")[0]


if __name__ == "__main__":
    run_cli(main)
