"""DGUNet: proximal gradient descent, unrolled into K stages.

Deep Generalized Unfolding Networks for Image Restoration, C. Mou, Q. Wang, J. Zhang, CVPR 2022.

Restoration of ``x`` from ``y = A x + n`` is ``min_x 1/2 ||A x - y||^2 + lambda J(x)``; stage k computes

    v_k = x_{k-1} - rho_k * A_adjoint(A(x_{k-1}) - y)  gradient descent  (FGDM: Stage.gradient_step; A: degradations.py)
    x_k = prox_k(v_k; features of stage k-1)           proximal mapping  (IPMM: proximal.py; pathways: fusion.py)

from x_0 = y when the degradation is unknown and x_0 = A_adjoint(y) when it is known. A_adjoint is the paper's A^T; the
learned prox_k stands for lambda and J. Stages that share their weights share rho, too.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dgunet  # for dgunet.checkpoints, which imports this module and is imported when first used
from dgunet.model.degradations import (
    Degradation,
    LearnedDegradation,
    check_operator,
    for_measurements,
    no_autocast_for_user_operator,
)
from dgunet.model.proximal import MULTIPLE, FinalMapping, ProximalMapping, StageFeatures


class Stage(nn.Module):
    """One proximal gradient step.

    Args:
        proximal: maps v and the previous stage's features to x and this stage's features (of `FinalStage`: to a
            residual image).
        degradation: the stage's own learned degradation, with A and A_adjoint; None where the network's is known.
        rho: initial value of the learned step size; None for no gradient step: v is x.
    """

    def __init__(self, proximal: nn.Module, degradation: nn.Module | None, rho: float | None):
        super().__init__()
        self.rho = nn.Parameter(torch.full((1,), float(rho))) if rho is not None else None
        self.degradation = degradation
        self.proximal = proximal

    def gradient_step(self, x: Tensor, y: Tensor, known: Degradation | None) -> Tensor:
        """v_k (B, C, H, W) of x_{k-1}; x_{k-1} itself without gradient steps."""
        if self.rho is None:
            return x
        degradation = self.degradation if known is None else known
        # FGDM: v_k = x_{k-1} - rho_k * A_adjoint(A(x_{k-1}) - y)
        with no_autocast_for_user_operator(known, x):
            return x - self.rho * degradation.A_adjoint(degradation.A(x) - y)

    def forward(
        self, x: Tensor, y: Tensor, previous: StageFeatures | None, known: Degradation | None
    ) -> tuple[Tensor, StageFeatures | None]:
        """Computes x_k and the features of stage k from x_{k-1} (B, C, H, W) and ``previous``, those of stage k-1.

        ``previous`` are `StageFeatures`, None for k = 1. ``y`` is (B, C, H, W), or the measurement of the ``known``
        degradation, which is None where it is learned.
        """
        v = self.gradient_step(x, y, known)
        return self.proximal(v, previous)  # IPMM: x_k = prox_k(v_k; features of stage k-1)


class FinalStage(Stage):
    """Stage K: its mapping has no U-Net and predicts a residual, to y (learned degradation) or to v_K (known).

    In the paper's text it is like the others; this is what the released code computes (docs/differences.md).
    """

    def forward(
        self, x: Tensor, y: Tensor, previous: StageFeatures | None, known: Degradation | None
    ) -> tuple[Tensor, None]:
        v = self.gradient_step(x, y, known)
        anchor = y if known is None else v
        return anchor + self.proximal(v, previous), None


class CustomStage(Stage):
    """Any stage, K too, with a mapping from ``DGUNet(proximal=...)``, whose output is checked.

    That is x_k itself: nothing is added to it, unlike in `FinalStage`.
    """

    def forward(self, x: Tensor, y: Tensor, previous, known: Degradation | None) -> tuple:
        result = super().forward(x, y, previous, known)
        if not (isinstance(result, tuple) and len(result) == 2 and getattr(result[0], "shape", None) == x.shape):
            raise ValueError(
                f"the proximal mapping {type(self.proximal).__name__} must return (x, features), x of v's shape "
                f"{tuple(x.shape)}; got {_describe_result(result)}"
            )
        return result


def _describe_result(result) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(map(_describe_result, result))})"
    return f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__


class DGUNet(nn.Module):
    """Deep generalized unfolding network. The defaults are the paper's DGUNet for deblurring and denoising.

    Args:
        channels: image channels, in [1, 1024].
        width, growth: the U-Net of a stage has the widths w, w+g, w+2g, w+3g; both even, in [4, 1024] and [0, 1024].
        stages: number of stages K, in [1, 100].
        shared: the middle stages 2..K-1 share one set of weights (DGUNet) or have their own (DGUNet+).
        pathways: the inter-stage information pathways, ISFF and feature fusion; False leaves both out.
        fusion: feature fusion in the stages 2..K-1, ``"subspace"`` (images), ``"concat"`` (compressive sensing), or
            ``"none"`` (then the last stage has none either); see `dgunet.model.fusion`.
        isff: inter-stage feature fusion in the encoders, ``"adaptive"`` (images), ``"additive"`` (compressive
            sensing), or ``"none"``; see `ISFF`.
        attention: a sigmoid map of the estimate weights the features for the next stage's fusion (compressive
            sensing), see `ProximalMapping`. Channel attention is always there.
        final_fusion, final_growth: feature fusion in the last stage, ``"concat"`` (to width + final_growth channels,
            in [0, 1024]) or ``"subspace"``.
        gradient: False leaves out the gradient steps, ``v_k = x_{k-1}``.
        degradation: None to learn it (each stage its own; shared middle stages share it), or a known one: of
            `dgunet.degradations`, one of deepinv's linear operators, or any object with ``A(x)`` and ``A_adjoint(y)``,
            scaled so that A's largest singular value is about 1.
        rho: initial value of the learned step sizes, one of each stored stage; 1 projects onto the data where A has
            orthonormal rows.
        checkpointing: recompute each stage in the backward pass instead of keeping its activations.
        proximal: makes a proximal mapping of your own for each stage k in 1..K that is stored (a shared middle stage is
            k = 2). Called as ``proximal(channels=, k=, stages=, has_previous=)`` it returns an nn.Module that maps
            ``v, previous`` to ``(x, features)``, v and x (B, C, H, W); x is the whole estimate, in stage K too.
            ``features`` may be anything: they are the next stage's ``previous``, which is None where
            ``has_previous`` is False; those of stage K are not used.
            ``width``, ``growth``, ``pathways``, ``fusion``, ``isff``, ``attention``, ``final_fusion`` and
            ``final_growth`` describe the paper's mapping and have no effect then (`restore` estimates memory from
            ``width``).
        learned_degradation: likewise makes a learned degradation of your own: called as
            ``learned_degradation(channels=, k=, stages=)``, it returns an nn.Module with ``A(x)`` and ``A_adjoint(y)``.

    Raises:
        ValueError: arguments out of their range, or that do not go together; no module from ``proximal``, or none with
            the two methods from ``learned_degradation``.

    >>> model = DGUNet(width=8, growth=4, stages=3)
    >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 32, 48))]  # x_3, x_2, x_1
    [(1, 3, 32, 48), (1, 3, 32, 48), (1, 3, 32, 48)]
    """

    _compiled = False

    def __init__(
        self,
        channels: int = 3,
        width: int = 80,
        growth: int = 48,
        stages: int = 7,
        shared: bool = True,
        pathways: bool = True,
        fusion: str = "subspace",
        isff: str = "adaptive",
        attention: bool = False,
        final_fusion: str = "concat",
        final_growth: int = 32,
        gradient: bool = True,
        degradation: Degradation | None = None,
        rho: float = 0.5,
        checkpointing: bool = False,
        proximal: Callable[..., nn.Module] | None = None,
        learned_degradation: Callable[..., nn.Module] | None = None,
    ):
        values = locals()  # the arguments by name: this must be the first statement
        super().__init__()
        if degradation is not None:
            check_operator(degradation, "degradation")
        self.factories = {name: values[name] for name in FACTORIES if values[name] is not None}
        if learned_degradation is not None and not (degradation is None and gradient):
            raise ValueError("learned_degradation is for gradient steps whose degradation is not known; leave it out")
        # load_model rebuilds the network from name and arguments, and from `describe_degradation` of a known one.
        self.name = None
        self.degradation_name: str | None = None  # the user's ``module:name`` that made the known degradation
        self.local: dict[str, int] = {}  # windows for statistics at test time, see `inference.restore`
        self.arguments = {name: values[name] for name in ARGUMENTS}
        _check_arguments(self.arguments)
        if not (type(rho) in (int, float) and math.isfinite(rho)):
            raise ValueError(f"rho must be a number, got {rho!r:.60}")
        self.channels, self.stages, self.checkpointing = channels, stages, checkpointing
        self.degradation = degradation
        if not pathways:
            fusion = isff = "none"
        rho = rho if gradient else None
        final_fusion = final_fusion if fusion != "none" and stages > 1 else "none"

        def stage(k: int) -> Stage:
            if proximal is not None:
                place = dict(channels=channels, k=k, stages=stages, has_previous=k > 1)
                kind, mapping = CustomStage, _make("proximal", proximal, **place)
            elif k < stages:
                kind, mapping = Stage, ProximalMapping(channels, width, growth, fusion, isff, attention, k > 1)
            else:
                kind, mapping = FinalStage, FinalMapping(channels, width, final_fusion, width + final_growth)
            return kind(mapping, learned(k) if degradation is None and gradient else None, rho)

        def learned(k: int) -> nn.Module:
            if learned_degradation is None:
                return LearnedDegradation(channels)
            made = _make("learned_degradation", learned_degradation, channels=channels, k=k, stages=stages)
            check_operator(made, "learned degradation")
            return made

        middle_stages = max(stages - 2, 0)
        stored = min(middle_stages, 1) if shared else middle_stages
        self.first = stage(1) if stages > 1 else None
        self.middle = nn.ModuleList(stage(k) for k in range(2, 2 + stored))
        self.last = stage(stages)

    @classmethod
    def default_arguments(cls) -> dict:
        """The constructor's defaults for ``arguments``."""
        parameters = inspect.signature(cls).parameters
        return {name: parameters[name].default for name in ARGUMENTS}

    @classmethod
    def from_pretrained(cls, name: str | Path, **options) -> "DGUNet":
        """See `dgunet.checkpoints.hub.from_pretrained`."""
        return dgunet.checkpoints.hub.from_pretrained(name, **options)

    def save_pretrained(self, folder: str | Path, about: str = "", **options):
        """See `dgunet.checkpoints.hub.save_pretrained`."""
        return dgunet.checkpoints.hub.save_pretrained(self, folder, about, **options)

    def push_to_hub(self, repo_id: str, about: str = "", **options) -> str:
        """See `dgunet.checkpoints.hub.push_to_hub`."""
        return dgunet.checkpoints.hub.push_to_hub(self, repo_id, about, **options)

    def iter_stages(self):
        """Yields the K stages in order; a shared middle stage is stored once and applied K-2 times."""
        if self.first is not None:
            yield self.first
        for k in range(self.stages - 2):
            yield self.middle[k % len(self.middle)]
        yield self.last

    def compile(self, **options):
        """`torch.compile` the stages one by one, with its ``options``.

        Shared middle stages make 3 graphs, in a third of the time that one graph of all stages takes.
        """
        for stage in dict.fromkeys(self.iter_stages()):
            stage.compile(**options)
        self._compiled = True  # CUDA graphs need to know where a pass begins: `forward` marks it

    def forward(self, y: Tensor, degradation: Degradation | None = None) -> list[Tensor]:
        """Returns the estimates x_K, ..., x_1, (B, C, H, W) each, the restored image first; not clamped.

        Args:
            y: degraded image (B, C, H, W), range [0, 1], sides multiples of 8; of a known degradation the
                measurement that its ``A_adjoint`` takes.
            degradation: a known one instead of the network's own known one.

        Raises:
            ValueError: other channels, sides that are no multiples of 8 (of y, or of A_adjoint(y)), or a known
                degradation for a network that learns its own.
        """
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        if degradation is not None and self.degradation is None:
            raise ValueError("this DGUNet has a learned degradation and takes no known one; call it without")
        known = self.degradation if degradation is None else degradation
        if known is not None:
            known = for_measurements(known, y)  # of a network for several ratios: the operator with y's rows
        with no_autocast_for_user_operator(known, y):
            x = y if known is None else known.A_adjoint(y)  # x_0
        self._check(x)
        features = None
        estimates = []
        for stage in self.iter_stages():  # x_{k-1} to x_k
            if self.checkpointing and torch.is_grad_enabled():
                x, features = checkpoint(stage, x, y, features, known, use_reentrant=False)
            else:
                x, features = stage(x, y, features, known)
            estimates.append(x)
        return estimates[::-1]

    def _check(self, x: Tensor):
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"this DGUNet takes (B, {self.channels}, H, W) images, got shape {tuple(x.shape)}")
        height, width = x.shape[2:]
        if height % MULTIPLE or width % MULTIPLE:
            raise ValueError(
                f"DGUNet needs height and width that are multiples of {MULTIPLE}, got {height}x{width}; "
                "dgunet.restore(model, image) pads and crops for you"
            )


# The arguments that rebuild a network, and their allowed values: a list, or the smallest and the largest. The largest
# are beyond any use, and bound the time to build a network from a damaged file.
ARGUMENTS = dict(
    channels=(1, 1024), width=(4, 1024), growth=(0, 1024), stages=(1, 100), shared=[True, False],
    pathways=[True, False], fusion=["subspace", "concat", "none"], isff=["adaptive", "additive", "none"],
    attention=[True, False], final_fusion=["subspace", "concat"], final_growth=(0, 1024), gradient=[True, False],
)  # fmt: skip

FACTORIES = ("proximal", "learned_degradation")  # arguments that make parts of the user's own


def _make(name: str, factory: Callable[..., nn.Module], **given) -> nn.Module:
    """What a factory of the user's own, the argument ``name``, makes for a stage."""
    if not callable(factory) or isinstance(factory, nn.Module):
        got = repr(factory) if isinstance(factory, str) else f"a {type(factory).__name__}"
        raise ValueError(f"{name} is a function or class that makes a module for each stage, got {got:.100}")
    made = factory(**given)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} must return an nn.Module for each stage, got a {type(made).__name__}")
    return made


def _check_arguments(arguments: dict):
    for name, value in arguments.items():
        allowed, got = ARGUMENTS[name], f"got {value!r:.60}"
        if isinstance(allowed, tuple):
            least, most = allowed
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be an integer from {least} to {most}, {got}")
            if name in ("width", "growth") and value % 2:
                raise ValueError(f"{name} must be even, {got}")
        elif type(value) is not type(allowed[0]) or value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, {got}")
