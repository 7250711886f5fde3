"""Look inside a network: what each stage does to a picture, and what its degradation has become.

    python scripts/analyse.py --weights denoising_gaussian --pair Datasets/demo/denoising/test astronaut
    python scripts/analyse.py --weights W --pair Datasets/Set11 barbara                     # compressive sensing
    python scripts/analyse.py --weights W --pair DIR NAME --kernel kernel.npy               # the true blur beside it

Prints a table with a line for each stage, and draws into --out:

    stages.png       x_k, what the gradient step changes (v_k - x_{k-1}), what the proximal mapping changes (x_k - v_k)
    curves.png       PSNR, data term ||A x - y||, and step size rho_k from stage to stage
    degradation.png  how A and A_adjoint spread a pixel, beside the true degradation where it is known

Numbers are in 8-bit levels, root mean squares; of learned operators what is drawn is their derivative.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from plot_stages import find_window, read_pair
from torch import Tensor

from dgunet import DGUNet, load_model
from dgunet.data import to_tensor
from dgunet.degradations import BlockSampling, LearnedDegradation, read_array
from dgunet.errors import run_cli
from dgunet.inside import Step, Trace, adjoint_mismatch, data_term, impulse_response, trace
from dgunet.metrics import psnr_batch
from dgunet.proximal import MULTIPLE
from dgunet.transforms import pad_to_blocks, pad_to_multiple, to_uint8, unit_range

REACH = 16  # pixels around an impulse that are drawn; a learned operator has two 3x3 convolutions, and reaches 2
LEARNED_REACH = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint")
    add("--pair", nargs=2, required=True, metavar=("DIR", "NAME"), help="folder with input/, target/, or pictures")
    add("--crop", nargs=3, type=int, metavar=("TOP", "LEFT", "SIDE"), help="part that is drawn (default: centre)")
    add("--kernel", type=Path, help="the true blur's kernel, a .npy file, to be drawn beside what was learned")
    add("--out", type=Path, default=Path("results/analysis"), help="folder (default: results/analysis)")
    args = parser.parse_args()

    model = load_model(args.weights)
    y, truth = read_case(model, *args.pair)
    top, left, side = find_window(truth.shape[2:], args.crop, usual=128, least=2 * LEARNED_REACH + 1)
    window = slice(top, top + side), slice(left, left + side)
    kernel = None if args.kernel is None else torch.from_numpy(read_array(args.kernel))
    with torch.no_grad():
        record = trace(model, y)
        rows = [measure(step, y, truth) for step in record.steps]
    print_table(rows, psnr(record.initial, truth))
    args.out.mkdir(parents=True, exist_ok=True)
    save(draw_stages(record, truth, window), args.out / "stages.png")
    save(draw_curves(rows, psnr(record.initial, truth)), args.out / "curves.png")
    if record.steps[0].degradation is not None:
        save(draw_degradation(record, y, window, kernel), args.out / "degradation.png")
    print(f"drawn in {args.out.absolute()}")


def read_case(model: DGUNet, folder: str, name: str) -> tuple[Tensor, Tensor]:
    """What the network is given, and the true picture (1, C, H, W), padded to what the network takes."""
    pictures = (unit_range(to_tensor(picture)[None]) for picture in read_pair(model, folder, name))
    if isinstance(model.degradation, BlockSampling):
        _, truth = (pad_to_blocks(picture, model.degradation.block) for picture in pictures)
        return model.degradation.A(truth), truth
    y, truth = (pad_to_multiple(picture, MULTIPLE) for picture in pictures)
    return y, truth


# ------------------------------------------------------------------------------------------------------------- numbers


def psnr(x: Tensor, truth: Tensor) -> float:
    return psnr_batch(x, truth).item()


def rms(x: Tensor) -> float:
    return 255 * x.square().mean().sqrt().item()


def measure(step: Step, y: Tensor, truth: Tensor) -> dict[str, float]:
    """A line of the table; nan where a network has no degradation."""
    row = {
        "stage": step.k,
        "rho": np.nan if step.rho is None else step.rho,
        "PSNR of v": psnr(step.v, truth),
        "PSNR of x": psnr(step.x, truth),
        "gradient step": rms(step.gradient_step),
        "proximal step": rms(step.proximal_step),
    }
    if step.degradation is not None:
        row |= {
            "|A x_{k-1} - y|": 255 * data_term(step.degradation, step.before, y),
            "|A v - y|": 255 * data_term(step.degradation, step.v, y),
            "|A x - y|": 255 * data_term(step.degradation, step.x, y),
            "|A truth - y|": 255 * data_term(step.degradation, truth, y),
            "not adjoint": adjoint_mismatch(step.degradation, step.before, y),
        }
        if y.shape == truth.shape:
            row["|truth - y|"] = rms(truth - y)
    return row


def print_table(rows: list[dict[str, float]], initial: float):
    print(f"x_0: {initial:.2f} dB")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:d}" if isinstance(value, int) else f"{value:.3f}" for value in row.values())
            + " |"
        )


# ------------------------------------------------------------------------------------------------------------ pictures


def shown(x: Tensor, window: tuple[slice, slice]) -> np.ndarray:
    """A part of a picture, for imshow."""
    picture = to_uint8(x[0][(slice(None), *window)].permute(1, 2, 0).cpu().numpy())
    return picture[..., 0] if picture.shape[2] == 1 else picture


def draw_stages(record: Trace, truth: Tensor, window: tuple[slice, slice]) -> Figure:
    steps = record.steps
    changes = [
        [
            255 * change[0][(slice(None), *window)].mean(dim=0).cpu().numpy()
            for change in (s.gradient_step, s.proximal_step)
        ]
        for s in steps
    ]
    # The middle stages decide on the scale. The first may have to change the brightness; the last adds a residual to y
    # where the degradation is learned, and its v_K need not be a picture at all.
    limit = float(np.percentile(np.abs(changes[1:-1] or changes), 99.5)) or 1.0
    figure = Figure(figsize=(1.9 * (len(steps) + 2), 6.6), layout="constrained")
    axes = figure.subplots(3, len(steps) + 2, squeeze=False)
    grey = dict(cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    start = "$x_0=y$" if record.y.shape == record.initial.shape else "$x_0=A^T y$"
    columns = [(start, record.initial), *((f"$x_{s.k}$", s.x) for s in steps), ("ground truth", truth)]
    for axis, (name, x) in zip(axes[0], columns, strict=True):
        axis.imshow(shown(x, window), **grey)
        axis.set_title(name if x is truth else f"{name}\n{psnr(x, truth):.2f} dB", fontsize=10)
    for (above, below), step, pair in zip(axes[1:, 1:-1].T, steps, changes, strict=True):
        for axis, change, symbol, whole in (
            (above, pair[0], f"$v_{step.k}-x_{step.k - 1}$", step.gradient_step),
            (below, pair[1], f"$x_{step.k}-v_{step.k}$", step.proximal_step),
        ):
            image = axis.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axis.set_title(f"{symbol}\nrms {rms(whole):.2f}", fontsize=10)
    for axis, words in (
        (axes[1, 0], "what the\ngradient step\nchanges"),
        (axes[2, 0], "what the\nproximal mapping\nchanges"),
    ):
        axis.text(0.5, 0.5, words, ha="center", va="center", fontsize=11)
    for axis in axes.ravel():
        axis.set_axis_off()
    scale = axes[1, -1].inset_axes([0.1, 0.5, 0.8, 0.08])
    figure.colorbar(image, cax=scale, orientation="horizontal", extend="both", label="change, 8-bit levels")
    return figure


def draw_curves(rows: list[dict[str, float]], initial: float) -> Figure:
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    k = [row["stage"] for row in rows]
    axes[0].plot([0, *k], [initial, *(row["PSNR of x"] for row in rows)], marker="o", label="$x_k$")
    axes[0].plot(
        k, [row["PSNR of v"] for row in rows], marker=".", linestyle=":", label="$v_k$, after the gradient step"
    )
    axes[0].set(title="PSNR [dB]")
    if "|A x - y|" in rows[0]:
        for key, label, style in (
            ("|A x_{k-1} - y|", "$|A_k x_{k-1} - y|$, before the stage", "o:"),
            ("|A v - y|", "$|A_k v_k - y|$, after its gradient step", "v-"),
            ("|A x - y|", "$|A_k x_k - y|$, after its proximal mapping", "s-"),
            ("|A truth - y|", "$|A_k\\,truth - y|$", "x--"),
            ("|truth - y|", "$|truth - y|$", "k--"),
        ):
            if key in rows[0] and rows[0][key] > 1e-3:  # of a known degradation the truth's is zero
                axes[1].plot(k, [row[key] for row in rows], style, markersize=5, linewidth=1, label=label)
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter(LogFormatter())
        axes[1].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    axes[1].set(title="data term, rms in 8-bit levels")
    axes[2].plot(k, [row["rho"] for row in rows], marker="o")
    axes[2].set(title="step size $\\rho_k$")
    for axis in axes:
        axis.set_xlabel("stage k")
        axis.set_xticks([0, *k])
        axis.grid(alpha=0.3)
        if axis.lines and axis is not axes[2]:
            axis.legend(fontsize=8)
    return figure


def draw_degradation(record: Trace, y: Tensor, window: tuple[slice, slice], kernel: Tensor | None) -> Figure:
    """Responses to one pixel in the middle of the window, of every degradation that there is."""
    row, column = ((part.start + part.stop) // 2 for part in window)
    block = getattr(record.steps[0].degradation, "block", 1)
    row, column = (place // block * block + block // 2 for place in (row, column))  # the middle of a block
    learned = isinstance(record.steps[0].degradation, LearnedDegradation)
    reach = LEARNED_REACH if learned else min(REACH, *((part.stop - part.start) // 2 for part in window))
    near = (slice(row - reach, row + reach + 1), slice(column - reach, column + reach + 1))
    responses: list[tuple[str, Tensor]] = []
    seen = set()
    for step in record.steps:
        A, x = step.degradation, step.before
        if id(A) in seen:
            continue
        seen.add(id(A))
        stages = [s.k for s in record.steps if s.degradation is A]
        name = f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]} to {stages[-1]}"
        if y.shape == x.shape:
            responses.append((f"$A$, {name}", impulse_response(A.A, x, row, column)[near]))
            residual = A.A(x) - y
            responses.append((f"$A^T$, {name}", impulse_response(A.A_adjoint, residual, row, column)[near]))
        else:
            responses.append(
                (f"$A^T A$, {name}", impulse_response(lambda x, A=A: A.A_adjoint(A.A(x)), x, row, column)[near])
            )
    if kernel is not None:
        responses.append(("the true kernel", kernel))
    figure = Figure(figsize=(2.2 * len(responses), 3.2), layout="constrained")
    figure.suptitle("What one pixel becomes", fontsize=11)
    axes = figure.subplots(1, len(responses), squeeze=False)[0]
    for axis, (name, response) in zip(axes, responses, strict=True):
        values = response.detach().cpu().numpy()
        around = values.copy()
        around[values.shape[0] // 2, values.shape[1] // 2] = 0
        limit = float(np.abs(around).max()) or 1.0
        axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        middle = values[values.shape[0] // 2, values.shape[1] // 2]
        axis.set_title(
            f"{name}\ncentre {middle:.2f}, sum {values.sum():.2f}\ncolours to $\\pm${limit:.2f}", fontsize=10
        )
        axis.set_axis_off()
    return figure


def save(figure: Figure, path: Path):
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    run_cli(main)
