"""Analyse a network: what each stage does to an image, and which degradation it has learned.

    python studies/analyse.py --weights denoising_gaussian --pair Datasets/demo/denoising/test astronaut
    python studies/analyse.py --weights W --pair Datasets/Set11 barbara                     # compressive sensing
    python studies/analyse.py --weights W --pair DIR NAME --kernel kernel.npy               # the true blur beside it

Prints a table with a line for each stage, and draws into --out:

    stages.png       x_k, what the gradient step changes (v_k - x_{k-1}), what the proximal mapping changes (x_k - v_k)
    curves.png       PSNR, data term ||A x - y||, and step size rho_k from stage to stage
    degradation.png  how A and A_adjoint spread a pixel, beside the true degradation where it is known

Differences are root mean squares over the whole image in 8-bit levels; in brackets, what remains when a constant may be
added to each colour. StepMeasures in dgunet/introspect.py describes the columns. Changes are drawn as means over the
colours; of a learned operator the derivative is drawn. A network for any known blur needs --kernel.
"""

from pathlib import Path

from shared import Parser, command_imports, markdown_table, run_cli

with command_imports(__name__):
    import numpy as np
    import torch
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
    from plot_stages import find_window, read_pair
    from torch import Tensor

    from dgunet import DGUNet, load_model
    from dgunet.data.images import to_tensor
    from dgunet.data.transforms import to_uint8, unit_range
    from dgunet.evaluation.metrics import psnr_batch
    from dgunet.introspect import StepMeasures, Trace, impulse_response, measure_step, rms, trace
    from dgunet.model.degradations import Blur, LearnedDegradation
    from dgunet.model.proximal import MULTIPLE
    from dgunet.model.sampling import BlockSampling
    from dgunet.runtime.files import read_array

REACH = 16  # pixels drawn around an impulse; a learned operator, two 3x3 convolutions, reaches 2
LEARNED_REACH = 4


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint")
    add("--pair", nargs=2, required=True, metavar=("DIR", "NAME"), help="folder with input/, target/, or images")
    add("--crop", nargs=3, type=int, metavar=("TOP", "LEFT", "SIDE"), help="part that is drawn (default: centre)")
    add("--kernel", type=Path, help="kernel of the true blur (.npy), drawn beside the learned one")
    add("--out", type=Path, default=Path("results/analysis"), help="folder to write (default: %(default)s)")
    args = parser.parse_args()

    model = load_model(args.weights)
    kernel = None if args.kernel is None else torch.from_numpy(read_array(args.kernel)).float()
    given = Blur(kernel) if kernel is not None and isinstance(model.degradation, Blur) else None
    y, truth = read_case(model, *args.pair)
    top, left, side = find_window(truth.shape[2:], args.crop, usual=128, least=2 * LEARNED_REACH + 1)
    window = slice(top, top + side), slice(left, left + side)
    with torch.no_grad():
        record = trace(model, y, given)
        rows = [measure_step(step, y, truth) for step in record.steps]
    initial = psnr(record.initial, truth)
    print_table(rows, initial)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_stages(record, truth, window).savefig(args.out / "stages.png")
    draw_curves(rows, initial).savefig(args.out / "curves.png")
    if record.steps[0].degradation is not None:
        draw_degradation(record, y, window, kernel).savefig(args.out / "degradation.png")
    print(f"drawn in {args.out.absolute()}")


def read_case(model: DGUNet, folder: str, name: str) -> tuple[Tensor, Tensor]:
    """The network's input y and the ground truth (1, C, H, W), cropped to multiples of what the network needs."""
    sensing = isinstance(model.degradation, BlockSampling)
    multiple = model.degradation.block if sensing else MULTIPLE
    pair = [unit_range(to_tensor(image)[None]) for image in read_pair(model, folder, name)]
    height, width = (size // multiple * multiple for size in pair[0].shape[2:])
    y, truth = (image[..., :height, :width] for image in pair)
    return (model.degradation.A(truth) if sensing else y), truth


def psnr(x: Tensor, truth: Tensor) -> float:
    return psnr_batch(x, truth).item()


def print_table(rows: list[StepMeasures], initial: float):
    """As Markdown, without the columns that are empty for this network."""

    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def levels(value: float | None, tinted: float | None = None) -> str:
        text = "" if value is None else f"{255 * value:.2f}"
        return text if tinted is None else f"{text} ({255 * tinted:.2f})"

    columns = {
        "stage": lambda row: str(row.k),
        "rho": lambda row: number(row.rho, digits=3),
        "PSNR of v": lambda row: number(row.psnr_v),
        "PSNR of x": lambda row: number(row.psnr_x),
        "gradient step": lambda row: levels(row.gradient_step),
        "proximal step": lambda row: levels(row.proximal_step),
        "A x - y before": lambda row: levels(row.data_term_before),
        "A v - y": lambda row: levels(row.data_term_v),
        "A x - y after": lambda row: levels(row.data_term_x),
        "A truth - y": lambda row: levels(row.data_term_truth, row.data_term_truth_tinted),
        "truth - y": lambda row: levels(row.truth_to_y, row.truth_to_y_tinted),
        "not adjoint": lambda row: number(row.adjoint_mismatch),
        "descent": lambda row: number(row.descent),
        "towards y": lambda row: number(row.towards_y),
    }  # fmt: skip
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: values for name, values in cells.items() if any(values)}
    print(f"x_0: {initial:.2f} dB")
    print(markdown_table(list(cells), list(zip(*cells.values(), strict=True))))


# ------------------------------------------------------------------------------------------------------------ images


def crop_for_imshow(x: Tensor, window: tuple[slice, slice]) -> np.ndarray:
    """The window of an image (1, C, H, W), as imshow takes it."""
    image = to_uint8(x[(0, ..., *window)].permute(1, 2, 0).cpu().numpy())
    return image[..., 0] if image.shape[2] == 1 else image


def draw_stages(record: Trace, truth: Tensor, window: tuple[slice, slice]) -> Figure:
    steps = record.steps
    changes = [
        [255 * x[(0, ..., *window)].mean(dim=0).cpu().numpy() for x in (s.gradient_step, s.proximal_step)]
        for s in steps
    ]
    # The colour scale is that of the middle stages. The first may change the brightness; the last adds a residual to y
    # where the degradation is learned, and its v_K need not be an image: its title then says "off the scale".
    limit = float(np.percentile(np.abs(changes[1:-1] or changes), 99.5)) or 1.0
    figure = Figure(figsize=(1.9 * (len(steps) + 2), 6.8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    axes = figure.subplots(3, len(steps) + 2, squeeze=False)
    grey = dict(cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    start = "$x_0=y$" if record.y.shape == record.initial.shape else "$x_0=A^T y$"
    columns = [(start, record.initial), *((f"$x_{s.k}$", s.x) for s in steps), ("ground truth", truth)]
    for axis, (name, x) in zip(axes[0], columns, strict=True):
        axis.imshow(crop_for_imshow(x, window), **grey)
        axis.set_title(name if x is truth else f"{name}\n{psnr(x, truth):.2f} dB", fontsize=10)
    for (above, below), step, pair in zip(axes[1:, 1:-1].T, steps, changes, strict=True):
        for axis, change, symbol, whole in (
            (above, pair[0], f"$v_{step.k}-x_{step.k - 1}$", step.gradient_step),
            (below, pair[1], f"$x_{step.k}-v_{step.k}$", step.proximal_step),
        ):
            image = axis.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            beyond = ", off the scale" if np.mean(np.abs(change) > limit) > 0.5 else ""
            axis.set_title(f"{symbol}\nrms {255 * rms(whole):.2f}{beyond}", fontsize=10)
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


def draw_curves(rows: list[StepMeasures], initial: float) -> Figure:
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    axes = figure.subplots(1, 3)
    k = [row.k for row in rows]
    axes[0].plot([0, *k], [initial, *(row.psnr_x for row in rows)], marker="o", label="$x_k$")
    axes[0].plot(k, [row.psnr_v for row in rows], marker=".", linestyle=":", label="$v_k$, after the gradient step")
    axes[0].set(title="PSNR [dB]")
    if rows[0].data_term_x is not None:
        for name, label, style in (
            ("data_term_before", "$|A_k x_{k-1} - y|$, before the stage", "o:"),
            ("data_term_v", "$|A_k v_k - y|$, after its gradient step", "v-"),
            ("data_term_x", "$|A_k x_k - y|$, after its proximal mapping", "s-"),
            ("data_term_truth", "$|A_k\\,truth - y|$", "x--"),
            ("truth_to_y", "$|truth - y|$", "k--"),
        ):
            values = [getattr(row, name) for row in rows]
            if values[0] is not None and 255 * values[0] > 1e-3:  # zero for the truth where measurements have no noise
                axes[1].plot(k, [255 * v for v in values], style, markersize=5, linewidth=1, label=label)
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter(LogFormatter())
        axes[1].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    axes[1].set(title="data term, rms in 8-bit levels")
    axes[2].plot(k, [np.nan if row.rho is None else row.rho for row in rows], marker="o")
    axes[2].set(title="step size $\\rho_k$")
    for axis in axes:
        axis.set_xlabel("stage k")
        axis.set_xticks([0, *k])
        axis.grid(alpha=0.3)
        if axis.lines and axis is not axes[2]:
            axis.legend(fontsize=8)
    return figure


def draw_degradation(record: Trace, y: Tensor, window: tuple[slice, slice], kernel: Tensor | None) -> Figure:
    """The response of every distinct A and A_adjoint to an impulse in the middle of the window."""
    row, column = ((part.start + part.stop) // 2 for part in window)
    block = getattr(record.steps[0].degradation, "block", 1)
    row, column = (place // block * block + block // 2 for place in (row, column))  # the middle of a block
    learned = isinstance(record.steps[0].degradation, LearnedDegradation)
    reach = LEARNED_REACH if learned else min(REACH, *((part.stop - part.start) // 2 for part in window))
    near = (slice(row - reach, row + reach + 1), slice(column - reach, column + reach + 1))
    responses: list[tuple[str, str, Tensor]] = []  # (symbol, stages, response); those of one symbol share a scale
    seen = set()
    for step in record.steps:
        A, x = step.degradation, step.before
        if id(A) in seen:
            continue
        seen.add(id(A))
        stages = [s.k for s in record.steps if s.degradation is A]
        name = f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]} to {stages[-1]}"
        if y.shape == x.shape:
            responses.append(("$A$", name, impulse_response(A.A, x, row, column)[near]))
            responses.append(("$A^T$", name, impulse_response(A.A_adjoint, A.A(x) - y, row, column)[near]))
        else:
            both = impulse_response(lambda x, A=A: A.A_adjoint(A.A(x)), x, row, column)
            responses.append(("$A^T A$", name, both[near]))
    responses.sort(key=lambda response: response[0])
    if kernel is not None:
        responses.append(("the true kernel", "", kernel))
    figure = Figure(figsize=(max(2.2 * len(responses), 4.4), 3.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    colours = "" if record.initial.shape[1] == 1 else " (a grey one, mean of the colours)"
    figure.suptitle(f"What one pixel becomes{colours}", fontsize=11)
    axes = figure.subplots(1, len(responses), squeeze=False)[0]
    limits: dict[str, float] = {}
    for symbol, _, response in responses:
        around = response.detach().clone()
        around[around.shape[0] // 2, around.shape[1] // 2] = 0
        limits[symbol] = max(limits.get(symbol, 0.0), around.abs().max().item())
    for axis, (symbol, name, response) in zip(axes, responses, strict=True):
        values = response.detach().cpu().numpy().copy()
        middle, whole = (values.shape[0] // 2, values.shape[1] // 2), values.sum()
        own, values[middle] = values[middle], np.nan  # it would hide what is around it
        limit = limits[symbol] or 1.0
        axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.plot(middle[1], middle[0], marker="x", color="black", markersize=5)
        title = f"{symbol}, {name}" if name else symbol
        axis.set_title(f"{title}\nx: {own:.2f}, sum {whole:.2f}\ncolours to $\\pm${limit:.2f}", fontsize=10)
        axis.set_axis_off()
    return figure


if __name__ == "__main__":
    run_cli(main)
