"""Deraining, deblurring and compressive sensing end to end, through the real command lines and published formats."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from export_weights import read_record
from parity.weights import fill
from PIL import Image
from processes import Forked, run_forked, run_script

from dgunet import create_model, load_model, restore
from dgunet.checkpoints.load import describe_model, read_checkpoint, save_checkpoint
from dgunet.checkpoints.registry import list_pretrained
from dgunet.data.datasets import CenterCropDataset, LumaPatches, SaturationPatches
from dgunet.data.images import read_image, read_luma, write_image
from dgunet.data.pairs import find_pairs
from dgunet.data.synthesis import added_rain, motion_blur
from dgunet.data.transforms import unit_range
from dgunet.evaluation.metrics import evaluate_pair
from dgunet.model.degradations import Blur
from dgunet.model.sampling import init_sampling_matrix
from dgunet.model.variants import find_variant
from dgunet.runtime.errors import UserError
from dgunet.tasks import compressive_sensing as sensing
from dgunet.tasks.compressive_sensing import block_sampling
from dgunet.training.cli import build_model
from dgunet.training.config import load_config
from dgunet.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "deraining": "Deraining",
    "deblurring": "Deblurring",
    "denoising": "Denoising",
    "compressive_sensing": "CompressiveSensing",
}


def run(task: str, script: str, *words, cwd: Path, check: int = 0) -> subprocess.CompletedProcess:
    done = run_script(ROOT / FOLDERS[task] / script, *words, cwd=cwd)
    assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def rows(folder: Path, task: str) -> list[dict]:
    with open(folder / "results" / f"{task}.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Small networks of random weights, for each task."""
    paths = {}
    for task in ("deraining", "deblurring", "compressive_sensing"):
        torch.manual_seed(0)
        model = create_model(f"{task}_dgunet", width=8, growth=4, final_growth=4, stages=2)
        paths[task] = tmp_path_factory.mktemp(task) / "small.pth"
        save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, paths[task])
    return paths


# --------------------------------------------------------------------- from embedded photographs to a score


@pytest.mark.parametrize("task", FOLDERS)
def test_demo_data_training_and_test(tmp_path, task, curves):
    """The README's commands, at a size that takes seconds: the trained network is better than the first weights."""
    data = tmp_path / "demo"
    make = [sys.executable, ROOT / "scripts" / "make_demo_data.py", "--task", task, "--out", data]
    run_forked(make + ([] if task == "compressive_sensing" else ["--copies", "1"]), check=True)
    words = [
        "--config", ROOT / "configs" / task / "quickstart.yaml", "TRAINING.TRAIN_DIR", data / "train",
        "TRAINING.VAL_DIR", data / "val", "TRAINING.SAVE_DIR", tmp_path / "runs", "TRAINING.VAL_PS", 64,
        "TRAINING.TRAIN_PS", 32, "TRAINING.REPEAT", 4, "TRAINING.WORKERS", 0, "OPTIM.NUM_EPOCHS", 5, "DEVICE", "cpu",
        "TRAINING.VAL_AFTER_EVERY", 1, "OPTIM.LR_INITIAL", 1e-3, "OPTIM.EMA_DECAY", 0.8,
        "MODEL.OVERRIDES.stages", 2, "MODEL.OVERRIDES.width", 8,
        "MODEL.OVERRIDES.growth", 4,
    ]  # fmt: skip
    run(task, "train.py", *words, cwd=tmp_path)
    with open(tmp_path / "runs/quickstart/history.csv") as file:
        history = list(csv.DictReader(file))
    assert float(history[-1]["psnr"]) > float(history[0]["psnr"])

    test = data / "test"
    if task == "deraining":
        test = test / "DEMO"
    # a corner of each photograph is enough
    for path in test.rglob("*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path))[:96, :96])
    best = tmp_path / "runs/quickstart/model_best.pth"
    run(task, "test.py", "--weights", best, "--dataset", test, "--device", "cpu", cwd=tmp_path)
    (row,) = rows(tmp_path, task)
    assert row["images"] == "3" and float(row["psnr"]) > 10
    if task == "denoising":
        assert float(row["psnr"]) > float(row["input_psnr"])
    # exported in half precision, it scores the same
    record = ROOT / "Denoising/pretrained_models/gaussian/record.yaml"
    (tmp_path / "r.yaml").write_text(record.read_text().replace("noise_sigma: [0, 50]", "noise_sigma: [5, 50]"))
    out = tmp_path / "exported"
    export = [sys.executable, ROOT / "scripts/export_weights.py", tmp_path / "runs/quickstart"]
    run_forked([*export, "--record", tmp_path / "r.yaml", "--out", out], check=True)
    run(task, "test.py", "--weights", out / "weights.safetensors", "--dataset", test, "--device", "cpu", cwd=tmp_path)
    assert read_checkpoint(out / "weights.safetensors")["noise_sigma"] == [5, 50]
    assert (out / "record.yaml").read_text() == (tmp_path / "r.yaml").read_text()
    exported = rows(tmp_path, task)[-1]
    assert exported["weights"] != row["weights"] and float(exported["psnr"]) == pytest.approx(
        float(row["psnr"]), abs=0.01
    )
    assert (out / "config.yaml").read_text().splitlines()[1].startswith(f"#   python {FOLDERS[task]}/train.py --config")
    assert (out / "history.csv").exists() and (out / "curves.png").exists()


# --------------------------------------------------------------------- the repository's own weights


@pytest.mark.parametrize("record", list_pretrained(), ids=lambda record: record.name)
def test_shipped_weights_are_complete(record):
    weights = record.path
    assert weights.stat().st_size < 10 * 2**20
    content = read_checkpoint(weights)
    assert {value.dtype for value in content["state_dict"].values()} == {torch.float16}
    assert "2026" in record.date and record.task == find_variant(content["model"]["name"]).task
    assert record.name.startswith(record.task.split("_")[0]) and record.licence == "MIT" and record.scores
    assert content["record"] == read_record(weights.with_name("record.yaml")), "export_weights.py --renew"
    assert next(load_model(weights).parameters()).dtype == torch.float32
    for config in weights.parent.glob("config*.yaml"):
        assert config.read_text().splitlines()[1].endswith(f"--config {config.relative_to(ROOT)}")
        assert load_config(config).MODEL.NAME == content["model"]["name"]
    for pattern in ("config*.yaml", "history*.csv", "curves*.png"):
        assert list(weights.parent.glob(pattern))


def test_shipped_weights_are_the_default(tmp_path):
    """A photograph of scikit-image, measured, noisy and in rain: all restore it well (bicubic or a blur would not)."""
    image = skimage.data.astronaut()[:128, 150:278]
    rain = added_rain(image.astype(np.float32) / 255, np.random.default_rng(1))
    write_image(tmp_path / "rain/target/a.png", image)
    write_image(tmp_path / "rain/input/a.png", (255 * rain).round().astype(np.uint8))
    noisy = image + np.random.default_rng(0).normal(0, 25, image.shape)
    write_image(tmp_path / "grey/a.png", cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    write_image(tmp_path / "pairs/target/a.png", image)
    write_image(tmp_path / "pairs/input/a.png", noisy.clip(0, 255).round().astype(np.uint8))
    done = run("compressive_sensing", "test.py", "--dataset", "grey", "--device", "cpu", cwd=tmp_path)
    assert "no --weights given: this repository's own compressive_sensing_25 (Grey images measured" in done.stdout
    assert float(rows(tmp_path, "compressive_sensing")[0]["psnr"]) > 29
    run("denoising", "test.py", "--dataset", "pairs", "--device", "cpu", cwd=tmp_path)
    (row,) = rows(tmp_path, "denoising")
    assert float(row["input_psnr"]) < 21.5 and float(row["psnr"]) > 28.5
    run("deraining", "test.py", "--dataset", "rain", "--device", "cpu", cwd=tmp_path)
    (row,) = rows(tmp_path, "deraining")
    assert float(row["psnr"]) > float(row["input_psnr"]) + 4
    image = skimage.data.astronaut()[:256, 100:356]  # instance norm looks at an image as a whole
    shake = motion_blur(image.astype(np.float32) / 255, np.random.default_rng(1), extent=(8, 8))
    write_image(tmp_path / "shake/target/a.png", image)
    write_image(tmp_path / "shake/input/a.png", (255 * shake).round().astype(np.uint8))
    run("deblurring", "test.py", "--dataset", "shake", "--device", "cpu", cwd=tmp_path)
    (row,) = rows(tmp_path, "deblurring")
    assert float(row["psnr"]) > float(row["input_psnr"]) + 1


# --------------------------------------------------------------------- published data trees


def make_tree(root: Path, names: list[str], image_pairs, size=(32, 40)):
    for name in names:
        image_pairs(root / name, count=2, size=size)


def test_all_deraining_sets_and_their_average(tmp_path, weights, image_pairs):
    names = ["Test100", "Rain100H", "Rain100L", "Test2800", "Test1200"]
    make_tree(tmp_path / "Datasets/test", names, image_pairs)
    easy = image_pairs(tmp_path / "Datasets/test/Test100", count=6, size=(32, 40))  # more images, and without noise
    for pair in find_pairs(easy):
        shutil.copy(pair.target, pair.input)
    done = run("deraining", "test.py", "--weights", weights["deraining"], "--device", "cpu", cwd=tmp_path)
    table = rows(tmp_path, "deraining")
    assert [row["dataset"] for row in table] == [*names, "average"]
    assert "33.06/0.923" in done.stdout and "37.42/0.969" in done.stdout
    means = [float(row["psnr"]) for row in table[:-1]]
    assert float(table[-1]["psnr"]) == pytest.approx(np.mean(means), abs=1e-3)
    of_all_images = np.average(means, weights=[int(row["images"]) for row in table[:-1]])
    assert abs(of_all_images - np.mean(means)) > 0.01

    # the score is that of the 8-bit image on disk, by the protocol of the deraining literature
    folder = next((tmp_path / "results/deraining").glob("*/Rain100L"))
    scores = [
        evaluate_pair(read_image(folder / f"{pair.name}.png"), read_image(pair.target), "deraining_y")
        for pair in find_pairs(tmp_path / "Datasets/test/Rain100L")
    ]
    assert float(table[2]["psnr"]) == pytest.approx(np.mean([psnr for psnr, _ in scores]), abs=1e-3)
    assert float(table[2]["ssim"]) == pytest.approx(np.mean([ssim for _, ssim in scores]), abs=1e-5)

    # all of it is there already: nothing is restored again
    restored = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.png")}
    done = run("deraining", "test.py", "--weights", weights["deraining"], "--device", "cpu", cwd=tmp_path)
    assert "Test1200: 2 of 2 images are done already" in done.stdout
    assert restored == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.png")}


def test_killed_test_goes_on(tmp_path, weights, image_pairs):
    image_pairs(tmp_path / "Datasets/test/Rain100L", count=40, size=(64, 64))
    words = ["--weights", weights["deraining"], "--dataset", "Rain100L", "--device", "cpu"]
    command = [sys.executable, ROOT / "Deraining" / "test.py", *words]
    process = Forked(command, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        sheets = list((tmp_path / "results").rglob("scores.csv"))
        if sheets and sheets[0].read_text().count("\n") > 5:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.png")}
    assert 5 <= len(before) < 40
    done = run("deraining", "test.py", *words, cwd=tmp_path)
    kept = sum(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert f"Rain100L: {kept} of 40 images are done already" in done.stdout and kept >= 5
    assert rows(tmp_path, "deraining")[0]["images"] == "40"


def test_gopro_and_hide(tmp_path, weights, image_pairs):
    make_tree(tmp_path / "Datasets", ["GoPro/test", "HIDE/test"], image_pairs)
    words = ["--weights", weights["deblurring"], "--dataset", "GoPro", "HIDE", "--device", "cpu"]
    done = run("deblurring", "test.py", *words, cwd=tmp_path)
    assert "32.71/0.960" in done.stdout and "30.96/0.940" in done.stdout
    assert [row["protocol"] for row in rows(tmp_path, "deblurring")] == ["rgb_matlab", "rgb_matlab"]


def test_realblur_image_that_cannot_be_aligned_is_not_lost(tmp_path, weights):
    """Photographs align; a flat image does not: it is named, counted and scored as it is."""
    photograph = cv2.imread(str(ROOT / "tests/golden/metrics/pairs/coffee_blur_target.png"))
    for name in ("RealBlur_J", "RealBlur_R"):
        for side in ("input", "target"):
            folder = tmp_path / "Datasets" / name / "test" / side
            folder.mkdir(parents=True)
            blurred = cv2.GaussianBlur(photograph, (0, 0), 1.0) if side == "input" else photograph
            cv2.imwrite(str(folder / "scene.png"), blurred)
            cv2.imwrite(str(folder / "flat.png"), np.full((64, 64, 3), 128, np.uint8))
    words = ["--weights", weights["deblurring"], "--dataset", "RealBlur_J", "RealBlur_R", "--device", "cpu"]
    done = run("deblurring", "test.py", *words, cwd=tmp_path)
    assert done.stdout.count("note: 1 of 2 in RealBlur") == 2 and done.stdout.count("flat: could not be aligned") == 2
    assert [row["images"] for row in rows(tmp_path, "deblurring")] == ["2", "2"]


def test_unreadable_image_is_reported_and_the_others_are_scored(tmp_path, weights, image_pairs):
    image_pairs(tmp_path / "set", count=3, size=(32, 32))
    (tmp_path / "set/input/img2.png").write_bytes(b"\x89PNG and nothing more")
    words = ["--weights", weights["deblurring"], "--dataset", "set", "--device", "cpu"]
    done = run("deblurring", "test.py", *words, cwd=tmp_path, check=2)
    assert "1 not tested" in done.stderr and "img2.png" in done.stderr
    assert rows(tmp_path, "deblurring")[0]["images"] == "2"


def test_score_only_scores_images_of_other_methods(tmp_path, image_pairs):
    image_pairs(tmp_path / "Datasets/test/Rain100L", count=2, size=(32, 32))
    elsewhere = tmp_path / "elsewhere" / "Rain100L"
    elsewhere.mkdir(parents=True)
    expected = []
    for pair in find_pairs(tmp_path / "Datasets/test/Rain100L"):
        image = cv2.blur(cv2.imread(str(pair.input)), (3, 3))
        cv2.imwrite(str(elsewhere / f"{pair.name}.png"), image)
        expected.append(evaluate_pair(image[..., ::-1], read_image(pair.target), "deraining_y")[0])
    run("deraining", "test.py", "--score_only", tmp_path / "elsewhere", "--dataset", "Rain100L", cwd=tmp_path)
    assert float(rows(tmp_path, "deraining")[0]["psnr"]) == pytest.approx(np.mean(expected), abs=1e-3)


def test_original_checkpoints_need_only_their_path(tmp_path, image_pairs):
    specs = json.loads((ROOT / "tests/parity/specs.json").read_text())
    image_pairs(tmp_path / "set", count=1, size=(16, 16))
    for variant, task in (
        ("deraining_dgunet", "deraining"),
        ("deraining_dgunet_plus", "deraining"),
        ("deblurring_dgunet", "deblurring"),
        ("denoising_dgunet", "denoising"),
    ):
        path = tmp_path / f"{variant}.pth"
        torch.save({"state_dict": {f"module.{k}": v for k, v in fill(specs[variant], 7).items()}}, path)
        done = run(task, "test.py", "--weights", path, "--dataset", "set", "--device", "cpu", cwd=tmp_path)
        assert done.stdout.startswith(variant + ",")
    # another task's weights are refused, wherever the layout tells them apart
    words = ["--dataset", "set", "--device", "cpu"]
    done = run("deblurring", "test.py", "--weights", tmp_path / "deraining_dgunet.pth", *words, cwd=tmp_path, check=2)
    assert "not a network for deblurring" in done.stderr
    done = run("compressive_sensing", "test.py", "--weights", tmp_path / "deraining_dgunet.pth", cwd=tmp_path, check=2)
    assert "not a network for compressive sensing" in done.stderr
    torch.save(fill(specs["cs_dgunet_r10"], 7), tmp_path / "cs.pth")
    for k in range(2):
        (tmp_path / "Datasets/Set11").mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(k).integers(0, 256, (40, 70), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"Datasets/Set11/{k}.tif")
    words = ["--weights", tmp_path / "cs.pth", "--dataset", "Set11", "--device", "cpu"]
    assert "31.07/0.912" in run("compressive_sensing", "test.py", *words, cwd=tmp_path).stdout
    done = run("deraining", "test.py", "--weights", tmp_path / "cs.pth", "--dataset", "set", cwd=tmp_path, check=2)
    assert "not a network for deraining" in done.stderr


# --------------------------------------------------------------------- deblurring


def test_saturation_changes_a_third_and_both_alike(tmp_path, image_pairs):
    image_pairs(tmp_path, count=2, size=(24, 24))
    plain = SaturationPatches(tmp_path, 16, saturation=0, repeat=150)
    changed = SaturationPatches(tmp_path, 16, saturation=0.2, repeat=150)
    grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    count = 0
    for index in range(len(plain)):
        assert plain[1, index][0].dtype == torch.uint8 and changed[1, index][0].dtype == torch.float32
        before, after = [unit_range(x) for x in plain[1, index]], changed[1, index]
        assert torch.equal(before[0], after[0]) == torch.equal(before[1], after[1])
        if torch.equal(before[0], after[0]):
            continue
        count += 1
        factors = []
        for b, a in zip(before, after, strict=True):
            colour = b - (b * grey).sum(0)  # saturation scales the distance from grey
            inside = (a > 0.01) & (a < 0.99) & (colour.abs() > 0.05)
            factors.append((((a - (b * grey).sum(0)) / colour)[inside]).median())
        assert 0.8 <= factors[0] <= 1.2 and abs(factors[0] - factors[1]) < 0.02
    assert count / len(plain) == pytest.approx(1 / 3, abs=0.09)


def test_known_blur_from_a_config_to_a_score(tmp_path):
    """Trained on clean images, tested on blurred ones; the kernel is the config's, whatever the first weights had."""
    rng = np.random.default_rng(0)
    kernel = np.outer([1, 2, 1], [1, 2, 4, 2, 1]) / 40
    np.save(tmp_path / "kernel.npy", kernel)
    np.save(tmp_path / "other.npy", kernel[:, ::-1] * 0.9)
    for k in range(4):
        clean = cv2.resize(rng.integers(0, 256, (7, 8, 3), dtype=np.uint8), (48, 40), interpolation=cv2.INTER_CUBIC)
        blurred = cv2.filter2D(clean, -1, kernel[::-1, ::-1], borderType=cv2.BORDER_REFLECT_101)
        write_image(tmp_path / f"clean/{k}.png", clean)
        write_image(tmp_path / f"pairs/target/{k}.png", clean)
        write_image(tmp_path / f"pairs/input/{k}.png", blurred)
    words = [
        "MODEL.DEGRADATION", "blur", "TRAINING.TRAIN_DIR", "clean", "TRAINING.SAVE_DIR", "runs", "OPTIM.NUM_EPOCHS", 1,
        "OPTIM.BATCH_SIZE", 2, "TRAINING.TRAIN_PS", 32, "TRAINING.VAL_PS", 32, "TRAINING.WORKERS", 0, "DEVICE", "cpu",
        "SPEED.AMP", "fp32", "MODEL.OVERRIDES", "{width: 8, growth: 4, final_growth: 4, stages: 2}",
    ]  # fmt: skip
    done = run("deblurring", "train.py", *words, "MODEL.KERNEL", "other.npy", "MODEL.SESSION", "one", cwd=tmp_path)
    assert "3 images of clean" in done.stdout and "held out" in done.stdout
    words += ["MODEL.KERNEL", "kernel.npy", "MODEL.WEIGHTS", "runs/one/model_best.pth", "MODEL.SESSION", "two"]
    run("deblurring", "train.py", *words, cwd=tmp_path)
    weights = tmp_path / "runs/two/model_best.pth"
    model = load_model(weights, task="deblurring")
    np.testing.assert_array_equal(model.degradation.kernel, kernel.astype(np.float32))
    assert not list(model.degradation.parameters())
    run("deblurring", "test.py", "--weights", weights, "--dataset", "pairs", "--device", "cpu", cwd=tmp_path)
    (row,) = rows(tmp_path, "deblurring")
    assert row["images"] == "4" and float(row["psnr"]) > 10
    y = read_image(tmp_path / "pairs/input/0.png")[:33, :45]  # of no multiple of 8
    assert restore(model, y, tile=32).shape == y.shape
    with pytest.raises(UserError, match="not the network's known degradation"):
        restore(model, y, self_ensemble=True)
    done = run("deblurring", "train.py", *words, "SYNTHESIS.NAME", "motion_blur", cwd=tmp_path, check=2)
    assert "set one of the two" in done.stderr


def test_one_network_for_any_known_blur_of_grey_images(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(4):
        write_image(tmp_path / f"clean/{k}.png", rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    words = [
        "TRAINING.TRAIN_DIR", "clean", "TRAINING.SAVE_DIR", "runs", "OPTIM.NUM_EPOCHS", 2, "OPTIM.BATCH_SIZE", 2,
        "OPTIM.LR_INITIAL", 1e-12, "OPTIM.LR_MIN", 0, "TRAINING.TRAIN_PS", 40, "TRAINING.VAL_PS", 40, "DEVICE", "cpu",
        "TRAINING.WORKERS", 0, "SPEED.AMP", "fp32", "MODEL.SESSION", "any", "MODEL.GREY", True,
        "TRAINING.VAL_EPOCHS", "[1, 2]", "TRAINING.VAL_FROM_EPOCH", 0, "TRAINING.VAL_TIMES", 1,
        "MODEL.OVERRIDES", "{width: 8, growth: 4, final_growth: 4, stages: 2}",
    ]  # fmt: skip
    known = ["MODEL.DEGRADATION", "blur", "MODEL.KERNEL", "motion", "MODEL.KERNEL_EXTENT", "[3, 9]", "MODEL.NOISE", 50]
    done = run("deblurring", "train.py", *words, cwd=tmp_path, check=2)
    assert "MODEL.GREY and MODEL.NOISE are of a known blur" in done.stderr
    run("deblurring", "train.py", *words, *known, cwd=tmp_path)
    with open(tmp_path / "runs/any/history.csv", newline="") as file:
        first, second = (float(row["psnr"]) for row in csv.DictReader(file))
    assert first == pytest.approx(second, abs=1e-4), "blurs and noise of the validation are the same each time"
    model = load_model(tmp_path / "runs/any/model_best.pth")
    assert model.channels == 1 and model.degradation.settings() == dict(shortest=3, longest=9, noise=50 / 255)
    assert model(torch.rand(1, 1, 16, 24), Blur(torch.ones(3, 3) / 9))[0].shape == (1, 1, 16, 24)
    told = run(
        "deblurring", "test.py", "--weights", "runs/any/model_best.pth", "--dataset", "clean", cwd=tmp_path, check=2
    )
    assert "give it yours first: model.degradation = Blur(kernel)" in told.stderr
    model.degradation = Blur(torch.ones(3, 3) / 9)
    assert restore(model, read_luma(tmp_path / "clean/0.png")[:33]).shape == (33, 48)


def test_known_blurs_are_those_of_their_step_and_image(tmp_path, monkeypatch):
    """Whatever the processes, and wherever the run was stopped."""
    rng = np.random.default_rng(0)
    for k in range(6):
        write_image(tmp_path / f"clean/{k}.png", rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    words = [
        "MODEL.DEGRADATION", "blur", "MODEL.KERNEL", "motion", "MODEL.KERNEL_EXTENT", "[3, 9]", "MODEL.NOISE", 9,
        "TRAINING.TRAIN_DIR", "clean", "TRAINING.VAL_DIR", "clean", "TRAINING.SAVE_DIR", "runs", "OPTIM.NUM_EPOCHS", 1,
        "OPTIM.BATCH_SIZE", 2, "TRAINING.TRAIN_PS", 40, "TRAINING.VAL_PS", 40, "TRAINING.WORKERS", 0, "DEVICE", "cpu",
        "TRAINING.VAL_EPOCHS", "[1]", "TRAINING.VAL_FROM_EPOCH", 0, "TRAINING.VAL_TIMES", 1, "SPEED.AMP", "fp32",
        "MODEL.OVERRIDES", "{width: 8, growth: 4, final_growth: 4, stages: 2}",
    ]  # fmt: skip
    run("deblurring", "train.py", *words, "MODEL.SESSION", "whole", cwd=tmp_path)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_sync_stop_flag", lambda self, _=0.0: setattr(self.stop, "agreed", 15))
        run("deblurring", "train.py", *words, "MODEL.SESSION", "parts", cwd=tmp_path, check=143)
    run("deblurring", "train.py", *words, "MODEL.SESSION", "parts", "TRAINING.RESUME", True, cwd=tmp_path)
    whole, parts = (read_checkpoint(tmp_path / f"runs/{name}/model_latest.pth") for name in ("whole", "parts"))
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][key]), key

    words += ["OPTIM.LR_INITIAL", 1e-12, "OPTIM.LR_MIN", 0]
    run("deblurring", "train.py", *words, "MODEL.SESSION", "one", cwd=tmp_path)
    command = [sys.executable, ROOT / "Deblurring/train.py", *map(str, words), "MODEL.SESSION", "two", "PROCESSES", "2"]
    run_forked(command, cwd=tmp_path, check=True)
    one, two = (read_checkpoint(tmp_path / f"runs/{name}/model_latest.pth")["last_psnr"] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-4)


# --------------------------------------------------------------------- compressive sensing


def test_luma_of_every_kind_of_image(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    r, g, b = (colour[..., i].astype(int) for i in range(3))
    luma = (4899 * r + 9617 * g + 1868 * b + 8192) >> 14
    for suffix in ("png", "tif"):
        Image.fromarray(colour).save(tmp_path / f"colour.{suffix}")
        Image.fromarray(grey).save(tmp_path / f"grey.{suffix}")
        np.testing.assert_array_equal(read_luma(tmp_path / f"colour.{suffix}"), luma)
        np.testing.assert_array_equal(read_luma(tmp_path / f"grey.{suffix}"), grey)
    palette = Image.fromarray(colour).quantize(16)
    palette.save(tmp_path / "palette.png")
    expected = cv2.cvtColor(np.asarray(palette.convert("RGB")), cv2.COLOR_RGB2YCrCb)[..., 0]
    np.testing.assert_array_equal(read_luma(tmp_path / "palette.png"), expected)
    cv2.imwrite(str(tmp_path / "deep.png"), grey.astype(np.uint16))
    with pytest.raises(ValueError, match="16 bits per channel"):
        read_luma(tmp_path / "deep.png")


def test_luma_patches(tmp_path):
    ramp = np.arange(32 * 32).reshape(32, 32) % 251
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "ramp.png")
    data = LumaPatches([tmp_path / "ramp.png"], 32, repeat=400)
    assert len(data) == 400
    base = torch.from_numpy(ramp).byte()[None]
    variants = [v for x in (base, base.mT) for v in (x, x.flip(-1), x.flip(-2), x.flip(-1, -2))]
    seen = np.zeros(8)
    for index in range(400):
        x, target = data[1, index]
        assert torch.equal(x, target) and x.shape == (1, 32, 32)
        seen += [torch.equal(x, v) for v in variants]
    assert seen.sum() == 400 and seen.min() > 25  # all eight, equally likely
    assert all(torch.equal(a, b) for a, b in zip(data[3, 7], data[3, 7], strict=True))
    with pytest.raises(ValueError, match="TRAIN_PS must be a multiple of 32 pixels"):
        LumaPatches([tmp_path / "ramp.png"], 33)
    with pytest.raises(ValueError, match="VAL_PS must be a multiple of 32 pixels"):
        sensing_centres(tmp_path / "ramp.png", 40)


def sensing_centres(path: Path, patch: int) -> CenterCropDataset:
    """As CompressiveSensing/train.py validates with one image."""
    return CenterCropDataset([path], patch, luma=True, multiple=32, area=256)


@pytest.mark.parametrize(
    ("size", "patch", "blocks"),
    [
        ((300, 270), 32, [(y, x, 32, 32) for y in range(22, 278, 32) for x in range(7, 263, 32)]),
        ((300, 270), 128, [(22, 7, 128, 128), (22, 135, 128, 128), (150, 7, 128, 128), (150, 135, 128, 128)]),
        ((300, 270), 256, [(22, 7, 256, 256)]),
        ((300, 270), 0, [(6, 7, 288, 256)]),
        ((100, 140), 128, [(2, 6, 96, 128)]),
        ((70, 33), 32, [(3, 0, 32, 32), (35, 0, 32, 32)]),
    ],
)
def test_sensing_is_validated_in_separate_blocks(tmp_path, size, patch, blocks):
    """Of the centre of an image, and scored as one image."""
    image = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    centres = sensing_centres(tmp_path / "a.png", patch)
    x, target = centres[0]
    assert torch.equal(x, target)
    expected = [image[y : y + height, x : x + width] for y, x, height, width in blocks]
    np.testing.assert_array_equal(x, np.stack(expected)[:, None])
    assert centres.sizes == {(len(blocks), *x.shape[-2:])}

    words = ["MODEL.NAME", "compressive_sensing_dgunet", "DEVICE", "cpu", "TRAINING.WORKERS", 0, "SPEED.AMP", "fp32"]
    cfg = load_config(None, [str(word) for word in words])
    model = create_model("compressive_sensing_dgunet", width=8, growth=4, final_growth=4, stages=2)
    trainer = Trainer(cfg, model, LumaPatches([tmp_path / "a.png"], 32), centres)
    with torch.inference_mode():
        ones = [model(model.degradation.A(unit_range(block)[None]))[0][0] for block in x]
    error = (torch.stack(ones).clamp(0, 1) - unit_range(x)).square().mean()
    assert trainer.validate() == pytest.approx(-10 * error.log10().item(), abs=1e-3)


def test_sensing_recipes_validate_what_they_train_on():
    for name in ("dgunet", "dgunet_plus"):
        for step, side in (("", 32), ("_step2", 128)):
            training = load_config(ROOT / f"configs/compressive_sensing/{name}{step}.yaml").TRAINING
            assert training.TRAIN_PS == training.VAL_PS == side


def test_tiles_follow_the_original_and_whole_does_not(weights):
    """Sides 128 and 130: a full tile of zeros is added to the first, as in the original; results are cropped again."""
    model = load_model(weights["compressive_sensing"])
    luma = np.random.default_rng(0).integers(0, 256, (128, 130), dtype=np.uint8)
    restored, initial = sensing.reconstruct_tiles(model, luma)
    assert restored.shape == initial.shape == luma.shape and restored.dtype == np.float32
    x = torch.from_numpy(luma[:, :128].astype(np.float32) / 255)[None, None]
    with torch.no_grad():
        y = model.degradation.A(x)
        np.testing.assert_allclose(restored[:, :128], model(y)[0][0, 0], atol=1e-5)
        np.testing.assert_allclose(initial[:, :128], model.degradation.A_adjoint(y)[0, 0], atol=1e-5)
    whole, _ = sensing.reconstruct_whole(model, luma)
    assert whole.shape == luma.shape and np.abs(whole - restored).max() > 1e-4


def test_measurements_with_noise_and_of_few_bits(tiny_model):
    """What test.py's --noise and --bits do; seen from the first estimate, which is linear in the measurements."""
    model = tiny_model("compressive_sensing_dgunet", stages=2, ratio=0.5)
    matrix = model.degradation.matrix
    torch.manual_seed(0)
    y = torch.rand(1, len(matrix), 40, 40)
    noisy = sensing.disturb(y, matrix, noise=10)
    torch.testing.assert_close((noisy - y).std(dim=(0, 2, 3)), 10 / 255 * matrix.norm(dim=1), rtol=0.1, atol=0)
    assert torch.equal(noisy, sensing.disturb(y, matrix, noise=10)) and torch.equal(y, sensing.disturb(y, matrix))
    for bits in (1, 8):
        rounded = sensing.disturb(y, matrix, bits=bits)
        assert all(len(row.unique()) <= 2**bits for row in rounded[0])
        step = (y.amax(dim=(0, 2, 3)) - y.amin(dim=(0, 2, 3))) / (2**bits - 1)
        assert ((rounded - y).abs().amax(dim=(0, 2, 3)) <= 0.501 * step).all()
    constant = torch.ones_like(y)
    torch.testing.assert_close(sensing.disturb(constant, matrix, bits=8), constant)
    luma = np.random.default_rng(0).integers(0, 256, (70, 130), dtype=np.uint8)
    for reconstruct in (sensing.reconstruct_tiles, sensing.reconstruct_whole):
        clean, initial = reconstruct(model, luma)
        disturbed, other = reconstruct(model, luma, noise=5, bits=6)
        assert np.abs(initial - other).mean() > 1e-3 and np.abs(clean - disturbed).mean() > 1e-3


def test_sets_are_scored_by_the_original_protocol(tmp_path, weights, monkeypatch):
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (40, 70), dtype=np.uint8) for name in ("Set11/a.tif", "BSD68/b.png")}
    for name, image in images.items():
        (tmp_path / "Datasets" / name).parent.mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "Datasets" / name)
    words = ["--weights", weights["compressive_sensing"], "--device", "cpu", "--save_images"]
    done = run("compressive_sensing", "test.py", *words, cwd=tmp_path)
    assert "36.11/0.961" in done.stdout and "31.90/0.91" in done.stdout
    model = load_model(weights["compressive_sensing"])
    for row, image in zip(rows(tmp_path, "compressive_sensing"), images.values(), strict=True):
        psnr, ssim = evaluate_pair(sensing.reconstruct_tiles(model, image)[0], image, "cs_y")
        assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-3) and float(row["ssim"]) == pytest.approx(
            ssim, abs=1e-5
        )
    run("compressive_sensing", "test.py", *words, "--whole", cwd=tmp_path)
    assert len(rows(tmp_path, "compressive_sensing")) == 4


def test_measuring_and_reconstructing_apart(tmp_path, weights, monkeypatch):
    path = weights["compressive_sensing"]
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (45, 70), dtype=np.uint8), (0, 0), 3)
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    run("compressive_sensing", "measure.py", "photo.png", "--weights", path, "--out", "photo.npz", cwd=tmp_path)
    with np.load(tmp_path / "photo.npz") as file:
        content = dict(file)
    assert content["y"].shape == (256, 2, 3) and content["matrix"].shape == (256, 1024)
    block = np.zeros((32, 32))
    block[:13, :32] = image[32:45, 32:64] / 255  # the second row's second block, zeros below the image
    np.testing.assert_allclose(content["y"][:, 1, 1], content["matrix"] @ block.ravel(), atol=1e-4)

    words = ["photo.npz", "--weights", path, "--out", "back.png", "--device", "cpu"]
    run("compressive_sensing", "reconstruct.py", *words, cwd=tmp_path)
    expected = sensing.reconstruct_whole(load_model(path), image)[0].clip(0, 1) * 255
    back = cv2.imread(str(tmp_path / "back.png"), cv2.IMREAD_UNCHANGED)
    assert back.shape == image.shape and np.abs(back - expected).max() <= 0.51

    # measurements by another matrix are not reconstructed as if they were ours
    np.save(tmp_path / "other.npy", np.random.default_rng(1).normal(size=(256, 1024)).astype(np.float32))
    run("compressive_sensing", "measure.py", "photo.png", "--matrix", "other.npy", "--out", "photo.npz", cwd=tmp_path)
    done = run("compressive_sensing", "reconstruct.py", *words, cwd=tmp_path, check=2)
    assert "another matrix" in done.stderr and "MATRIX_START" in done.stderr and done.stderr.strip().count("\n") == 0
    (tmp_path / "photo.npz").write_text("no measurements")
    done = run("compressive_sensing", "reconstruct.py", *words, cwd=tmp_path, check=2)
    assert "not an .npz file" in done.stderr


@pytest.mark.parametrize("matrix, start", [("learned", "pca"), ("fixed", ""), ("fixed", "matrix.npy")])
def test_sensing_in_two_steps_with_either_matrix(tmp_path, matrix, start):
    """Step 1 on blocks, step 2 from its weights on larger crops; a fixed matrix does not move, a learned one does."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for k in range(4):
        Image.fromarray(rng.integers(0, 256, (70, 80), dtype=np.uint8)).save(tmp_path / f"images/{k}.png")
    np.save(tmp_path / "matrix.npy", rng.normal(size=(103, 1024)).astype(np.float32) / 32)
    common = [
        "MODEL.RATIO", 0.1, "MODEL.MATRIX", matrix, "MODEL.MATRIX_START", start, "TRAINING.TRAIN_DIR", "images",
        "TRAINING.VAL_HOLD_BACK", 1,
        "TRAINING.REPEAT", 2, "TRAINING.VAL_PS", 32, "TRAINING.WORKERS", 0, "TRAINING.SAVE_DIR", "runs",
        "OPTIM.BATCH_SIZE", 2, "OPTIM.NUM_EPOCHS", 1, "OPTIM.LR_INITIAL", 1e-3, "DEVICE", "cpu", "SPEED.AMP", "fp32",
        "MODEL.OVERRIDES.width", 8, "MODEL.OVERRIDES.growth", 4, "MODEL.OVERRIDES.final_growth", 4,
        "MODEL.OVERRIDES.stages", 2,
    ]  # fmt: skip
    done = run("compressive_sensing", "train.py", *common, "MODEL.SESSION", "one", cwd=tmp_path)
    assert "training    3 images" in done.stdout and "held out" in done.stdout
    config = ROOT / "configs/compressive_sensing/dgunet_step2.yaml"
    words = ["--config", config, *common, "TRAINING.TRAIN_PS", 64, "MODEL.WEIGHTS", "runs/one/model_latest.pth"]
    run("compressive_sensing", "train.py", *words, "MODEL.SESSION", "two", cwd=tmp_path)
    first, second = (load_model(tmp_path / f"runs/{name}/model_latest.pth").degradation for name in ("one", "two"))
    assert first.matrix.shape == (103, 1024)
    learned = matrix == "learned"
    assert isinstance(first.matrix, torch.nn.Parameter) == learned
    assert torch.equal(first.matrix, second.matrix) != learned
    if start == "matrix.npy":
        np.testing.assert_array_equal(first.matrix, np.load(tmp_path / "matrix.npy"))


def test_sensing_begins_with_a_network_of_another_ratio(tmp_path, weights):
    """All but the matrix is taken over, if a start for the matrix is given; without one, the shapes do not fit."""
    given = load_model(weights["compressive_sensing"])
    size = {f"MODEL.OVERRIDES.{key}": given.arguments[key] for key in ("width", "growth", "final_growth", "stages")}

    def trained_from(start: str | Path, ratio: float = 0.5, matrix: str = "learned") -> dict[str, torch.Tensor]:
        options = {
            "MODEL.RATIO": ratio, "MODEL.MATRIX_START": start, "MODEL.MATRIX": matrix,
            "MODEL.WEIGHTS": weights["compressive_sensing"],
            "TRAINING.SAVE_DIR": tmp_path, "DEVICE": "cpu", **size,
        }  # fmt: skip
        words = [str(word) for pair in options.items() for word in pair]
        cfg = load_config(ROOT / "configs/compressive_sensing/dgunet.yaml", words)
        return build_model(cfg, None, block_sampling).state_dict()

    with pytest.raises(UserError, match="degradation.matrix"):
        trained_from("")
    after = trained_from("dct")
    assert torch.equal(after.pop("degradation.matrix"), init_sampling_matrix("dct", 0.5))
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in after.items())
    # of the same ratio, a user's own matrix that is to stay as it is
    own = init_sampling_matrix("dct", 0.25).flip(0)
    np.save(tmp_path / "own.npy", own)
    assert torch.equal(trained_from(tmp_path / "own.npy", 0.25, "fixed")["degradation.matrix"], own)
    kept = trained_from(tmp_path / "own.npy", 0.25)["degradation.matrix"]
    assert torch.equal(kept, given.degradation.matrix)


def small_images(folder: Path, count: int = 3):
    for k in range(count):
        image = np.random.default_rng(k).integers(0, 256, (5, 5), dtype=np.uint8)
        write_image(folder / f"{k}.png", cv2.resize(image, (64, 64), interpolation=cv2.INTER_CUBIC))


def train_words(**changed) -> list:
    """A run of seconds on ``images``, of `small_images`."""
    values = {
        "TRAINING.TRAIN_DIR": "images", "TRAINING.VAL_HOLD_BACK": 1, "TRAINING.TRAIN_PS": 64, "TRAINING.VAL_PS": 64,
        "TRAINING.REPEAT": 2, "TRAINING.WORKERS": 0, "TRAINING.SAVE_DIR": "runs", "MODEL.SESSION": "run",
        "OPTIM.BATCH_SIZE": 2, "OPTIM.NUM_EPOCHS": 1, "DEVICE": "cpu", "SPEED.AMP": "fp32",
        "MODEL.OVERRIDES": "{width: 8, growth: 4, final_growth: 4, stages: 2}",
        **{key.replace("__", "."): value for key, value in changed.items()},
    }  # fmt: skip
    return [word for pair in values.items() for word in pair]


def test_one_network_for_all_ratios(tmp_path, weights):
    """Trained from one for 25 %, tested at the paper's ratios and another; measure.py and reconstruct.py at 17 %."""
    small_images(tmp_path / "images")
    small_images(tmp_path / "Datasets/Set11", count=1)
    begin = dict(MODEL__WEIGHTS=weights["compressive_sensing"], MODEL__MATRIX_START="dct", OPTIM__LR_INITIAL=1e-12)
    words = train_words(MODEL__RATIO="[0.01, 0.5]", **begin)
    run("compressive_sensing", "train.py", *words, cwd=tmp_path)
    path = tmp_path / "runs/run/model_best.pth"
    model = load_model(path)
    torch.testing.assert_close(model.degradation.matrix.detach(), init_sampling_matrix("dct", 0.5))
    torch.testing.assert_close(model.last.state_dict(), load_model(weights["compressive_sensing"]).last.state_dict())
    assert "1 %: " in (tmp_path / "runs/run/train.log").read_text()

    words = ["--weights", path, "--dataset", "Set11", "--device", "cpu"]
    run("compressive_sensing", "test.py", *words, cwd=tmp_path)
    done = run("compressive_sensing", "test.py", *words, "--ratio", 0.17, "--whole", cwd=tmp_path)
    assert "22.09" not in done.stdout
    found = rows(tmp_path, "compressive_sensing")
    assert [row["dataset"] for row in found] == [f"Set11_{percent}%" for percent in (1, 4, 10, 25, 50, 17)]
    assert len({row["psnr"] for row in found}) == 6
    image = read_luma(tmp_path / "Datasets/Set11/0.png")
    for row in found:
        ratio, whole = float(row["dataset"][6:-1]) / 100, "whole=True" in row["settings"]
        assert f"ratio={ratio:g} " in row["settings"]
        reconstruct = sensing.reconstruct_whole if whole else sensing.reconstruct_tiles
        expected = evaluate_pair(reconstruct(model, image, ratio=ratio)[0], image, "cs_y")[0]
        assert float(row["psnr"]) == pytest.approx(expected, abs=1e-3)
    assert "0.7" in run("compressive_sensing", "test.py", *words, "--ratio", 0.7, cwd=tmp_path, check=2).stderr
    words[1] = weights["compressive_sensing"]  # of one ratio
    assert "25 %" in run("compressive_sensing", "test.py", *words, "--ratio", 0.1, cwd=tmp_path, check=2).stderr

    words = ["images/0.png", "--weights", path, "--ratio", 0.17, "--out", "photo.npz"]
    run("compressive_sensing", "measure.py", *words, cwd=tmp_path)
    with np.load(tmp_path / "photo.npz") as file:
        assert file["y"].shape == (175, 2, 2) and file["ratio"] == 175 / 1024
        np.testing.assert_array_equal(file["matrix"], model.degradation.matrix[:175].detach())
    words = ["photo.npz", "--weights", path, "--out", "back.png", "--device", "cpu"]
    run("compressive_sensing", "reconstruct.py", *words, cwd=tmp_path)
    back = sensing.reconstruct_whole(model, read_luma(tmp_path / "images/0.png"), ratio=0.17)[0].clip(0, 1) * 255
    assert np.abs(read_luma(tmp_path / "back.png") - back).max() <= 0.51
    np.savez(tmp_path / "photo.npz", y=np.zeros((600, 2, 2), np.float32))
    assert "from 11 to 512" in run("compressive_sensing", "reconstruct.py", *words, cwd=tmp_path, check=2).stderr


@pytest.mark.parametrize("block", [16, 24])
def test_blocks_of_other_sides_are_trained_and_tested(tmp_path, block):
    small_images(tmp_path / "images")
    side = 48 if block == 24 else 64
    changed = dict(MODEL__BLOCK=block, TRAINING__TRAIN_PS=side, TRAINING__VAL_PS=side, MODEL__MATRIX_START="dct")
    run("compressive_sensing", "train.py", *train_words(**changed), cwd=tmp_path)
    path = tmp_path / "runs/run/model_best.pth"
    assert load_model(path).degradation.matrix.shape == (block**2 // 4, block**2)
    words = ["--weights", path, "--dataset", "images", "--device", "cpu"]
    if 128 % block:
        done = run("compressive_sensing", "test.py", *words, cwd=tmp_path, check=2)
        assert "--whole" in done.stderr and "24x24" in done.stderr
        words.append("--whole")
    run("compressive_sensing", "test.py", *words, cwd=tmp_path)
    assert rows(tmp_path, "compressive_sensing")[0]["images"] == "3"
    run("compressive_sensing", "measure.py", "images/0.png", "--weights", path, "--out", "y.npz", cwd=tmp_path)
    words = ["y.npz", "--weights", path, "--out", "back.png", "--device", "cpu"]
    run("compressive_sensing", "reconstruct.py", *words, cwd=tmp_path)
    assert read_luma(tmp_path / "back.png").shape == (64, 64)
    np.save(tmp_path / "own.npy", init_sampling_matrix("dct", 0.25, block))
    run("compressive_sensing", "measure.py", "images/0.png", "--matrix", "own.npy", "--out", "own.npz", cwd=tmp_path)
    with np.load(tmp_path / "y.npz") as measured, np.load(tmp_path / "own.npz") as own:
        assert measured["y"].shape == own["y"].shape
    wrong = train_words(**changed | dict(TRAINING__TRAIN_PS=32, MODEL__SESSION="other"))
    if block == 24:
        assert "TRAIN_PS" in run("compressive_sensing", "train.py", *wrong, cwd=tmp_path, check=2).stderr


def test_tasks_read_their_weights_through_restore(weights):
    """The networks for images restore through the package; the sensing one wants measurements."""
    image = np.zeros((20, 20, 3), np.uint8)
    for task in ("deraining", "deblurring"):
        assert restore(load_model(weights[task], task=task), image).shape == image.shape
    with pytest.raises(ValueError, match="BlockSampling.*measurements"):
        restore(load_model(weights["compressive_sensing"]), image)


def test_test100_as_it_was_published(tmp_path, weights, image_pairs):
    """Images of two halves, clean on the left, score as the same pairs in two folders do."""
    pairs = image_pairs(tmp_path / "Datasets/test/Rain100L", count=3)
    halves = tmp_path / "Datasets/test/Test100"
    for pair in find_pairs(pairs):
        write_image(halves / f"{pair.name}.png", np.hstack([read_image(pair.target), read_image(pair.input)]))
    run("deraining", "test.py", "--weights", weights["deraining"], "--dataset", "Test100", "Rain100L", cwd=tmp_path)
    one, other = rows(tmp_path, "deraining")
    assert one["images"] == "3"
    assert all(one[key] == other[key] for key in ("psnr", "ssim", "input_psnr", "input_ssim"))
    write_image(halves / "odd.png", np.zeros((16, 33, 3), np.uint8))
    command = "--weights", weights["deraining"], "--dataset", "Test100"
    assert "odd.png" in run("deraining", "test.py", *command, cwd=tmp_path, check=2).stderr
