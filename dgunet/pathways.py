"""Inter-stage information pathways: what a stage learns from the features of the stage before it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.layers import conv3x3


class ISFF(nn.Module):
    """Inter-stage feature fusion at one scale: the previous stage's features modulate this stage's.

    With e and d the encoder and decoder features of the previous stage,

        s = LeakyReLU_0.1(conv(e) + conv(d)),    out = x * sigmoid(conv(s)) + conv(s) + x        (``adaptive``)
        out = x + conv(e) + conv(d)                                                              (otherwise)

    The second form is what the original computes for compressive sensing.

    Args:
        channels: channels of ``x`` and of ``e``.
        decoder_channels: channels of ``d``.
        adaptive: choose the spatially adaptive form.
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
        shared = self.encoder_conv(encoded).add_(self.decoder_conv(decoded))
        if not self.adaptive:
            return shared.add_(x)
        shared = F.leaky_relu(shared, 0.1, inplace=True)
        scale = self.scale_conv(shared).sigmoid_()
        return self.shift_conv(shared).add_(x).addcmul_(x, scale)


class ConcatFusion(nn.Module):
    """One conv3x3 (no bias) of the concatenation ``cat[x, bridge]``; out: (B, out_width, H, W)."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.conv = conv3x3(2 * width, out_width, bias=False)

    def forward(self, x: Tensor, bridge: Tensor) -> Tensor:
        return self.conv(torch.cat([x, bridge], dim=1))


class SubspaceFusion(nn.Module):
    """Projects the previous stage's features onto a learned subspace before fusing them.

    From ``cat[x, bridge]`` a conv3x3 gives ``rank`` basis maps V; the bridge is replaced by its orthogonal projection
    ``V (V^T V)^-1 V^T bridge`` onto their span, and the result is ``conv3x3(cat[x, projected]) + x``.
    """

    def __init__(self, width: int, rank: int = 16):
        super().__init__()
        self.basis_conv = conv3x3(2 * width, rank)
        self.merge_conv = conv3x3(2 * width, width)

    def forward(self, x: Tensor, bridge: Tensor) -> Tensor:
        basis = self.basis_conv(torch.cat([x, bridge], dim=1))
        projected = project(basis, bridge)
        return self.merge_conv(torch.cat([x, projected], dim=1)).add_(x)


def project(basis: Tensor, features: Tensor, ridge: float = 1e-8) -> Tensor:
    """Orthogonal projection of feature maps onto the span of basis maps, ``V (V^T V)^-1 V^T features``.

    The projection does not change when a basis map is rescaled, so the Gram matrix is brought to a unit diagonal, as
    if the maps had unit length: ``ridge`` on it bounds its condition number whatever the maps are. Coinciding, constant
    and zero maps are therefore harmless. Runs in float32 with the small Gram matrix in float64, whatever autocast says.

    Args:
        basis: (B, rank, H, W).
        features: (B, C, H, W).
        ridge: added to the unit diagonal.

    Returns:
        (B, C, H, W), dtype of ``features``.
    """
    with torch.autocast(features.device.type, enabled=False):
        V = _columns(basis.float())  # (B, HW, rank)
        V64 = V.double()
        gram = V64.mT @ V64
        unit = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-30).rsqrt()[..., None]  # (B, rank, 1): 1 / length
        gram = unit * gram * unit.mT + ridge * torch.eye(V.shape[2], dtype=V64.dtype, device=V.device)
        factor, _ = torch.linalg.cholesky_ex(gram)  # the _ex form does not wait for the device to report success
        products = (V.mT @ _columns(features.float())).double()  # (B, rank, C)
        coefficients = unit * torch.cholesky_solve(unit * products, factor)
        projected = (V @ coefficients.float()).to(features.dtype)  # (B, HW, C)
    return projected.unflatten(1, features.shape[2:]).permute(0, 3, 1, 2)


def _columns(maps: Tensor) -> Tensor:
    """Maps (B, C, H, W) as the columns of matrices (B, HW, C); no copy in either memory format."""
    if maps.is_contiguous():
        return maps.flatten(2).mT
    return maps.permute(0, 2, 3, 1).flatten(1, 2)
