"""Reconstruct a picture from its measurements: measurements in, picture out.

    python CompressiveSensing/reconstruct.py photo.npz --weights model.pth --out photo.png

The .npz is what measure.py describes. Its matrix must be the one that the network was trained with; ``--ignore_matrix``
reconstructs nevertheless (of a file without ``matrix``, say).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from dgunet import load_model
from dgunet.data import write_image
from dgunet.errors import UserError, run_cli
from dgunet.evaluation import pick_device, to_uint8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path, help=".npz with y, matrix, height, width")
    parser.add_argument("--weights", required=True, help="checkpoint of a compressive-sensing network")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, e.g. photo.png")
    parser.add_argument("--ignore_matrix", action="store_true", help="do not compare the matrices")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()

    device = pick_device(args.device)
    model = load_model(args.weights, task="compressive_sensing", device=device)
    content = read_measurements(args.measurements)
    trained = model.degradation.matrix.detach().cpu().numpy()
    y = content["y"]
    if y.ndim != 3 or y.shape[0] != len(trained):
        raise UserError(f"{args.measurements}: y is {y.shape}, but the network reads ({len(trained)}, rows, columns)")
    if not args.ignore_matrix:
        if "matrix" not in content:
            raise UserError(f"{args.measurements} does not say which matrix measured it; --ignore_matrix trusts you")
        matrix = content["matrix"]
        if matrix.shape != trained.shape or not np.allclose(matrix, trained, atol=1e-5):
            raise UserError(
                f"{args.measurements} was measured with another matrix than {args.weights} was trained with; use the "
                "weights of that matrix, or train with MODEL.MATRIX set to it"
            )
    with torch.inference_mode():
        x = model(torch.from_numpy(y.astype(np.float32))[None].to(device))[0][0, 0].float().cpu().numpy()
    height, width = (int(content.get(key, side)) for key, side in zip(("height", "width"), x.shape, strict=True))
    write_image(args.out, to_uint8(x[:height, :width]))
    print(f"wrote {args.out}: {width}x{height} pixels from {y.size:,} measurements")


def read_measurements(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, without running any code in it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise UserError(f"no measurements at {path}") from error
    except Exception as error:  # a file of another kind fails in many ways
        raise UserError(f"{path} is not an .npz file of arrays; see measure.py for what it should hold") from error
    if "y" not in content:
        raise UserError(f"{path} holds no array y; see measure.py for what it should hold")
    return content


if __name__ == "__main__":
    run_cli(main)
