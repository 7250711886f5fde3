"""What each part of the network is worth: one change at a time, several seeds, at one small budget.

    python scripts/ablation.py --train_dir Datasets/train/DIV2K_BSD400 --out results/ablation
    python scripts/ablation.py --train_dir ... --devices 0 1 2 3 --epochs 40        # four GPUs, a run on each at a time

Trains small networks (five stages, width 16) for Gaussian noise and for compressive sensing, one run for each variant
and seed; a variant differs from the first in what its name says and in nothing else. The rate falls as a cosine. The
score is the PSNR, averaged over images held back from training, of their 256x256 centres. Writes ablation.csv,
ablation.md (a table) and ablation.png. A study that was interrupted goes on where it was. On one CPU core a run of
three epochs of 380 images takes a minute or two.
"""

import argparse
import csv
import queue
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.errors import ROOT, UserError, command_imports, run_cli

with command_imports(__name__):
    import numpy as np
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dgunet.config import load_config
    from dgunet.data import changed_items, find_images, fingerprint
    from dgunet.resume import changed_settings

KERNEL = "one_pixel.npy"
SMALL = {"width": 16, "growth": 8, "final_growth": 8, "stages": 5}
COMMON = {
    "OPTIM.BATCH_SIZE": 4, "OPTIM.LR_INITIAL": 1e-3, "OPTIM.LR_MIN": 1e-5, "OPTIM.WARMUP_EPOCHS": 0,
    "OPTIM.SCHEDULE": "cosine", "OPTIM.COSINE_EXTRA_EPOCHS": 0, "OPTIM.CLIP_NORM": 1.0, "TRAINING.REPEAT": 1,
    "TRAINING.TRAIN_PS": 64, "TRAINING.VAL_PS": 256, "TRAINING.VAL_DIR": "", "TRAINING.VAL_HOLD_BACK": 20,
    "TRAINING.VAL_AFTER_EVERY": 1000, "TRAINING.VAL_TIMES": 1, "TRAINING.SAVE_EACH_VALIDATION": False,
    "TRAINING.WORKERS": 0, "TRAINING.RESUME": "auto",
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
    """A change: arguments of `DGUNet`, and other config keys; of one task, or of all.

    ``trained_as``: the task whose train.py can do it, where that is another.
    """

    group: str
    name: str
    arguments: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    task: str = ""
    trained_as: str = ""


BASE = Variant("", "as in the paper, 5 stages")
SENSING, IMAGES = "compressive_sensing", "denoising"
# The deblurring network is the same, and its degradation can be given: a blur of one pixel is none. (With any known
# degradation one thing more differs: the last estimate is v_K plus a residual, not y plus one.)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_dir", required=True, help="folder of images; the last 20 by name are held back")
    add("--out", type=Path, default=Path("results/ablation"), help="folder for runs, table and plot")
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--epochs", type=int, default=3, help="of one 64x64 crop from each image, four at a time (default: 3)")
    add("--devices", nargs="+", default=["cpu"], help="cpu (default), or numbers of GPUs: a run on each at a time")
    add("--only", nargs="*", metavar="WORDS", help="only variants whose names have one of these in them, and the first")
    add("options", nargs="*", metavar="KEY VALUE", help="config keys for all runs")
    args = parser.parse_intermixed_args()
    if args.epochs < 1:
        raise UserError("--epochs is at least 1")
    runs = [
        (task, variant, seed)
        for seed in args.seeds  # the whole grid once, then again: an interrupted study has a table of fewer seeds
        for task in args.tasks
        for variant in VARIANTS
        if variant.task in ("", task)
        and (variant is BASE or not args.only or any(words in variant.name for words in args.only))
    ]
    if args.only and all(variant is BASE for _, variant, _ in runs):
        raise UserError(f"--only matches none of {'; '.join(variant.name for variant in VARIANTS)}")
    of_these_images(args.train_dir, args.out)
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

    with ThreadPoolExecutor(len(args.devices)) as pool, ended_with_this():
        for row in pool.map(run, *zip(*runs, strict=True)):
            rows.append(row)
            print(f"{row['task']}, {row['variant']}, seed {row['seed']}: {row['psnr']:.2f} dB", flush=True)
            report(rows, args)
    print(f"wrote {args.out / 'ablation.md'} and {args.out / 'ablation.png'}")


def settings_of(task: str, variant: Variant, seed: int, args) -> dict:
    """The config keys of a run, but for where it computes."""
    arguments = ", ".join(f"{key}: {value}" for key, value in (SMALL | variant.arguments).items())
    own = (
        variant.settings | {"MODEL.KERNEL": args.out / KERNEL} if variant.trained_as else TASKS[task] | variant.settings
    )
    return COMMON | own | {
        "MODEL.OVERRIDES": f"{{{arguments}}}", "MODEL.SESSION": f"{variant.name}, seed {seed}", "SEED": seed,
        "OPTIM.NUM_EPOCHS": args.epochs, "TRAINING.TRAIN_DIR": args.train_dir,
        "TRAINING.SAVE_DIR": args.out / "runs" / f"{task}_{args.epochs}",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- running

under_way: set[subprocess.Popen] = set()


def of_these_images(train_dir: str, out: Path):
    """Note in ``out`` what its runs are trained on; scores of other images are not for one table.

    Raises:
        UserError: they were trained on others.
    """
    items, note = find_images(train_dir), out / "images.pth"
    if not note.exists():
        out.mkdir(parents=True, exist_ok=True)
        torch.save(fingerprint(items), note)
    elif changes := changed_items(items, torch.load(note)):
        raise UserError(f"{train_dir} is not what {out} was trained on: {changes}; choose another --out")


@contextmanager
def ended_with_this():
    """Within it, no training outlives the study: not an interrupt, not SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in list(under_way):
            process.terminate()


def train(task: str, settings: dict, options: list[str] = ()) -> float:
    """A run of a task's train.py, or what is missing of it; the last validation's PSNR.

    Raises:
        UserError: what the command has told; a run of this name had other settings.
    """
    config = ROOT / f"configs/{task}/dgunet.yaml"
    words = [*(str(word) for pair in settings.items() for word in pair), *options]
    folder = Path(settings["TRAINING.SAVE_DIR"]) / settings["MODEL.SESSION"]
    cfg = load_config(config, words)
    began = folder / "config.yaml"
    if began.exists() and (changed := changed_settings(cfg, load_config(began))):
        raise UserError(f"{folder} was trained with another {', '.join(changed)}; choose another --out")
    if (psnr := finished(folder / "history.csv", cfg.OPTIM.NUM_EPOCHS)) is not None:
        return psnr
    command = [sys.executable, ROOT / task.title().replace("_", "") / "train.py", "--config", config, *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        under_way.add(process)
        _, told = process.communicate()
        under_way.discard(process)
    if process.returncode:
        raise UserError(f"{settings['MODEL.SESSION']}: {told.strip().removeprefix('error: ')}")
    return finished(folder / "history.csv", cfg.OPTIM.NUM_EPOCHS)


def finished(history: Path, epochs: int) -> float | None:
    """The PSNR at the end of a run that has come there."""
    if not history.exists():
        return None
    with open(history) as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["psnr"]) if int(last["epoch"]) == epochs and last["psnr"] else None


def scores(rows: list[dict], task: str) -> dict[Variant, list[float]]:
    """Of each variant that has been run, the PSNR of each seed."""
    found = {
        variant: [r["psnr"] for r in rows if (r["task"], r["variant"]) == (task, variant.name)] for variant in VARIANTS
    }
    return {variant: values for variant, values in found.items() if values}


def report(rows: list[dict], args):
    """Write the table and the plot of what there is."""
    with open(args.out / "ablation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = []
    for task in args.tasks:
        found = scores(rows, task)
        if BASE not in found:
            continue
        base = statistics.mean(found[BASE])
        lines += [f"| {TITLES[task]} | PSNR, dB | spread over seeds | difference |", "| --- | --- | --- | --- |"]
        for variant, values in found.items():
            mean, spread = statistics.mean(values), max(values) - min(values)
            told = f"{spread:.2f} ({len(values)})" if len(values) > 1 else "one seed"
            lines.append(f"| {variant.name} | {mean:.2f} | {told} | {mean - base:+.2f} |")
        lines.append("")
    (args.out / "ablation.md").write_text("\n".join(lines))
    draw(rows, args.tasks, args.out / "ablation.png")


def draw(rows: list[dict], tasks: list[str], path: Path):
    """A panel for each task: each seed's PSNR as a dot, the mean as a bar, variants from top to bottom."""
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
        axis.set(title=TITLES[task], xlabel="PSNR on held-back images [dB]")
        axis.grid(axis="x", alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    run_cli(main)
