"""Compressive sensing of blocks: sampling matrices, and the operators that measure with their rows."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dgunet.runtime.errors import UserError
from dgunet.runtime.files import read_array

STARTS = ("xavier", "orthonormal", "dct", "pca")
RATIOS = (0.01, 0.04, 0.1, 0.25, 0.5)  # of the paper


class BlockSampling(nn.Module):
    """Block compressive sensing: every block of ``block x block`` pixels is measured by the same matrix.

    That is a convolution with stride ``block`` and its transpose, here written as a matrix product (cuDNN would round
    a convolution's inputs to TF32), in float32 also under autocast: bfloat16 is too coarse for sums of 1000 pixels.

    Args:
        ratio: measurements per pixel, in (0, 1]: M = ceil(ratio * block^2) rows. Not used where ``matrix`` is given.
        block: side of a block in pixels.
        learned: whether the matrix is trained with the network (the original's code) or fixed (the paper's text).
        matrix: (M, block^2) initial values; default ``"xavier"`` of `init_sampling_matrix` if learned, else
            ``"orthonormal"``.

    Raises:
        ValueError: a matrix of another shape.
        UserError: a ratio out of its range.
    """

    start = ""  # MODEL.MATRIX_START as the user set it, see `keep_on_load`

    def __init__(self, ratio: float = 0.25, block: int = 32, learned: bool = True, matrix: Tensor | None = None):
        super().__init__()
        if matrix is None:
            matrix = init_sampling_matrix("xavier" if learned else "orthonormal", ratio, block)
        elif block < 1 or matrix.dim() != 2 or matrix.shape[1] != block**2:
            raise ValueError(
                f"a sampling matrix for {block}x{block} blocks is (M, {block**2}), got {tuple(matrix.shape)}"
            )
        self.block, self.learned = block, bool(learned)
        matrix = matrix.detach().clone().float()
        if learned:
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("matrix", matrix)

    def A(self, x: Tensor) -> Tensor:
        """Measures images (B, 1, H, W), H and W multiples of ``block``, as (B, M, H/block, W/block)."""
        b = self.block
        if x.dim() != 4 or x.shape[1] != 1 or x.shape[2] % b or x.shape[3] % b:
            raise ValueError(f"block sampling is of (B, 1, H, W) with multiples of {b} for sides, got {tuple(x.shape)}")
        height, width = x.shape[2:]
        with torch.autocast(x.device.type, enabled=False):
            blocks = x.to(self.matrix.dtype).reshape(-1, height // b, b, width // b, b)
            blocks = blocks.transpose(2, 3).flatten(3)  # (B, H/b, W/b, b^2)
            return (blocks @ self.matrix.mT).permute(0, 3, 1, 2)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The adjoint: (B, M, h, w) to images (B, 1, h*block, w*block)."""
        if y.dim() != 4 or y.shape[1] != self.matrix.shape[0]:
            raise ValueError(f"measurements are (B, {self.matrix.shape[0]}, h, w), got {tuple(y.shape)}")
        b, (rows, columns) = self.block, y.shape[2:]
        with torch.autocast(y.device.type, enabled=False):
            blocks = y.to(self.matrix.dtype).permute(0, 2, 3, 1) @ self.matrix  # (B, h, w, b^2)
            return blocks.view(-1, rows, columns, b, b).transpose(2, 3).reshape(-1, 1, rows * b, columns * b)

    def at(self, ratio: float | None) -> "BlockSampling | FirstRows":
        """The operator that takes ``ratio`` measurements per pixel: itself. Another ratio is a UserError."""
        if ratio is not None and num_rows(ratio, self.block) != len(self.matrix):
            raise UserError(f"this network is for a ratio of {self.percent} only, not {ratio:g}; use other weights")
        return self

    @property
    def percent(self) -> str:
        """Its ratio as text, ``25 %``."""
        return f"{percentage(len(self.matrix), self.block)} %"

    def settings(self) -> dict:
        """The constructor's arguments, without the tensors."""
        return {"block": self.block, "learned": self.learned}

    def keep_on_load(self, weights: dict[str, Tensor]) -> bool:
        """Whether training that starts from ``weights`` keeps this matrix: one for another ratio, or the user's own."""
        loaded = weights.get("degradation.matrix", self.matrix)
        from_file = not self.learned and self.start not in STARTS
        return bool(self.start) and (from_file or loaded.shape != self.matrix.shape)


class FirstRows:
    """Block sampling with the first M rows of a `ScalableSampling`'s ``matrix``, a view (M, block^2)."""

    def __init__(self, matrix: Tensor, block: int):
        self.matrix, self.block = matrix, block

    A, A_adjoint = BlockSampling.A, BlockSampling.A_adjoint  # not a subclass: a module would copy the matrix


class ScalableSampling(BlockSampling):
    """Block sampling at any ratio of a range, with the first M rows of one matrix.

    ``A`` measures with all rows, ``at(ratio).A`` with fewer. Training draws M for each step; the network infers it from
    the number of channels of a measurement: ``model(model.degradation.at(0.17).A(x))[0]``.

    Args:
        lowest: the smallest M.
        block, learned: see `BlockSampling`.
        matrix: (highest M, block^2), the most important rows first.
    """

    def __init__(self, lowest: int, block: int, learned: bool, matrix: Tensor):
        super().__init__(block=block, learned=learned, matrix=matrix)
        if type(lowest) is not int or not 1 <= lowest <= len(matrix):
            raise ValueError(f"lowest must be from 1 to the matrix's {len(matrix)} rows, got {lowest!r:.60}")
        self.lowest = lowest

    def at(self, ratio: float | None) -> BlockSampling | FirstRows:
        """The operator that takes ``ratio`` measurements per pixel; itself, with all rows, for None."""
        if ratio is None:
            return self
        if not self.covers(ratio):
            raise UserError(f"this network is for ratios of {self.percent}, not {ratio:g}")
        return self._first(num_rows(ratio, self.block))

    def covers(self, ratio: float) -> bool:
        """Whether a ratio is in the range."""
        return self.lowest <= num_rows(ratio, self.block) <= len(self.matrix)

    def for_measurements(self, y: Tensor) -> FirstRows:
        """The operator that made a measurement (B, M, h, w)."""
        if y.dim() != 4 or not self.lowest <= y.shape[1] <= len(self.matrix):
            raise ValueError(
                f"measurements are (B, M, h, w) with M from {self.lowest} to {len(self.matrix)}, got {tuple(y.shape)}"
            )
        return self._first(y.shape[1])

    def measure(
        self, x: Tensor, shared: torch.Generator | None = None, own: list[torch.Generator] | None = None
    ) -> Tensor:
        """Measures images (B, 1, H, W) with a random number M of rows: (B, M, h, w). See `Degradation`.

        M is uniform over the range in half of the calls, log-uniform in the other half: for a range of 1 to 50 %, a
        fifth of the calls is below 4 %, and a third above 25 %.
        """
        choice, position = torch.rand(2, generator=shared, dtype=torch.float64).tolist()
        lowest, end = self.lowest, len(self.matrix) + 1
        rows = lowest + position * (end - lowest) if choice < 0.5 else lowest * (end / lowest) ** position
        return self._first(min(int(rows), end - 1)).A(x)

    @property
    def validation_operators(self) -> list[FirstRows]:
        """The operators at the paper's ratios within the range, or at both ends of the range where there are none."""
        inside = [num_rows(ratio, self.block) for ratio in RATIOS if self.covers(ratio)]
        return [self._first(m) for m in inside or sorted({self.lowest, len(self.matrix)})]

    @property
    def percent(self) -> str:
        """Its ratios as text, ``1 to 50 %``."""
        return f"{percentage(self.lowest, self.block)} to {super().percent}"

    def settings(self) -> dict:
        return {"lowest": self.lowest, **super().settings()}

    def _first(self, rows: int) -> FirstRows:
        return FirstRows(self.matrix[:rows], self.block)


def init_sampling_matrix(
    start: str, ratio: float, block: int = 32, blocks: Callable[[], Tensor] | None = None
) -> Tensor:
    """Initial values of a sampling matrix, (M, block^2) with M = ceil(ratio * block^2).

    Args:
        start: ``"xavier"`` (normal, as in the original's code), ``"orthonormal"`` (Gaussian with orthonormal rows, as
            in the paper's text), ``"dct"`` (the cosines of lowest frequency, in zigzag order), or ``"pca"`` (the
            principal components of training blocks). The rows of the last three are orthonormal.
        ratio, block: see `BlockSampling`.
        blocks: for ``"pca"``: returns training blocks, (N, block^2), at least as many as rows.
    """
    rows = num_rows(ratio, block)
    if start in ("xavier", "orthonormal"):
        fill = nn.init.xavier_normal_ if start == "xavier" else nn.init.orthogonal_
        return fill(torch.empty(rows, block**2))
    if start == "dct":
        return _cosines(block, rows)
    if start == "pca":
        samples = blocks().double()
        if len(samples) < rows:
            raise ValueError(f"{rows} principal components need at least as many training blocks, got {len(samples)}")
        # Without subtracting the mean: brightness is the first thing to measure.
        return torch.linalg.eigh(samples.mT @ samples).eigenvectors.mT.flip(0)[:rows].float()
    raise ValueError(f"a matrix can start from {', '.join(STARTS)}, got {start!r}")


def num_rows(ratio: float, block: int) -> int:
    """The number of rows of a sampling matrix, ceil(ratio * block^2): 11, 41, 103, 256, 512 for the paper's ratios."""
    if not 0 < ratio <= 1:
        raise UserError(f"the ratio of measurements to pixels must be in (0, 1], got {ratio}")
    # round() first: 0.07 * 1600 is 112.00000000000001 in floating point, and must count as 112
    return math.ceil(round(ratio * block**2, 6))


def percentage(rows: int, block: int) -> str:
    """The ratio of a number of rows in percent, with as few decimals as `num_rows` needs: 11 of 1024 are ``1``."""
    exact = 100 * rows / block**2
    shorter = (math.floor(exact * 10**decimals) / 10**decimals for decimals in range(6))
    return f"{next((p for p in shorter if p and num_rows(p / 100, block) == rows), exact):g}"


def _cosines(block: int, rows: int) -> Tensor:
    """The two-dimensional DCT-II of a block, orthonormal, the first rows in JPEG's zigzag order: (rows, block^2)."""
    k = torch.arange(block, dtype=torch.float64)
    basis = torch.cos(math.pi / block * k[:, None] * (k + 0.5)) * math.sqrt(2 / block)
    basis[0] /= math.sqrt(2)
    diagonal_order = sorted(
        ((u, v) for u in range(block) for v in range(block)),
        key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else uv[1]),
    )
    return torch.stack([torch.outer(basis[u], basis[v]).flatten().float() for u, v in diagonal_order[:rows]])


def block_sampling(
    ratio: float | Sequence[float] = 0.25, block: int = 32, learned: bool = True, matrix: Tensor | None = None
) -> BlockSampling:
    """`BlockSampling`, or for a range of ratios (lowest, highest) `ScalableSampling`, by default of the DCT."""
    if not isinstance(ratio, Sequence):
        return BlockSampling(ratio, block, learned, matrix)
    if len(ratio) != 2 or not ratio[0] <= ratio[1]:
        raise ValueError(f"a range of ratios is (lowest, highest), got {ratio!r:.100}")
    if matrix is None:
        matrix = init_sampling_matrix("dct", ratio[1], block)  # the first rows have to be the most important ones
    return ScalableSampling(num_rows(ratio[0], block), block, learned, matrix)


def sampling_operator(
    ratio: float | Sequence[float],
    matrix: str = "learned",
    start: str = "",
    blocks: Callable[[], Tensor] | None = None,
    block: int | None = 32,
) -> BlockSampling:
    """The block sampling that a config describes.

    Args:
        ratio: see `block_sampling`.
        matrix: ``"learned"`` (trained with the network) or ``"fixed"``.
        start: its initial values: a name that `init_sampling_matrix` knows, or a .npy file with (M, block^2) values,
            which set the (highest) ratio. Empty: the defaults of `block_sampling`.
        blocks: training blocks for ``"pca"``, see `init_sampling_matrix`.
        block: side of a block in pixels; None for that of the file's blocks.
    """
    if matrix not in ("learned", "fixed"):
        raise UserError(f"MODEL.MATRIX must be learned or fixed, got {matrix!r}; set MODEL.MATRIX_START to a .npy file")
    scalable, values = isinstance(ratio, Sequence), None
    try:
        if start in STARTS:
            values = init_sampling_matrix(start, ratio[-1] if scalable else ratio, block, blocks)
        elif start:
            values = torch.from_numpy(read_array(Path(start)))
            block = block or math.isqrt((values.shape or (0,))[-1])
        operator = block_sampling(ratio, block, matrix == "learned", values)
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL.RATIO {ratio}, MODEL.MATRIX_START {start or 'empty'}: {error}") from error
    operator.start = start or ("dct" if scalable else "")
    return operator
