"""The figure of stages: how the estimate becomes a picture."""

import io
from pathlib import Path

import numpy as np
import torch

from dgunet.errors import optional
from dgunet.files import replacing
from dgunet.proximal import MULTIPLE
from dgunet.transforms import pad_to_multiple, to_uint8, unit_range


def stages_of(model, degraded: np.ndarray) -> list[np.ndarray]:
    """The estimates x_1 ... x_K of a picture, (H, W, C) uint8 or floats in [0, 1], as uint8 of the same shape."""
    height, width = degraded.shape[:2]
    y = torch.from_numpy(unit_range(degraded)).permute(2, 0, 1)[None]
    parameter = next(model.parameters())
    with torch.inference_mode():
        estimates = model(pad_to_multiple(y, MULTIPLE).to(parameter))[::-1]
    estimates = [x[0, :, :height, :width].permute(1, 2, 0).float().cpu().numpy() for x in estimates]
    return [to_uint8(x) for x in estimates]


def label_stages(estimates: list[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """What `stages_of` gives, each with its name in the figure."""
    names = [f"after stage {k}" for k in range(1, len(estimates))] + ["restored"]
    return list(zip(names, estimates, strict=True))


def draw_stages(
    whole: np.ndarray,
    crop: tuple[int, int, int, int],
    tiles: list[tuple[str, np.ndarray, float]],
    out: Path,
    title: str | None = None,
):
    """Write a PNG: the whole picture with the frame of a crop, then that crop after each stage, in two rows.

    Args:
        whole: uint8, (H, W, 3) or (H, W).
        crop: top, left, height, width.
        tiles: label, picture and PSNR of each crop; inf where there is none.
        out: its folder is made if needed; the file appears when it is complete.
        title: above all.
    """
    Figure = optional("matplotlib.figure").Figure
    Rectangle = optional("matplotlib.patches").Rectangle
    columns = -(-(len(tiles) + 1) // 2)
    figure = Figure(figsize=(2.3 * columns, 5.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    figure.suptitle(title)
    axes = figure.subplots(2, columns).ravel()
    top, left, height, width = crop
    grey = dict(cmap="gray", vmin=0, vmax=255)  # of pictures without colour
    axes[0].imshow(whole, **grey)
    axes[0].add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="yellow", linewidth=1.5))
    axes[0].set_title("the whole picture", fontsize=10)
    for axis, (label, image, score) in zip(axes[1:], tiles, strict=False):
        axis.imshow(image, interpolation="nearest", **grey)
        axis.set_title(label if np.isinf(score) else f"{label}\n{score:.2f} dB", fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    encoded = io.BytesIO()
    optional("matplotlib.backends.backend_agg").FigureCanvasAgg(figure).print_png(encoded)
    with replacing(out) as temporary:
        temporary.write_bytes(encoded.getbuffer())
