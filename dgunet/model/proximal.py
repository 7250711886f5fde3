"""Informative proximal mapping module (IPMM): a U-Net informed by the features of the previous stage."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dgunet.model.fusion import ISFF, ConcatFusion, SubspaceFusion
from dgunet.model.layers import ConvBlock, ShallowFeatures, conv3x3

LEVELS = 4  # of the U-Net, at the scales 1, 1/2, 1/4, 1/8
MULTIPLE = 2 ** (LEVELS - 1)  # the sides of an image are multiples of it


class StageFeatures(NamedTuple):
    """What a stage hands to the next: its features at full resolution and at every scale, finest first."""

    features: Tensor | None  # of the supervised head, (B, w, H, W), for feature fusion; None without it
    # For ISFF, None without it:
    encoded: list[Tensor] | None  # before each downsampling: (B, w+g, H, W), (B, w+2g, H/2, W/2), (B, w+3g, H/4, W/4)
    decoded: list[Tensor] | None  # (B, w, H, W), (B, w+g, H/2, W/2), (B, w+2g, H/4, W/4)


class Encoder(nn.Module):
    """Block i widens from w+ig to w+(i+1)g channels at scale 1/2^i; then ISFF; then the resolution is halved.

    The last block, at scale 1/8, stays at w+3g and has no ISFF. ``isff`` is the form of `ISFF`, or ``"none"``.
    """

    def __init__(self, widths: list[int], isff: str):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.blocks = nn.ModuleList(ConvBlock(narrow, wide, norm=True) for narrow, wide in pairs)
        self.downsamples = nn.ModuleList(nn.Conv2d(w, w, 4, stride=2, padding=1, bias=False) for _, w in pairs)
        fusions = (ISFF(wide, narrow, adaptive=isff == "adaptive") for narrow, wide in pairs)
        self.isff = nn.ModuleList(fusions) if isff != "none" else None
        self.bottom = ConvBlock(widths[-1], widths[-1], norm=True)

    def forward(self, x: Tensor, previous: StageFeatures | None) -> tuple[Tensor, list[Tensor]]:
        """x (B, w, H, W) to the deepest features (B, w+3g, H/8, W/8) and those before each downsampling.

        The latter are (B, w+g, H, W), (B, w+2g, H/2, W/2), (B, w+3g, H/4, W/4).
        """
        encoded = []
        for i, (block, downsample) in enumerate(zip(self.blocks, self.downsamples, strict=True)):
            x = block(x)
            if self.isff is not None:
                x = self.isff[i](x, previous.encoded[i], previous.decoded[i])
            encoded.append(x)
            x = downsample(x)
        return self.bottom(x), encoded


class Decoder(nn.Module):
    """Doubles the resolution three times, each time joining a convolution of the encoder's features of that scale."""

    def __init__(self, widths: list[int]):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.upsamples = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in pairs)
        self.skips = nn.ModuleList(conv3x3(wide, narrow) for narrow, wide in pairs)
        self.blocks = nn.ModuleList(ConvBlock(2 * narrow, narrow, norm=False) for narrow, _ in pairs)

    def forward(self, x: Tensor, encoded: list[Tensor]) -> list[Tensor]:
        """The encoder's output to (B, w, H, W), (B, w+g, H/2, W/2), (B, w+2g, H/4, W/4)."""
        decoded = []
        for i in reversed(range(len(self.blocks))):  # coarsest first
            x = torch.cat([self.upsamples[i](x), self.skips[i](encoded[i])], dim=1)
            x = self.blocks[i](x)
            decoded.append(x)
        return decoded[::-1]


class ProximalMapping(nn.Module):
    """``x_k = prox_k(v_k; features of stage k-1)`` for the stages 1 to K-1.

    Args:
        channels: image channels.
        width, growth: the U-Net has the widths w, w+g, w+2g, w+3g at the scales 1, 1/2, 1/4, 1/8.
        fusion: feature fusion with the stage before, ``"subspace"``, ``"concat"``, or ``"none"``.
        isff: the form of `ISFF`, ``"adaptive"``, ``"additive"``, or ``"none"``.
        attention: the features for the next stage are ``f + conv(f) * sigmoid(conv(x_k))`` instead of ``f + conv(f)``,
            where there is feature fusion. The channel attention of `ShallowFeatures` is always there.
        has_previous: whether there is a stage before this one.
    """

    def __init__(
        self, channels: int, width: int, growth: int, fusion: str, isff: str, attention: bool, has_previous: bool
    ):  # fmt: skip
        super().__init__()
        widths = [width + i * growth for i in range(LEVELS)]
        self.shallow = ShallowFeatures(channels, width)
        self.fusion = make_fusion(fusion, width, width) if has_previous else None
        self.encoder = Encoder(widths, isff if has_previous else "none")
        self.decoder = Decoder(widths)
        # Supervised head, of the decoder's output f: x_k = v + conv(f), and f + conv(f) for the next stage; the sigmoid
        # map of MPRNet's supervised attention module only with ``attention``.
        self.image_conv = nn.Conv2d(width, channels, 1, bias=False)
        self.features_conv = nn.Conv2d(width, width, 1, bias=False) if fusion != "none" else None
        attends = attention and fusion != "none"
        self.attention_conv = nn.Conv2d(channels, width, 1, bias=False) if attends else None
        self.emits_isff = isff != "none"  # the next stage's ISFF needs this stage's features of every scale

    def forward(self, v: Tensor, previous: StageFeatures | None) -> tuple[Tensor, StageFeatures | None]:
        features = self.shallow(v)
        if self.fusion is not None:
            features = self.fusion(features, previous.features)
        deepest, encoded = self.encoder(features, previous)
        decoded = self.decoder(deepest, encoded)
        features = decoded[0]
        x = v + self.image_conv(features)  # x_k
        return x, StageFeatures(self._features(features, x), *(encoded, decoded) if self.emits_isff else (None, None))

    def _features(self, features: Tensor, x: Tensor) -> Tensor | None:
        """The features (B, width, H, W) for the next stage's fusion."""
        if self.features_conv is None:
            return None
        change = self.features_conv(features)
        if self.attention_conv is None:
            return change.add_(features)
        return torch.addcmul(features, change, self.attention_conv(x).sigmoid_())


class FinalMapping(nn.Module):
    """The last stage's mapping, without a U-Net: shallow features, fusion, one conv3x3 (no bias) to the image residual.

    ``fusion`` is ``"concat"`` (to ``out_width`` channels), ``"subspace"`` (stays at ``width``), or ``"none"``.
    """

    def __init__(self, channels: int, width: int, fusion: str, out_width: int):
        super().__init__()
        self.shallow = ShallowFeatures(channels, width)
        self.fusion = make_fusion(fusion, width, out_width)
        self.image_conv = conv3x3(out_width if fusion == "concat" else width, channels, bias=False)

    def forward(self, v: Tensor, previous: StageFeatures | None) -> Tensor:
        features = self.shallow(v)
        if self.fusion is not None:
            features = self.fusion(features, previous.features)
        return self.image_conv(features)


def make_fusion(fusion: str, width: int, out_width: int) -> nn.Module | None:
    """The module that merges a stage's shallow features with the previous stage's, both ``width`` channels."""
    if fusion == "none":
        return None
    return SubspaceFusion(width) if fusion == "subspace" else ConcatFusion(width, out_width)
