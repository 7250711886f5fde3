"""What happens inside: each stage's gradient step and proximal mapping, and what the degradation has become.

record = trace(model, y)
for step in record.steps:
    print(step.k, step.rho, step.gradient_step.abs().mean(), step.proximal_step.abs().mean())
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dgunet.degradations import Degradation
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


def trace(model: DGUNet, y: Tensor) -> Trace:
    """Run a network and keep what each stage computes.

    It is `DGUNet.forward` that runs, watched by hooks: the last estimate is what ``model(y)[0]`` gives, to the last
    bit, and a network that is not traced does nothing for it. The stages of a compiled one run uncompiled.

    Args:
        model: any DGUNet.
        y: what its ``forward`` takes.

    Raises:
        ValueError: as ``forward``.
    """
    steps: list[Step] = []
    v: list[Tensor] = []

    def note_v(mapping, arguments):
        v.append(arguments[0])

    def note_stage(stage, arguments, result):
        before, *_, known = arguments
        rho = None if stage.rho is None else stage.rho.item()
        degradation = stage.degradation if known is None else known
        steps.append(Step(len(steps) + 1, before, v.pop(), result[0], rho, degradation))

    with after_each_stage(model, note_stage), contextlib.ExitStack() as hooks:
        for stage in dict.fromkeys(model.unrolled()):
            hooks.callback(stage.proximal.register_forward_pre_hook(note_v).remove)
        model(y)
    return Trace(y, steps[0].before, steps)


@contextlib.contextmanager
def after_each_stage(model: DGUNet, call: Callable[[Stage, tuple, tuple], None]) -> Iterator[None]:
    """Inside, ``call`` is given each stage that has run, its arguments and its results; of compiled ones as well."""
    stages = list(dict.fromkeys(model.unrolled()))
    compiled = [stage._compiled_call_impl for stage in stages]
    with contextlib.ExitStack() as hooks:
        for stage in stages:
            stage._compiled_call_impl = None  # it would not look at the hooks
            hooks.callback(stage.register_forward_hook(call).remove)
        try:
            yield
        finally:
            for stage, own in zip(stages, compiled, strict=True):
                stage._compiled_call_impl = own


def data_term(degradation: Degradation, x: Tensor, y: Tensor) -> float:
    """``||A x - y||``, as the root mean square over the measurements."""
    return (degradation.A(x) - y).square().mean().sqrt().item()


def adjoint_mismatch(degradation: Degradation, x: Tensor, y: Tensor, probes: int = 4) -> float:
    """How far ``A_adjoint`` is from the adjoint of ``A``: 0 for the adjoint, 1 where it could as well be zero.

    The root mean square of ``<A d, e> - <d, A_adjoint e>`` over random d and e, relative to that of ``<A d, e>``.
    Learned operators are not linear: A and A_adjoint stand for their derivatives, A's at ``x`` and A_adjoint's at what
    the gradient step gives it, ``A(x) - y``.

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
