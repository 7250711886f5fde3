"""The figure of stages: the estimate x_k after each stage."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgunet.data.transforms import pad_to_blocks, pad_to_multiple, to_uint8, unit_range
from dgunet.inference import blend_tiles, tile_grid
from dgunet.introspect import after_each_stage
from dgunet.model.local import with_local_statistics
from dgunet.model.network import DGUNet
from dgunet.model.proximal import MULTIPLE
from dgunet.model.sampling import BlockSampling
from dgunet.runtime.files import atomic_write
from dgunet.runtime.fonts import set_title


def estimate_stages(
    model: DGUNet,
    image: np.ndarray,
    *,
    bf16: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
    ratio: float | None = None,
    progress: Callable[[float, str], None] = lambda fraction, description: None,
) -> list[np.ndarray]:
    """The estimates x_0, x_1, ..., x_K of an image, all of its shape, float32, clamped to [0, 1].

    Args:
        model: a network for images, or for compressive sensing, which is given the image's measurements. Statistics
            are local where ``model.local`` says so, see `restore`.
        image: (H, W, C) or (H, W), degraded; of compressive sensing (H, W), clean; uint8, or floats in [0, 1].
        bf16: compute in bfloat16: faster where the hardware has it, up to some hundredths of a dB off.
        tile, overlap: as in `restore`; where ``model.local`` has a smaller tile, that. None: as a whole.
        ratio: of compressive sensing, measurements per pixel, see `BlockSampling.at`; None: with all rows.
        progress: called with the fraction done, in [0, 1], and a description of the next step.
    """
    height, width = image.shape[:2]
    if side := model.local.get("tile"):
        tile, overlap = min(side, tile or side), None
    if model.local.keys() - {"tile"}:
        model = with_local_statistics(model, model.local)
    degradation, parameter = model.degradation, next(model.parameters())
    sensing = isinstance(degradation, BlockSampling)
    if sensing:
        degradation = degradation.at(ratio)
    multiple, pad = (degradation.block, pad_to_blocks) if sensing else (MULTIPLE, pad_to_multiple)
    x = torch.from_numpy(np.atleast_3d(unit_range(image))).permute(2, 0, 1)[None]
    x = pad(x, multiple).to(parameter)
    areas, overlap = tile_grid(*x.shape[2:], tile, overlap, multiple)
    done = 0

    def report():
        place, stage = divmod(done, model.stages)
        which = f", tile {place + 1} of {len(areas)}" if len(areas) > 1 else ""
        if place < len(areas):
            progress(done / model.stages / len(areas), f"stage {stage + 1} of {model.stages}{which}")

    def count(*_):
        nonlocal done
        done += 1
        report()

    def stages(area: tuple) -> Tensor:
        start = y = x[area].contiguous(memory_format=torch.channels_last)
        if sensing:
            y = degradation.A(start)
        if degradation is not None:
            start = degradation.A_adjoint(y)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return torch.cat([start, *model(y)[::-1]]).float()

    report()
    with torch.inference_mode(), after_each_stage(model, count):
        estimates = blend_tiles(areas, overlap, x.shape[2:], stages)
    estimates = estimates[..., :height, :width].clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [stage.reshape(image.shape) for stage in estimates]


def restore_stages(model: DGUNet, image: np.ndarray, **options) -> list[np.ndarray]:
    """As `estimate_stages`, uint8."""
    return [to_uint8(stage) for stage in estimate_stages(model, image, **options)]


def label_stages(estimates: list[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The estimates x_1, ..., x_K, each with its name in the figure."""
    names = [f"after stage {k}" for k in range(1, len(estimates))] + ["restored"]
    return list(zip(names, estimates, strict=True))


def draw_stages(
    whole: np.ndarray,
    crop: tuple[int, int, int, int],
    tiles: list[tuple[str, np.ndarray, float]],
    out: Path,
    title: str | None = None,
    comment: str = "",
):
    """Write a PNG: the whole image with the frame of a crop, then that crop after each stage, in two rows.

    Args:
        whole: uint8, (H, W, 3) or (H, W).
        crop: top, left, height, width.
        tiles: label, image and PSNR of each crop; inf where there is none.
        out: its folder is made if needed; the file appears when it is complete.
        title: see `set_title`.
        comment: stored in the file, see `photos.read_comment`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = -(-(len(tiles) + 1) // 2)
    figure = Figure(figsize=(2.3 * columns, 5.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    set_title(figure, title or "")
    axes = figure.subplots(2, columns).ravel()
    top, left, height, width = crop
    grey = dict(cmap="gray", vmin=0, vmax=255)  # of images without colour
    axes[0].imshow(whole, **grey)
    axes[0].add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="yellow", linewidth=1.5))
    axes[0].set_title("the whole image", fontsize=10)
    for axis, (label, image, score) in zip(axes[1:], tiles, strict=False):
        axis.imshow(image, interpolation="nearest", **grey)
        axis.set_title(label if np.isinf(score) else f"{label}\n{score:.2f} dB", fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    with atomic_write(out) as temporary:
        figure.savefig(temporary, format="png", metadata={"Comment": comment} if comment else None)


def centre_crop(image: np.ndarray, side: int) -> np.ndarray:
    """The centre of an image (H, W, ...), of at most ``side`` pixels a side."""
    top, left, height, width = middle(image.shape, side)
    return image[top : top + height, left : left + width]


def middle(shape: tuple, side: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of `centre_crop`."""
    height, width = (min(side, whole) for whole in shape[:2])
    return (shape[0] - height) // 2, (shape[1] - width) // 2, height, width
