"""Known degradations: linear operators with ``A`` and ``A_adjoint`` (the convention of the deepinv library)."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dgunet.errors import UserError


class BlockSampling(nn.Module):
    """Block compressive sensing: every block of ``block x block`` pixels is measured by the same matrix.

    As an operator it is a convolution with stride ``block`` and its transpose, written as the matrix product it is
    (cuDNN would round a convolution's inputs to TF32). Always computed in float32, whatever autocast says: measurements
    sum a thousand pixels, which bfloat16 does not carry.

    Args:
        ratio: measurements per pixel, in (0, 1]; the matrix has ceil(ratio * block^2) rows
            (11, 41, 103, 256, 512 for 1, 4, 10, 25, 50 % of 32x32).
        block: side of a block in pixels.
        learned: whether the matrix is trained with the network (the original's code) or fixed (the paper's text).
        matrix: (M, block^2) values to start from; default Xavier normal if learned, else a Gaussian with
            orthonormal rows.
    """

    def __init__(self, ratio: float = 0.25, block: int = 32, learned: bool = True, matrix: Tensor | None = None):
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is the number of measurements per pixel, in (0, 1], got {ratio}")
        if matrix is None:
            # round() first: 0.07 * 1600 is 112.00000000000001 in floating point, and must count as 112
            rows = math.ceil(round(ratio * block**2, 6))
            matrix = torch.empty(rows, block**2)
            if learned:
                nn.init.xavier_normal_(matrix)
            else:
                nn.init.orthogonal_(matrix)
        elif matrix.dim() != 2 or matrix.shape[1] != block**2:
            raise ValueError(
                f"a sampling matrix for {block}x{block} blocks is (M, {block**2}), got {tuple(matrix.shape)}"
            )
        self.block = block
        matrix = matrix.detach().clone().float()
        if learned:
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("matrix", matrix)

    def A(self, x: Tensor) -> Tensor:
        """Measures images (B, 1, H, W), H and W multiples of ``block``, as (B, M, H/block, W/block)."""
        if x.dim() != 4 or x.shape[1] != 1 or x.shape[2] % self.block or x.shape[3] % self.block:
            raise ValueError(
                f"block sampling measures (B, 1, H, W) with sides that are multiples of {self.block}, "
                f"got {tuple(x.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):
            b, (height, width) = self.block, x.shape[2:]
            blocks = x.to(self.matrix.dtype).reshape(-1, height // b, b, width // b, b).transpose(2, 3).flatten(3)
            return (blocks @ self.matrix.mT).permute(0, 3, 1, 2)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The adjoint: (B, M, h, w) to images (B, 1, h*block, w*block)."""
        if y.dim() != 4 or y.shape[1] != self.matrix.shape[0]:
            raise ValueError(f"measurements are (B, {self.matrix.shape[0]}, h, w), got {tuple(y.shape)}")
        with torch.autocast(y.device.type, enabled=False):
            b, (rows, columns) = self.block, y.shape[2:]
            blocks = y.to(self.matrix.dtype).permute(0, 2, 3, 1) @ self.matrix
            blocks = blocks.view(-1, rows, columns, b, b).transpose(2, 3)
            return blocks.reshape(-1, 1, rows * b, columns * b)


def sampling_operator(ratio: float, matrix: str = "learned") -> BlockSampling:
    """The block sampling that a config asks for.

    Args:
        ratio: measurements per pixel, in (0, 1].
        matrix: ``"learned"``, ``"fixed"`` (Gaussian with orthonormal rows), or a .npy file with (M, 1024) values, which
            stay fixed and set the ratio.

    Raises:
        UserError: an impossible ratio, or a file that holds no such matrix.
    """
    try:
        if matrix in ("learned", "fixed"):
            return BlockSampling(ratio, learned=matrix == "learned")
        values = torch.from_numpy(np.load(Path(matrix), allow_pickle=False).astype(np.float32))
        return BlockSampling(learned=False, matrix=values)
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL.RATIO {ratio}, MODEL.MATRIX {matrix}: {error}") from error
