"""Test DGUNet for denoising, or denoise pictures.

    python Denoising/test.py --weights model.pth --dataset SIDD              # the paper's table, from the .mat blocks
    python Denoising/test.py --weights model.pth --dataset DND               # writes the files to submit
    python Denoising/test.py --weights model.pth --dataset path/to/folder    # pairs in input/ and target/, or pictures
    python Denoising/test.py --dataset path/to/folder                        # our own weights: Gaussian noise, sigma 25

The weights may be this repository's or the original authors'; the variant is recognised. PSNR and SSIM are computed as
for SIDD: RGB in [0, 1], not rounded to 8 bits, SSIM over three dimensions. A test that was interrupted goes on where it
was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from benchmarks import read_dnd, read_dnd_picture, read_sidd
from tqdm import tqdm

from dgunet.data import write_image
from dgunet.errors import UserError, optional, run_cli
from dgunet.evaluation import ScoreSheet, TestRun, TestSet, find_folder, to_uint8
from dgunet.files import replacing

TEST_SETS = {
    "SIDD": TestSet(
        "SIDD/test",
        "sidd_unit_range",
        {"denoising_dgunet": (39.88, 0.959), "denoising_dgunet_plus": (39.91, 0.960)},
    ),
    # scored by its server; the paper has 40.04/0.956, DGUNet+ 40.12/0.957, with the self-ensemble as for SIDD
    "DND": TestSet("DND/test", "none"),
}


def main():
    shipped = Path(__file__).parent / "pretrained_models/gaussian25/weights.pth"
    run = TestRun(
        "denoising", __doc__, TEST_SETS, protocol="sidd_unit_range", ensembled=tuple(TEST_SETS), shipped=shipped
    )
    run.run({"SIDD": test_sidd, "DND": test_dnd})


def test_sidd(run: TestRun, out: Path) -> ScoreSheet:
    """Score the validation blocks and write the restored ones as the benchmark's ``Idenoised.mat`` (single)."""
    require_model(run, "SIDD")
    folder = find_folder(run.args.data_root, TEST_SETS["SIDD"].folder)
    noisy, clean = read_sidd(folder)
    blocks = [[f"{i + 1:04d}_{j + 1:02d}" for j in range(noisy.shape[1])] for i in range(len(noisy))]
    sources = tuple(sorted(folder.glob("*.mat")))
    sheet = run.sheet("SIDD", out, "sidd_unit_range", {name: sources for names in blocks for name in names})
    parts = out / "parts"  # restored blocks of each picture, so that an interrupted test need not do them again
    parts.mkdir(exist_ok=True)
    for i, names in enumerate(tqdm(blocks, desc="SIDD", unit="picture", disable=None)):
        part = parts / f"{i + 1:04d}.npy"
        pictures = [out / f"{name}.png" for name in names] if run.args.save_images else []
        if part.exists() and all(map(sheet.done, names)) and all(path.exists() for path in pictures):
            continue
        with run.attempt(f"SIDD's picture {i + 1:04d}"):
            part.unlink(missing_ok=True)
            restored = np.empty(noisy.shape[1:], dtype=np.float32)
            for j in range(0, len(names), 8):  # blocks at a time
                degraded = noisy[i, j : j + 8].astype(np.float32) / np.float32(255)
                restored[j : j + 8] = run.restore("SIDD", degraded)
                for k, block in enumerate(degraded, start=j):
                    sheet.add(names[k], restored[k], clean[i, k], block)
                    if run.args.save_images:
                        write_image(out / f"{names[k]}.png", to_uint8(restored[k]))
            with replacing(part) as temporary, open(temporary, "wb") as file:
                np.save(file, restored)
    written = [parts / f"{i + 1:04d}.npy" for i in range(len(noisy))]
    if not all(path.exists() for path in written):
        (out / "Idenoised.mat").unlink(missing_ok=True)
        return sheet
    restored = np.stack([np.load(path) for path in written])
    optional("scipy.io").savemat(out / "Idenoised.mat", {"Idenoised": restored})
    print(f"wrote {out / 'Idenoised.mat'}")
    return sheet


def test_dnd(run: TestRun, out: Path) -> ScoreSheet:
    """Write the benchmark's submission: for each picture a .mat file with its 20 restored crops (1-based boxes)."""
    require_model(run, "DND")
    source = find_folder(run.args.data_root, TEST_SETS["DND"].folder)
    boxes_of = read_dnd(source)
    files = {name: source / "images_srgb" / name for name in boxes_of}
    sheet = run.sheet("DND", out, "none", {name: (source / "info.mat", path) for name, path in files.items()})
    folder = out / "matfiles"
    folder.mkdir(exist_ok=True)
    for name, boxes in tqdm(boxes_of.items(), desc="DND", unit="picture", disable=None):
        if sheet.done(name) and (folder / name).exists() and not run.args.save_images:
            continue
        with run.attempt(f"DND's picture {name}"):
            picture = read_dnd_picture(files[name], boxes)
            crops = np.empty((1, len(boxes)), dtype=object)
            for k, (top, left, bottom, right) in enumerate(boxes):
                crops[0, k] = run.restore("DND", picture[top - 1 : bottom, left - 1 : right])
                if run.args.save_images:
                    write_image(out / f"{Path(name).stem}_{k + 1:02d}.png", to_uint8(crops[0, k]))
            optional("scipy.io").savemat(folder / name, {"Idenoised": crops, "israw": False, "eval_version": "1.0"})
            sheet.tick(name)
    print(f"wrote {folder}; its scores come from the benchmark's server, https://noise.visinf.tu-darmstadt.de")
    return sheet


def require_model(run: TestRun, dataset: str):
    if run.model is None:
        raise UserError(f"--score_only reads pictures; {dataset} comes in MATLAB files, give --weights")


if __name__ == "__main__":
    run_cli(main)
