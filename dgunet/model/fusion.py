"""Inter-stage information pathways: how the features of a stage reach the next (ISFF, feature fusion)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.model.layers import conv3x3
from dgunet.model.projection import project


class ISFF(nn.Module):
    """Inter-stage feature fusion (ISFF) at one scale: the previous stage's features modulate this stage's.

    With e and d the encoder and decoder features of the previous stage,

        s = LeakyReLU_0.1(conv(e) + conv(d)),    out = x * sigmoid(conv(s)) + conv(s) + x        (``adaptive``)
        out = x + conv(e) + conv(d)                                                              (otherwise)

    The second form is what the original computes for compressive sensing. ``x`` and e have ``channels`` channels, d has
    ``decoder_channels``.
    """

    def __init__(self, channels: int, decoder_channels: int, adaptive: bool = True):
        super().__init__()
        self.encoder_conv = conv3x3(channels, channels)
        self.decoder_conv = conv3x3(decoder_channels, channels)
        self.adaptive = adaptive
        if adaptive:
            self.scale_conv = conv3x3(channels, channels)
            self.shift_conv = conv3x3(channels, channels)

    def forward(self, x: Tensor, encoded: Tensor, decoded: Tensor) -> Tensor:
        s = self.encoder_conv(encoded).add_(self.decoder_conv(decoded))  # conv(e) + conv(d)
        if not self.adaptive:
            return s.add_(x)
        s = F.leaky_relu(s, 0.1, inplace=True)
        scale = self.scale_conv(s).sigmoid_()
        return self.shift_conv(s).add_(x).addcmul_(x, scale)  # x * sigmoid(conv(s)) + conv(s) + x


class ConcatFusion(nn.Module):
    """Feature fusion: one conv3x3 (no bias) of ``cat[x, previous]``, (B, out_width, H, W).

    ``x`` are this stage's shallow features, ``previous`` those that the stage before hands on, both (B, width, H, W).
    """

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.conv = conv3x3(2 * width, out_width, bias=False)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        return self.conv(torch.cat([x, previous], dim=1))


class SubspaceFusion(nn.Module):
    """Projects the previous stage's features onto a learned subspace (NBNet) before fusing them.

    From ``cat[x, previous]``, see `ConcatFusion`, a conv3x3 gives ``rank`` basis maps V; ``previous`` is replaced by
    its orthogonal projection ``V (V^T V)^-1 V^T previous`` onto their span, and the result, (B, width, H, W), is
    ``conv3x3(cat[x, projected]) + x``. (The released code inverts V^T V without the ridge of `project`.)
    """

    def __init__(self, width: int, rank: int = 16):
        super().__init__()
        self.basis_conv = conv3x3(2 * width, rank)
        self.merge_conv = conv3x3(2 * width, width)
        self.project = project  # replaced by local.py (windows) and apps/export.py (ONNX)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        basis = self.basis_conv(torch.cat([x, previous], dim=1))
        projected = self.project(basis, previous)
        return self.merge_conv(torch.cat([x, projected], dim=1)).add_(x)
