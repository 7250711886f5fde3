"""The degradation A of ``y = A x + n``: learned where it is unknown, or one of the known ones.

All have ``A`` and ``A_adjoint``, the convention of the deepinv library.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.model.layers import conv3x3
from dgunet.model.proximal import MULTIPLE
from dgunet.model.sampling import BlockSampling, ScalableSampling, read_array
from dgunet.runtime.errors import UserError


class Degradation(Protocol):
    """A linear map from images (B, C, H, W) to measurements, and its adjoint.

    A known degradation may have more:

    ``image_to_image = True``: measurements are images of x's size, which `restore` may pad and cut into tiles.
    ``measure(x, shared, own)``: what training measures instead of ``A(x)``, for example ``A(x)`` with noise. Its output
    may be smaller than x, and is of x's centre then. Random numbers for the whole batch come from the generator
    ``shared`` (on the CPU), those for each image from its generator in the list ``own`` (on x's device): training seeds
    them so that a measurement depends neither on the number of processes nor on that of accumulation steps.
    ``for_measurements(y)``: of several operators the one that made y; the network computes with it.
    ``validation_ratios``: the operators that validation measures each image with, in turn, instead of ``measure``.
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
    """An unknown degradation: ``A`` and ``A_adjoint`` are residual blocks, learned freely (not as adjoints)."""

    def __init__(self, channels: int):
        super().__init__()
        self.A = ResidualBlock(channels)
        self.A_adjoint = ResidualBlock(channels)


class Blur(nn.Module):
    """A known uniform blur: each channel is convolved with a kernel, with reflected borders; never in low precision.

    Args:
        kernel: (h, w), both odd, not normalised (a blur that keeps the brightness sums to 1).
        noise: sigma of the Gaussian noise that `measure` adds, in the unit of the images.
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
        """``A(x)`` of images (B, C, H, W) with noise, see `Degradation`."""
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
        return True  # the config's kernel replaces the one in the weights

    def _taps(self, x: Tensor) -> Tensor:
        return self.kernel.flip(0, 1).expand(x.shape[1], 1, *self.kernel.shape)  # conv2d correlates

    def _borders(self, x: Tensor) -> list[Tensor]:
        """Indices of the rows and columns of an image extended by reflection, half a kernel on each side."""
        indices = []
        for size, taps in zip(x.shape[-2:], self.kernel.shape, strict=True):
            period = torch.full((), max(2 * (size - 1), 1), device=x.device)  # a tensor: ONNX needs it
            index = torch.arange(-(taps // 2), size + taps // 2, device=x.device) % period
            indices.append(torch.minimum(index, period - index))
        return indices


class MotionBlur(Blur):
    """Random known blurs, to train one network for any of them: each `measure` simulates another camera shake.

    The network then restores any known blur: ``model(y, Blur(kernel))[0]``.

    Args:
        shortest, longest: extent of the kernels, their larger side in pixels.
        noise: see `Blur`.
        sample_kernel: draws the kernels of `measure`, given a NumPy generator and (shortest, longest), such as
            `synthesis.motion_kernel`. Checkpoints do not hold it.
    """

    image_to_image = False  # it has no kernel of its own

    def __init__(
        self, shortest: float = 5, longest: float = 25, noise: float = 0.0, sample_kernel: Callable | None = None
    ):
        super().__init__(torch.empty(1, 1), noise)
        self.register_buffer("kernel", None, persistent=False)  # of the last `measure`
        self.shortest, self.longest, self.sample_kernel = shortest, longest, sample_kernel

    def measure(
        self, x: Tensor, shared: torch.Generator | None = None, own: list[torch.Generator] | None = None
    ) -> Tensor:
        """Images (B, C, H, W), blurred by one random kernel and cropped to their centre, (B, C, H - 2m, W - 2m), with m
        a multiple of 8: as in a photograph, light from beyond the borders blurs into the image. See `Degradation`.
        """
        if self.sample_kernel is None:
            raise UserError(
                "this MotionBlur draws no kernels: set its sample_kernel, dgunet.data.synthesis.motion_kernel"
            )
        rng = np.random.default_rng(torch.randint(2**62, (), generator=shared).item())
        self.kernel = torch.from_numpy(self.sample_kernel(rng, (self.shortest, self.longest))).to(x.device)
        m = math.ceil(self.longest / 2 / MULTIPLE) * MULTIPLE
        if min(x.shape[-2:]) < 2 * m + MULTIPLE:
            raise UserError(f"blurs of {self.longest:g} pixels need crops of at least {2 * m + MULTIPLE} pixels")
        return super().measure(x, shared, own)[..., m:-m, m:-m]

    def settings(self) -> dict:
        return {"shortest": self.shortest, "longest": self.longest, "noise": self.noise}

    def _borders(self, x: Tensor) -> list[Tensor]:
        if self.kernel is None:
            raise UserError(
                "this network needs to know the blur: call model(y, Blur(kernel))[0], or set model.degradation = "
                "Blur(kernel) first"
            )
        return super()._borders(x)


# The known degradations that checkpoints can hold, by their ``kind`` there.
KINDS = dict(block_sampling=BlockSampling, scalable_sampling=ScalableSampling, blur=Blur, motion_blur=MotionBlur)


def for_measurements(degradation: Degradation, y: Tensor) -> Degradation:
    """The operator that made a measurement: one of several that ``degradation`` stands for, or itself."""
    return degradation.for_measurements(y) if hasattr(degradation, "for_measurements") else degradation


def describe_degradation(degradation: Degradation | None) -> dict | None:
    """What `rebuild_degradation` needs besides the tensors; None for a learned one. A user's own cannot be rebuilt."""
    if degradation is None:
        return None
    kind = next((kind for kind, cls in KINDS.items() if type(degradation) is cls), None)
    return {"kind": "own"} if kind is None else {"kind": kind, **degradation.settings()}


def rebuild_degradation(description: dict, tensors: dict[str, Tensor]) -> Degradation:
    """A known degradation from its description and its tensors by name; any exception where these do not fit."""
    settings = {name: value for name, value in description.items() if name != "kind"}
    degradation = KINDS[description["kind"]](**settings, **tensors)
    if describe_degradation(degradation) != description:
        raise ValueError(f"unknown settings of a degradation: {settings}")
    return degradation


def degradation_from_config(cfg, train_set=None) -> Degradation | None:
    """The known degradation that a config's MODEL.DEGRADATION names; None where it is learned."""
    name, kernel = cfg.MODEL.DEGRADATION, cfg.MODEL.KERNEL
    if name not in ("", "blur"):
        raise UserError(f"MODEL.DEGRADATION must be blur, or empty for a learned one, got {name!r}")
    if bool(name) != bool(kernel):
        raise UserError("a known blur needs both MODEL.DEGRADATION blur and MODEL.KERNEL, a .npy file or motion")
    if not name:
        return None
    noise = cfg.MODEL.NOISE / 255
    if kernel == "motion":
        return MotionBlur(min(cfg.MODEL.KERNEL_EXTENT), max(cfg.MODEL.KERNEL_EXTENT), noise)
    try:
        return Blur(torch.from_numpy(read_array(Path(kernel))), noise)
    except ValueError as error:
        raise UserError(f"MODEL.KERNEL {kernel}: {error}") from error
