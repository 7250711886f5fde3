"""Restoring images of any size: padding, tiles with blended seams, self-ensemble."""

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from dgunet.data.transforms import dihedral, pad_to_multiple, undo_dihedral
from dgunet.model.degradations import Degradation, MotionBlur, PaddedDegradation, apply_adjoint, for_measurements
from dgunet.model.local import check_windows, with_local_statistics
from dgunet.model.proximal import MULTIPLE
from dgunet.runtime.errors import UserError
from dgunet.runtime.hardware import available_memory

# Peak memory of a forward pass, in floats per pixel and unit of width, as measured.
_FLOATS_PER_PIXEL_AND_WIDTH = 16


def restore(
    model,
    image,
    tile: int | str | None = "auto",
    tile_overlap: int | None = None,
    self_ensemble: bool = False,
    bf16: bool = False,
    local: Mapping[str, int] | bool | None = None,
    strength: float = 1.0,
):
    """Restore an image, or a batch of them, of any size; or of a known degradation the image of a measurement.

    The image is padded to multiples of 8 (by reflection; by replication where it is too small), restored on the
    network's device, cropped back and clamped to [0, 1].

    A network whose known degradation is not from image to image, such as `BlockSampling` or an operator of your own,
    takes a measurement y instead, as the operator's ``A`` gives it: a tensor or array (B, ...) of any shape and type,
    also complex. x_0 = A_adjoint(y) may be of any size. The result is the image, float32: a tensor (B, C, H, W) of a
    tensor, an array (B, H, W, C) of an array; clamped to [0, 1], but for the two channels of a complex image. It is
    restored whole: ``tile`` is None or "auto".

    Args:
        model: a DGUNet for C channels; of any floating type (``model.half()``), and compiled (``model.compile()``) or
            not.
        image: a NumPy array (H, W, C) or (B, H, W, C), a tensor (C, H, W) or (B, C, H, W), for C = 1 also (H, W):
            uint8, uint16, or floats in [0, 1]; or a measurement, see above; or a list or tuple of such, of any sizes.
            It is not modified.
        tile: side in pixels of the tiles that the image is restored in; None for the whole image at once; "auto"
            for the tile that ``local`` has, else the whole image if it fits into memory, else tiles, with a warning.
            Tiles change the result: channel attention, instance norm and subspace projection see only the tile.
        tile_overlap: pixels that neighbouring tiles share, at most half of their side; seams are blended linearly over
            them. None for a quarter of the tile, at most 64.
        self_ensemble: mean over the 8 flips and rotations: 8 times the work for some hundredths of a dB.
        bf16: run the network under bfloat16 autocast.
        local: windows in pixels for local statistics, as in ``{"norm": 64, "attention": 64, "projection": 64}``, see
            `with_local_statistics`, or ``{"tile": 128}``; False for the statistics of the whole image, as in the paper;
            None for what the weights' record says (``model.local``). docs/local.md compares them.
        strength: share of the change that is made, from 0 (the image as it is) to 1: ``y + strength (x_K - y)``. Not of
            a measurement, which is no image.

    Returns:
        The restored image(s), of the same type, shape and dtype as ``image`` (of a measurement see above), tensors on
        the same device.

    Raises:
        UserError: an unsuitable shape, type or range, NaN pixels, or a network that outputs NaN.

    >>> from dgunet import create_model
    >>> model = create_model("deraining_dgunet", width=8, growth=4, stages=2)
    >>> restored = restore(model, np.full((37, 53, 3), 128, np.uint8))
    >>> restored.shape, restored.dtype
    ((37, 53, 3), dtype('uint8'))
    """
    if isinstance(image, list | tuple):
        options = dict(tile=tile, tile_overlap=tile_overlap, self_ensemble=self_ensemble, bf16=bf16, local=local)
        restored = [restore(model, one, strength=strength, **options) for one in image]
        return restored if isinstance(image, list) else tuple(restored)
    check_tiles(tile, tile_overlap)
    if not 0 <= strength <= 1:
        raise UserError(f"strength is from 0 to 1, not {strength}")
    device = _check_network(model)
    if self_ensemble and model.degradation is not None:
        raise UserError("self_ensemble rotates the image, but not the network's known degradation; leave it out")
    windows = check_windows(getattr(model, "local", None) if local is None else local)
    if windows.keys() - {"tile"}:
        model = with_local_statistics(model, windows)
    if not (model.degradation is None or getattr(model.degradation, "image_to_image", False)):
        if tile not in (None, "auto") or "tile" in windows:
            raise UserError("a measurement cannot be cut into tiles; leave tile out, or pass local=False")
        if strength != 1:
            raise UserError("a measurement is no image that the restored one could be mixed with; leave strength out")
        with temporarily_set(model.modules(), "training", False), torch.no_grad():
            return _restore_measurement(model, image, device, bf16)
    x, back = _as_batch(image, model.channels)
    with temporarily_set(model.modules(), "training", False), torch.no_grad():
        x = x.to(device)
        if isinstance(tile, str):
            tile = windows.get("tile") or automatic_tile(model, x.shape, device)
        if tile is not None:
            tile = int(tile)  # NumPy's integers overflow
        turns = range(8) if self_ensemble else (0,)
        step = max(MULTIPLE, windows.get("projection", 0) // 2)
        total = sum(
            undo_dihedral(_restore_tiles(model, dihedral(x, k), tile, tile_overlap, bf16, step), k) for k in turns
        )
        restored = (total / len(turns)).clamp(0, 1)
        if strength != 1:
            restored = torch.lerp(x.to(restored.dtype), restored, strength)
    return back(restored)


_overrides: dict[tuple[int, str], list] = {}  # (object, attribute): number of users, value before the first
_overrides_lock = threading.Lock()


@contextlib.contextmanager
def temporarily_set(objects: Iterable, name: str, value) -> Iterator[None]:
    """Inside, the attribute ``name`` of all objects is ``value``; afterwards it is restored.

    Threads may do so at the same time: the last one to leave restores it.
    """
    objects = list(objects)
    with _overrides_lock:
        for one in objects:
            override = _overrides.setdefault((id(one), name), [0, getattr(one, name)])
            override[0] += 1
            setattr(one, name, value)
    try:
        yield
    finally:
        with _overrides_lock:
            for one in reversed(objects):  # torch.compile's wrapper shares the mode of the network in it
                override = _overrides[id(one), name]
                override[0] -= 1
                if not override[0]:
                    setattr(one, name, override[1])
                    del _overrides[id(one), name]


def check_tiles(tile, tile_overlap):
    """Check ``tile`` and ``tile_overlap`` of `restore`; raises UserError."""

    def whole(value) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool)

    good = tile is None or (isinstance(tile, str) and tile == "auto") or (whole(tile) and tile >= 16)
    most = tile // 2 if good and whole(tile) else math.inf
    if not good or not (tile_overlap is None or (whole(tile_overlap) and 0 <= tile_overlap <= most)):
        raise UserError(
            "tile must be None, 'auto' or at least 16 pixels, and tile_overlap from 0 to half of it; "
            f"got tile={tile!r}, tile_overlap={tile_overlap!r}"
        )


def parse_tile(text: str) -> int | str | None:
    """``tile`` from a command line: ``auto``, ``whole`` (None) or a number."""
    return {"auto": "auto", "whole": None}[text] if text in ("auto", "whole") else int(text)


def _check_network(model) -> torch.device:
    """The network's device; raises UserError if `restore` cannot run it."""
    if not isinstance(model, torch.nn.Module) or not all(hasattr(model, name) for name in ("channels", "degradation")):
        raise UserError(
            f"restore takes a network from load_model or DGUNet(...), not {type(model).__name__}"
            + ("; pass its .module" if hasattr(model, "module") else "")
        )
    if isinstance(model.degradation, MotionBlur):
        raise UserError("this network is for any known blur; give it yours first: model.degradation = Blur(kernel)")
    kinds = {(p.device, p.dtype) for p in model.parameters()}
    if len(kinds) != 1:
        raise UserError(
            "the network's weights are not all of one type and on one device; model.to(device, dtype) moves them"
        )
    device = kinds.pop()[0]
    if device.type == "meta":
        raise UserError("the network has no weights: it is on the meta device; load_model(path) loads some")
    return device


def _restore_measurement(model, measurement, device: torch.device, bf16: bool):
    """`restore` of a measurement y (B, ...): the images x_K, (B, C, H, W), or of an array (B, H, W, C)."""
    _check_dense(measurement)
    if isinstance(measurement, Tensor):
        y = measurement.detach()
    elif (kind := measurement.dtype.kind) in "biufc":
        y = torch.from_numpy(np.array(measurement, dtype=np.complex64 if kind == "c" else np.float32))
    else:
        raise UserError(f"a measurement is of numbers, got an array of {measurement.dtype}")
    home, y = y.device, y.to(device)
    y = y.to(torch.complex64 if y.is_complex() else torch.float32)
    if y.dim() < 2 or not y.numel() or not torch.isfinite(y).all():
        raise UserError(f"a measurement is (B, ...), of finite numbers, as A gives it; got shape {tuple(y.shape)}")
    if not y.is_complex():
        y = y.to(next(model.parameters()).dtype)
    known = for_measurements(model.degradation, y)
    initial = apply_adjoint(known, y)
    if initial.dim() != 4 or initial.shape[1] != model.channels:
        raise UserError(
            f"A_adjoint makes {tuple(initial.shape)} of a measurement {tuple(y.shape)}, but the network restores "
            f"images (B, {model.channels}, H, W)"
        )
    whole = PaddedDegradation(known)
    x = whole.crop(estimate(model, y, bf16, whole))
    x = (x if model.channels == 2 else x.clamp(0, 1)).to(home)
    return x.contiguous() if isinstance(measurement, Tensor) else np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())


def estimate(model, y: Tensor, bf16: bool = False, degradation: Degradation | None = None) -> Tensor:
    """The network's final estimate x_K, (B, C, H, W) float32, without gradients.

    ``y`` is degraded images (B, C, H, W) with sides that are multiples of 8, or measurements; float32, or complex.
    ``degradation``: see `DGUNet.forward`.
    """
    if not y.is_complex():
        y = y.to(next(model.parameters()).dtype)
    with torch.no_grad(), torch.autocast(y.device.type, torch.bfloat16, enabled=bf16):
        estimates = model(y, degradation) if degradation is not None else model(y)
    if not torch.isfinite(estimates[0]).all():
        stage = next(k for k, x in enumerate(estimates[::-1], start=1) if not torch.isfinite(x).all())
        raise UserError(
            f"stage {stage} of the network gave NaN or infinite values: its weights are damaged"
            + ("" if not bf16 and y.dtype == torch.float32 else ", or need more than half precision")
        )
    return estimates[0].float()


def _restore_tiles(model, x: Tensor, tile: int | None, overlap: int | None, bf16: bool, step: int) -> Tensor:
    areas, overlap = tile_grid(*x.shape[2:], tile, overlap, step)
    return blend_tiles(areas, overlap, x.shape[2:], lambda area: _restore_whole(model, x[area], bf16))


def blend_tiles(
    areas: list[tuple[slice, slice]], overlap: int, size: tuple[int, int], compute: Callable[[tuple], Tensor]
) -> Tensor:
    """Compute an image (..., H, W) tile by tile, and blend the overlaps.

    ``areas`` and ``overlap`` are of `tile_grid`, ``size`` is (H, W), ``compute`` maps the indices (..., rows, columns)
    of a tile to (..., h, w), float32.
    """
    indices = [(..., rows, columns) for rows, columns in areas]
    if len(areas) == 1:
        return compute(indices[0])
    out = weight = None
    for area in indices:
        part = compute(area)
        if out is None:
            out, weight = part.new_zeros(*part.shape[:-2], *size), part.new_zeros(size)
        # The weights of a tile fall linearly over the overlap towards its borders.
        ramp = _ramp(part.shape[-2], overlap, part)[:, None] * _ramp(part.shape[-1], overlap, part)
        out[area] += ramp * part
        weight[area] += ramp
    return out / weight


def tile_grid(
    height: int, width: int, tile: int | None, overlap: int | None = None, step: int = MULTIPLE
) -> tuple[list[tuple[slice, slice]], int]:
    """The tiles (rows, columns) of an image, and the number of pixels that neighbours share at least.

    They are as few as possible, of one size, and no larger than needed. They begin at multiples of ``step``, so that
    the grid of the network's scales and of its local statistics is the whole image's.
    """
    if tile is None or (height <= tile and width <= tile):
        return [(slice(0, height), slice(0, width))], 0
    overlap = min(tile // 4, 64) if overlap is None else min(int(overlap), tile // 2)
    step = step if tile >= 2 * step else MULTIPLE
    tile, overlap = tile // step * step, -(-overlap // step) * step
    overlap = min(overlap, tile - step)
    rows, columns = (_cut(size, tile, overlap, step) for size in (height, width))
    return [(down, right) for down in rows for right in columns], overlap


def _restore_whole(model, x: Tensor, bf16: bool) -> Tensor:
    height, width = x.shape[2:]
    padded = pad_to_multiple(x, MULTIPLE)
    return estimate(model, padded.to(memory_format=torch.channels_last), bf16)[..., :height, :width]


def _cut(size: int, tile: int, overlap: int, step: int) -> list[slice]:
    """Tiles along one side, evenly spread, that begin at multiples of ``step`` and share at least ``overlap``."""
    if size <= tile:
        return [slice(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    tile = math.ceil((size + (count - 1) * overlap) / count / step) * step
    starts = [math.ceil(i * (size - tile) / (count - 1) / step) * step for i in range(count)]
    return [slice(start, min(start + tile, size)) for start in starts]


def _ramp(size: int, overlap: int, like: Tensor) -> Tensor:
    # The outermost quarter of the overlap, the worst of a tile, counts only where there is no other tile.
    position = torch.arange(size, device=like.device, dtype=like.dtype)
    distance = torch.minimum(position, size - 1 - position) + 1
    margin = overlap // 4
    return ((distance - margin) / (overlap + 1 - 2 * margin)).clamp(1e-6, 1)


def estimate_memory(model, pixels: int) -> int:
    """Rough peak memory in bytes of restoring an image of this many pixels in float32."""
    return 4 * _FLOATS_PER_PIXEL_AND_WIDTH * model.arguments["width"] * pixels


def automatic_tile(model, shape: tuple[int, int, int, int], device: torch.device) -> int | None:
    """None if a batch of this shape fits into nine tenths of the device's free memory.

    Else the side of the largest square tile that does, with a warning.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = available_memory()
    batch, _, height, width = shape
    needed = estimate_memory(model, batch * height * width)
    if needed <= 0.9 * free:
        return None
    side = int((0.9 * free / estimate_memory(model, batch)) ** 0.5) // 64 * 64
    side = max(min(side, 1024), 128)
    warnings.warn(
        f"restoring {width}x{height} pixels at once needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free: "
        f"using tiles of {side} (tile={side}); tile=None forces the whole image",
        stacklevel=3,
    )
    return side


def _check_dense(image):
    """Raise a UserError for what is no NumPy array or tensor of values."""
    if isinstance(image, np.ma.MaskedArray):
        raise UserError("restore takes no masked arrays; use image.filled(0)")
    if isinstance(image, Tensor):
        if image.is_nested or image.layout != torch.strided or image.is_quantized or image.device.type == "meta":
            raise UserError("restore takes no nested, sparse, quantised or meta tensors; pass a dense one, or a list")
    elif not isinstance(image, np.ndarray):
        raise UserError(f"restore takes a NumPy array, a tensor, or a list of them, not {type(image).__name__}")


def _as_batch(image, channels: int):
    """The image(s) as a (B, C, H, W) float32 tensor, and a function that converts the result to the caller's type."""
    _check_dense(image)
    if isinstance(image, np.ndarray):
        layout, dtype = "HWC", image.dtype
        scale = 1 if dtype.kind == "f" else {"u1": 255, "u2": 65535}.get(dtype.str[1:])
        # np.array copies: from_numpy would share the caller's memory
        x = torch.from_numpy(np.array(image, dtype=np.float32)) if scale else None
    else:
        layout, dtype = "CHW", image.dtype
        scale = 1 if image.is_floating_point() else {torch.uint8: 255, torch.uint16: 65535}.get(dtype)
        x = image.detach().to(torch.float32) if scale else None
    if scale is None:
        raise UserError(f"restore takes uint8, uint16 or floats in [0, 1], got {dtype}")
    shape, home = tuple(image.shape), x.device
    if x.dim() == 2:
        x = x[..., None] if layout == "HWC" else x[None]
    if x.dim() == 3:
        x = x[None]
    if x.dim() != 4 or x.numel() == 0:
        raise UserError(f"restore takes images ({', '.join(layout)}) or batches of them, got shape {shape}")
    if layout == "HWC":
        x = x.permute(0, 3, 1, 2)
    if x.shape[1] != channels:
        kind = {1: "grey", 3: "RGB", 4: "RGBA"}
        raise UserError(
            f"the network restores {kind.get(channels, channels)} images, got "
            f"{kind.get(x.shape[1], f'{x.shape[1]} channels')} (shape {shape}); convert the image first, "
            "e.g. np.stack([grey] * 3, axis=-1) or rgba[..., :3]"
        )
    x = x / scale
    low, high = x.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise UserError("the image has pixels that are NaN or infinite; replace them before restoring")
    if scale == 1 and (high > 4 or low < -3):  # strong noise stays within this
        raise UserError(f"float images must be in [0, 1], got {low:.3g} to {high:.3g}; divide by 255 (or 65535)")

    def back(restored: Tensor):
        restored = restored.to(home)
        if scale != 1:
            restored = (restored * scale).round()
        if layout == "CHW":
            return restored.to(dtype).reshape(shape).contiguous()
        return np.ascontiguousarray(restored.permute(0, 2, 3, 1).numpy().astype(dtype)).reshape(shape)

    return x, back
