"""The degradation A of ``y = A x + n``: learned where it is unknown, or one of the known ones.

All have ``A`` and ``A_adjoint``, the convention of the deepinv library.
"""

import contextlib
import inspect
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.model.layers import conv3x3
from dgunet.model.proximal import MULTIPLE
from dgunet.model.sampling import BlockSampling, FirstRows, ScalableSampling
from dgunet.runtime.errors import UserError
from dgunet.runtime.imports import import_object


class Degradation(Protocol):
    """A linear map from images (B, C, H, W) to measurements (B, ...) of any shape, and its adjoint.

    Operators of deepinv are such maps, and so is any object with the two methods. These and ``measure`` run without
    autocast. A known degradation may have more:

    ``image_to_image = True``: measurements are images of x's size, which `restore` may pad and cut into tiles.
    ``measure(x)``: what training and tests measure instead of ``A(x)``, for example ``A(x)`` with noise. An operator
    that can be called, as deepinv's can, needs no such method: ``operator(x)`` measures. PyTorch's own random numbers
    are seeded before each image, so that a measurement depends neither on the number of processes nor on that of
    accumulation steps, and is the same after a resume.
    ``measure(x, shared, own)``: the same, of a whole batch at once; every ``measure`` with more than one parameter is
    called like this, also where the others are optional. Random numbers for the batch come from the generator
    ``shared`` (on the CPU), those for each image from its generator in the list ``own`` (on x's device). Its output may
    be smaller than x, and is of x's centre then.
    ``for_measurements(y)``: of several operators the one that made y; the network computes with it.
    ``validation_operators``: the operators that validation measures each image with, in turn, instead of ``measure``.
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

    image_to_image = False  # `restore` does not know the kernel, and measurements are cropped

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


def check_operator(degradation, what: str):
    """Raises ValueError unless an object, ``what`` in the message, has the methods ``A`` and ``A_adjoint``."""
    missing = [name for name in ("A", "A_adjoint") if not callable(getattr(degradation, name, None))]
    if missing:
        raise ValueError(f"the {what} {type(degradation).__name__} has no method {' and no '.join(missing)}")


def for_measurements(degradation: Degradation, y: Tensor) -> Degradation:
    """The operator that made a measurement: one of several that ``degradation`` stands for, or itself."""
    return degradation.for_measurements(y) if hasattr(degradation, "for_measurements") else degradation


def is_ours(degradation: Degradation) -> bool:
    return isinstance(degradation, (*KINDS.values(), FirstRows))


def no_autocast_for_user_operator(degradation: Degradation | None, x: Tensor) -> contextlib.AbstractContextManager:
    """Disables autocast for an operator of the user's own on x or y; ours do so themselves, learned ones need not."""
    ours = degradation is None or is_ours(degradation)
    return contextlib.nullcontext() if ours else torch.autocast(x.device.type, enabled=False)


def may_measure_randomly(degradation: Degradation | None) -> bool:
    """Whether measuring may draw random numbers: where there is a ``measure``, or the operator can be called."""
    if isinstance(degradation, nn.Module) and type(degradation).forward is nn.Module.forward:
        return hasattr(degradation, "measure")
    return hasattr(degradation, "measure") or callable(degradation)


def measure(
    degradation: Degradation, x: Tensor, shared: torch.Generator | None = None, own: list[torch.Generator] | None = None
) -> Tensor:
    """Measurements y (B, ...) of images x (B, C, H, W), with the operator's noise, if it has any; see `Degradation`."""
    with no_autocast_for_user_operator(degradation, x):
        if not may_measure_randomly(degradation):
            return degradation.A(x)
        noisy = getattr(degradation, "measure", degradation)
        if hasattr(degradation, "measure") and len(inspect.signature(noisy).parameters) > 1:
            return noisy(x, shared, own)
        if own is None:
            return noisy(x)
        rng = getattr(getattr(degradation, "noise_model", None), "rng", None)  # a generator of deepinv's noise
        measured = []
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            for image, generator in zip(x.split(1), own, strict=True):
                torch.manual_seed(generator.initial_seed())
                if rng is not None:
                    rng.manual_seed(generator.initial_seed())
                measured.append(noisy(image))
        return torch.cat(measured)


def try_operator(degradation: Degradation, x: Tensor, generators: tuple = (), name: str = "") -> tuple[Tensor, Tensor]:
    """Measurements y of images x (B, C, H, W), and ``x_0 = A_adjoint(y)``, without gradients.

    Args:
        degradation: a known one.
        generators: see `Degradation`.
        name: of the operator in messages.

    Raises:
        UserError: it cannot measure such images, or x_0 has another shape than they have.
    """
    name = name or type(degradation).__name__
    with torch.no_grad():
        with _one_line_errors(f"{name} cannot measure images {tuple(x.shape)}"):
            y = measure(degradation, x, *generators)
        initial = apply_adjoint(for_measurements(degradation, y), y, name)
    if initial.dim() != 4 or initial.shape[:2] != x.shape[:2]:
        raise UserError(
            f"{name} makes of images {tuple(x.shape)} measurements {tuple(y.shape)}, and A_adjoint of these "
            f"{tuple(initial.shape)}; it must be {tuple(x.shape)}"
        )
    return y, initial


def apply_adjoint(degradation: Degradation, y: Tensor, name: str = "") -> Tensor:
    """``x_0 = A_adjoint(y)``; a UserError where the operator, ``name`` in messages, fails for such measurements."""
    failing = f"A_adjoint of {name or type(degradation).__name__} fails for measurements {tuple(y.shape)}"
    with _one_line_errors(failing), no_autocast_for_user_operator(degradation, y):
        return degradation.A_adjoint(y)


@contextlib.contextmanager
def _one_line_errors(what: str):
    """Around an operator of the user's own: its error in one line, which says where in the code it comes from."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{what}: {text} ({Path(place.filename).name}, line {place.lineno})") from error


def keeps_config_values(degradation: Degradation, weights: dict[str, Tensor]) -> bool:
    """Whether training that starts from weights keeps the config's operator: where it has nothing to learn."""
    if is_ours(degradation):
        return degradation.keep_on_load(weights)
    return not (isinstance(degradation, nn.Module) and any(p.requires_grad for p in degradation.parameters()))


class PaddedDegradation:
    """A known degradation for images of any size: A_adjoint pads with zeros to multiples of 8, A measures without them.

    Call A_adjoint first: it finds the size.
    """

    def __init__(self, degradation: Degradation):
        self.degradation = degradation
        self.size = ()  # height and width of the images, known after A_adjoint

    def A(self, x: Tensor) -> Tensor:
        return self.degradation.A(self.crop(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        x = self.degradation.A_adjoint(y)
        self.size = height, width = x.shape[-2:]
        return F.pad(x, (0, -width % MULTIPLE, 0, -height % MULTIPLE))

    def crop(self, x: Tensor) -> Tensor:
        return x[..., : self.size[0], : self.size[1]]


def describe_degradation(degradation: Degradation | None) -> dict | None:
    """What `rebuild_degradation` needs besides the tensors; None for a learned one. A user's own cannot be rebuilt."""
    if degradation is None:
        return None
    kind = next((kind for kind, cls in KINDS.items() if type(degradation) is cls), None)
    return {"kind": "own"} if kind is None else {"kind": kind, **degradation.settings()}


def rebuild_degradation(description: dict, tensors: dict[str, Tensor]) -> Degradation:
    """A known degradation from its description and its tensors by name.

    Raises:
        Exception: of any kind, where these do not fit: they come from a file.
    """
    settings = {name: value for name, value in description.items() if name != "kind"}
    degradation = KINDS[description["kind"]](**settings, **tensors)
    if describe_degradation(degradation) != description:
        raise ValueError(f"unknown settings of a degradation: {settings}")
    return degradation


def make_operator(name: str, key: str, cfg=None) -> Degradation:
    """The known degradation that a user's function or class makes, ``make()`` or ``make(cfg)``.

    Args:
        name: ``module:name`` of it.
        key: where the user wrote that, for messages.
        cfg: the training's config; None where it is not known.

    Raises:
        UserError: there is no such function or class, it needs other arguments, or what it makes lacks one of
            the two methods of a `Degradation`.
    """
    make = import_object(name, key)
    needed = []
    if callable(make):
        needed = [p for p in inspect.signature(make).parameters.values() if p.default is p.empty]
        needed = [p.name for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not callable(make) or len(needed) > 1:
        raise UserError(f"{key} {name} must be a function or class to call without arguments or with the config")
    if needed and cfg is None:
        raise UserError(f"{key} {name} takes the training's config, which the checkpoint does not have; give a make()")
    degradation = make(cfg) if needed else make()
    try:
        check_operator(degradation, "operator")
    except ValueError as error:
        raise UserError(f"{key} {name}: {error}") from error
    return degradation
