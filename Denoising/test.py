"""Test DGUNet for denoising, or denoise pictures.

    python Denoising/test.py --weights model.pth --dataset SIDD              # the paper's table, from the .mat blocks
    python Denoising/test.py --weights model.pth --dataset DND               # writes the files to submit
    python Denoising/test.py --weights model.pth --dataset path/to/folder    # pairs in input/ and target/, or pictures

The weights may be this repository's or the original authors'; the variant is recognised. PSNR and SSIM are computed as
for SIDD: RGB in [0, 1], not rounded to 8 bits, SSIM over three dimensions.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.io
import torch
from dataset import read_dnd, read_sidd
from tqdm import tqdm

from dgunet import load_model, restore
from dgunet.data import find_pairs, list_images, read_image, write_image
from dgunet.errors import UserError, run_cli
from dgunet.evaluation import Result, Scorer, append_results, format_table, to_uint8

PAPER = {  # PSNR, SSIM
    "SIDD": {"denoising_dgunet": (39.88, 0.959), "denoising_dgunet_plus": (39.91, 0.960)},
    "DND": {"denoising_dgunet": (40.04, 0.956), "denoising_dgunet_plus": (40.12, 0.957)},
}
PROTOCOL = "sidd_unit_range"


def main():
    args = parse_args()
    model = load_model(args.weights, task="denoising", device=pick_device(args.device))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{model.name or 'DGUNet'}, {parameters:,} parameters, from {args.weights}")
    results, failures = [], []
    for dataset in args.dataset:
        # The original scores SIDD with the self-ensemble, and nothing else.
        ensemble = args.self_ensemble if args.self_ensemble is not None else dataset == "SIDD"
        settings = dict(self_ensemble=ensemble, tile=args.tile, bf16=args.bf16)

        def run(images, settings=settings):
            return restore(model, images, tile_overlap=args.tile_overlap, **settings)

        started = time.monotonic()
        if dataset == "SIDD":
            result = test_sidd(args, run)
        elif dataset == "DND":
            result = test_dnd(args, run)
        else:
            result = test_folder(Path(dataset), args, run, failures)
        if result is not None:
            result.seconds_per_image = (time.monotonic() - started) / result.images
            result.paper = PAPER.get(dataset, {}).get(model.name)
            result.settings = settings
            results.append(result)
    if results:
        print(format_table(results))
        append_results(args.results / "denoising.csv", results, args.weights, model.name or "DGUNet")
        print(f"appended to {args.results / 'denoising.csv'}")
    if failures:
        raise UserError(f"{len(failures)} pictures could not be tested; the others were.\n" + "\n".join(failures))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="checkpoint, this repository's or the authors'")
    parser.add_argument("--dataset", nargs="+", default=["SIDD"], help="SIDD, DND, or folders (default: SIDD)")
    parser.add_argument("--data_root", type=Path, default=Path("Datasets"), help="holds SIDD/test and DND/test")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where everything is written")
    parser.add_argument(
        "--self_ensemble",
        action=argparse.BooleanOptionalAction,
        help="mean over 8 flips and rotations (default: for SIDD only, as in the original)",
    )
    parser.add_argument("--tile", type=tile_side, default="auto", help="tile side in pixels, whole, or auto (default)")
    parser.add_argument("--tile_overlap", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster, some thousandths of a dB off")
    parser.add_argument("--save_images", action="store_true", help="write the restored pictures of a test set, too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args()


def tile_side(text: str) -> int | str | None:
    """``auto``, ``whole`` (None) or a number, for `restore`."""
    return {"auto": "auto", "whole": None}[text] if text in ("auto", "whole") else int(text)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from error
    return device


def test_sidd(args, run) -> Result:
    """Score the validation blocks and write the restored ones as the benchmark's ``Idenoised.mat`` (single)."""
    noisy, clean = read_sidd(args.data_root / "SIDD" / "test")
    restored = np.empty(noisy.shape, dtype=np.float32)
    scorer = Scorer(PROTOCOL)
    for i in tqdm(range(len(noisy)), desc="SIDD", unit="picture", disable=None):
        for j in range(0, noisy.shape[1], 8):  # blocks at a time
            blocks = noisy[i, j : j + 8].astype(np.float32) / np.float32(255)
            restored[i, j : j + 8] = run(blocks)
            for k, block in enumerate(blocks, start=j):
                name = f"{i + 1:04d}_{k + 1:02d}"
                scorer.add(name, restored[i, k], clean[i, k], block)
                if args.save_images:
                    write_image(args.results / "denoising" / "SIDD" / f"{name}.png", to_uint8(restored[i, k]))
    folder = args.results / "denoising" / "SIDD"
    result = scorer.finish("SIDD", folder / "scores.csv")
    scipy.io.savemat(folder / "Idenoised.mat", {"Idenoised": restored}, do_compression=True)
    print(f"wrote {folder / 'Idenoised.mat'}")
    return result


def test_dnd(args, run) -> None:
    """Write the benchmark's submission: for each picture a .mat file with its 20 restored crops (1-based boxes)."""
    folder = args.results / "denoising" / "DND" / "matfiles"
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture, boxes in tqdm(
        read_dnd(args.data_root / "DND" / "test"), desc="DND", unit="picture", disable=None
    ):
        crops = np.empty((1, len(boxes)), dtype=object)
        for k, (top, left, bottom, right) in enumerate(boxes):
            crops[0, k] = run(picture[top - 1 : bottom, left - 1 : right])
            if args.save_images:
                write_image(folder.parent / "png" / f"{Path(name).stem}_{k + 1:02d}.png", to_uint8(crops[0, k]))
        scipy.io.savemat(folder / name, {"Idenoised": crops, "israw": False, "eval_version": "1.0"})
    print(f"wrote {folder}; its scores come from the benchmark's server, https://noise.visinf.tu-darmstadt.de")


def test_folder(folder: Path, args, run, failures: list[str]) -> Result | None:
    """Score the pairs in ``input/`` and ``target/``, or else restore the pictures of a folder into the results."""
    paired = (folder / "input").is_dir()
    items = find_pairs(folder, check_sizes=False) if paired else list_images(folder)
    out = args.results / "denoising" / folder.absolute().name
    scorer = Scorer(PROTOCOL)
    for item in tqdm(items, desc=folder.name, unit="picture", disable=None):
        try:
            degraded = read_image(item.input if paired else item)
            target = read_image(item.target) if paired else None
            if paired and target.shape != degraded.shape:
                raise UserError(f"{item.input} and {item.target} differ in size: {degraded.shape} and {target.shape}")
        except UserError as error:
            failures.append(str(error))
            continue
        degraded = degraded.astype(np.float32) / np.float32(255)
        restored = run(degraded)
        if paired:
            scorer.add(item.name, restored, target, degraded)
        if args.save_images or not paired:
            write_image(out / f"{item.name if paired else item.stem}.png", to_uint8(restored))
    if args.save_images or not paired:
        print(f"wrote restored pictures to {out}")
    return scorer.finish(folder.name, out / "scores.csv") if paired and scorer.jobs else None


if __name__ == "__main__":
    run_cli(main)
