"""Known degradations: linear operators with ``A`` and ``A_adjoint`` (the convention of the deepinv library)."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dgunet.errors import UserError
from dgunet.files import open_file

STARTS = ("xavier", "orthonormal", "dct", "pca")


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
        matrix: (M, block^2) values to start from, see `start_matrix`; default Xavier normal if learned, else a
            Gaussian with orthonormal rows.
    """

    def __init__(self, ratio: float = 0.25, block: int = 32, learned: bool = True, matrix: Tensor | None = None):
        super().__init__()
        if matrix is None:
            matrix = start_matrix("xavier" if learned else "orthonormal", ratio, block)
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


def start_matrix(start: str, ratio: float, block: int = 32, blocks: Callable[[], Tensor] | None = None) -> Tensor:
    """A sampling matrix (M, block^2), M = ceil(ratio * block^2), for `BlockSampling` to begin with.

    Args:
        start: ``"xavier"`` (normal, as the original's code), ``"orthonormal"`` (Gaussian with orthonormal rows, as the
            paper's text), ``"dct"`` (the cosines of lowest frequency, in zigzag order), or ``"pca"`` (the principal
            components of training blocks). The rows of the last three are orthonormal.
        ratio: measurements per pixel, in (0, 1].
        block: side of a block in pixels.
        blocks: for ``"pca"``: gives training blocks, (N, block^2).

    Raises:
        ValueError: an unknown start, a ratio out of range, or fewer blocks than rows.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is the number of measurements per pixel, in (0, 1], got {ratio}")
    # round() first: 0.07 * 1600 is 112.00000000000001 in floating point, and must count as 112
    rows = math.ceil(round(ratio * block**2, 6))
    if start == "xavier":
        return nn.init.xavier_normal_(torch.empty(rows, block**2))
    if start == "orthonormal":
        return nn.init.orthogonal_(torch.empty(rows, block**2))
    if start == "dct":
        return _cosines(block)[:rows].float()
    if start == "pca":
        samples = blocks().double()
        if len(samples) < rows:
            raise ValueError(f"{rows} principal components need at least as many training blocks, got {len(samples)}")
        # Of the blocks as they are, not around their mean: brightness is the first thing to measure.
        return torch.linalg.eigh(samples.mT @ samples).eigenvectors.mT.flip(0)[:rows].float()
    raise ValueError(f"a matrix starts from {', '.join(STARTS)}, got {start!r}")


def _cosines(block: int) -> Tensor:
    """The two-dimensional DCT-II of a block, orthonormal (block^2, block^2), rows in JPEG's zigzag order."""
    k = torch.arange(block, dtype=torch.float64)
    basis = torch.cos(math.pi / block * k[:, None] * (k + 0.5)) * math.sqrt(2 / block)
    basis[0] /= math.sqrt(2)
    diagonal_order = sorted(
        ((u, v) for u in range(block) for v in range(block)),
        key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else uv[1]),
    )
    return torch.stack([torch.outer(basis[u], basis[v]).flatten() for u, v in diagonal_order])


def sampling_operator(
    ratio: float, matrix: str = "learned", start: str = "", blocks: Callable[[], Tensor] | None = None
) -> BlockSampling:
    """The block sampling that a config asks for.

    Args:
        ratio: measurements per pixel, in (0, 1].
        matrix: ``"learned"`` (trained with the network) or ``"fixed"``.
        start: what it starts from, or stays: a name that `start_matrix` knows, or a .npy file with (M, 1024) values,
            which set the ratio. Empty: xavier for a learned matrix, orthonormal for a fixed one.
        blocks: for a start from principal components, see `start_matrix`.

    Raises:
        UserError: neither learned nor fixed, an impossible ratio, or a file that holds no such matrix.
    """
    if matrix not in ("learned", "fixed"):
        raise UserError(f"MODEL.MATRIX is learned or fixed, got {matrix!r}; a .npy file goes to MODEL.MATRIX_START")
    learned = matrix == "learned"
    start = start or ("xavier" if learned else "orthonormal")
    try:
        if start in STARTS:
            values = start_matrix(start, ratio, blocks=blocks)
        else:
            values = torch.from_numpy(_read_matrix(Path(start)))
        return BlockSampling(ratio, learned=learned, matrix=values)
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL.RATIO {ratio}, MODEL.MATRIX_START {start}: {error}") from error


def _read_matrix(path: Path) -> np.ndarray:
    with open_file(path) as file:
        try:
            values = np.load(file, allow_pickle=False)
            numbers = values.dtype.kind in "iuf"
        except Exception as error:  # a damaged file, or an .npz, fails in many ways
            raise ValueError("this is not a .npy file with an array, or is damaged") from error
    if not numbers:
        raise ValueError(f"a sampling matrix has numbers, got {values.dtype}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("the matrix has values that are not finite")
    return values
