"""Local statistics at test time: over windows as large as the crops that a network was trained on.

Three operations of DGUNet are global: half instance norm and channel attention take the mean (and variance) of each
channel, the subspace projection takes the Gram matrix of its basis maps. Training computes them on crops of 64 to 256
pixels, testing on whole photographs, whose statistics differ. Here each pixel gets the statistics of a window around
it. For the norm and for attention that is TLC (Chu et al., "Improving image restoration by revisiting global
information aggregation", ECCV 2022); for the projection it is new.

    local = with_local_statistics(model, {"norm": 64, "attention": 64, "projection": 64})
    x = local(y)[0]

Statistics are taken on a grid with one position per 8x8 pixels of the image (one value of a map at the scale 1/8) and
interpolated bilinearly; near the border the nearest window inside the image is used.

Zero padding differs, too: in a crop every pixel is near it, and a network may rely on that (docs/local.md). Only tiles
reproduce it, ``{"tile": 128}``.
"""

import copy
from collections.abc import Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgunet.model.instance_norm import HalfInstanceNorm
from dgunet.model.layers import ChannelAttention
from dgunet.model.network import DGUNet
from dgunet.model.projection import gram_precision, project, solve_projection
from dgunet.model.proximal import MULTIPLE, FinalMapping, ProximalMapping
from dgunet.runtime.errors import UserError

OPERATIONS = ("norm", "attention", "projection")
KEYS = (*OPERATIONS, "tile")  # of `restore`'s ``local``
STEP = 2 * MULTIPLE  # windows are multiples of it: half a window lies on the grid


def check_windows(local) -> dict[str, int]:
    """The windows in pixels of the image, and the tile, that `restore`'s ``local`` asks for; empty for none."""
    if local is None or local is False:
        return {}
    if not isinstance(local, Mapping) or not all(name in KEYS for name in local):
        known = ", ".join(KEYS)
        raise UserError(f"local is False or gives windows for {known}, as in {{'norm': 64}}; got {local!r:.100}")
    for name, window in local.items():
        if type(window) is not int or not STEP <= window <= 2**15 or window % STEP:
            raise UserError(f"the window for {name} is a multiple of {STEP} pixels, got {window!r:.60}")
    return {name: local[name] for name in KEYS if name in local}


def with_local_statistics(model: DGUNet, windows: Mapping[str, int]) -> DGUNet:
    """A copy of the network for inference with statistics over windows around each pixel.

    ``windows`` gives sides in pixels of the image, multiples of 16, by operation: ``norm`` (half instance norm),
    ``attention`` (channel attention), ``projection`` (subspace projection). Operations that are not named stay global,
    and so do all on an image smaller than the window. A ``tile`` is for `restore`, and ignored. The weights are shared.
    """
    windows = {name: window for name, window in check_windows(windows).items() if name != "tile"}
    known = [model.degradation] if model.degradation is not None else []
    shared = {id(part): part for part in chain(model.parameters(), model.buffers(), known)}
    local = copy.deepcopy(model, shared).eval()
    for stage in dict.fromkeys(local.iter_stages()):
        mapping = stage.proximal
        if not isinstance(mapping, ProximalMapping | FinalMapping):
            raise UserError(
                f"local statistics are of dgunet's own proximal mappings, not of a {type(mapping).__name__}; leave "
                "local out, or ask for a tile, local={'tile': 128}"
            )
        if "attention" in windows:
            block = mapping.shallow.block
            block.attention = LocalChannelAttention(block.attention, windows["attention"])
        if "projection" in windows and hasattr(mapping.fusion, "project"):
            mapping.fusion.project = partial(project_locally, window=windows["projection"])
        if "norm" in windows and hasattr(mapping, "encoder"):
            for level, block in enumerate([*mapping.encoder.blocks, mapping.encoder.bottom]):
                block.norm = LocalHalfInstanceNorm(block.norm, windows["norm"], cell=MULTIPLE >> level)
    local.local = {}  # `restore` has nothing left to do
    local.windows = windows
    return local


class LocalHalfInstanceNorm(nn.Module):
    """`HalfInstanceNorm` with the mean and variance of a window around each pixel.

    ``window`` is its side in pixels of the image, ``cell`` the spacing of the grid in pixels of the map: 8 at the scale
    1, 1 at the scale 1/8.
    """

    def __init__(self, norm: HalfInstanceNorm, window: int, cell: int):
        super().__init__()
        self.norm, self.window, self.cell = norm.norm, window, cell

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.chunk(2, dim=1)
        mean, variance = window_moments(first, self.window // MULTIPLE, self.cell)
        scale = self.norm.weight.float().view(1, -1, 1, 1) * torch.rsqrt(variance + self.norm.eps)
        shift = self.norm.bias.float().view(1, -1, 1, 1) - mean * scale
        chunk = 8  # channels at once, to save memory: interpolated, the factors are as large as the map
        parts = [
            torch.addcmul(to_pixels(b, self.cell), part.float(), to_pixels(a, self.cell)).to(x.dtype)
            for part, a, b in zip(first.split(chunk, 1), scale.split(chunk, 1), shift.split(chunk, 1), strict=True)
        ]
        return torch.cat([*parts, rest], dim=1)


class LocalChannelAttention(nn.Module):
    """`ChannelAttention` from the channel means of a window around each pixel: weights (B, C, H, W)."""

    def __init__(self, attention: ChannelAttention, window: int):
        super().__init__()
        self.attention, self.window = attention, window

    def forward(self, x: Tensor) -> Tensor:
        means = window_means(F.avg_pool2d(x.float(), MULTIPLE), self.window // MULTIPLE)
        return to_pixels(self.attention.from_means(means.to(x.dtype)), MULTIPLE)


def window_moments(x: Tensor, count: int, cell: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of windows of ``count`` x ``count`` cells around each cell of ``cell`` x ``cell`` pixels.

    From (B, C, H, W) to two of (B, C, H / cell, W / cell), in float32.
    """
    x = x.float()
    means = F.avg_pool2d(x, cell)
    # Centred before squaring, for precision.
    within = F.avg_pool2d((x - to_pixels(means, cell, mode="nearest")).square_(), cell)
    centre = means.mean(dim=(2, 3), keepdim=True)
    mean = window_means(means - centre, count)
    variance = window_means((means - centre).square() + within, count) - mean.square()
    return mean + centre, variance.clamp_min_(0)


def window_means(cells: Tensor, count: int) -> Tensor:
    """Means of windows of ``count`` x ``count`` cells around each cell of (B, C, h, w).

    A window of an even count has half cells at both ends. Near the border the nearest window inside is used; of an
    image smaller than a window, all of it.
    """
    for dim in (2, 3):
        if count >= cells.shape[dim]:
            cells = cells.mean(dim=dim, keepdim=True).expand_as(cells)
            continue
        kernel = (count, 1) if dim == 2 else (1, count)
        means = F.avg_pool2d(cells, kernel, stride=1)
        if count % 2 == 0:
            means = F.avg_pool2d(means, (2, 1) if dim == 2 else (1, 2), stride=1)
        border = count // 2
        cells = F.pad(means, (0, 0, border, border) if dim == 2 else (border, border, 0, 0), mode="replicate")
    return cells


def to_pixels(cells: Tensor, cell: int, mode: str = "bilinear") -> Tensor:
    """Interpolate values on the grid (B, C, h, w) to the pixels of a map, (B, C, h * cell, w * cell)."""
    return cells if cell == 1 else F.interpolate(cells, scale_factor=cell, mode=mode)


def project_locally(basis: Tensor, features: Tensor, window: int) -> Tensor:
    """`project` in windows of this (even) side that overlap by half, blended linearly between their centres.

    The maps are cut into cells of half a window. A window is 2x2 cells, and its Gram matrix is the sum of theirs. A
    pixel gets the coefficients of the four windows of its cell, interpolated by its distance to their centres.
    """
    side, (height, width) = window // 2, basis.shape[2:]
    if height <= window and width <= window:
        return project(basis, features)
    with torch.autocast(features.device.type, enabled=False):
        V, maps = _cells(basis.float(), side), _cells(features.float(), side)  # (B, h, w, N, rank), (B, h, w, N, C)
        exact = V.to(gram_precision(V))
        gram, cross = _windows(exact.mT @ exact), _windows(V.mT @ maps)
        coefficients = solve_projection(gram, cross)  # (B, h - 1, w - 1, rank, C)
        out = torch.zeros_like(maps)
        # Position of a pixel within its cell, in (0, 1): from one window's centre to the next.
        part = (torch.arange(side, device=V.device) + 0.5) / side
        rows, columns = (torch.arange(count, device=V.device) for count in V.shape[1:3])
        last_row, last_column = coefficients.shape[1] - 1, coefficients.shape[2] - 1
        for down in (0, 1):
            for right in (0, 1):
                weight = torch.outer(part if down else 1 - part, part if right else 1 - part).reshape(-1, 1)
                row, column = (rows - 1 + down).clamp(0, last_row), (columns - 1 + right).clamp(0, last_column)
                out += (weight * V) @ coefficients[:, row][:, :, column]
        out = out.unflatten(3, (side, side)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return out[..., :height, :width].to(features.dtype)


def _cells(maps: Tensor, side: int) -> Tensor:
    """Maps (B, C, H, W), padded by zeros, as cells of ``side`` x ``side`` pixels, (B, h, w, side^2, C)."""
    maps = F.pad(maps, (0, -maps.shape[3] % side, 0, -maps.shape[2] % side))
    cells = maps.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, h, side, w, side)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)


def _windows(cells: Tensor) -> Tensor:
    """Sums over 2x2 neighbouring cells of (B, h, w, ...); over one cell along a side that has no more."""
    for dim in (1, 2):
        count = cells.shape[dim]
        if count > 1:
            cells = cells.narrow(dim, 0, count - 1) + cells.narrow(dim, 1, count - 1)
    return cells
