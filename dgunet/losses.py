"""Training losses, as in the original's code. All take (B, C, H, W) images in [0, 1]."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.errors import UserError


def charbonnier(restored: Tensor, target: Tensor) -> Tensor:
    """``mean sqrt(d^2 + 1e-6)`` with d = restored - target: a smooth L1. Returns a scalar."""
    return torch.sqrt((restored - target) ** 2 + 1e-6).mean()


def mse(restored: Tensor, target: Tensor) -> Tensor:
    """``mean d^2``. Returns a scalar."""
    return F.mse_loss(restored, target)


class EdgeLoss(nn.Module):
    """Charbonnier of the Laplacian residue ``x - G(up(down(G x)))``.

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


class StageLoss(nn.Module):
    """A weighted sum of losses, summed over the estimates of all K stages, in float32.

    Args:
        weights: e.g. ``{"charbonnier": 1.0, "edge": 0.05}``; the names are charbonnier, edge and mse.
        clamp: clamp the estimates to [0, 1] first (denoising and compressive sensing in the original).

    Raises:
        UserError: a name that is no loss, or no loss at all.
    """

    def __init__(self, weights: dict[str, float], clamp: bool = False):
        super().__init__()
        known = {"charbonnier": charbonnier, "edge": EdgeLoss(), "mse": mse}
        for name in weights:
            if name not in known:
                raise UserError(f"unknown loss {name!r}; known are {', '.join(known)}")
        self.terms = [(weight, known[name]) for name, weight in weights.items() if weight > 0]
        if not self.terms:
            raise UserError("no loss has a weight above 0; set LOSS.CHARBONNIER, LOSS.EDGE or LOSS.MSE")
        self.edge = known["edge"]  # registered, so that its kernel moves with .to(device)
        self.clamp = clamp

    def forward(self, estimates: list[Tensor], target: Tensor) -> Tensor:
        target = target.float()
        total = target.new_zeros(())
        for estimate in estimates:
            estimate = estimate.float()
            if self.clamp:
                estimate = estimate.clamp(0, 1)
            for weight, term in self.terms:
                total = total + weight * term(estimate, target)
        return total
