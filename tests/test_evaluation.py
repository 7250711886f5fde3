"""The test commands, each run in this process: what they do beside one another, at faults, and on a second call."""

import csv
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import scipy.io
import torch

from dgunet import DGUNet, UserError, create_model, inference, load_model, restore
from dgunet.checkpoints.load import describe_model, read_checkpoint, save_checkpoint
from dgunet.data.images import read_image, write_image
from dgunet.data.pairs import find_pairs
from dgunet.data.photos import estimate_sigma, trained_sigma_range
from dgunet.data.transforms import to_uint8, unit_range
from dgunet.evaluation import cli as testing
from dgunet.evaluation import runner, scoresheet, sets
from dgunet.evaluation.cli import append_results, average
from dgunet.evaluation.metrics import PROTOCOLS, evaluate_pair
from dgunet.evaluation.runner import evaluate
from dgunet.evaluation.scoresheet import Result, ScoreSheet
from dgunet.evaluation.sets import ImageSet, Sample
from dgunet.runtime.errors import run_cli
from dgunet.runtime.files import match_unicode_form
from dgunet.runtime.hardware import pick_device
from dgunet.tasks import find_task
from dgunet.tasks.denoising import BENCHMARKS, with_noise

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("deraining", "denoising", "compressive_sensing")


@cache
def tiny_weights(task: str, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    model = create_model(f"{task}_dgunet", width=8, growth=4, final_growth=4, stages=2)
    return {"state_dict": model.state_dict(), "model": describe_model(model)}


@pytest.fixture
def test(tmp_path, monkeypatch, capfd):
    """``test(*words)`` runs a task's test.py in an empty folder: its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words, task: str = "denoising", weights: str | None = "tiny.pth") -> SimpleNamespace:
        if weights == "tiny.pth" and not Path(weights).exists():
            save_checkpoint(tiny_weights(task), weights)
        words = [*map(str, words), "--device", "cpu", *(["--weights", weights] if weights else [])]
        capfd.readouterr()
        with pytest.raises(SystemExit) as status:
            run_cli(lambda: find_task(task).test(words))
        out, err = capfd.readouterr()
        err = "\n".join(line for line in err.splitlines() if "grfmt_" not in line)  # of OpenCV's decoders
        return SimpleNamespace(status=status.value.code or 0, out=out, err=err)

    return run


def rows(task: str = "denoising") -> list[dict]:
    path = Path("results") / f"{task}.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def sheet(name: str = "scores.csv") -> Path:
    (path,) = Path("results").glob(f"*/*/*/{name}")
    return path


def one_line(done: SimpleNamespace) -> str:
    assert done.status == 2 and "Traceback" not in done.err, done.err
    assert done.err.strip().count("\n") == 0, done.err
    return done.err


# ------------------------------------------------------------------------------------------------------------- locking


def test_two_tests_at_once_do_not_mix_and_a_killed_one_goes_on_at_once(test, image_pairs, monkeypatch):
    image_pairs(Path("set"), count=3, size=(16, 16))
    save_checkpoint(tiny_weights("denoising"), "tiny.pth")
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:  # a test that restores two images and is then still busy
        try:
            restore, calls = runner.restore, []

            def slow(*args, **options):
                if len(calls) == 2:
                    time.sleep(0.2)  # the scores of the two
                    os.write(started, b"x")
                    time.sleep(600)
                calls.append(args)
                return restore(*args, **options)

            runner.restore = slow
            test("--dataset", "set")
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"x"
        assert "results" in one_line(test("--dataset", "set"))
        assert rows() == []
        image_pairs(Path("other"), count=1, size=(16, 16))
        assert test("--dataset", "other").status == 0  # another folder is free
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    done = test("--dataset", "set")
    assert done.status == 0 and "2 of 3 images are done already" in done.out
    assert rows()[-1]["images"] == "3"
    assert test("--dataset", "set").status == 0  # one that has ended leaves no lock


def test_rows_of_results_are_whole(tmp_path):
    """After a test that was killed while it wrote its row, and when several write at once."""
    result = Result("set", "cs_y", 3, 30.0, 0.9, 20.0, 0.5)
    table = tmp_path / "results.csv"
    append_results(table, [result], "w.pth", "DGUNet")
    table.write_bytes(table.read_bytes()[:-30])
    append_results(table, [result], "w.pth", "DGUNet")
    with open(table, newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 2 and (found[1]["dataset"], found[1]["psnr"]) == ("set", "30.0000")

    table.unlink()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            for _ in range(10):
                append_results(table, [result, result], "w.pth", "DGUNet")
            os._exit(0)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    with open(table, newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 80 and {row["psnr"] for row in found} == {"30.0000"}


# ----------------------------------------------------------------------------------------- what a second call continues


def test_weights_replaced_while_the_test_starts_are_not_scored_under_the_old_name(test, image_pairs, monkeypatch):
    image_pairs(Path("set"), count=2, size=(16, 16))
    load_model = testing.load_model

    def replaced(*args, **options):
        model = load_model(*args, **options)
        save_checkpoint(tiny_weights("denoising", seed=1), "tiny.pth")
        return model

    with monkeypatch.context() as patch:
        patch.setattr(testing, "load_model", replaced)
        test("--dataset", "set")
    done = test("--dataset", "set")
    assert "done already" not in done.out
    first, second = rows()
    assert first["psnr"] != second["psnr"]
    assert "2 of 2 images are done already" in test("--dataset", "set").out


def test_only_images_that_changed_are_restored_again(test, image_pairs):
    image_pairs(Path("set"), count=3, size=(16, 16))
    for side in ("input", "target"):
        os.rename(f"set/{side}/img3.png", f"set/{side}.png")
    test("--dataset", "set", "--save_images")
    written = {path.stem: path.stat().st_mtime_ns for path in Path("results").rglob("*.png")}
    assert set(written) == {"img1", "img2"}
    for side in ("input", "target"):  # one is added
        os.rename(f"set/{side}.png", f"set/{side}/img3.png")
    done = test("--dataset", "set", "--save_images")
    assert "2 of 3 images are done already" in done.out and rows()[-1]["images"] == "3"
    # another changes
    cv2.imwrite("set/input/img2.png", 255 - cv2.imread("set/input/img2.png"))
    done = test("--dataset", "set", "--save_images")
    assert "2 of 3 images are done already" in done.out and rows()[-1]["psnr"] != rows()[-2]["psnr"]
    now = {path.stem: path.stat().st_mtime_ns for path in Path("results").rglob("*.png")}
    assert now["img1"] == written["img1"] and now["img2"] > written["img2"]
    # one goes: the mean is that of the others
    for side in ("input", "target"):
        os.remove(f"set/{side}/img2.png")
    done = test("--dataset", "set", "--save_images")
    assert "2 of 2 images are done already" in done.out and rows()[-1]["dataset"].endswith("set")
    with open(sheet(), newline="") as file:
        kept = list(csv.DictReader(file))
    assert [row["name"] for row in kept] == ["img1", "img3"]
    assert float(rows()[-1]["psnr"]) == pytest.approx(np.mean([float(row["psnr"]) for row in kept]), abs=1e-4)


def test_images_of_other_settings_do_not_stay(test, image_pairs):
    """Neither beside the scores of these settings, nor as theirs."""
    image_pairs(Path("set"), count=2, size=(16, 16))
    test("--dataset", "set", "--save_images")
    first = {path.name: path.read_bytes() for path in Path("results").rglob("*.png")}
    assert test("--dataset", "set", "--self_ensemble").status == 0 and len(first) == 2
    assert not list(Path("results").rglob("*.png"))
    test("--dataset", "set", "--self_ensemble", "--save_images")
    second = {path.name: path.read_bytes() for path in Path("results").rglob("*.png")}
    assert first.keys() == second.keys() and all(first[name] != second[name] for name in first)


@pytest.mark.parametrize("name", ["scores.csv", "settings.json"])
@pytest.mark.parametrize("content", [b"", b"\0\xff\n,,\n", b"name,psnr\nimg1,x\n", b'{"a": [', b'"' * 200_000])
def test_damaged_records_are_begun_anew(test, image_pairs, name, content):
    image_pairs(Path("set"), count=2, size=(16, 16))
    test("--dataset", "set")
    sheet(name).write_bytes(content)
    done = test("--dataset", "set")
    assert done.status == 0 and "done already" not in done.out and rows()[0]["psnr"] == rows()[1]["psnr"]


def test_killed_while_the_sheet_is_begun_anew(tmp_path, monkeypatch):
    """Scores of other settings are gone before the note says that the sheet's are of these."""
    sheet = ScoreSheet(tmp_path, "train_rgb", {"bf16": False}, {"img": "its fingerprint"})
    sheet.mark_done("img")
    sheet.finish("set")

    def killed(*_):
        raise KeyboardInterrupt

    for method in ((ScoreSheet, "_write"), (Path, "write_text")):
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(*method, killed)
            ScoreSheet(tmp_path, "train_rgb", {"bf16": True}, {"img": "its fingerprint"})
    assert not ScoreSheet(tmp_path, "train_rgb", {"bf16": True}, {"img": "its fingerprint"}).done("img")


def test_weights_of_one_name_do_not_share_a_folder(test, image_pairs):
    image_pairs(Path("set"), count=2, size=(16, 16))
    written = {}
    for seed, name in enumerate("AB"):
        os.makedirs(f"{name}/DGUNet")
        save_checkpoint(tiny_weights("denoising", seed), f"{name}/DGUNet/model_best.pth")
        done = test("--dataset", "set", "--save_images", weights=f"{name}/DGUNet/model_best.pth")
        (folder,) = set(Path("results/denoising").iterdir()) - set(written)
        assert folder.name.startswith("DGUNet_model_best_") and str(folder) in done.out
        written[folder] = {path.name: path.read_bytes() for path in folder.rglob("*.png")}
        assert len(written[folder]) == 2
    for folder, images in written.items():
        assert {path.name: path.read_bytes() for path in folder.rglob("*.png")} == images
    for name in "AB":
        assert (
            "2 of 2 images are done already"
            in test("--dataset", "set", "--save_images", weights=f"{name}/DGUNet/model_best.pth").out
        )
    assert len(list(Path("results/denoising").iterdir())) == 2
    assert test("--dataset", "set", weights="denoising_gaussian").status == 0
    assert Path("results/denoising/denoising_gaussian").is_dir()


def test_scores_of_another_version_of_the_protocol_are_not_done(test, image_pairs, monkeypatch):
    image_pairs(Path("set"), count=2, size=(16, 16))
    test("--dataset", "set")
    assert "2 of 2 images are done already" in test("--dataset", "set").out
    old = PROTOCOLS["sidd_unit_range"]

    def mended(restored, target):
        psnr, ssim = old.score(restored, target)
        return psnr + 1, ssim

    new = dataclasses.replace(old, score=mended, version=old.version + 1)
    monkeypatch.setitem(PROTOCOLS, "sidd_unit_range", new)
    done = test("--dataset", "set")
    assert done.status == 0 and "done already" not in done.out
    (first, _, last), version = rows(), old.version
    assert float(last["psnr"]) == pytest.approx(float(first["psnr"]) + 1, abs=1e-3)
    assert [row["protocol_version"] for row in rows()] == [str(version), str(version), str(version + 1)]


# ----------------------------------------------------------------------------------------------------- tiles and memory


@pytest.fixture
def little_memory(monkeypatch):
    """Calling this makes the free memory too little for a network on more than so many pixels at once."""

    def limit(pixels: int):
        # that of one pixel is what the automatic tile, here the smallest, is computed from
        needed = lambda model, asked: 2**20 if 1 < asked <= pixels else 2**60  # noqa: E731
        monkeypatch.setattr(inference, "estimate_memory", needed)

    return limit


def test_scores_are_of_whole_images_whatever_the_memory(test, image_pairs, little_memory):
    image_pairs(Path("set"), count=2, size=(16, 16))
    cv2.imwrite("set/input/img2.png", np.zeros((200, 240, 3), np.uint8))
    cv2.imwrite("set/target/img2.png", np.full((200, 240, 3), 9, np.uint8))
    assert test("--dataset", "set").status == 0
    assert "2 of 2 images are done already" in test("--dataset", "set", "--tile", "whole").out, "the same scores"
    assert all("tile=whole" in row["settings"] for row in rows()) and rows()[0]["psnr"] == rows()[1]["psnr"]

    little_memory(100 * 100)
    image_pairs(Path("set"), count=1, size=(16, 16), seed=1)  # another first image: the second is done
    done = test("--dataset", "set")
    assert done.status == 0 and "1 of 2 images are done already" in done.out
    os.utime("set/input/img2.png", ns=(1, 1))
    done = test("--dataset", "set")
    assert done.status == 2 and "Traceback" not in done.err and rows()[-1]["images"] == "1"
    (line,) = [line for line in done.err.splitlines() if "img2.png" in line]
    assert "--tile" in line and "memory" in line
    assert test("--dataset", "set", "--tile", "whole").status == 0, "asked for, it is tried"

    tiled = test("--dataset", "set", "--tile", "auto")
    assert tiled.status == 0 and "done already" not in tiled.out and "1 of 2 restored in tiles of 128" in tiled.out
    assert "tile=auto(128+whole)" in rows()[-1]["settings"] and "UserWarning" not in tiled.err
    with open(sheet(), newline="") as file:
        assert [row["tile"] for row in csv.DictReader(file)] == ["whole", "128"]
    fixed = test("--dataset", "set", "--tile", "128")
    assert fixed.status == 0 and "done already" not in fixed.out and "tile=128" in rows()[-1]["settings"]
    assert rows()[-1]["psnr"] == rows()[-2]["psnr"] != rows()[0]["psnr"]


def test_images_that_are_not_scored_are_restored_in_tiles_where_memory_is_short(test, little_memory):
    os.mkdir("photos")
    cv2.imwrite("photos/a.png", np.random.default_rng(0).integers(0, 256, (140, 150, 3), dtype=np.uint8))
    little_memory(100 * 100)
    done = test("--dataset", "photos")
    assert done.status == 0 and "in tiles of 128" in done.out
    (written,) = Path("results").rglob("a.png")
    expected = restore(load_model("tiny.pth"), read_image("photos/a.png"), tile=128)
    assert np.abs(read_image(written).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes"),
     RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")],
    ids=str,
)  # fmt: skip
def test_out_of_memory_names_the_option(test, image_pairs, monkeypatch, error):
    image_pairs(Path("set"), count=2, size=(16, 16))
    whole = runner.restore

    def short(model, image, **options):
        if short.calls:
            raise error
        short.calls += 1
        return whole(model, image, **options)

    short.calls = 0
    monkeypatch.setattr(runner, "restore", short)
    done = test("--dataset", "set")
    assert done.status == 2 and "Traceback" not in done.err and rows()[-1]["images"] == "1"
    assert "img2.png" in done.err and "--tile 512" in done.err


def test_time_of_an_image_is_that_of_restoring_it(tmp_path, image_pairs, monkeypatch):
    """Not of reading, scoring and writing it, nor of what was done before."""
    image_pairs(tmp_path / "set", count=2, size=(16, 16))
    for module, name in ((sets, "read_image"), (runner, "write_image"), (scoresheet, "evaluate_pair")):
        slow = partial(lambda do, *args, **options: (time.sleep(0.1), do(*args, **options))[1], getattr(module, name))
        monkeypatch.setattr(module, name, slow)

    def method(sample, y):
        time.sleep(0.02)
        return y, y

    result = evaluate(method, tmp_path / "set", "rgb_matlab", tmp_path / "out")
    assert 0.02 <= result.seconds_per_image < 0.1

    class Identity(torch.nn.Module):
        forward = None

    model, out = Identity(), tmp_path / "network"
    first = evaluate(model, tmp_path / "set", "rgb_matlab", out, method=restore_nothing)
    again = evaluate(model, tmp_path / "set", "rgb_matlab", out, method=restore_nothing)
    assert first.seconds_per_image < 0.1 and math.isnan(again.seconds_per_image)


def restore_nothing(model, y):
    return y, y


# ------------------------------------------------------------------------------------------------- what is not a number


def test_images_that_equal_their_targets_are_counted_not_averaged(test, image_pairs):
    """Their PSNR is infinite, and one of them alone would make the mean so."""
    image_pairs(Path("set"), count=3, size=(16, 16))
    os.makedirs("restored/set")
    for k in (1, 2, 3):
        image = cv2.imread(f"set/target/img{k}.png")
        cv2.imwrite(f"restored/set/img{k}.png", image if k == 2 else 255 - image)
    done = test("--score_only", "restored", "--dataset", "set", task="deraining", weights=None)
    (row,) = rows("deraining")
    expected = [
        evaluate_pair(read_image(f"restored/set/img{k}.png"), read_image(f"set/target/img{k}.png"), "deraining_y")
        for k in (1, 2, 3)
    ]
    assert expected[1] == (math.inf, 1)
    assert float(row["psnr"]) == pytest.approx((expected[0][0] + expected[2][0]) / 2, abs=1e-3)
    assert float(row["ssim"]) == pytest.approx(np.mean([ssim for _, ssim in expected]), abs=1e-5)
    assert (row["images"], row["identical"]) == ("3", "1") and "1 of 3 restored images" in done.out
    assert math.isnan(float(row["seconds_per_image"]))

    shutil.copytree("set/target", "restored/other")
    image_pairs(Path("other"), count=3, size=(16, 16))
    for k in (1, 2):
        shutil.copy(f"other/target/img{k}.png", f"other/input/img{k}.png")
    done = test("--score_only", "restored", "--dataset", "other", task="deraining", weights=None)
    row = rows("deraining")[-1]
    assert (row["psnr"], row["identical"], row["identical_inputs"]) == ("inf", "3", "2")
    assert math.isfinite(float(row["input_psnr"])) and "2 of 3 inputs" in done.out
    many = average([Result("a", "p", 2, 30, 0.9, 20, 0.5, identical=1), Result("b", "p", 2, 20, 0.9, 20, 0.5)])
    assert (many.identical, many.images, many.psnr) == (1, 4, 25)


@pytest.fixture
def broken_on_white(monkeypatch):
    """The network's second stage gives NaN for white images; calling this ends it."""
    forward = DGUNet.forward

    def broken(self, y):
        estimates = forward(self, y)
        white = (y == 1).flatten(1).all(1)[:, None, None, None]
        estimates[0] = torch.where(white, math.nan, estimates[0])
        return estimates

    monkeypatch.setattr(DGUNet, "forward", broken)
    return lambda: monkeypatch.setattr(DGUNet, "forward", forward)


def test_nan_is_refused_and_the_other_images_are_kept(test, image_pairs, broken_on_white):
    image_pairs(Path("set"), count=3, size=(16, 16))
    cv2.imwrite("set/input/img2.png", np.full((16, 16, 3), 255, np.uint8))
    done = test("--dataset", "set", "--save_images")
    assert done.status == 2 and "error: 1 " in done.err and "Traceback" not in done.err
    (line,) = [line for line in done.err.splitlines() if "NaN" in line]
    assert "set/input/img2.png" in line and "stage 2" in line
    assert {path.stem for path in Path("results").rglob("*.png")} == {"img1", "img3"}
    (row,) = rows()
    assert row["dataset"].endswith("set (incomplete: 2 of 3)") and "nan" not in row["psnr"]
    broken_on_white()
    done = test("--dataset", "set", "--save_images")
    assert done.status == 0 and "2 of 3 images are done already" in done.out and rows()[-1]["images"] == "3"


def test_nan_in_images_alone(test, broken_on_white):
    os.mkdir("photos")
    cv2.imwrite("photos/white.png", np.full((16, 16, 3), 255, np.uint8))
    cv2.imwrite("photos/grey.png", np.full((16, 16, 3), 99, np.uint8))
    done = test("--dataset", "photos")
    assert done.status == 2 and "photos/white.png: stage 2" in done.err
    assert {path.stem for path in Path("results").rglob("*.png")} == {"grey"}


def write_sidd(noisy: np.ndarray, clean: np.ndarray):
    folder = Path("Datasets/SIDD/test")
    folder.mkdir(parents=True)
    for kind, blocks in (("Noisy", noisy), ("Gt", clean)):
        key = f"Validation{kind}BlocksSrgb"
        scipy.io.savemat(folder / f"{key}.mat", {key: blocks})


def test_nan_in_sidd(test, broken_on_white):
    blocks = np.random.default_rng(0).integers(0, 200, (3, 2, 16, 16, 3), dtype=np.uint8)
    noisy = blocks.copy()
    noisy[1, 1] = 255
    write_sidd(noisy, blocks)
    done = test("--dataset", "SIDD")
    assert done.status == 2 and "SIDD's image 0002: stage 2 of the network gave NaN" in done.err
    assert rows()[0]["dataset"] == "SIDD (incomplete: 4 of 6)" and "39.88" not in done.out
    assert not list(Path("results").rglob("Idenoised.mat"))
    broken_on_white()
    assert test("--dataset", "SIDD").status == 0
    assert (rows()[1]["dataset"], rows()[1]["images"]) == ("SIDD", "6") and list(Path("results").rglob("Idenoised.mat"))


def test_nan_in_compressive_sensing(test, monkeypatch):
    os.mkdir("grey")
    for name in ("a", "b"):
        cv2.imwrite(f"grey/{name}.png", np.full((32, 32), 255 if name == "b" else 99, np.uint8))
    weights = tiny_weights("compressive_sensing")
    matrix = weights["state_dict"]["degradation.matrix"]
    # what the network makes of large measurements does not fit into numbers
    scaled = weights["state_dict"] | {"degradation.matrix": torch.full_like(matrix, 2e18)}
    save_checkpoint(weights | {"state_dict": scaled}, "huge.pth")
    for words in ((), ("--whole",)):
        done = test("--dataset", "grey", *words, task="compressive_sensing", weights="huge.pth")
        assert done.status == 2 and "2 not tested" in done.err and "Traceback" not in done.err
        assert "grey/a.png: stage 1 of the network gave NaN or infinite" in done.err
    assert rows("compressive_sensing") == []


def test_disturbed_measurements_do_not_stand_beside_the_papers(test, image_pairs):
    image_pairs(Path("pairs"), count=2, size=(40, 48))
    os.renames("pairs/target", "Datasets/Set11")
    words = ["--dataset", "Set11"]
    assert "36.11" in test(*words, task="compressive_sensing").out
    disturbed = test(*words, "--noise", "5", "--bits", "8", task="compressive_sensing")
    assert disturbed.status == 0 and "36.11" not in disturbed.out
    clean, noisy = rows("compressive_sensing")
    assert "noise=5" in noisy["settings"] and "bits=8" in noisy["settings"] and "noise" not in clean["settings"]
    assert noisy["input_psnr"] != clean["input_psnr"]


# ------------------------------------------------------------------------------------------------------------ the table


def test_average_is_of_the_sets_means_whatever_their_sizes():
    results = [Result("a", "p", 1, 40.0, 0.9, 20.0, 0.5), Result("b", "p", 3, 30.0, 0.8, 10.0, 0.1)]
    mean = average(results)
    assert (mean.psnr, mean.input_psnr, mean.images) == (35, 15, 4)
    assert (mean.ssim, mean.input_ssim) == pytest.approx((0.85, 0.3))


def test_incomplete_scores_are_marked_and_enter_no_average(test, image_pairs):
    names = ["Test100", "Rain100H", "Rain100L", "Test2800", "Test1200"]
    for count, name in enumerate(names, start=1):
        image_pairs(Path("Datasets/test") / name, count=count, size=(16, 16))
        image_pairs(Path("other") / name, count=count, size=(16, 16), seed=1)
        os.rename(f"other/{name}/input", f"restored_{name}")
    os.mkdir("restored")
    for name in names:
        os.rename(f"restored_{name}", f"restored/{name}")

    assert test("--score_only", "restored", task="deraining", weights=None).status == 0
    table = {row["dataset"]: row for row in rows("deraining")}
    assert list(table) == [*names, "average"] and table["average"]["images"] == "15"
    sets = [float(table[name]["psnr"]) for name in names]
    assert float(table["average"]["psnr"]) == pytest.approx(np.mean(sets), abs=1e-4)
    of_all = np.average(sets, weights=range(1, 6))
    assert abs(of_all - np.mean(sets)) > 0.01

    os.remove("restored/Rain100L/img2.png")
    done = test("--score_only", "restored", task="deraining", weights=None)
    assert done.status == 2 and "no restored img2 in restored/Rain100L" in done.err
    assert "Rain100L (incomplete: 2 of 3)" in done.out
    later = [row["dataset"] for row in rows("deraining")[6:]]
    assert later == ["Test100", "Rain100H", "Rain100L (incomplete: 2 of 3)", "Test2800", "Test1200"]


def test_score_only_of_blocks_and_of_measured_images(test):
    blocks = np.random.default_rng(0).integers(0, 256, (1, 2, 16, 16, 3), dtype=np.uint8)
    write_sidd(blocks, blocks // 2)
    assert test("--dataset", "SIDD", "--save_images").status == 0
    where = sheet().parent.parent
    assert test("--score_only", where, "--dataset", "SIDD", weights=None).status == 0
    first, second = rows()
    assert second["images"] == "2" and float(second["psnr"]) == pytest.approx(float(first["psnr"]), abs=0.05)
    assert not list(Path("results").glob("denoising/scores_of_*/SIDD/[!s.]*"))  # nothing but scores and settings

    for name, strength in (("grey", 0), ("restored", 9)):
        write_image(f"{name}/a.png", np.full((16, 16), 99 + strength, np.uint8))
    words = ("--score_only", "restored", "--dataset", "grey")
    assert test(*words, task="compressive_sensing", weights=None).status == 0
    (row,) = rows("compressive_sensing")
    assert float(row["psnr"]) == pytest.approx(20 * math.log10(255 / 9), abs=1e-3) and row["input_psnr"] == "nan"


def test_score_only_without_the_folder_says_so_once(test, image_pairs):
    image_pairs(Path("set"), count=3, size=(16, 16))
    os.mkdir("restored")
    assert "restored" in one_line(test("--score_only", "restored", "--dataset", "set", weights=None))


# ---------------------------------------------------------------------------------------------- what --dataset may name


def test_a_single_image_is_restored(test):
    os.mkdir("holiday")
    for name in ("beach.jpg", "town.png"):
        cv2.imwrite(f"holiday/{name}", np.full((13, 21, 3), 99, np.uint8))
    done = test("--dataset", "holiday/beach.jpg")
    assert done.status == 0
    (written,) = Path("results").rglob("*.png")
    assert written.name == "beach.png" and cv2.imread(str(written)).shape == (13, 21, 3)
    assert test("--dataset", "holiday/beach.jpg", "holiday/town.png").status == 0
    assert {path.name for path in Path("results").rglob("*.png")} == {"beach.png", "town.png"}
    Path("notes.txt").write_text("no image")
    assert "notes.txt" in one_line(test("--dataset", "notes.txt"))
    done = test("--score_only", "holiday", "--dataset", "holiday/beach.jpg", weights=None)
    assert "input/" in one_line(done) and "target/" in done.err


def test_a_single_image_is_measured_and_reconstructed(test):
    cv2.imwrite("photo.png", np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))
    assert test("--dataset", "photo.png", task="compressive_sensing").status == 0
    assert rows("compressive_sensing")[0]["images"] == "1"


def test_images_of_one_name_do_not_overwrite_each_other(test):
    os.mkdir("photos")
    for name in ("a.png", "a.jpg"):
        cv2.imwrite(f"photos/{name}", np.full((16, 16, 3), 99, np.uint8))
    for task in ("denoising", "compressive_sensing"):
        Path("tiny.pth").unlink(missing_ok=True)
        assert "photos/a." in one_line(test("--dataset", "photos", task=task))


def test_folders_of_one_label_do_not_overwrite_each_other(test, image_pairs):
    for root in ("one", "two"):
        image_pairs(Path(root) / "a/test", count=1, size=(16, 16))
    error = one_line(test("--dataset", "one/a/test", "two/a/test"))
    assert "two/a/test" in error or "one/a/test" in error
    assert test("--dataset", "one/a/test", "one/a/test").status == 0  # named twice, tested once
    assert len(rows()) == 1


LABELS = [("/photos", "photos"), ("/a/b/c", "b_c"), ("/", "root"), ("/a/b/../c", "a_c"), ("SIDD", "SIDD")]


@pytest.mark.parametrize(("dataset", "label"), LABELS)
def test_label_is_a_folder_below_the_results(dataset, label):
    assert list(testing._tests([dataset], {"SIDD": None}, {"": None})) == [label]


def test_published_sets_are_found_in_upper_and_lower_case(test, image_pairs):
    image_pairs(Path("data/TEST/rain100l"), count=1, size=(16, 16))
    for name in ("Rain100L", "RAIN100L"):
        assert test("--data_root", "data", "--dataset", name, task="deraining").status == 0
        assert rows("deraining")[-1]["dataset"] == "Rain100L"
    os.makedirs("data/set11")
    cv2.imwrite("data/set11/a.png", np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8))
    Path("tiny.pth").unlink()
    assert test("--data_root", "data", "--dataset", "Set11", task="compressive_sensing").status == 0
    assert rows("compressive_sensing")[-1]["dataset"] == "Set11"


def test_folder_of_another_case(tmp_path):
    for name in ("a/SET", "a/Set", "b/sEt/X"):
        (tmp_path / name).mkdir(parents=True)
    for name, found in {
        "a/Set": "a/Set",  # as it is written
        "a/set": "a/set",  # which of the two?
        "B/set/x": "b/sEt/X",
        "nowhere/Set11": "nowhere/Set11",
    }.items():
        assert match_unicode_form(tmp_path / name, ignore_case=True) == tmp_path / found
    assert match_unicode_form(tmp_path / "B/set") == tmp_path / "B/set"


def test_data_root_mistakes(test, image_pairs):
    image_pairs(Path("data/Rain100L"), count=1, size=(16, 16))
    for root in ("nowhere", "data/Rain100L", "data"):
        error = one_line(test("--data_root", root, "--dataset", "Rain100L", task="deraining"))
        assert "--data_root" in error and "test/Rain100L" in error
    error = one_line(test("--dataset", "Rain1000L", task="deraining"))
    assert "Rain1000L" in error and "Rain100H, Rain100L" in error


def test_reproduce_finds_its_folders_whatever_their_case(tmp_path):
    # without any it stops before it installs anything
    done = subprocess.run(["bash", ROOT / "scripts/reproduce.sh", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "Set11" in done.stderr and "Test100" in done.stderr
    for name in ("set11", "Bsd68"):
        (tmp_path / name).mkdir()
    script = (ROOT / "scripts/reproduce.sh").read_text().splitlines()
    (function,) = [line for line in script if line.startswith("folder()")]
    code = f'{function}\nfolder "{tmp_path}" Set11; folder "{tmp_path}" BSD68; folder "{tmp_path}" CBSD68'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "set11"), str(tmp_path / "Bsd68")]


def test_reproduce_tells_what_it_leaves_out(tmp_path, image_pairs):
    """In a repository of links, so that nothing is written into this one."""
    repository = tmp_path / "repository"
    for path in ("Denoising", "dgunet", "requirements.txt"):
        (repository / path).parent.mkdir(exist_ok=True)
        (repository / path).symlink_to(ROOT / path)
    (repository / ".venv/bin").mkdir(parents=True)
    (repository / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (repository / ".venv/bin/python").chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", repository / ".venv/requirements.installed")
    (repository / "scripts").mkdir()
    for name in ("reproduce.sh", "setup_venv.sh"):
        shutil.copy(ROOT / "scripts" / name, repository / "scripts")
    image_pairs(tmp_path / "data/nam25", count=1, size=(32, 40))
    words = ["bash", repository / "scripts/reproduce.sh", tmp_path / "data"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, row, missing = done.stdout.splitlines()
    assert row.split()[:3] == ["denoising_photo", "Nam25", "1"]
    sets = "Set11 BSD68 Set12 CBSD68 Kodak24 CC15 Rain100L Test100 reds_small"
    assert missing == f"left out, for they are not in {tmp_path / 'data'}: {sets}"


def test_data_set_is_found_in_any_unicode_form(test, image_pairs):
    """And so are its restored images; its results have one name."""
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    image_pairs(Path("photos") / nfd, count=1, size=(16, 16))
    if os.listdir("photos") != [nfd]:
        pytest.skip("this disk has one Unicode form only")
    os.rename(f"photos/{nfd}/input/img1.png", f"photos/{nfd}/input/{nfc}.png")
    os.rename(f"photos/{nfd}/target/img1.png", f"photos/{nfd}/target/{nfd}.png")
    first = test("--dataset", f"photos/{nfd}", "--save_images")
    again = test("--dataset", f"photos/{nfc}", "--save_images")
    both = test("--dataset", f"photos/{nfc}", f"photos/{nfd}")
    assert (first.status, again.status, both.status) == (0, 0, 0)
    assert "1 of 1 images are done already" in again.out and "1 of 1 images are done already" in both.out
    assert [row["dataset"] for row in rows()] == [f"photos_{nfc}"] * 3
    (written,) = Path("results").rglob("*.png")
    assert written.name == f"{nfc}.png" and written.parent.name == f"photos_{nfc}"
    os.rename(written, written.with_name(f"{nfd}.png"))
    os.rename(written.parent, f"restored_{nfd}")
    assert test("--score_only", f"restored_{nfd}", "--dataset", f"photos/{nfc}", weights=None).status == 0
    shutil.copytree(f"photos/{nfd}", f"photos/{nfc}")
    assert f"photos_{nfc}" in one_line(test("--dataset", f"photos/{nfc}", f"photos/{nfd}"))


# ----------------------------------------------------------------------------------------------------- bf16 and compile


@pytest.mark.parametrize("task", TASKS)
def test_bf16_and_compile_are_options_of_every_task(test, image_pairs, monkeypatch, task):
    compiled = []
    monkeypatch.setattr(DGUNet, "compile", lambda self, **options: compiled.append(self))
    image_pairs(Path("set"), count=2, size=(24, 32))
    dataset = "set/target" if task == "compressive_sensing" else "set"
    for words in ((), ("--compile",), ("--bf16",)):
        done = test("--dataset", dataset, *words, task=task)
        assert done.status == 0 and "done already" not in done.out
    settings = [row["settings"] for row in rows(task)]
    assert ["compile=True" in s for s in settings] == [False, True, False]
    assert ["bf16=True" in s for s in settings] == [False, False, True]
    plain, same, bf16 = (float(row["ssim"]) for row in rows(task))
    assert plain == same and 0 < abs(plain - bf16) < 0.01
    assert len(compiled) == 1


def test_compiled_network_is_not_compiled_for_every_size(test, image_pairs, monkeypatch):
    """Once for the first size, and once more for all others (large enough: see test_model.py)."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile(self, backend=count, **options))
    torch.manual_seed(0)
    model = create_model("denoising_dgunet", width=8, stages=1)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, "small.pth")
    for k, size in enumerate([(96, 96), (104, 120), (120, 96), (96, 128), (88, 104)]):
        image_pairs(Path(f"part{k}"), count=1, size=size, seed=k)
        for side in ("input", "target"):
            os.makedirs(f"set/{side}", exist_ok=True)
            os.rename(f"part{k}/{side}/img1.png", f"set/{side}/{k}.png")
    for words in ((), ("--compile",)):
        assert test("--dataset", "set", *words, weights="small.pth").status == 0
    plain, compiled = (float(row["psnr"]) for row in rows())
    assert compiled == pytest.approx(plain, abs=2e-3) and len(graphs) == 2


def test_failing_compiler_is_told_in_one_line(test, image_pairs, monkeypatch):
    def fails(graph, _):
        raise RuntimeError("no C++ compiler\nand much more")

    torch._dynamo.reset()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile(self, backend=fails, **options))
    image_pairs(Path("set"), count=2, size=(16, 16))
    error = one_line(test("--dataset", "set", "--compile"))
    assert "--compile" in error and "no C++ compiler" in error


# --------------------------------------------------------------------------------------------------------------- noise


def test_shipped_denoiser_says_what_it_is_for():
    assert trained_sigma_range(read_checkpoint("denoising_gaussian")) == (0, 50)
    assert trained_sigma_range({"noise_sigma": ["a", None, 3]}) is None  # of other software


@pytest.mark.parametrize("sigma", [5, 15, 25, 50])
def test_noise_level(sigma):
    photograph = cv2.imread(str(ROOT / "tests/golden/metrics/pairs/coffee_blur_target.png"))
    noisy = photograph + np.random.default_rng(0).normal(0, sigma, photograph.shape)
    assert estimate_sigma(noisy) == pytest.approx(sigma, rel=0.2)
    assert estimate_sigma(noisy[None].repeat(2, axis=0)) == pytest.approx(estimate_sigma(noisy))
    assert math.isnan(estimate_sigma(np.zeros((2, 9, 3))))


def test_gaussian_noise_is_that_of_the_literature():
    """As KAIR adds it: seed 0 for each image, floats, not clipped, not rounded."""
    clean = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for _ in range(2):
        np.random.seed(0)
        expected = np.float32(clean / 255.0)
        expected += np.random.normal(0, 50 / 255.0, expected.shape)
        noisy = with_noise(clean, 50)
        assert noisy.dtype == np.float32 and noisy.min() < 0 and noisy.max() > 1
        np.testing.assert_array_equal(noisy, expected)
    black = with_noise(np.zeros((1, 1, 3), np.uint8), 255)  # the generator's first numbers
    np.testing.assert_allclose(black.ravel(), [1.764052, 0.400157, 0.978738], atol=1e-6)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (None, ["SIDD", "DND"]),
        ((25, 25), ["CBSD68_25", "Kodak24_25"]),
        ((0, 30), ["CBSD68_15", "CBSD68_25", "Kodak24_15", "Kodak24_25"]),
        ((30, 40), ["SIDD", "DND"]),
    ],
)
def test_weights_are_tested_on_the_noise_that_they_are_for(noise, expected):
    assert testing._default(BENCHMARKS, noise) == expected


def test_gaussian_sets(test, image_pairs):
    for name in ("cbsd68", "KODAK24"):
        image_pairs(Path("pairs"), count=2, size=(21, 30), seed=len(name))
        os.renames("pairs/target", f"Datasets/{name}")
    save_checkpoint(tiny_weights("denoising") | {"noise_sigma": [20, 25]}, "gaussian.pth")
    assert test(weights="gaussian.pth").status == 0
    table = rows()
    assert [(row["dataset"], row["protocol"]) for row in table] == [
        ("CBSD68_25", "gaussian_rgb"), ("Kodak24_25", "gaussian_rgb")
    ]  # fmt: skip
    model, scores = load_model("gaussian.pth"), []
    for path in sorted(Path("Datasets/cbsd68").iterdir()):
        clean = read_image(path)
        noisy = with_noise(clean, 25)
        restored = to_uint8(restore(model, noisy))
        scores.append(
            (*evaluate_pair(restored, clean, "gaussian_rgb"), *evaluate_pair(to_uint8(noisy), clean, "gaussian_rgb"))
        )
    measured = [float(table[0][key]) for key in ("psnr", "ssim", "input_psnr", "input_ssim")]
    assert measured == pytest.approx(np.mean(scores, axis=0), abs=1e-4)
    assert "2 of 2 images are done already" in test("--dataset", "kodak24_25", weights="gaussian.pth").out


def test_real_noise_of_cc15(test, image_pairs):
    image_pairs(Path("Datasets/cc15"), count=2, size=(21, 30))
    assert test("--dataset", "CC15").status == 0
    (row,) = rows()
    assert (row["dataset"], row["protocol"], row["images"]) == ("CC15", "gaussian_rgb", "2")


def test_noise_on_clean_images_of_ones_own(test, image_pairs):
    image_pairs(Path("set"), count=2, size=(21, 30))
    assert test("--dataset", "set/target", "--sigma", "7.5", "100").status == 0
    weak, strong = rows()
    assert (weak["dataset"], strong["dataset"]) == ("set_target_7.5", "set_target_100")
    assert float(weak["input_psnr"]) == pytest.approx(-20 * math.log10(7.5 / 255), abs=0.5)
    assert float(strong["input_psnr"]) < 12
    for words in ((), ("--dataset", "set/target", "sidd")):
        assert "--sigma" in one_line(test("--sigma", "25", *words))
    for sigma in ("0", "nan", "101", "strong"):
        done = test("--dataset", "set/target", "--sigma", sigma)
        assert done.status == 2 and "--sigma" in done.err.splitlines()[-1]


# --------------------------------------------------------------------------------------------------------- from Python


def test_evaluate_from_python(tmp_path, tiny_model, image_pairs, monkeypatch):
    """Without a command line, and without files unless asked for: the rows and means of the images as they are."""
    monkeypatch.chdir(tmp_path)
    image_pairs(Path("set"), count=3, size=(21, 30))
    model, before = tiny_model(stages=2), torch.backends.cudnn.allow_tf32
    result = evaluate(model, "set", "rgb_matlab", self_ensemble=True)
    assert os.listdir() == ["set"] and torch.backends.cudnn.allow_tf32 == before
    assert (result.dataset, result.images, result.missing, result.failures) == ("set", 3, 0, [])
    for row, pair in zip(result.rows, find_pairs("set"), strict=True):
        degraded, target = read_image(pair.input), read_image(pair.target)
        restored = to_uint8(restore(model, unit_range(degraded), self_ensemble=True))
        assert row.name == pair.name and row[1:3] == evaluate_pair(restored, target, "rgb_matlab")
        assert row[3:5] == evaluate_pair(degraded, target, "rgb_matlab")
    assert result.psnr == pytest.approx(np.mean([row.psnr for row in result.rows]))

    # with a folder it goes on where it was, and the function of another method has its say as well
    told = []
    for _ in range(2):
        again = evaluate(model, "set", "rgb_matlab", "out", self_ensemble=True, say=told.append)
        assert again.rows == result.rows and len(list(Path("out").glob("*.png"))) == 3
    assert told == ["set: 3 of 3 images are done already"]
    blur = evaluate(lambda sample, y: (cv2.blur(y, (3, 3)), y), "set", "rgb_matlab", "blurred")
    assert blur.psnr > blur.input_psnr == result.input_psnr and len(list(Path("blurred").glob("*.png"))) == 3


def test_evaluate_begins_anew_where_it_cannot_know_what_is_computed(tmp_path, tiny_model, image_pairs):
    class Darken:
        image_to_image = True

        def __init__(self, factor):
            self.factor = factor

        def A(self, x):
            return self.factor * x

        A_adjoint = A

    def black(model, y):
        return np.zeros_like(y), y

    image_pairs(tmp_path / "set", count=1, size=(16, 16))
    model = tiny_model(stages=2, degradation=Darken(0.5))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.fill_(0.5 if name.endswith("rho") else 0)
    scores = []
    for factor in (0.5, 0.9):
        model.degradation = Darken(factor)
        for folder in (tmp_path / "out", None):
            scores.append(evaluate(model, tmp_path / "set", "train_rgb", folder).psnr)
    assert scores[0] == scores[1] != scores[2] == scores[3]
    model = tiny_model(stages=2)
    first = evaluate(model, tmp_path / "set", "train_rgb", tmp_path / "other", tile=np.int64(64))
    assert evaluate(model, tmp_path / "set", "train_rgb", tmp_path / "other", method=black).psnr != first.psnr

    def filled(value, model, y):
        return np.full_like(y, value), y

    for methods in (
        [partial(filled, value) for value in (0, 1)],
        [lambda model, y, value=value: (np.full_like(y, value), y) for value in (0, 1)],
    ):
        first, second = (evaluate(model, tmp_path / "set", "train_rgb", tmp_path / "other", method=m) for m in methods)
        assert first.psnr != second.psnr
    assert evaluate(model.bfloat16(), tmp_path / "set", "train_rgb", tmp_path / "other").images == 1


def test_evaluate_tells_what_it_could_not_test(tmp_path, tiny_model, image_pairs):
    image_pairs(tmp_path, count=2, size=(16, 16))
    (tmp_path / "input/img2.png").write_bytes(b"no image")
    result = evaluate(tiny_model(stages=2), tmp_path, "sidd_unit_range")
    assert (result.images, result.missing) == (1, 1) and "img2.png" in result.failures[0]
    small = evaluate(tiny_model(stages=2), tmp_path, "deraining_y")
    assert small.images == 1
    photos = evaluate(tiny_model(stages=2), tmp_path / "target", None)
    assert photos.images == 0 and math.isnan(photos.psnr) and [row.psnr for row in photos.rows] == [None, None]
    with pytest.raises(ValueError, match="'psnr'.*rgb_matlab"):
        evaluate(tiny_model(stages=2), tmp_path, "psnr")


def test_sample_of_several_images(tmp_path, tiny_model):
    """Of one size or of several: each is scored and written under its own name."""
    rng = np.random.default_rng(0)
    stack = rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    crops = [rng.integers(0, 256, (16, width, 3), dtype=np.uint8) for width in (16, 24)]
    model = tiny_model(stages=2)
    for given in (stack, crops):
        names = tuple(f"block{k}" for k in range(len(given)))
        data = ImageSet([Sample("image", (tmp_path / "file.mat",), lambda given=given: (given, given[:]), names)])
        out = tmp_path / str(len(given))
        result = evaluate(model, data, "sidd_unit_range", out, save_images=True)
        assert [row.name for row in result.rows] == list(names) and result.input_psnr == math.inf
        for name, image in zip(names, given, strict=True):
            restored = restore(model, unit_range(image))
            assert np.abs(read_image(out / f"{name}.png").astype(int) - to_uint8(restored)).max() <= 1


def test_file_for_the_benchmark_is_whole_or_not_there(test, monkeypatch):
    blocks = np.random.default_rng(0).integers(0, 200, (1, 2, 16, 16, 3), dtype=np.uint8)
    write_sidd(blocks, blocks)

    def full(path, *_, **__):
        Path(path).write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(scipy.io, "savemat", full)
        assert "Idenoised.mat" in one_line(test("--dataset", "SIDD"))
    assert not list(Path("results").rglob("*Idenoised*"))
    assert test("--dataset", "SIDD").status == 0
    assert scipy.io.loadmat(next(Path("results").rglob("Idenoised.mat")))["Idenoised"].shape == blocks.shape


# -------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("name", ["mps", "cuda:99", "meta", "nonsense", "xla", "cpu:x", ""])
def test_device_that_is_not_there(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("has one")
    with pytest.raises(UserError, match=f"cannot use --device {name}") as error:
        pick_device(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_device_that_is_there():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")


# --------------------------------------------------------------------------------------------------------------- faults


def test_random_faults_of_inputs_end_in_one_line(test, image_pairs, fuzz, tmp_path_factory, monkeypatch):
    """Images that are damaged, missing, of other sizes and kinds, oddly named; options that do not fit."""
    outcomes = {0: 0, 2: 0}
    for trial in range(12 * fuzz):
        rng = np.random.default_rng([10, trial])
        monkeypatch.chdir(tmp_path_factory.mktemp("fuzz"))
        task = str(rng.choice(TASKS))
        image_pairs(Path("set"), count=int(rng.integers(1, 4)), size=tuple(rng.integers(9, 40, 2)), seed=trial)
        for _ in range(int(rng.integers(0, 3))):
            spoil(rng, Path("set"))
        words = [str(word) for choices in OPTIONS for word in choices[int(rng.integers(len(choices)))]]
        if task == "compressive_sensing":
            words = [word for word in words if word in ("--bf16", "--save_images")]
        dataset = rng.choice(
            ["set", "set", "set/input", "set/input", "set/input/img1.png", "set/../set", "nowhere", "SIDD"]
        )
        done = test("--dataset", dataset, *words, task=task)
        told = done.err.strip().splitlines()
        where = f"trial {trial}: {task} {dataset} {words}\n{done.out}\n{done.err}"
        outcomes[done.status] += 1
        assert "Traceback" not in done.err, where
        if done.status == 2:
            count = int(told[-1].split()[1]) if "not tested, all others were" in told[-1] else 0
            assert len(told) == 1 + count or "usage:" in told[0], where
            assert all(line.startswith("not tested: ") for line in told[:count]), where
            assert "usage:" in told[0] or told[-1].startswith("error: "), where
        for row in rows(task):
            assert "nan" not in row["psnr"], where
        again = test("--dataset", dataset, *words, task=task)
        assert again.status == done.status, where
    print(f"{sum(outcomes.values())} trials, exit status: {outcomes}")
    assert min(outcomes.values()) > 0


OPTIONS = [
    [[], [], [], ["--tile", "16"], ["--tile", "whole"], ["--tile", "23", "--tile_overlap", "11"],
     ["--tile_overlap", "1000000"], ["--tile", "7"], ["--tile_overlap", "-1"], ["--tile", "x"]],
    [[], [], ["--bf16"], ["--self_ensemble"], ["--no-self_ensemble"]],
    [[], ["--save_images"]],
]  # fmt: skip


def spoil(rng: np.random.Generator, root: Path):
    """One random fault of an image file."""
    paths = sorted(path for path in root.glob("*/*") if path.is_file())
    if not paths:
        return
    path = paths[int(rng.integers(len(paths)))]
    content = bytearray(path.read_bytes())
    fault = int(rng.integers(9))
    if fault == 0:
        path.write_bytes(content[: int(rng.integers(len(content) + 1))])
    elif fault == 1:
        for _ in range(int(rng.integers(1, 20))):
            content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
    elif fault == 2:
        path.unlink()
    elif fault == 3:
        kind = [(9, 9), (9, 9, 4), (40, 8, 3), (1, 1, 3)][int(rng.integers(4))]
        cv2.imwrite(str(path), rng.integers(0, 256, kind, dtype=np.uint8))
    elif fault == 4:
        cv2.imwrite(str(path), rng.integers(0, 65536, (9, 9, 3), dtype=np.uint16))
    elif fault == 5:
        name = str(rng.choice(["ü ñ.png", "-x.png", "a\tb.png", "%s{}.png", "x" * 200 + ".png", "'\".png", "#,;.png"]))
        for side in ("input", "target"):
            if (root / side / path.name).exists():
                os.rename(root / side / path.name, root / side / name)
    elif fault == 6:
        path.unlink()
        path.symlink_to("nowhere.png")
    elif fault == 7:
        path.unlink()
        path.mkdir()
    else:
        (path.parent / f"{path.stem}.jpg").write_bytes(content)


# ------------------------------------------------------------------------------------------------- further metrics


def test_further_metrics_are_columns_and_a_image_without_one_is_scored_anew(tmp_path, image_pairs):
    image_pairs(tmp_path / "set", count=3, size=(16, 20))
    restored = []

    class Identity(torch.nn.Module):
        def forward(self, y):
            return y

    def method(model, degraded):
        restored.append(degraded)
        return degraded, degraded

    def difference(x, target):
        assert x.dtype == target.dtype == np.uint8
        return float(np.abs(x.astype(float) - target).mean())

    def score(**metrics):
        restored.clear()
        result = evaluate(Identity(), tmp_path / "set", "rgb_matlab", tmp_path / "out", method=method, metrics=metrics)
        with open(tmp_path / "out/scores.csv", newline="") as file:
            return result, list(csv.DictReader(file)), len(restored)

    result, rows, count = score()
    assert (result.metrics, count) == ({}, 3)
    result, rows, count = score(difference=difference)
    assert count == 3, "scored anew"
    assert [float(row["difference"]) for row in rows] == [row.metrics["difference"] for row in result.rows]
    assert result.metrics["difference"] == pytest.approx(np.mean([float(row["difference"]) for row in rows])) != 0
    (tmp_path / "out" / f"{rows[0]['name']}.png").unlink()
    assert score(difference=difference)[2] == 1, "the others are done"
    _, again, count = score()
    assert count == 0 and again == rows, "columns of before are kept"
    assert score(constant=lambda x, target: 7.0)[0].metrics == {"constant": 7.0}

    def fails(x, target):
        raise ValueError("cannot score this image")

    result = score(fails=fails)[0]
    assert result.missing == len(result.failures) == 3 and "cannot score this image" in result.failures[0]
    with pytest.raises(UserError, match="targets"):
        evaluate(Identity(), tmp_path / "set/input", "rgb_matlab", metrics={"difference": difference})


def test_results_get_columns_for_further_metrics(tmp_path):
    plain = Result("set", "cs_y", 3, 30.0, 0.9, 20.0, 0.5)
    table = tmp_path / "results.csv"
    further = ({"lpips": 0.25}, {"niqe": 4.0, "lpips": 0.5}, {})
    append_results(table, [plain], "w.pth", "DGUNet")
    for metrics in further:
        append_results(table, [dataclasses.replace(plain, metrics=metrics)], "w.pth", "DGUNet")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["lpips"] or "", row["niqe"] or "") for row in rows] == [
        ("", ""),
        ("0.250000", ""),
        ("0.500000", "4.000000"),
        ("", ""),
    ]
    assert {row["psnr"] for row in rows} == {"30.0000"} and None not in rows[0]
    assert average([dataclasses.replace(plain, metrics={"a": a}) for a in (1.0, 2.0)]).metrics == {"a": 1.5}


def test_results_are_appended_to_tables_of_before(tmp_path):
    """Which have fewer columns; what is none of ours is left as it is."""
    table, new = tmp_path / "results.csv", Result("set", "cs_y", 3, 31.0, 0.9, 20.0, 0.5, identical=1)
    old = (
        "date,weights,model,dataset,protocol,images,psnr,ssim,input_psnr,input_ssim,seconds_per_image,settings,command"
    )
    for end in ("\r\n", "\n", ""):
        table.write_bytes(f"{old}\r\n2026,w,m,before,cs_y,3,30.0,0.9,20.0,0.5,0.1,bf16=False,test.py{end}".encode())
        append_results(table, [new], "w.pth", "DGUNet")
        with open(table, newline="") as file:
            first, second = csv.DictReader(file)
        assert (first["dataset"], first["psnr"], first["identical"]) == ("before", "30.0", "")
        assert (second["dataset"], second["psnr"], second["identical"], second["protocol_version"]) == (
            "set", "31.0000", "1", "1"
        )  # fmt: skip
    assert table.read_text().splitlines()[0].split(",")[:13] == old.split(",")  # scripts/reproduce.sh counts them
    table.write_text(old.replace(",", ";") + "\n2026;w;m\n")
    before = table.read_bytes()
    with pytest.raises(UserError, match=r"results\.csv"):
        append_results(table, [new], "w.pth", "DGUNet")
    assert table.read_bytes() == before


def test_metrics_of_pyiqa(test, image_pairs, monkeypatch):
    pyiqa = pytest.importorskip("pyiqa")
    image_pairs(Path("set"), count=2, size=(40, 48))
    assert test("--dataset", "set", "--metrics", "gmsd", "psnr").status == 0
    (row,) = rows()
    assert 0 < float(row["gmsd"]) < 1 and float(row["pyiqa_psnr"]) == pytest.approx(float(row["psnr"]), abs=0.01)
    told = test("--dataset", "set", "--metrics", "lpisp")
    assert told.status == 2 and "lpisp" in told.err and "lpips" in told.err

    def no_connection(name, **options):
        raise urllib.error.URLError("no connection")

    monkeypatch.setattr(pyiqa, "create_metric", no_connection)
    told = test("--dataset", "set", "--metrics", "lpips")
    assert told.status == 2 and "--metrics lpips" in told.err and "no connection" in told.err
    assert told.err.count("\n") == 0
