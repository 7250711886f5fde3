"""Measure what each part of the network contributes: one change at a time, several seeds, one small budget.

    python studies/ablation.py --train_dir Datasets/train/DIV2K_BSD400 --out results/ablation
    python studies/ablation.py --train_dir ... --devices 0 1 2 3 --epochs 40        # four GPUs, a run on each at a time

Trains small networks (five stages, width 16) for Gaussian noise and for compressive sensing, one run for each variant
and seed; a variant differs from the first in what its name says and in nothing else. The learning rate follows a
cosine. The score is the mean PSNR of the 256x256 centres of held-out images. Writes ablation.csv, ablation.md (a
table) and ablation.png. An interrupted study is resumed by the same command. On one CPU core a run of three epochs of
380 images takes a minute or two.
"""

import csv
import queue
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from shared import UserError, command_imports, markdown_table, matching, run_cli

with command_imports(__name__):
    import numpy as np
    from matplotlib.figure import Figure
    from runs import SHORT_RUN, check_images, study_parser, terminate_runs_at_exit, train

KERNEL = "one_pixel.npy"
SMALL = {"width": 16, "growth": 8, "final_growth": 8, "stages": 5}
COMMON = SHORT_RUN | {
    "OPTIM.LR_MIN": 1e-5, "OPTIM.WARMUP_EPOCHS": 0, "OPTIM.SCHEDULE": "cosine", "OPTIM.COSINE_EXTRA_EPOCHS": 0,
    "TRAINING.VAL_DIR": "", "TRAINING.VAL_TIMES": 1,
}  # fmt: skip
TASKS = {
    "denoising": {
        "MODEL.NAME": "denoising_dgunet", "SYNTHESIS.NAME": "gaussian_noise",
        "SYNTHESIS.OPTIONS": "{sigma: [25, 25], clip: False}", "LOSS.CHARBONNIER": 1.0, "AUGMENT.MIXUP": 0.0,
    },
    "compressive_sensing": {
        "MODEL.NAME": "compressive_sensing_dgunet", "MODEL.RATIO": 0.25, "MODEL.MATRIX_START": "dct",
        "LOSS.CLAMP": False,
    },
}  # fmt: skip
TITLES = {"denoising": "Gaussian noise, sigma 25", "compressive_sensing": "compressive sensing, 25 %"}


@dataclass(frozen=True, eq=False)
class Variant:
    """A change: arguments of `DGUNet` and other config keys; for one task, or for all.

    ``trained_as``: the task whose train.py is used, if it is another.
    """

    group: str
    name: str
    arguments: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    task: str = ""
    trained_as: str = ""


BASE = Variant("", "as in the paper, 5 stages")
SENSING, IMAGES = "compressive_sensing", "denoising"
# The deblurring network is the same, and its degradation can be set: a blur by one pixel is the identity. (With a known
# degradation the last estimate, too, differs: v_K plus a residual instead of y plus a residual.)
IDENTITY = {
    "MODEL.NAME": "deblurring_dgunet", "MODEL.DEGRADATION": "blur", "MODEL.NOISE": 25, "LOSS.CHARBONNIER": 1.0,
    "LOSS.EDGE": 0.0, "LOSS.CLAMP": True, "AUGMENT.SATURATION": 0.0,
}  # fmt: skip
VARIANTS = [
    BASE,
    *(Variant("stages", f"{k} stage{'s' * (k > 1)}", {"stages": k}) for k in (1, 3, 7, 9)),
    Variant("stages", "own weights in the middle stages", {"shared": False}),
    Variant("gradient step", "no gradient steps", {"gradient": False}),
    Variant("degradation", "A known, the identity", {}, IDENTITY, IMAGES, trained_as="deblurring"),
    Variant("degradation", "DCT as matrix, fixed", {}, {"MODEL.MATRIX": "fixed"}, SENSING),
    Variant("degradation", "Gaussian matrix, fixed", {}, {"MODEL.MATRIX": "fixed", "MODEL.MATRIX_START": ""}, SENSING),
    Variant("degradation", "matrix learned from Xavier noise", {}, {"MODEL.MATRIX_START": "xavier"}, SENSING),
    Variant("pathways", "neither ISFF nor feature fusion", {"pathways": False}),
    Variant("pathways", "no ISFF", {"isff": "none"}),
    Variant("pathways", "no feature fusion", {"fusion": "none"}),
    Variant("pathways", "ISFF as a sum", {"isff": "additive"}, task=IMAGES),
    Variant("pathways", "ISFF adaptive", {"isff": "adaptive"}, task=SENSING),
    Variant("pathways", "fusion by concatenation", {"fusion": "concat"}, task=IMAGES),
    Variant("pathways", "fusion by subspace projection", {"fusion": "subspace"}, task=SENSING),
    Variant("pathways", "features attended by the estimate", {"attention": True}, task=IMAGES),
    Variant("pathways", "features not attended", {"attention": False}, task=SENSING),
]


def main():
    parser = study_parser(__doc__, out="results/ablation")
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--epochs", type=int, default=3, help="of one 64x64 crop from each image, four at a time (default: 3)")
    add("--devices", nargs="+", default=["cpu"], help="cpu (default), or numbers of GPUs: a run on each at a time")
    args = parser.parse_intermixed_args()
    if args.epochs < 1:
        raise UserError("--epochs must be at least 1")
    chosen = {BASE.name, *matching([variant.name for variant in VARIANTS if variant is not BASE], args.only)}
    runs = [
        (task, variant, seed)
        for seed in args.seeds  # the whole grid with one seed first: an interrupted study has a table of fewer seeds
        for task in args.tasks
        for variant in VARIANTS
        if variant.task in ("", task) and variant.name in chosen
    ]
    check_images(args.train_dir, args.out)
    np.save(args.out / KERNEL, np.ones((1, 1), np.float32))
    rows: list[dict] = []
    free: queue.Queue[str] = queue.Queue()
    for device in args.devices:
        free.put(device)

    def run(task: str, variant: Variant, seed: int) -> dict:
        device = free.get()
        try:
            place = {"DEVICE": "cpu"} if device == "cpu" else {"DEVICE": "cuda", "GPU": f"[{device}]"}
            psnr = train(variant.trained_as or task, settings_of(task, variant, seed, args) | place, args.options)
        finally:
            free.put(device)
        return {"task": task, "group": variant.group, "variant": variant.name, "seed": seed, "psnr": psnr}

    with ThreadPoolExecutor(len(args.devices)) as pool, terminate_runs_at_exit():
        for row in pool.map(run, *zip(*runs, strict=True)):
            rows.append(row)
            print(f"{row['task']}, {row['variant']}, seed {row['seed']}: {row['psnr']:.2f} dB", flush=True)
            report(rows, args)
    print(f"wrote {args.out / 'ablation.md'} and {args.out / 'ablation.png'}")


def settings_of(task: str, variant: Variant, seed: int, args) -> dict:
    """The config keys of a run, but for its device."""
    arguments = ", ".join(f"{key}: {value}" for key, value in (SMALL | variant.arguments).items())
    own = {"MODEL.KERNEL": args.out / KERNEL} if variant.trained_as else TASKS[task]
    return COMMON | own | variant.settings | {
        "MODEL.OVERRIDES": f"{{{arguments}}}", "MODEL.SESSION": f"{variant.name}, seed {seed}", "SEED": seed,
        "OPTIM.NUM_EPOCHS": args.epochs, "TRAINING.TRAIN_DIR": args.train_dir,
        "TRAINING.SAVE_DIR": args.out / "runs" / f"{task}_{args.epochs}",
    }  # fmt: skip


def scores(rows: list[dict], task: str) -> dict[Variant, list[float]]:
    """The PSNR of each seed, by variant, for those that have been run."""
    found = {
        variant: [r["psnr"] for r in rows if (r["task"], r["variant"]) == (task, variant.name)] for variant in VARIANTS
    }
    return {variant: values for variant, values in found.items() if values}


def report(rows: list[dict], args):
    """Write the table and the plot of the runs so far."""
    with open(args.out / "ablation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    tables = []
    for task in args.tasks:
        found = scores(rows, task)
        if BASE not in found:
            continue
        base = statistics.mean(found[BASE])
        cells = []
        for variant, values in found.items():
            mean, spread = statistics.mean(values), max(values) - min(values)
            seeds = f"{spread:.2f} ({len(values)})" if len(values) > 1 else "one seed"
            cells.append([variant.name, f"{mean:.2f}", seeds, f"{mean - base:+.2f}"])
        tables.append(markdown_table([TITLES[task], "PSNR, dB", "spread over seeds", "difference"], cells) + "\n")
    (args.out / "ablation.md").write_text("\n".join(tables))
    draw(rows, args.tasks, args.out / "ablation.png")


def draw(rows: list[dict], tasks: list[str], path: Path):
    """A panel for each task: a dot for each seed's PSNR, a bar for the mean, variants from top to bottom."""
    figure = Figure(figsize=(6.2 * len(tasks), 5.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        found = scores(rows, task)
        if BASE in found:
            axis.axvline(statistics.mean(found[BASE]), color="grey", linewidth=1, linestyle="--")
        groups = list(dict.fromkeys(variant.group for variant in found))
        for place, (variant, values) in enumerate(found.items()):
            colour = f"C{groups.index(variant.group)}"
            axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, markersize=5)
            axis.plot(statistics.mean(values), place, "|", color=colour, markersize=16, markeredgewidth=2.5)
        axis.set_yticks(range(len(found)), [variant.name for variant in found])
        axis.invert_yaxis()
        axis.set(title=TITLES[task], xlabel="PSNR on held-out images [dB]")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    run_cli(main)
