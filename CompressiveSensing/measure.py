"""Measure an image block by block: image in, measurements out.

    python CompressiveSensing/measure.py photo.png --weights model.pth --out photo.npz     # with a network's matrix
    python CompressiveSensing/measure.py photo.png --weights model.pth --ratio 0.17 --out photo.npz
    python CompressiveSensing/measure.py photo.png --matrix matrix.npy --out photo.npz     # with one of your own

The .npz holds ``y`` (M, rows, columns) float32, one column of M measurements for each block, of 32x32 pixels in most
networks; ``matrix`` (M, 1024) float32, which measures a block's pixels row by row, in [0, 1]; ``ratio``, M per pixel of
a block; and the image's ``height`` and ``width``, to which zeros were added at the right and bottom to fill the last
blocks (without both, the image is of whole blocks). reconstruct.py takes such a file of a real camera as well. With
--ratio the first rows of the matrix of a network for a range of ratios measure, without it all of them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.runtime.errors import command_imports, run_cli

with command_imports(__name__):
    import numpy as np
    import torch

    from dgunet import load_model
    from dgunet.data.images import read_luma, to_tensor
    from dgunet.data.transforms import pad_to_blocks, unit_range
    from dgunet.model.sampling import sampling_operator
    from dgunet.runtime.files import atomic_write


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", help="checkpoint whose sampling matrix to use")
    source.add_argument("--matrix", help=".npy file with an (M, 1024) matrix, or (M, side^2) of other blocks")
    parser.add_argument("--ratio", type=float, help="measurements per pixel, of a network for a range of ratios")
    parser.add_argument("--out", type=Path, required=True, help=".npz file to write")
    args = parser.parse_args()

    luma = read_luma(args.image)
    if args.weights:
        operator = load_model(args.weights, task="compressive_sensing").degradation
    else:
        operator = sampling_operator(ratio=0.25, matrix="fixed", start=args.matrix, block=None)
    operator = operator.at(args.ratio)
    with torch.inference_mode():
        y = operator.A(pad_to_blocks(unit_range(to_tensor(luma)[None]), operator.block))[0].numpy()
    height, width = luma.shape
    matrix, ratio = operator.matrix.detach().numpy(), len(operator.matrix) / operator.block**2
    with atomic_write(args.out) as temporary, open(temporary, "wb") as file:
        np.savez(file, y=y, matrix=matrix, ratio=ratio, height=height, width=width)
    print(f"wrote {args.out}: {y.size:,} measurements of {luma.size:,} pixels, ratio {ratio:.4g}")


if __name__ == "__main__":
    run_cli(main)
