"""Training losses, as in the original's code. All take two (B, C, H, W) images in [0, 1] and return a scalar.

To add one: a module here, its line in `LOSSES`, and its weight, 0 by default, in `config.py`. One of a user's own is
named in LOSS.TERMS, see `StageLoss`.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.runtime.errors import UserError
from dgunet.runtime.imports import import_object, is_object_name


class Charbonnier(nn.Module):
    """``mean sqrt(d^2 + 1e-6)`` with d = restored - target: a smooth L1."""

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        return torch.sqrt((restored - target) ** 2 + 1e-6).mean()


class Edge(nn.Module):
    """Edge loss (MPRNet): Charbonnier of the Laplacian residue ``x - G(up(down(G x)))``.

    G is the 5-tap Gaussian [.05 .25 .4 .25 .05] (outer product) with replicated borders; down keeps every second
    pixel and up puts 4 times its value back, with zeros in between.
    """

    def __init__(self):
        super().__init__()
        taps = torch.tensor([0.05, 0.25, 0.4, 0.25, 0.05])  # float32, as in the original: it shows in the ninth digit
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def blur(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 5, 5)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=channels)

    def laplacian(self, x: Tensor) -> Tensor:
        blurred = self.blur(x)
        sparse = torch.zeros_like(blurred)
        sparse[:, :, ::2, ::2] = 4 * blurred[:, :, ::2, ::2]
        return x - self.blur(sparse)

    def forward(self, restored: Tensor, target: Tensor) -> Tensor:
        # The residue is linear in x, so that of the difference is the difference of the two.
        return torch.sqrt(self.laplacian(restored - target) ** 2 + 1e-6).mean()


LOSSES = {"charbonnier": Charbonnier, "edge": Edge, "mse": nn.MSELoss}


class StageLoss(nn.Module):
    """A weighted sum of losses, summed over the estimates of all K stages, in float32.

    A loss is a callable, or a class that makes one without arguments: ``(restored, target) -> scalar``. It gets more
    where its parameters say so: a third one named ``y`` is the measurement, the network's input; a first one named
    ``estimates`` is the list of the estimates of all stages, the last stage's first, and the loss weighs them itself.
    A module's own parameters are moved to the device, and not trained.

    Args:
        weights: e.g. ``{"charbonnier": 1.0, "my_losses:Focal": 0.1}``; the names are those of `LOSSES`, or
            ``module:name``.
        clamp: clamp the estimates to [0, 1] first (denoising and compressive sensing in the original).

    Raises:
        UserError: there is no such loss, or none with a weight above 0.
    """

    def __init__(self, weights: dict[str, float], clamp: bool = False):
        super().__init__()
        for name in weights:
            if name not in LOSSES and not is_object_name(name):
                raise UserError(
                    f"unknown loss {name!r}; known are {', '.join(LOSSES)}, or give your own as module:name"
                )
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.terms = {name: _make_term(name) for name in self.weights}
        if not self.weights:
            names = ", ".join(f"LOSS.{name.upper()}" for name in LOSSES)
            raise UserError(f"no loss has a weight above 0; set {names} or LOSS.TERMS")
        self.registered = nn.ModuleList([term for term in self.terms.values() if isinstance(term, nn.Module)])
        self.requires_grad_(False)
        parameters = {name: _parameters(term) for name, term in self.terms.items()}
        self.of_all_stages = [name for name, (first, *_) in parameters.items() if first == "estimates"]
        self.of_a_stage = [name for name in parameters if name not in self.of_all_stages]
        self.with_measurement = {name for name, (_, _, *more) in parameters.items() if "y" in more}
        self.clamp = clamp

    def forward(self, estimates: list[Tensor], target: Tensor, y: Tensor | None = None) -> Tensor:
        """K estimates (B, C, H, W), their target (B, C, H, W) and the measurement to a scalar, float32."""
        target = target.float()
        y = y.float() if isinstance(y, Tensor) and y.is_floating_point() else y
        estimates = [estimate.float().clamp(0, 1) if self.clamp else estimate.float() for estimate in estimates]
        total = target.new_zeros(())
        for estimate in estimates:  # L = sum_{k=1..K} sum_terms weight * term(x_k, x)
            for name in self.of_a_stage:
                total = total + self.weights[name] * self._term(name, estimate, target, y)
        for name in self.of_all_stages:
            total = total + self.weights[name] * self._term(name, estimates, target, y)
        return total

    def _term(self, name: str, restored: Tensor | list[Tensor], target: Tensor, y: Tensor | None) -> Tensor:
        value = self.terms[name](restored, target, **({"y": y} if name in self.with_measurement else {}))
        if not isinstance(value, Tensor) or value.dim():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"the loss {name} must return a scalar tensor, got {got}; take its mean, for example")
        return value


def _make_term(name: str) -> Callable:
    if name in LOSSES:
        return LOSSES[name]()
    found = import_object(name, "LOSS.TERMS")
    term = found() if isinstance(found, type) else found
    if not callable(term):
        raise UserError(f"LOSS.TERMS {name} is {term!r:.60}; name a function of (restored, target), or its class")
    return term


def _parameters(term: Callable) -> list[str]:
    """The names of a loss's parameters, two at least."""
    try:
        names = list(inspect.signature(term.forward if isinstance(term, nn.Module) else term).parameters)
    except ValueError:  # a function of PyTorch's in C++
        names = []
    return names + [""] * (2 - len(names))


def loss_from_config(loss) -> StageLoss:
    """The loss of a config's LOSS section: LOSS.TERMS or, where that is empty, those that have a key of their own."""
    return StageLoss(dict(loss.TERMS) or {name: loss[name.upper()] for name in LOSSES}, loss.CLAMP)
