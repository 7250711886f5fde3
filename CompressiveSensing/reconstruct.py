"""Reconstruct an image from its measurements: measurements in, image out.

    python CompressiveSensing/reconstruct.py photo.npz --weights model.pth --out photo.png

The .npz is what measure.py describes. Its matrix must be the one that the network was trained with, or of a network for
a range of ratios its first rows; ``--ignore_matrix`` reconstructs nevertheless (of a file without ``matrix``, say).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.runtime.errors import UserError, command_imports, run_cli

with command_imports(__name__):
    import numpy as np
    import torch

    from dgunet import load_model
    from dgunet.data.images import write_image
    from dgunet.data.transforms import to_uint8
    from dgunet.inference import estimate
    from dgunet.runtime.files import open_file
    from dgunet.runtime.hardware import pick_device

MAX_BYTES = 2**30  # of an array: the measurements of a gigapixel at 25 %


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path, help=".npz with y, matrix, height, width")
    parser.add_argument("--weights", required=True, help="checkpoint of a compressive-sensing network")
    parser.add_argument("--out", type=Path, required=True, help="image to write, e.g. photo.png")
    parser.add_argument("--ignore_matrix", action="store_true", help="do not compare the matrices")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()

    device = pick_device(args.device)
    model = load_model(args.weights, task="compressive_sensing", device=device)
    operator = model.degradation
    trained = operator.matrix.detach().cpu().numpy()
    fewest = getattr(operator, "lowest", None)
    y, matrix, height, width = read_measurements(args.measurements, len(trained), operator.block, fewest)
    trained = trained[: len(y)]
    if not args.ignore_matrix:
        if matrix is None:
            raise UserError(f"{args.measurements} does not say which matrix measured it; --ignore_matrix trusts you")
        if matrix.shape != trained.shape or not np.allclose(matrix, trained, atol=1e-5):
            raise UserError(
                f"{args.measurements} was measured with another matrix than {args.weights} was trained with; use the "
                "weights of that matrix, or train with MODEL.MATRIX fixed and MODEL.MATRIX_START a .npy file of it"
            )
    try:
        x = estimate(model, torch.from_numpy(y)[None].to(device))[0, 0].cpu().numpy()
    except UserError as error:
        raise UserError(f"{args.measurements}: {error}, or the measurements are far too large") from error
    write_image(args.out, to_uint8(x[:height, :width]))
    ratio = len(y) / operator.block**2
    print(f"wrote {args.out}: {width}x{height} pixels from {y.size:,} measurements, ratio {ratio:.4g}")


def read_measurements(
    path: Path, rows: int, block: int, fewest: int | None = None
) -> tuple[np.ndarray, np.ndarray | None, int, int]:
    """Read an .npz file of measurements, without running any code in it.

    Args:
        path: the file.
        rows: M, the number of measurements of a block.
        block: side of a block in pixels.
        fewest: the smallest M, where it may be any up to ``rows``.

    Returns:
        y, (M, h, w) float32; the matrix, if there is one; height and width of the image, those of all blocks where
        the file has neither.

    Raises:
        UserError: no such file, another or a damaged one, or arrays that are not what measure.py describes.
    """
    arrays = {}
    with open_file(path) as file:
        try:
            with np.load(file, allow_pickle=False) as content:
                for name in {"y", "matrix", "height", "width"} & set(content.files):
                    if content.zip.getinfo(f"{name}.npy").file_size > MAX_BYTES:
                        raise UserError(f"{path}: {name} has more than {MAX_BYTES >> 30} GiB, too many to read")
                    arrays[name] = content[name]
        except UserError:
            raise
        except Exception as error:  # another or a damaged file fails in many ways
            raise UserError(f"{path} is not an .npz file of arrays; see measure.py for what it should hold") from error
    if "y" not in arrays:
        raise UserError(f"{path} holds no array y; see measure.py for what it should hold")
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf":
            raise UserError(f"{path}: {name} should hold numbers, got {array.dtype}")
        with np.errstate(over="ignore"):
            arrays[name] = array = array.astype(np.float32 if name in ("y", "matrix") else np.float64)
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} has values that are not finite; measure again")
    y = arrays["y"]
    if y.ndim != 3 or not (fewest or rows) <= y.shape[0] <= rows or not y.size:
        read = f"({rows}, rows, columns)" if fewest is None else f"(M, rows, columns), M from {fewest} to {rows}"
        raise UserError(f"{path}: y is {y.shape}, but the network reads {read}")
    if ("height" in arrays) != ("width" in arrays):
        raise UserError(f"{path} holds one of height and width, but an image has both")
    sides = []
    for name, blocks in zip(("height", "width"), y.shape[1:], strict=True):
        side = arrays.get(name, np.array(blocks * block))
        least, most = (blocks - 1) * block + 1, blocks * block
        if side.size != 1 or side.item() % 1 or not least <= side.item() <= most:
            told = side.item() if side.size == 1 else f"an array {side.shape}"
            raise UserError(f"{path}: {name} of {blocks} blocks is a whole number from {least} to {most}, got {told}")
        sides.append(int(side.item()))
    return y, arrays.get("matrix"), *sides


if __name__ == "__main__":
    run_cli(main)
