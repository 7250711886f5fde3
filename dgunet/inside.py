"""What happens inside: each stage's gradient step and proximal mapping, and what the degradation has become.

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

from dgunet.degradations import Degradation
from dgunet.inference import temporarily_set
from dgunet.metrics import psnr_batch
from dgunet.model import DGUNet, Stage


@dataclass(frozen=True)
class Step:
    """Stage k of a forward pass: x_{k-1} to v_k to x_k, images (B, C, H, W)."""

    k: int  # from 1
    before: Tensor  # x_{k-1}
    v: Tensor  # x_{k-1} - rho_k A_adjoint(A(x_{k-1}) - y)
    x: Tensor  # prox_k(v_k)
    rho: float | None  # None for a network without gradient steps
    degradation: Degradation | None  # the one that this stage computes with: its own, or the network's known one

    @property
    def gradient_step(self) -> Tensor:
        """What the gradient step changes, ``v_k - x_{k-1}``."""
        return self.v - self.before

    @property
    def proximal_step(self) -> Tensor:
        """What the proximal mapping changes, ``x_k - v_k``."""
        return self.x - self.v


@dataclass(frozen=True)
class Trace:
    """A forward pass, stage by stage."""

    y: Tensor  # what the network was given
    initial: Tensor  # x_0: y, or A_adjoint(y) of a known degradation
    steps: list[Step]

    @property
    def estimates(self) -> list[Tensor]:
        """x_0, x_1, ..., x_K."""
        return [self.initial, *(step.x for step in self.steps)]


def trace(model: DGUNet, y: Tensor, degradation: Degradation | None = None) -> Trace:
    """Run a network and keep what each stage computes.

    It is `DGUNet.forward` that runs, watched by hooks: the last estimate is what ``model(y)[0]`` gives, to the last
    bit, and a network that is not traced does nothing for it. The stages of a compiled one run uncompiled.

    Args:
        model: any DGUNet.
        y, degradation: what its ``forward`` takes.

    Raises:
        ValueError: as ``forward``.
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
    """Inside, ``call`` is given each stage that has run, its arguments and its results; of compiled ones as well.

    It watches: what ``call`` returns changes nothing. It watches the passes of this thread alone.
    """
    thread = threading.get_ident()

    def watch(stage: Stage, arguments: tuple, result: tuple) -> None:
        if threading.get_ident() == thread:
            call(stage, arguments, result)  # PyTorch takes what a hook returns, unless it is None, for the result

    stages = list(dict.fromkeys(model.iter_stages()))
    # A compiled stage would not look at the hooks.
    with temporarily_set(stages, "_compiled_call_impl", None), contextlib.ExitStack() as hooks:
        for stage in stages:
            hooks.callback(stage.register_forward_hook(watch).remove)
        yield


@dataclass(frozen=True)
class StepMeasures:
    """A stage in numbers; differences are root mean squares, in the unit of the images. None where there is none."""

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
    adjoint_mismatch: float | None = None  # see there
    descent: float | None = None  # see `descent`
    # Of degradations from images to images:
    data_term_truth_tinted: float | None = None  # ||A truth - y||, but for a constant in each channel
    truth_to_y: float | None = None  # ||truth - y||
    truth_to_y_tinted: float | None = None
    towards_y: float | None = None  # correlation of v_k - x_{k-1} with y - x_{k-1}; none where x_{k-1} is y


def measure_step(step: Step, y: Tensor, truth: Tensor) -> StepMeasures:
    """What a stage does, and how well its degradation explains y.

    Args:
        step: of `trace`.
        y: what the network was given.
        truth: the true image (B, C, H, W), in [0, 1].
    """
    found = {
        "k": step.k,
        "rho": step.rho,
        "psnr_v": psnr_batch(step.v, truth).mean().item(),
        "psnr_x": psnr_batch(step.x, truth).mean().item(),
        "gradient_step": rms(step.gradient_step),
        "proximal_step": rms(step.proximal_step),
    }
    if (A := step.degradation) is None:
        return StepMeasures(**found)
    found |= {
        "data_term_before": data_term(A, step.before, y),
        "data_term_v": data_term(A, step.v, y),
        "data_term_x": data_term(A, step.x, y),
        "data_term_truth": data_term(A, truth, y),
        "adjoint_mismatch": adjoint_mismatch(A, step.before, y),
        "descent": descent(A, step.before, y),
    }
    if y.shape == truth.shape:
        change, way = (_without_means(end - step.before) for end in (step.v, y))
        found |= {
            "data_term_truth_tinted": rms(_without_means(A.A(truth) - y)),
            "truth_to_y": rms(truth - y),
            "truth_to_y_tinted": rms(_without_means(truth - y)),
            "towards_y": _cosine(change, way) if way.any() else None,
        }
    return StepMeasures(**found)


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.square().mean().sqrt().item()


def _without_means(x: Tensor) -> Tensor:
    return x - x.mean(dim=(-2, -1), keepdim=True)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two tensors; nan where one of them is zero."""
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def data_term(degradation: Degradation, x: Tensor, y: Tensor) -> float:
    """``||A x - y||``, as the root mean square over the measurements."""
    return rms(degradation.A(x) - y)


def descent(degradation: Degradation, x: Tensor, y: Tensor) -> float:
    """How nearly a stage's step is gradient descent on its own data term: 1 exactly, 0 across it, below 0 uphill.

    The cosine of the angle between ``A_adjoint(A(x) - y)`` and the gradient of ``||A(x) - y||^2 / 2``, in which A's
    derivative at x has its true adjoint.
    """
    residual, pull_back = torch.func.vjp(lambda x: degradation.A(x) - y, x)
    (gradient,) = pull_back(residual)
    return _cosine(degradation.A_adjoint(residual), gradient)


def adjoint_mismatch(degradation: Degradation, x: Tensor, y: Tensor, probes: int = 4) -> float:
    """How far ``A_adjoint`` is from the adjoint of ``A``: 0 for the adjoint, 1 where it could as well be zero.

    The root mean square of ``<A d, e> - <d, A_adjoint e>`` over random d and e, relative to that of ``<A d, e>``.
    Learned operators are not linear: A and A_adjoint stand for their derivatives, A's at ``x`` and A_adjoint's at what
    the gradient step gives it, ``A(x) - y``. The constants that they add are left out; `descent` has them.

    Args:
        degradation: any with ``A`` and ``A_adjoint`` that PyTorch can differentiate.
        x: image (B, C, H, W).
        y: the measurement.
        probes: random e; their d are averaged over exactly.
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
    """How an operator's output changes with one pixel of its input, all channels of it alike: their mean, (H, W).

    Args:
        operator: a function of images (1, C, H, W), such as ``degradation.A``.
        at: the image around which; learned operators are not linear.
        row, column: of the pixel.
    """
    impulse = torch.zeros_like(at)
    impulse[0, :, row, column] = 1
    _, response = torch.func.jvp(operator, (at,), (impulse,))
    return response[0].mean(dim=0)
