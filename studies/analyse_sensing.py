"""Analyse compressive sensing networks: their sampling matrices, and where their errors are.

    python studies/analyse_sensing.py --weights compressive_sensing_10 compressive_sensing_25 --images Datasets/Set11
    python studies/analyse_sensing.py --weights step1/model_best.pth step2/model_best.pth --images Datasets/Set11

Prints, for each of the weights, how its matrix compares with the discrete cosine transform (DCT) and how large the
errors are at the borders of blocks and of the 128x128 tiles, and draws into --out:

    matrix.png   rows of each matrix as 32x32 images, and which frequencies all of them see, beside the DCT's
    seams.png    the error over the distance to the nearest border of a block, and the first image's errors where
                 four tiles meet
    ratios.png   if one of the networks is for a range of ratios: PSNR over the ratio

The matrix and the seams of a network for a range of ratios are those of all rows.
"""

import math
from pathlib import Path

from shared import Parser, UserError, command_imports, markdown_table, run_cli

with command_imports(__name__):
    import matplotlib
    import numpy as np
    import torch
    from matplotlib.figure import Figure
    from scipy.fft import dctn
    from torch import Tensor

    from dgunet import DGUNet, load_model
    from dgunet.data.images import read_luma
    from dgunet.data.pairs import list_images
    from dgunet.evaluation.metrics import evaluate_pair
    from dgunet.model.sampling import ScalableSampling, init_sampling_matrix
    from dgunet.runtime.fonts import drawable
    from dgunet.tasks.compressive_sensing import reconstruct_tiles, reconstruct_whole

TILE = 128
ROWS = 8  # drawn of each matrix
CURVE = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1)  # ratios that are scored


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, help="checkpoints, or names of shipped networks")
    add("--images", required=True, help="folder")
    add("--out", type=Path, default=Path("results/analysis"), help="folder to write (default: %(default)s)")
    args = parser.parse_args()
    models = {drawable(label(words))[0]: load_model(words, task="compressive_sensing") for words in args.weights}
    if len(models) < len(args.weights):
        raise UserError("--weights: two have the same name, which is that of the file and of its folder; rename one")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [[name, *compare_with_cosines(model.degradation.matrix.detach())] for name, model in models.items()]
    header = ["weights", "rows", "of as many cosines it sees", "rows' lengths", "largest cosine of two rows"]
    print(markdown_table(header, rows))
    paths = list_images(args.images)
    images, first = [read_luma(path) for path in paths], drawable(paths[0].stem)[0]
    errors, rows = {}, []
    for name, model in models.items():
        tiled, whole = (
            [reconstruct(model, image)[0].clip(0, 1) * 255 - image for image in images]
            for reconstruct in (reconstruct_tiles, reconstruct_whole)
        )
        errors[name] = tiled
        block = model.degradation.block
        at_tiles = [to_border(error.shape, TILE) == 0 for error in tiled]
        at_blocks = [(to_border(e.shape, block) == 0) & ~tiles for e, tiles in zip(tiled, at_tiles, strict=True)]
        everywhere = [np.ones(error.shape, bool) for error in tiled]
        cells = [(tiled, everywhere), (tiled, at_blocks), (tiled, at_tiles), (whole, at_tiles)]
        rows.append([name, *(f"{rms(*cell):.2f}" for cell in cells)])
    header = ["weights", "rms error", "at borders of blocks", "at borders of tiles", "there, whole images"]
    print("\n" + markdown_table(header, rows))
    names = [*map(label, args.weights), paths[0].stem]
    with matplotlib.rc_context({"font.family": drawable("".join(names))[1], "text.parse_math": False}):
        draw_matrices(models).savefig(args.out / "matrix.png")
        draw_seams(models, errors, first).savefig(args.out / "seams.png")
        if any(isinstance(model.degradation, ScalableSampling) for model in models.values()):
            scores = {name: over_ratios(model, images) for name, model in models.items()}
            print("\n" + ratio_table(scores))
            draw_ratios(scores).savefig(args.out / "ratios.png")
    print(f"\ndrawn in {args.out.absolute()}")


def label(words: str) -> str:
    """What weights are called: their name, or their file with its folder."""
    return "/".join(Path(words).parts[-2:])


# -------------------------------------------------------------------------------------------------------------- matrix


def seen_frequencies(matrix: Tensor) -> np.ndarray:
    """How much of each frequency of the DCT a matrix (M, block^2) sees, in [0, 1]: (block, block), from low to high.

    It is the squared length of the frequency's projection onto the span of the rows; their mixing and lengths do not
    count.
    """
    block = round(matrix.shape[1] ** 0.5)
    rows = torch.linalg.qr(matrix.double().mT).Q.mT.reshape(-1, block, block)  # orthonormal, of the same span
    return np.square(dctn(rows.numpy(), axes=(1, 2), norm="ortho")).sum(axis=0)


def lowest_cosines(matrix: Tensor) -> Tensor:
    """The M rows of lowest frequency of the DCT, for a matrix (M, block^2)."""
    return init_sampling_matrix("dct", len(matrix) / matrix.shape[1], round(matrix.shape[1] ** 0.5))


def compare_with_cosines(matrix: Tensor) -> list[str]:
    cosines = lowest_cosines(matrix)
    shared = seen_frequencies(matrix)[seen_frequencies(cosines) > 0.5].mean()
    lengths = matrix.norm(dim=1)
    unit = matrix / lengths[:, None]
    cross = (unit @ unit.mT).fill_diagonal_(0).abs().max().item()
    return [str(len(matrix)), f"{100 * shared:.1f} %", f"{lengths.min():.2f} to {lengths.max():.2f}", f"{cross:.2f}"]


def draw_matrices(models: dict[str, DGUNet]) -> Figure:
    figure = Figure(figsize=(1.25 * (ROWS + 3.4), 1.75 * len(models) + 0.5), layout="constrained")
    axes = figure.subplots(len(models), ROWS + 2, squeeze=False, width_ratios=[1] * ROWS + [1.6, 1.6])
    for line, (name, model) in zip(axes, models.items(), strict=True):
        matrix, block = model.degradation.matrix.detach(), model.degradation.block
        for axis, k in zip(line, np.linspace(0, len(matrix) - 1, ROWS).astype(int), strict=False):
            row = matrix[k].reshape(block, block)
            limit = row.abs().max().item()
            axis.imshow(row, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axis.set_title(f"row {k + 1}", fontsize=8)
        for axis, title, m in zip(
            line[-2:], ("all its rows see", "the DCT sees"), (matrix, lowest_cosines(matrix)), strict=True
        ):
            seen = axis.imshow(seen_frequencies(m), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=8)
        for axis in line:
            axis.set_axis_off()
        line[0].text(-0.15, 0.5, f"{name}\n{len(matrix)} rows", transform=line[0].transAxes, ha="right", va="center")
    figure.colorbar(seen, ax=axes[:, -1], shrink=0.5, label="part of a frequency that is seen")
    return figure


# --------------------------------------------------------------------------------------------------------------- seams


def to_border(shape: tuple[int, int], side: int) -> np.ndarray:
    """Each pixel's distance to the nearest inner border of square cells of ``side``: 0 if it touches one, (H, W)."""

    def near(length: int) -> np.ndarray:
        inner = np.arange(side, length, side)  # an image's edge is no seam
        gaps = np.abs(np.arange(length)[:, None] + 0.5 - inner) - 0.5
        return gaps.min(axis=1, initial=np.inf)

    rows, columns = (near(length) for length in shape)
    return np.minimum(rows[:, None], columns[None])


def inside_a_tile(shape: tuple[int, int], block: int) -> np.ndarray:
    """The pixels whose nearest border is between blocks of one tile, (H, W) bool.

    Without the outermost blocks of the image, which have no neighbour on one side.
    """
    rows, columns = ((np.arange(size) >= block) & (np.arange(size) < (size - 1) // block * block) for size in shape)
    return rows[:, None] & columns[None] & (to_border(shape, TILE) >= block // 2)


def rms(errors: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """The root mean square of several images' errors over the masked pixels; nan if there are none."""
    squares = np.concatenate([error[mask] ** 2 for error, mask in zip(errors, masks, strict=True)])
    return float(np.sqrt(squares.mean())) if squares.size else math.nan


def draw_seams(models: dict[str, DGUNet], errors: dict[str, list[np.ndarray]], image: str) -> Figure:
    shown = min(len(models), 5)
    figure = Figure(figsize=(4.6 + 2.6 * shown, 3.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    axes = figure.subplots(1, 1 + shown, squeeze=False, width_ratios=[1.8] + [1] * shown)[0]
    for name, model in models.items():
        block = model.degradation.block
        distances = [to_border(error.shape, block) for error in errors[name]]
        within = [inside_a_tile(error.shape, block) for error in errors[name]]
        curve = [
            rms(errors[name], [(d == k) & w for d, w in zip(distances, within, strict=True)]) for k in range(block // 2)
        ]
        middle = rms(errors[name], [(d >= block // 4) & w for d, w in zip(distances, within, strict=True)])
        axes[0].plot(np.array(curve) / middle, marker=".", label=name)
    axes[0].set(xlabel="pixels to the nearest border of a block", title="rms error, beside that in blocks' middle")
    axes[0].legend(fontsize=8)
    axes[0].grid(alpha=0.3)
    for axis, (name, found) in zip(axes[1:], errors.items(), strict=False):
        block, error = models[name].degradation.block, found[0]
        top, left = (max(min(TILE, size - TILE // 2) - TILE // 2, 0) for size in error.shape)
        part = np.abs(error[top : top + TILE, left : left + TILE])
        limit = float(np.percentile(part, 99.5)) or 1.0
        axis.imshow(part, cmap="gray_r", vmin=0, vmax=limit, interpolation="nearest")
        for at in range(0, TILE, block):  # ticks: where blocks meet; lines: where tiles meet
            for mark, start, size in ((axis.axvline, left, part.shape[1]), (axis.axhline, top, part.shape[0])):
                if (start + at) % TILE == 0 and 0 < at < size:
                    mark(at - 0.5, color="C3", linewidth=0.8)
        axis.set_xticks(np.arange(block - left % block, part.shape[1], block) - 0.5, [])
        axis.set_yticks(np.arange(block - top % block, part.shape[0], block) - 0.5, [])
        axis.set_title(f"{image}, {name}\nerror, black: {limit:.0f} levels", fontsize=8)
    return figure


# -------------------------------------------------------------------------------------------------------------- ratios


def over_ratios(model: DGUNet, images: list[np.ndarray]) -> dict[float, float]:
    """The mean PSNR in dB, computed as test.py does, by ratio; of a network for one ratio, that alone."""
    sampling = model.degradation
    ratios = [len(sampling.matrix) / sampling.block**2]
    if isinstance(sampling, ScalableSampling):
        ratios = [r for r in CURVE if sampling.covers(r)]
    return {
        r: float(np.mean([evaluate_pair(reconstruct_tiles(model, p, ratio=r)[0], p, "cs_y")[0] for p in images]))
        for r in ratios
    }


def ratio_table(found: dict[str, dict[float, float]]) -> str:
    rows = [[name, ", ".join(f"{100 * r:.3g}: {x:.2f}" for r, x in scores.items())] for name, scores in found.items()]
    return markdown_table(["weights", "PSNR in dB by ratio in percent"], rows)


def draw_ratios(found: dict[str, dict[float, float]]) -> Figure:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, scores in found.items():
        axes.plot([100 * r for r in scores], scores.values(), marker="." if len(scores) > 1 else "o", label=name)
    axes.set(xscale="log", xlabel="measurements, percent of the pixels", ylabel="PSNR in dB")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run_cli(main)
