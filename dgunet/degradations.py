"""What A can be in ``y = A x + n``: learned, where it is unknown, or one of the known degradations.

All have ``A`` and ``A_adjoint``, the convention of the deepinv library.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.errors import UserError
from dgunet.files import open_file
from dgunet.layers import conv3x3
from dgunet.proximal import MULTIPLE

STARTS = ("xavier", "orthonormal", "dct", "pca")
RATIOS = (0.01, 0.04, 0.1, 0.25, 0.5)  # of the paper


class Degradation(Protocol):
    """A linear map from images (B, C, H, W) to measurements, and its adjoint.

    Of the known ones, those whose measurements are images of x's size say so by ``image_to_image = True``: `restore`
    may pad these and cut them into tiles. Those that train on something else than ``A(x)`` of clean images x, such as
    ``A(x)`` and noise, have ``measure(x, shared, own)`` for it: images may come out smaller than x, which is its centre
    then. What it draws for the whole batch comes from the generator ``shared`` (of the CPU), what it draws for each
    image from that image's generator in the list ``own`` (of x's device). Training seeds them so that neither the
    number of processes nor that of accumulation steps changes a measurement.

    Where a measurement y tells which of several operators made it, ``for_measurements(y)`` is that one, and the network
    computes with it. Where a validation is to measure otherwise than by ``measure``, ``validated`` lists the
    degradations that each image is measured with in turn.
    """

    def A(self, x: Tensor) -> Tensor: ...

    def A_adjoint(self, y: Tensor) -> Tensor: ...


class ResidualBlock(nn.Module):
    """``x + conv3x3(PReLU(conv3x3(x)))`` on images (B, C, H, W), with ``hidden`` channels in between."""

    def __init__(self, channels: int, hidden: int = 64):
        super().__init__()
        self.conv1 = conv3x3(channels, hidden)
        self.activation = nn.PReLU()
        self.conv2 = conv3x3(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.activation(self.conv1(x)))


class LearnedDegradation(nn.Module):
    """Stand-in for an unknown degradation: ``A`` and ``A_adjoint`` are residual blocks, image to image.

    Nothing makes ``A_adjoint`` the true adjoint of ``A``: the paper learns both freely.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.A = ResidualBlock(channels)
        self.A_adjoint = ResidualBlock(channels)


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
        matrix: (M, block^2) values to start from, see `init_sampling_matrix`; default Xavier normal if learned, else a
            Gaussian with orthonormal rows.
    """

    start = ""  # what the user has given for the matrix to start from: see `keeps`

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
        if x.dim() != 4 or x.shape[1] != 1 or x.shape[2] % self.block or x.shape[3] % self.block:
            raise ValueError(
                f"block sampling measures (B, 1, H, W) with sides that are multiples of {self.block}, "
                f"got {tuple(x.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):
            b, (height, width) = self.block, x.shape[2:]
            x = x.to(self.matrix.dtype)
            if torch.compiler.is_exporting():  # the same, but for rounded gradients; the other does not take free sizes
                blocks = F.pixel_unshuffle(x, b).permute(0, 2, 3, 1)
            else:
                blocks = x.reshape(-1, height // b, b, width // b, b).transpose(2, 3).flatten(3)
            return (blocks @ self.matrix.mT).permute(0, 3, 1, 2)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The adjoint: (B, M, h, w) to images (B, 1, h*block, w*block)."""
        if y.dim() != 4 or y.shape[1] != self.matrix.shape[0]:
            raise ValueError(f"measurements are (B, {self.matrix.shape[0]}, h, w), got {tuple(y.shape)}")
        with torch.autocast(y.device.type, enabled=False):
            b, (rows, columns) = self.block, y.shape[2:]
            blocks = y.to(self.matrix.dtype).permute(0, 2, 3, 1) @ self.matrix
            if torch.compiler.is_exporting():  # as in A
                return F.pixel_shuffle(blocks.permute(0, 3, 1, 2), b)
            blocks = blocks.view(-1, rows, columns, b, b).transpose(2, 3)
            return blocks.reshape(-1, 1, rows * b, columns * b)

    def at(self, ratio: float | None) -> "BlockSampling | FirstRows":
        """What measures ``ratio`` numbers per pixel: itself, where that is its ratio, or where None is asked for.

        Raises:
            UserError: another ratio.
        """
        if ratio is not None and num_rows(ratio, self.block) != len(self.matrix):
            raise UserError(
                f"the ratio {ratio:g} is not this network's, which is for {self.percent} alone; give weights of "
                'another, or train one for a range, MODEL.RATIO "[0.01, 0.5]"'
            )
        return self

    @property
    def percent(self) -> str:
        """Its ratio in words, ``25 %``."""
        return f"{percentage(len(self.matrix), self.block)} %"

    def settings(self) -> dict:
        """The constructor's arguments that its tensors do not tell."""
        return {"block": self.block, "learned": self.learned}

    def keep_on_load(self, weights: dict[str, Tensor]) -> bool:
        """Whether its tensors stay when training starts from a network's weights: of another ratio, or a user's own."""
        given = weights.get("degradation.matrix", self.matrix)
        own = not self.learned and self.start not in STARTS
        return bool(self.start) and (own or given.shape != self.matrix.shape)


class FirstRows:
    """The first rows of a `ScalableSampling`'s matrix: a view, nothing is copied.

    Args:
        matrix: these rows, (M, block^2).
        block: side of a block in pixels.
    """

    def __init__(self, matrix: Tensor, block: int):
        self.matrix, self.block = matrix, block

    A, A_adjoint = BlockSampling.A, BlockSampling.A_adjoint


class ScalableSampling(BlockSampling):
    """Block sampling at any ratio of a range: the first M rows of one matrix measure, of ``lowest`` to all of them.

    ``A`` measures with all rows, ``at(ratio).A`` with fewer. A network learns it with an M that is drawn for each step,
    and reads from the M channels of a measurement which rows made it: ``model(model.degradation.at(0.17).A(x))[0]``.

    Args:
        lowest: the smallest M.
        block: side of a block in pixels.
        learned: see `BlockSampling`.
        matrix: (highest M, block^2), what is worth the most first.

    Raises:
        ValueError: a ``lowest`` that is not from 1 to the number of rows; as `BlockSampling`.
    """

    def __init__(self, lowest: int, block: int, learned: bool, matrix: Tensor):
        super().__init__(block=block, learned=learned, matrix=matrix)
        if type(lowest) is not int or not 1 <= lowest <= len(matrix):
            raise ValueError(f"the fewest rows are from 1 to {len(matrix)}, got {lowest!r:.60}")
        self.lowest = lowest

    def at(self, ratio: float | None) -> BlockSampling | FirstRows:
        """The rows that measure ``ratio`` numbers per pixel; itself, with all rows, for None.

        Raises:
            UserError: a ratio out of the range.
        """
        if ratio is None:
            return self
        if not self.covers(ratio):
            raise UserError(f"the ratio {ratio:g} is not one of this network's, which is for {self.percent}")
        return self._first(num_rows(ratio, self.block))

    def covers(self, ratio: float) -> bool:
        """Whether a ratio, in (0, 1], is in the range."""
        return self.lowest <= num_rows(ratio, self.block) <= len(self.matrix)

    def for_measurements(self, y: Tensor) -> FirstRows:
        """The rows that made a measurement, (B, M, h, w).

        Raises:
            ValueError: an M out of the range.
        """
        if y.dim() != 4 or not self.lowest <= y.shape[1] <= len(self.matrix):
            raise ValueError(
                f"measurements are (B, M, h, w) with M from {self.lowest} to {len(self.matrix)}, got {tuple(y.shape)}"
            )
        return self._first(y.shape[1])

    def measure(
        self, x: Tensor, shared: torch.Generator | None = None, own: list[torch.Generator] | None = None
    ) -> Tensor:
        """Measures images (B, 1, H, W) with a random number of rows, the same for all of them: (B, M, h, w).

        M is uniform in half of the calls and log-uniform in the other half, every whole number from ``lowest`` to the
        number of rows. From 1 to 50 %, a fifth of the calls is below 4 %, and a third above 25 %.

        Args:
            x: the images.
            shared: a generator on the CPU; default: PyTorch's own.
            own: not used.
        """
        evenly, place = torch.rand(2, generator=shared, dtype=torch.float64).tolist()
        lowest, end = self.lowest, len(self.matrix) + 1
        rows = lowest + place * (end - lowest) if evenly < 0.5 else lowest * (end / lowest) ** place
        return self._first(min(int(rows), end - 1)).A(x)

    @property
    def validation_ratios(self) -> list[FirstRows]:
        """At the paper's ratios that are in the range, or at its ends where none is."""
        inside = [num_rows(ratio, self.block) for ratio in RATIOS if self.covers(ratio)]
        return [self._first(m) for m in inside or sorted({self.lowest, len(self.matrix)})]

    @property
    def percent(self) -> str:
        """Its ratios in words, ``1 to 50 %``."""
        return f"{percentage(self.lowest, self.block)} to {super().percent}"

    def settings(self) -> dict:
        return {"lowest": self.lowest, **super().settings()}

    def _first(self, rows: int) -> FirstRows:
        return FirstRows(self.matrix[:rows], self.block)


class Blur(nn.Module):
    """A known blur, the same everywhere: each channel's convolution with a kernel, borders reflected.

    Always computed in the kernel's precision, whatever autocast says.

    Args:
        kernel: (h, w), both odd; used as it is (a blur that keeps the brightness sums to 1).
        noise: what `measure` adds, Gaussian, sigma in the unit of the images.

    Raises:
        ValueError: a kernel of another shape.
    """

    image_to_image = True

    def __init__(self, kernel: Tensor, noise: float = 0.0):
        super().__init__()
        self.noise = noise
        if kernel.dim() != 2 or not kernel.shape[0] % 2 or not kernel.shape[1] % 2:
            raise ValueError(f"a blur's kernel is (h, w), both odd, got {tuple(kernel.shape)}")
        self.register_buffer("kernel", kernel.detach().clone().float())

    def A(self, x: Tensor) -> Tensor:
        """Blurs images (B, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            rows, columns = self._borders(x)
            extended = x.to(self.kernel.dtype).index_select(-2, rows).index_select(-1, columns)
            return F.conv2d(extended, self._taps(x), groups=x.shape[1])

    def measure(
        self, x: Tensor, shared: torch.Generator | None = None, own: list[torch.Generator] | None = None
    ) -> Tensor:
        """``A(x)`` of images (B, C, H, W) with noise.

        Args:
            x: the images.
            shared: not used.
            own: a generator for the noise of each image, on x's device; default: PyTorch's own for all of them.
        """
        y = self.A(x)
        if not self.noise:
            return y
        if own is None:
            return y + self.noise * torch.randn_like(y)
        noise = [torch.randn(y.shape[1:], generator=g, dtype=y.dtype, device=y.device) for g in own]
        return y + self.noise * torch.stack(noise)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The adjoint, also at the borders: (B, C, H, W) to images of that size."""
        with torch.autocast(y.device.type, enabled=False):
            rows, columns = self._borders(y)
            extended = F.conv_transpose2d(y.to(self.kernel.dtype), self._taps(y), groups=y.shape[1])
            folded = extended.new_zeros(*extended.shape[:-1], y.shape[-1]).index_add(-1, columns, extended)
            return folded.new_zeros(y.shape).index_add(-2, rows, folded)

    def settings(self) -> dict:
        return {"noise": self.noise} if self.noise else {}

    def keep_on_load(self, weights: dict[str, Tensor]) -> bool:
        return True  # of two kernels the config's is meant

    def _taps(self, x: Tensor) -> Tensor:
        return self.kernel.flip(0, 1).expand(x.shape[1], 1, *self.kernel.shape)  # conv2d correlates

    def _borders(self, x: Tensor) -> list[Tensor]:
        """Which rows, and which columns, make up an image that is extended by half a kernel on each side."""
        indices = []
        for size, taps in zip(x.shape[-2:], self.kernel.shape, strict=True):
            period = torch.full((), max(2 * (size - 1), 1), device=x.device)  # ONNX divides by no free number
            index = torch.arange(-(taps // 2), size + taps // 2, device=x.device) % period
            indices.append(torch.minimum(index, period - index))
        return indices


class MotionBlur(Blur):
    """Known blurs, to train one network for all of them: each `measure` is by a simulated camera shake of its own.

    The network then restores from any blur: ``model(y, Blur(kernel))[0]``.

    Args:
        shortest, longest: extent of the kernels, their larger side in pixels, see `synthesis.motion_kernel`.
        noise: see `Blur`.
    """

    image_to_image = False  # until one is given

    def __init__(self, shortest: float = 5, longest: float = 25, noise: float = 0.0):
        super().__init__(torch.empty(1, 1), noise)
        self.register_buffer("kernel", None, persistent=False)  # it is of one step
        self.shortest, self.longest = shortest, longest

    def measure(
        self, x: Tensor, shared: torch.Generator | None = None, own: list[torch.Generator] | None = None
    ) -> Tensor:
        """Images (B, C, H, W), blurred alike; the centre, which the blur reaches from beyond the borders as it does in
        a photograph: (B, C, H - 2m, W - 2m), with m a multiple of 8.

        Args:
            x: the images.
            shared: a generator for the kernel, on the CPU; default: PyTorch's own.
            own: see `Blur.measure`.

        Raises:
            UserError: images that are too small for the blur.
        """
        from dgunet.synthesis import motion_kernel  # with NumPy's random numbers, which take long to import

        rng = np.random.default_rng(torch.randint(2**62, (), generator=shared).item())
        self.kernel = torch.from_numpy(motion_kernel(rng, (self.shortest, self.longest))).to(x.device)
        m = self.margin
        if min(x.shape[-2:]) < 2 * m + MULTIPLE:
            raise UserError(f"crops for blurs of {self.longest:g} pixels are at least {2 * m + MULTIPLE} pixels large")
        return super().measure(x, shared, own)[..., m:-m, m:-m]

    @property
    def margin(self) -> int:
        return math.ceil(self.longest / 2 / MULTIPLE) * MULTIPLE

    def settings(self) -> dict:
        return {"shortest": self.shortest, "longest": self.longest, "noise": self.noise}

    def _borders(self, x: Tensor) -> list[Tensor]:
        if self.kernel is None:
            raise UserError(
                "this network is for any known blur; give it yours, model(y, Blur(kernel))[0], "
                "or for good, model.degradation = Blur(kernel)"
            )
        return super()._borders(x)


# The known degradations that checkpoints hold, by the kind that they name.
KINDS = {
    "block_sampling": BlockSampling,
    "scalable_sampling": ScalableSampling,
    "blur": Blur,
    "motion_blur": MotionBlur,
}


def for_measurements(degradation: Degradation, y: Tensor) -> Degradation:
    """The operator that made a measurement: one of ``degradation``'s where it knows several, or itself."""
    return degradation.for_measurements(y) if hasattr(degradation, "for_measurements") else degradation


def describe_degradation(degradation: Degradation | None) -> dict | None:
    """What `rebuild_degradation` needs besides the weights, None where it is learned; of the user's own it cannot."""
    if degradation is None:
        return None
    kind = next((kind for kind, ours in KINDS.items() if type(degradation) is ours), None)
    return {"kind": "own"} if kind is None else {"kind": kind, **degradation.settings()}


def rebuild_degradation(description: dict, tensors: dict[str, Tensor]) -> Degradation:
    """A known degradation from its description and its tensors, by their names in it.

    Raises:
        Exception: of any kind, where these do not make one.
    """
    settings = {name: value for name, value in description.items() if name != "kind"}
    degradation = KINDS[description["kind"]](**settings, **tensors)
    if describe_degradation(degradation) != description:
        raise ValueError(f"no settings of a degradation: {settings}")
    return degradation


def degradation_from_config(cfg, train_set=None) -> Degradation | None:
    """The known degradation that MODEL.DEGRADATION of a config names; None where it is to be learned.

    Raises:
        UserError: no such name, or what it is made of is missing.
    """
    name, kernel = cfg.MODEL.DEGRADATION, cfg.MODEL.KERNEL
    if name not in ("", "blur"):
        raise UserError(f"MODEL.DEGRADATION is blur, or empty for one that is learned, got {name!r}")
    if bool(name) != bool(kernel):
        raise UserError("a known blur needs both MODEL.DEGRADATION blur and MODEL.KERNEL, a .npy file or motion")
    if not name:
        return None
    noise = cfg.MODEL.NOISE / 255
    if kernel == "motion":
        extent = cfg.MODEL.KERNEL_EXTENT
        return MotionBlur(min(extent), max(extent), noise)
    try:
        return Blur(torch.from_numpy(read_array(Path(kernel))), noise)
    except ValueError as error:
        raise UserError(f"MODEL.KERNEL {kernel}: {error}") from error


def init_sampling_matrix(
    start: str, ratio: float, block: int = 32, blocks: Callable[[], Tensor] | None = None
) -> Tensor:
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
    rows = num_rows(ratio, block)
    if start == "xavier":
        return nn.init.xavier_normal_(torch.empty(rows, block**2))
    if start == "orthonormal":
        return nn.init.orthogonal_(torch.empty(rows, block**2))
    if start == "dct":
        return _cosines(block, rows)
    if start == "pca":
        samples = blocks().double()
        if len(samples) < rows:
            raise ValueError(f"{rows} principal components need at least as many training blocks, got {len(samples)}")
        # Of the blocks as they are, not around their mean: brightness is the first thing to measure.
        return torch.linalg.eigh(samples.mT @ samples).eigenvectors.mT.flip(0)[:rows].float()
    raise ValueError(f"a matrix starts from {', '.join(STARTS)}, got {start!r}")


def num_rows(ratio: float, block: int) -> int:
    """How many rows a sampling matrix has, ceil(ratio * block^2).

    Raises:
        UserError: a ratio out of (0, 1].
    """
    if not 0 < ratio <= 1:
        raise UserError(f"ratio is the number of measurements per pixel, in (0, 1], got {ratio}")
    # round() first: 0.07 * 1600 is 112.00000000000001 in floating point, and must count as 112
    return math.ceil(round(ratio * block**2, 6))


def percentage(rows: int, block: int) -> str:
    """The ratio of so many rows in percent, with as few decimals as tell it: 11 of 1024 are ``1``, see `num_rows`."""
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
    """The block sampling of a network: `BlockSampling`, or for a range of ratios `ScalableSampling`.

    Args:
        ratio: measurements per pixel, in (0, 1]; or the lowest and the highest.
        block, learned, matrix: see `BlockSampling`. Of a range, the matrix by default starts from the DCT.

    Raises:
        ValueError: an impossible ratio, or a matrix that does not fit.
    """
    if not isinstance(ratio, Sequence):
        return BlockSampling(ratio, block, learned, matrix)
    if len(ratio) != 2 or not ratio[0] <= ratio[1]:
        raise ValueError(f"a range of ratios is (lowest, highest), got {ratio!r:.100}")
    matrix = init_sampling_matrix("dct", ratio[1], block) if matrix is None else matrix
    return ScalableSampling(num_rows(ratio[0], block), block, learned, matrix)


def sampling_operator(
    ratio: float | Sequence[float],
    matrix: str = "learned",
    start: str = "",
    blocks: Callable[[], Tensor] | None = None,
    block: int | None = 32,
) -> BlockSampling:
    """The block sampling that a config asks for.

    Args:
        ratio: measurements per pixel, in (0, 1]; or the lowest and the highest, for all between them.
        matrix: ``"learned"`` (trained with the network) or ``"fixed"``.
        start: what it starts from, or stays: a name that `init_sampling_matrix` knows, or a .npy file with (M, block^2)
            values, which set the ratio, of a range the highest. Empty: dct for a range; else xavier for a learned
            matrix, orthonormal for a fixed one.
        blocks: for a start from principal components, see `init_sampling_matrix`.
        block: side of a block in pixels; None for that of the file's blocks.

    Raises:
        UserError: neither learned nor fixed, an impossible ratio, or a file that holds no such matrix.
    """
    if matrix not in ("learned", "fixed"):
        raise UserError(f"MODEL.MATRIX is learned or fixed, got {matrix!r}; a .npy file goes to MODEL.MATRIX_START")
    learned, scalable = matrix == "learned", isinstance(ratio, Sequence)
    if scalable:
        start = start or "dct"  # rows of noise would be of equal worth
    begun = start or ("xavier" if learned else "orthonormal")
    try:
        if begun in STARTS:
            values = init_sampling_matrix(begun, ratio[-1] if scalable else ratio, block, blocks)
        else:
            values = torch.from_numpy(read_array(Path(begun)))
            block = block or math.isqrt((values.shape or (0,))[-1])
        operator = block_sampling(ratio, block, learned, values)
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL.RATIO {ratio}, MODEL.MATRIX_START {begun}: {error}") from error
    operator.start = start
    return operator


def read_array(path: Path) -> np.ndarray:
    """The numbers in a .npy file, float32."""
    with open_file(path) as file:
        try:
            values = np.load(file, allow_pickle=False)
            numbers = values.dtype.kind in "iuf"
        except Exception as error:  # a damaged file, or an .npz, fails in many ways
            raise ValueError("this is not a .npy file with an array, or is damaged") from error
    if not numbers:
        raise ValueError(f"this should hold numbers, got {values.dtype}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("this has values that are not finite")
    return values
