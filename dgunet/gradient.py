"""Flexible gradient descent module (FGDM): the degradation and its adjoint, learned when they are unknown.

The gradient step itself, ``v = x - rho * A_adjoint(A(x) - y)``, is written out in `model.Stage`.
"""

from torch import Tensor, nn

from dgunet.layers import conv3x3


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

    It has the interface of the known degradations (see `degradations.py`), but nothing makes ``A_adjoint`` the true
    adjoint of ``A``: the paper learns both freely.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.A = ResidualBlock(channels)
        self.A_adjoint = ResidualBlock(channels)
