"""Turn a training run into weights to share: in half precision, with its config, history and curves beside them.

    python scripts/export_weights.py checkpoints/denoising/my_run --out Denoising/pretrained_models/my_run \\
        --about "colour Gaussian noise, sigma 25; 40 minutes on one H200, 2026-11-21"
    python scripts/export_weights.py checkpoints/t/step1 checkpoints/t/step2 --out ... --about ...    # the last one's

`model_best.pth` is exported: the best on the validation pictures, without what training needs to go on. The configs get
the command that trains with them.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.checkpoint import read_checkpoint, save_checkpoint
from dgunet.errors import ROOT, UserError, run_cli
from dgunet.model import find_variant


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of the runs, in the order they built on each other")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--about", required=True, help="what was trained, how long, on what, when")
    add = parser.add_argument
    add("--noise_sigma", nargs=2, type=float, metavar=("LOW", "HIGH"), help="Gaussian noise that they are for, of 255")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists; remove it, or give another --out")
    for run in args.runs:
        for name in ("model_best.pth", "config.yaml", "history.csv", "curves.png"):
            if not (run / name).is_file():
                raise UserError(f"{run} has no {name}; give the folder of a run that has validated")
    content = read_checkpoint(args.runs[-1] / "model_best.pth")
    weights = {name: value.half() for name, value in content["state_dict"].items()}
    args.out.mkdir(parents=True)
    shared = {"state_dict": weights, "model": content["model"], "config": content["config"], "about": args.about}
    if args.noise_sigma:
        shared["noise_sigma"] = args.noise_sigma
    save_checkpoint(shared, args.out / "weights.pth")
    for step, run in enumerate(args.runs, start=1):
        suffix = f"_step{step}" if len(args.runs) > 1 else ""
        for name in ("history.csv", "curves.png"):
            shutil.copy(run / name, args.out / f"{Path(name).stem}{suffix}{Path(name).suffix}")
        config = args.out / f"config{suffix}.yaml"
        task = find_variant(content["model"]["name"]).task.title().replace("_", "")
        there = config.resolve().relative_to(ROOT) if config.resolve().is_relative_to(ROOT) else config
        command = f"# {args.about}\n#   python {task}/train.py --config {there}\n"
        config.write_text(command + (run / "config.yaml").read_text())
    print(f"wrote {args.out}: {(args.out / 'weights.pth').stat().st_size / 2**20:.1f} MiB of weights")


if __name__ == "__main__":
    run_cli(main)
