"""Introspection: each stage's gradient step and proximal mapping, and how well the degradation was learned.

record = trace(model, y)
for step in record.steps:
    print(step.k, step.rho, step.gradient_step.abs().mean(), step.proximal_step.abs().mean())
    print(measure_step(step, y, truth))
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dgunet.evaluation.metrics import psnr_batch
from dgunet.inference import temporarily_set
from dgunet.model.degradations import Degradation
from dgunet.model.network import DGUNet, Stage


@dataclass(frozen=True)
class Step:
    """Stage k of a forward pass: x_{k-1} to v_k to x_k, images (B, C, H, W)."""

    k: int  # from 1
    before: Tensor  # x_{k-1}
    v: Tensor  # x_{k-1} - rho_k A_adjoint(A(x_{k-1}) - y)
    x: Tensor  # prox_k(v_k)
    rho: float | None  # None for a network without gradient steps
    degradation: Degradation | None  # of this stage's gradient step: its own, or the network's known one

    @property
    def gradient_step(self) -> Tensor:
        """The change by the gradient step, ``v_k - x_{k-1}``."""
        return self.v - self.before

    @property
    def proximal_step(self) -> Tensor:
        """The change by the proximal mapping, ``x_k - v_k``."""
        return self.x - self.v


@dataclass(frozen=True)
class Trace:
    """A forward pass, stage by stage."""

    y: Tensor  # the network's input
    initial: Tensor  # x_0: y, or A_adjoint(y) of a known degradation
    steps: list[Step]

    @property
    def estimates(self) -> list[Tensor]:
        """x_0, x_1, ..., x_K."""
        return [self.initial, *(step.x for step in self.steps)]


def trace(model: DGUNet, y: Tensor, degradation: Degradation | None = None) -> Trace:
    """Run a network on the arguments of its ``forward`` and record what each stage computes.

    It is `DGUNet.forward` with hooks: the last estimate is ``model(y)[0]``, bit for bit. Compiled ones run uncompiled.
    """
    steps: list[Step] = []
    v: list[Tensor] = []
    thread = threading.get_ident()

    def note_v(mapping, arguments):
        if threading.get_ident() == thread:
            v.append(arguments[0])

    def note_stage(stage, arguments, result):
        before, *_, known = arguments
        rho = None if stage.rho is None else stage.rho.item()
        degradation = stage.degradation if known is None else known
        steps.append(Step(len(steps) + 1, before, v.pop(), result[0], rho, degradation))

    with after_each_stage(model, note_stage), contextlib.ExitStack() as hooks:
        for stage in dict.fromkeys(model.iter_stages()):
            hooks.callback(stage.proximal.register_forward_pre_hook(note_v).remove)
        model(y, degradation)
    return Trace(y, steps[0].before, steps)


@contextlib.contextmanager
def after_each_stage(model: DGUNet, call: Callable[[Stage, tuple, tuple], None]) -> Iterator[None]:
    """Inside, ``call(stage, arguments, result)`` is called after each stage, in forward passes of this thread.

    Compiled stages run uncompiled; what ``call`` returns is ignored.
    """
    thread = threading.get_ident()

    def hook(stage: Stage, arguments: tuple, result: tuple) -> None:
        if threading.get_ident() == thread:
            call(stage, arguments, result)  # not returned: PyTorch would replace the result by it

    stages = list(dict.fromkeys(model.iter_stages()))
    # A compiled stage ignores hooks.
    with temporarily_set(stages, "_compiled_call_impl", None), contextlib.ExitStack() as hooks:
        for stage in stages:
            hooks.callback(stage.register_forward_hook(hook).remove)
        yield


@dataclass
class StepMeasures:
    """Measures of a stage; differences are root mean squares, in the unit of the images. None: does not apply."""

    k: int
    rho: float | None
    psnr_v: float  # dB, of v_k
    psnr_x: float  # dB, of x_k
    gradient_step: float
    proximal_step: float
    data_term_before: float | None = None  # ||A x_{k-1} - y||
    data_term_v: float | None = None  # ||A v_k - y||
    data_term_x: float | None = None  # ||A x_k - y||
    data_term_truth: float | None = None  # ||A truth - y||
    adjoint_mismatch: float | None = None  # see the functions of these names
    descent: float | None = None
    # Of degradations from images to images ("tinted": without the mean of each channel):
    data_term_truth_tinted: float | None = None
    truth_to_y: float | None = None  # ||truth - y||
    truth_to_y_tinted: float | None = None
    towards_y: float | None = None  # correlation of v_k - x_{k-1} with y - x_{k-1}; None where x_{k-1} is y


def measure_step(step: Step, y: Tensor, truth: Tensor) -> StepMeasures:
    """Measure what a stage of `trace` changes, and how well its degradation explains y, given the true image."""
    psnr_v, psnr_x = (psnr_batch(image, truth).mean().item() for image in (step.v, step.x))
    found = StepMeasures(step.k, step.rho, psnr_v, psnr_x, rms(step.gradient_step), rms(step.proximal_step))
    if (A := step.degradation) is None:
        return found
    found.data_term_before, found.data_term_v, found.data_term_x, found.data_term_truth = (
        data_term(A, x, y) for x in (step.before, step.v, step.x, truth)
    )
    found.adjoint_mismatch, found.descent = adjoint_mismatch(A, step.before, y), descent(A, step.before, y)
    if y.shape == truth.shape:
        found.data_term_truth_tinted = rms(_without_means(A.A(truth) - y))
        found.truth_to_y, found.truth_to_y_tinted = rms(truth - y), rms(_without_means(truth - y))
        change, way = (_without_means(end - step.before) for end in (step.v, y))
        found.towards_y = _cosine(change, way) if way.any() else None
    return found


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.square().mean().sqrt().item()


def _without_means(x: Tensor) -> Tensor:
    return x - x.mean(dim=(-2, -1), keepdim=True)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors; NaN where one of them is zero."""
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def data_term(degradation: Degradation, x: Tensor, y: Tensor) -> float:
    """``||A x - y||``, as the root mean square over the measurements."""
    return rms(degradation.A(x) - y)


def descent(degradation: Degradation, x: Tensor, y: Tensor) -> float:
    """How close a stage's step is to gradient descent on its own data term: 1 the same direction, below 0 uphill.

    The cosine of the angle between ``A_adjoint(A(x) - y)`` and the gradient of ``||A(x) - y||^2 / 2``.
    """
    residual, pull_back = torch.func.vjp(lambda x: degradation.A(x) - y, x)
    (gradient,) = pull_back(residual)
    return _cosine(degradation.A_adjoint(residual), gradient)


def adjoint_mismatch(degradation: Degradation, x: Tensor, y: Tensor, probes: int = 4) -> float:
    """How far ``A_adjoint`` is from the adjoint of ``A``: 0 for the adjoint, 1 if it might as well be zero.

    The root mean square of ``<A d, e> - <d, A_adjoint e>`` over random d and e, relative to that of ``<A d, e>``.
    Learned operators are not linear: A stands for its derivative at ``x``, A_adjoint for its derivative at the
    residual ``A(x) - y``. Constant offsets do not count here, but in `descent`.

    ``probes`` is the number of random e; the mean over d is exact. PyTorch has to be able to differentiate both.
    """
    residual, pull_back = torch.func.vjp(degradation.A, x)
    generator = torch.Generator().manual_seed(0)
    wrong = right = 0.0
    for _ in range(probes):
        e = torch.randn(residual.shape, generator=generator).to(residual)
        (adjoint,) = pull_back(e)
        _, claimed = torch.func.jvp(degradation.A_adjoint, (residual - y,), (e,))
        wrong += (adjoint - claimed).square().sum().item()
        right += adjoint.square().sum().item()
    return (wrong / right) ** 0.5


def impulse_response(operator: Callable[[Tensor], Tensor], at: Tensor, row: int, column: int) -> Tensor:
    """Impulse response to one pixel, in all channels: the mean over the output's channels, (H, W).

    The operator, such as ``degradation.A``, is linearised at an image (1, C, H, W): learned ones are not linear.
    """
    impulse = torch.zeros_like(at)
    impulse[0, :, row, column] = 1
    _, response = torch.func.jvp(operator, (at,), (impulse,))
    return response[0].mean(dim=0)
