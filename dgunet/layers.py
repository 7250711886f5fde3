"""The convolution blocks that the gradient and proximal modules are made of.

Feature maps are (B, C, H, W). Attribute names say what a layer does; `checkpoint.py` maps the original authors'
names onto them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    """3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


class ChannelAttention(nn.Module):
    """A weight in (0, 1) for every channel, computed from the channel means of the whole picture: (B, C, 1, 1)."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.excite = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return torch.sigmoid(self.excite(F.relu(self.squeeze(means))))


class ChannelAttentionBlock(nn.Module):
    """Residual block: conv3x3, PReLU, conv3x3, channel attention; no biases."""

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


class HalfInstanceNorm(nn.Module):
    """Instance norm (affine) of the first half of the channels; the second half passes unchanged (HINet)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels // 2, affine=True)  # holds the parameters

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not torch.is_grad_enabled():
            return _HalfInstanceNorm.apply(x, self.norm.weight, self.norm.bias, self.norm.eps)
        # Someone studies the trained network: torch.func and second derivatives need plain operations.
        first, second = x.chunk(2, dim=1)
        mean, rstd = _statistics(first, self.norm.eps)
        scale, shift = self.norm.weight.view(1, -1, 1, 1) * rstd, self.norm.bias.view(1, -1, 1, 1)
        return torch.cat([torch.addcmul(shift, first - mean, scale).to(x.dtype), second], dim=1)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each channel, (B, C, 1, 1), in float32 at least."""
    mean = x.mean(dim=(2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.rsqrt((x - mean).square().mean(dim=(2, 3), keepdim=True) + eps)


class _HalfInstanceNorm(torch.autograd.Function):
    """``scale * (x - mean) + bias`` for each channel, those of the second half with the scale 1, mean and bias 0.

    Split, normalised and concatenated, the maps would be read and written twice as often, and their memory format lost.
    In low precision ``x`` loses nothing where its mean, rounded, is subtracted first; the rest is a small shift.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, rstd = _statistics(x[:, : weight.numel()], eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        rounded, scale = mean.to(x.dtype), weight.view(1, -1, 1, 1) * rstd
        shift = bias.view(1, -1, 1, 1) + (rounded - mean) * scale
        centred = x - _extend(rounded, 0)
        return torch.addcmul(_extend(shift.to(x.dtype), 0), centred, _extend(scale.to(x.dtype), 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        # With x^ = (x - mean) * rstd, x has the gradient scale * (g - mean(g) - x^ * mean(g * x^)), linear in g and x.
        x, weight, mean, rstd = ctx.saved_tensors
        half, pixels = weight.numel(), x.shape[2] * x.shape[3]
        g, rounded = gradient[:, :half], mean.to(x.dtype)
        centred, rest = x[:, :half] - rounded, rounded - mean
        sum_g = g.sum(dim=(2, 3), keepdim=True, dtype=mean.dtype)
        sum_gx = (g * centred).sum(dim=(2, 3), keepdim=True, dtype=mean.dtype)
        sum_gx = (sum_gx + rest * sum_g) * rstd  # of g * x^
        scale = weight.view(1, -1, 1, 1) * rstd
        slope = -scale * rstd * sum_gx / pixels
        shift = -scale * sum_g / pixels + slope * rest
        x_gradient = gradient * _extend(scale.to(g.dtype), 1)
        x_gradient[:, :half].add_(torch.addcmul(shift.to(g.dtype), centred, slope.to(g.dtype)))
        return x_gradient, sum_gx.sum(dim=(0, 2, 3)), sum_g.sum(dim=(0, 2, 3)), None


def _extend(first: Tensor, value: float) -> Tensor:
    """Factors (B, C/2, 1, 1) of the first half of the channels, extended to all by a constant."""
    return torch.cat([first, torch.full_like(first, value)], dim=1)


class ConvBlock(nn.Module):
    """conv3x3, (half instance norm,) LeakyReLU(0.2), conv3x3, LeakyReLU(0.2), plus a 1x1 identity path."""

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
