"""The convolution blocks that the gradient and proximal modules are made of.

Feature maps are (B, C, H, W). Attribute names say what a layer does; `dgunet/checkpoints/original.py` maps the original
authors' names onto them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.model.instance_norm import HalfInstanceNorm


def conv3x3(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    """3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


class ChannelAttention(nn.Module):
    """Channel attention (MPRNet): weights (B, C, 1, 1) in (0, 1) from the channel means of the whole image."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.excite = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.from_means(x.mean(dim=(2, 3), keepdim=True))

    def from_means(self, means: Tensor) -> Tensor:
        """The weights from channel means (B, C, h, w); local.py passes those of windows."""
        return torch.sigmoid(self.excite(F.relu(self.squeeze(means))))


class ChannelAttentionBlock(nn.Module):
    """Residual block (MPRNet's CAB): conv3x3, PReLU, conv3x3, channel attention; no biases."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = conv3x3(channels, channels, bias=False)
        self.activation = nn.PReLU()
        self.conv2 = conv3x3(channels, channels, bias=False)
        self.attention = ChannelAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.activation(self.conv1(x)))
        return torch.addcmul(x, out, self.attention(out))


class ShallowFeatures(nn.Module):
    """Image (B, C, H, W) to features (B, width, H, W): conv3x3 without bias, then a channel-attention block."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv = conv3x3(channels, width, bias=False)
        self.block = ChannelAttentionBlock(width)

    def forward(self, image: Tensor) -> Tensor:
        return self.block(self.conv(image))


class ConvBlock(nn.Module):
    """conv3x3, (half instance norm,) LeakyReLU(0.2), conv3x3, LeakyReLU(0.2), plus a 1x1 identity path (HINet)."""

    def __init__(self, in_channels: int, out_channels: int, norm: bool):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm = HalfInstanceNorm(out_channels) if norm else nn.Identity()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.identity = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.norm(self.conv1(x)), 0.2, inplace=True)
        out = F.leaky_relu(self.conv2(out), 0.2, inplace=True)
        return self.identity(x).add_(out)
