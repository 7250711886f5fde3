"""What to train compressive sensing with when time is short: one change at a time, at equal cost.

    python scripts/study_sensing.py --train_dir Datasets/train/DIV2K_BSD400    # a core-hour; prints a table

Every run costs as much as four passes of seven stages over a 64x64 crop of each image: some four minutes of one core
that computes bfloat16. Fewer stages and smaller crops get as many more steps. The score is the PSNR, averaged over
images held back from training, of their 256x256 centres. A study that was interrupted goes on where it was.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dgunet.errors import UserError, command_imports, run_cli

with command_imports(__name__):
    from ablation import ended_with_this, of_these_images, train

COMMON = {
    "MODEL.RATIO": 0.25, "MODEL.MATRIX_START": "dct", "MODEL.OVERRIDES": "{stages: 3, rho: 1.0}",
    "OPTIM.BATCH_SIZE": 4, "OPTIM.LR_INITIAL": 1e-3, "OPTIM.SCHEDULE": "constant", "OPTIM.CLIP_NORM": 1.0,
    "OPTIM.EMA_DECAY": 0.99, "LOSS.CLAMP": False, "TRAINING.REPEAT": 1, "TRAINING.TRAIN_PS": 64,
    "TRAINING.VAL_PS": 256, "TRAINING.VAL_HOLD_BACK": 20, "TRAINING.VAL_AFTER_EVERY": 1000,
    "TRAINING.SAVE_EACH_VALIDATION": False, "TRAINING.WORKERS": 0,
}  # fmt: skip
# Three stages take 2.9 times less than seven: stages 1 to K-1 have a U-Net each, the last one has none.
SEVEN, THREE = 4, 12
# Of each variant: what differs, and how many epochs of one crop from each image; a list where runs follow each other.
VARIANTS = {
    "the recipe: DCT, rho 1, three stages": [({}, THREE)],
    "start: Xavier, rho 0.5 (the original)": [
        ({"MODEL.MATRIX_START": "xavier", "MODEL.OVERRIDES": "{stages: 3}"}, THREE)
    ],
    "start: DCT, rho 0.5": [({"MODEL.OVERRIDES": "{stages: 3}"}, THREE)],
    "start: principal components, rho 1": [({"MODEL.MATRIX_START": "pca"}, THREE)],
    "start: orthonormal noise, rho 1": [({"MODEL.MATRIX_START": "orthonormal"}, THREE)],
    "the DCT, not learned": [({"MODEL.MATRIX": "fixed"}, THREE)],
    "seven stages from the beginning": [({"MODEL.OVERRIDES": "{stages: 7, rho: 1.0}"}, SEVEN)],
    "three stages, then seven": [({}, THREE // 2), ({"MODEL.OVERRIDES": "{stages: 7, rho: 1.0}"}, SEVEN // 2)],
    "16 crops of 32x32": [({"OPTIM.BATCH_SIZE": 16, "TRAINING.TRAIN_PS": 32}, 4 * THREE)],
    "one crop of 128x128": [({"OPTIM.BATCH_SIZE": 1, "TRAINING.TRAIN_PS": 128}, THREE // 4)],
    "two crops": [({"OPTIM.BATCH_SIZE": 2}, THREE)],
    "rate 5e-4": [({"OPTIM.LR_INITIAL": 5e-4}, THREE)],
    "rate 2e-3": [({"OPTIM.LR_INITIAL": 2e-3}, THREE)],
    "no average of the weights": [({"OPTIM.EMA_DECAY": 0.0}, THREE)],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_dir", required=True, help="folder of images; the last 20 by name are held back")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/sensing_study"), help="folder for the runs")
    parser.add_argument(
        "--only", nargs="*", metavar="WORDS", help="only variants whose names have one of these in them"
    )
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys for all runs")
    args = parser.parse_intermixed_args()
    chosen = [name for name in VARIANTS if not args.only or any(words in name for words in args.only)]
    if not chosen:
        raise UserError(f"--only matches none of {'; '.join(VARIANTS)}")
    of_these_images(args.train_dir, args.out)
    rows = []
    with ended_with_this():
        for name in chosen:
            score = train_variant(name, args)
            rows.append((name, score))
            print(f"{name}: {score:.2f} dB", flush=True)
    reference = rows[0][1]
    print(f"\n| | PSNR, dB | beside {chosen[0].split(':')[0]} |\n| --- | --- | --- |")
    for name, score in rows:
        print(f"| {name} | {score:.2f} | {score - reference:+.2f} |")


def train_variant(name: str, args) -> float:
    """Train one variant, run after run; the last validation's PSNR."""
    weights = ""
    for step, (changes, epochs) in enumerate(VARIANTS[name], start=1):
        session = f"{name.replace(':', '')}, step {step}"
        settings = COMMON | changes | {
            "OPTIM.NUM_EPOCHS": epochs, "MODEL.SESSION": session, "MODEL.WEIGHTS": weights, "TRAINING.RESUME": "auto",
            "TRAINING.TRAIN_DIR": args.train_dir, "TRAINING.SAVE_DIR": args.out,
        }  # fmt: skip
        psnr = train("compressive_sensing", settings, args.options)
        weights = args.out / session / "model_latest.pth"
    return psnr


if __name__ == "__main__":
    run_cli(main)
