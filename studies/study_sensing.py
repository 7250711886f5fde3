"""Which recipe to train compressive sensing with when time is short: one change at a time, at equal cost.

    python studies/study_sensing.py --train_dir Datasets/train/DIV2K_BSD400    # a core-hour; prints a table

Every run costs as much as four epochs of seven stages on a 64x64 crop of each image: some four minutes of one core
that computes bfloat16. Fewer stages and smaller crops get as many more steps. The score is the mean PSNR of the 256x256
centres of held-out images. An interrupted study is resumed by the same command.
"""

from shared import command_imports, markdown_table, matching, run_cli

with command_imports(__name__):
    from runs import SHORT_RUN, check_images, study_parser, terminate_runs_at_exit, train

COMMON = SHORT_RUN | {
    "MODEL.RATIO": 0.25, "MODEL.MATRIX_START": "dct", "MODEL.OVERRIDES": "{stages: 3, rho: 1.0}",
    "OPTIM.SCHEDULE": "constant", "OPTIM.EMA_DECAY": 0.99, "LOSS.CLAMP": False,
}  # fmt: skip
# Three stages take 2.9 times less than seven: stages 1 to K-1 have a U-Net each, the last one has none.
SEVEN, THREE = 4, 12
# For each variant its runs, one after the other: (what differs, epochs of one crop from each image).
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
    args = study_parser(__doc__, out="checkpoints/sensing_study").parse_intermixed_args()
    chosen = matching(list(VARIANTS), args.only)
    check_images(args.train_dir, args.out)
    scores = {}
    with terminate_runs_at_exit():
        for name in chosen:
            scores[name] = train_variant(name, args)
            print(f"{name}: {scores[name]:.2f} dB", flush=True)
    first = scores[chosen[0]]
    rows = [[name, f"{score:.2f}", f"{score - first:+.2f}"] for name, score in scores.items()]
    print("\n" + markdown_table(["", "PSNR, dB", f"beside {chosen[0].split(':')[0]}"], rows))


def train_variant(name: str, args) -> float:
    """Train one variant, its runs one after the other; the PSNR of the last validation."""
    weights = ""
    for step, (changes, epochs) in enumerate(VARIANTS[name], start=1):
        session = f"{name.replace(':', '')}, step {step}"
        settings = COMMON | changes | {
            "OPTIM.NUM_EPOCHS": epochs, "MODEL.SESSION": session, "MODEL.WEIGHTS": weights,
            "TRAINING.TRAIN_DIR": args.train_dir, "TRAINING.SAVE_DIR": args.out,
        }  # fmt: skip
        psnr = train("compressive_sensing", settings, args.options)
        weights = args.out / session / "model_latest.pth"
    return psnr


if __name__ == "__main__":
    run_cli(main)
