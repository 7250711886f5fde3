"""Training losses, as in the original's code. All take two (B, C, H, W) images in [0, 1] and return a scalar.

To add one: a module here, its line in `LOSSES`, and its weight, 0 by default, in `config.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.runtime.errors import UserError


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

    Args:
        weights: e.g. ``{"charbonnier": 1.0, "edge": 0.05}``; the names are those of `LOSSES`.
        clamp: clamp the estimates to [0, 1] first (denoising and compressive sensing in the original).
    """

    def __init__(self, weights: dict[str, float], clamp: bool = False):
        super().__init__()
        for name in weights:
            if name not in LOSSES:
                raise UserError(f"unknown loss {name!r}; known are {', '.join(LOSSES)}")
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.terms = nn.ModuleDict({name: LOSSES[name]() for name in self.weights})
        if not self.terms:
            raise UserError(f"no loss has a weight above 0; set {', '.join(f'LOSS.{name.upper()}' for name in LOSSES)}")
        self.clamp = clamp

    def forward(self, estimates: list[Tensor], target: Tensor) -> Tensor:
        """K estimates (B, C, H, W) and their target (B, C, H, W) to a scalar, float32."""
        target = target.float()
        total = target.new_zeros(())
        for estimate in estimates:  # L = sum_{k=1..K} sum_terms weight * term(x_k, x)
            estimate = estimate.float()
            if self.clamp:
                estimate = estimate.clamp(0, 1)
            for name, term in self.terms.items():
                total = total + self.weights[name] * term(estimate, target)
        return total
