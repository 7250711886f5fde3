"""Denoising end to end: its data set, and test.py through the real command line on files in the published formats."""

import csv
import subprocess
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import scipy.io
import torch
from processes import run_script

from dgunet import UserError, create_model, load_model, restore
from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.data.datasets import MixupPatches
from dgunet.data.images import read_image
from dgunet.data.transforms import unit_range
from dgunet.evaluation.metrics import evaluate_pair
from dgunet.runtime.errors import run_cli
from dgunet.tasks import find_task
from dgunet.tasks.denoising import read_dnd, read_dnd_image, read_sidd

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = create_model("denoising_dgunet", width=8, growth=4, final_growth=4, stages=2)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, path)
    return path


def run_test(weights, *words, cwd, check=0) -> subprocess.CompletedProcess:
    done = run_script(ROOT / "Denoising" / "test.py", "--weights", weights, "--device", "cpu", *words, cwd=cwd)
    assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def out(folder: Path, weights: Path) -> Path:
    (found,) = (folder / "results" / "denoising").glob(f"{weights.parent.name}_{weights.stem}_*")
    return found


def results(folder) -> list[dict]:
    with open(folder / "results" / "denoising.csv") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------- mix-up


def test_mixup_starts_in_its_epoch_and_blends_two_samples(tmp_path, image_pairs):
    image_pairs(tmp_path, count=4, size=(40, 40))
    plain, mixed = MixupPatches(tmp_path, 16, mixup=0), MixupPatches(tmp_path, 16, mixup=0.6, mixup_from=6)
    for a, b in zip(plain[5, 1], mixed[5, 1], strict=True):
        assert torch.equal(a, b)
    blended = 0
    for index in range(4):
        one, out = [unit_range(x) for x in plain[6, index]], mixed[6, index]
        for partner in ([unit_range(x) for x in plain[6, other]] for other in range(4)):
            # out = l * one + (1 - l) * partner, with the same l for input and target
            shares = [
                ((o - p) * (s - p)).sum() / ((s - p) ** 2).sum().clamp(min=1e-12)
                for o, s, p in zip(out, one, partner, strict=True)
            ]
            fits = all(
                torch.allclose(o, share * s + (1 - share) * p, atol=1e-5)
                for o, s, p, share in zip(out, one, partner, shares, strict=True)
            )
            if fits and 0 < shares[0] < 1 and abs(shares[0] - shares[1]) < 1e-4:
                blended += 1
                break
    assert blended >= 2  # a sample may draw itself as its partner


def test_mixup_shares_follow_the_beta_distribution(tmp_path, image_pairs):
    image_pairs(tmp_path, count=2, size=(16, 16))
    data = MixupPatches(tmp_path, 16, mixup=0.6, mixup_from=1)
    shares = [float(data.generator(1, index, stream=1).beta(0.6, 0.6)) for index in range(4000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * 2.2), abs=0.01)  # ab / ((a+b)^2 (a+b+1))


# --------------------------------------------------------------------- SIDD, DND


def write_mat(path: Path, key: str, array: np.ndarray, version: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    if version == "v5":
        scipy.io.savemat(path, {key: array})
    else:  # 7.3 is HDF5 with the axes in reverse
        with h5py.File(path, "w") as file:
            file[key] = array.T


@pytest.fixture
def sidd_blocks():
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (2, 3, 1, 1, 3)) + np.arange(32)[:, None, None] + np.arange(32)[:, None]
    clean = clean.clip(0, 255).astype(np.uint8)
    noisy = (clean + rng.normal(0, 20, clean.shape)).clip(0, 255).astype(np.uint8)
    return noisy, clean


@pytest.mark.parametrize("version", ["v5", "v7.3"])
def test_sidd(tmp_path, weights, sidd_blocks, version):
    noisy, clean = sidd_blocks
    folder = tmp_path / "Datasets" / "SIDD" / "test"
    write_mat(folder / "ValidationNoisyBlocksSrgb.mat", "ValidationNoisyBlocksSrgb", noisy, version)
    write_mat(folder / "ValidationGtBlocksSrgb.mat", "ValidationGtBlocksSrgb", clean, version)
    for read, written in zip(read_sidd(folder), sidd_blocks, strict=True):
        np.testing.assert_array_equal(read, written)

    done = run_test(weights, "--dataset", "SIDD", "--save_images", cwd=tmp_path)
    assert "SIDD" in done.stdout and "39.88/0.959" in done.stdout
    model = load_model(weights)
    blocks = noisy.reshape(-1, *noisy.shape[2:]).astype(np.float32) / np.float32(255)
    expected = restore(model, blocks, self_ensemble=True).reshape(noisy.shape)
    mat = scipy.io.loadmat(out(tmp_path, weights) / "SIDD/Idenoised.mat")["Idenoised"]
    assert mat.dtype == np.float32 and mat.shape == noisy.shape
    np.testing.assert_allclose(mat, expected, atol=1e-5)
    scores = [evaluate_pair(mat[i, j], clean[i, j], "sidd_unit_range") for i, j in np.ndindex(noisy.shape[:2])]
    (row,) = results(tmp_path)
    assert (row["dataset"], row["images"], row["protocol"]) == ("SIDD", "6", "sidd_unit_range")
    assert "self_ensemble=True" in row["settings"]
    assert float(row["psnr"]) == pytest.approx(np.mean([psnr for psnr, _ in scores]), abs=1e-3)
    assert float(row["ssim"]) == pytest.approx(np.mean([ssim for _, ssim in scores]), abs=1e-5)
    assert len(list((out(tmp_path, weights) / "SIDD").glob("*.png"))) == 6


def test_sidd_mistakes(tmp_path, weights, sidd_blocks):
    assert "ValidationNoisyBlocksSrgb.mat" in run_test(weights, "--dataset", "SIDD", cwd=tmp_path, check=2).stderr
    folder = tmp_path / "Datasets" / "SIDD" / "test"
    write_mat(folder / "ValidationNoisyBlocksSrgb.mat", "SomethingElse", sidd_blocks[0], "v5")
    assert "ValidationNoisyBlocksSrgb" in run_test(weights, "--dataset", "SIDD", cwd=tmp_path, check=2).stderr
    (folder / "ValidationNoisyBlocksSrgb.mat").write_text("not a MATLAB file")
    error = run_test(weights, "--dataset", "SIDD", cwd=tmp_path, check=2).stderr
    assert "ValidationNoisyBlocksSrgb.mat" in error and error.strip().count("\n") == 0


@pytest.fixture
def dnd(tmp_path):
    """Two images with three boxes each, as DND comes: info.mat with references, images with MATLAB's axes."""
    folder = tmp_path / "Datasets" / "DND" / "test"
    (folder / "images_srgb").mkdir(parents=True)
    rng = np.random.default_rng(1)
    images = rng.random((2, 48, 64, 3), dtype=np.float32)
    boxes = np.array([[1, 1, 16, 24], [17, 9, 48, 64], [5, 3, 20, 22]], dtype=np.float64)  # 1-based, inclusive
    with h5py.File(folder / "info.mat", "w") as file:
        info = file.create_group("info")
        references = np.empty((1, 2), dtype=h5py.ref_dtype)
        for i in range(2):
            info[f"boxes{i}"] = boxes.T
            references[0, i] = info[f"boxes{i}"].ref
        info.create_dataset("boundingboxes", data=references, dtype=h5py.ref_dtype)
    for i, image in enumerate(images, start=1):
        write_mat(folder / "images_srgb" / f"{i:04d}.mat", "InoisySRGB", image, "v7.3")
    return folder, images, boxes.astype(int)


def test_dnd(tmp_path, weights, dnd):
    folder, images, boxes = dnd
    for (name, image_boxes), number in zip(read_dnd(folder).items(), (1, 2), strict=True):
        assert name == f"{number:04d}.mat"
        image = read_dnd_image(folder / "images_srgb" / name, image_boxes)
        np.testing.assert_array_equal(image, images[number - 1])
        np.testing.assert_array_equal(image_boxes, boxes)
    run_test(weights, "--dataset", "DND", cwd=tmp_path)
    model = load_model(weights)
    for number in (1, 2):
        mat = scipy.io.loadmat(out(tmp_path, weights) / f"DND/matfiles/{number:04d}.mat")
        assert mat["Idenoised"].shape == (1, 3) and mat["Idenoised"].dtype == object
        assert not mat["israw"].item() and mat["eval_version"].item() == "1.0"
        top, left, bottom, right = boxes[1]
        crop = mat["Idenoised"][0, 1]
        assert crop.shape == (32, 56, 3) and crop.dtype == np.float32
        expected = restore(model, images[number - 1][top - 1 : bottom, left - 1 : right], self_ensemble=True)
        np.testing.assert_allclose(crop, expected, atol=1e-6)
    assert not (tmp_path / "results/denoising.csv").exists()  # DND is scored by its server


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"cut", "damaged"),
        (None, "Denoising/README.md"),
        (np.zeros((40, 64, 3), np.float32), "info.mat"),
        (np.zeros((48, 64), np.float32), "float32 (48, 64)"),
        (np.zeros((48, 64, 3), np.uint8), "uint8"),
    ],
    ids=["damaged", "missing", "small", "grey", "bytes"],
)
def test_dnd_image_that_cannot_be_read_does_not_cost_the_others(
    tmp_path, weights, dnd, image, message, monkeypatch, capsys
):
    path = dnd[0] / "images_srgb" / "0001.mat"
    path.unlink()
    if isinstance(image, bytes):
        path.write_bytes(image)
    elif image is not None:
        write_mat(path, "InoisySRGB", image, "v7.3")
    monkeypatch.chdir(tmp_path)
    words = ["--weights", str(weights), "--dataset", "DND", "--no-self_ensemble", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: find_task("denoising").test(words))
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and "0001.mat" in said and "error: 1 " in said
    assert [p.name for p in (out(tmp_path, weights) / "DND/matfiles").iterdir()] == ["0002.mat"]


@pytest.mark.parametrize(
    "boxes", [np.zeros((3, 3)), np.zeros((3, 4)), np.array([[5, 5, 2, 9]]), np.ones(4), np.ones((2, 5)), b"no"], ids=str
)
def test_dnd_boxes_that_are_none(tmp_path, boxes):
    (tmp_path / "info.mat").write_bytes(b"no")
    if isinstance(boxes, np.ndarray):
        with h5py.File(tmp_path / "info.mat", "w") as file:
            file["info/boxes"] = boxes.T
            references = np.array([file["info/boxes"].ref], dtype=h5py.ref_dtype)
            file["info"].create_dataset("boundingboxes", data=references, dtype=h5py.ref_dtype)
    with pytest.raises(UserError, match="info.mat"):
        read_dnd(tmp_path)


# --------------------------------------------------------------------- folders


def test_folder_of_pairs(tmp_path, weights, image_pairs):
    image_pairs(tmp_path / "set", count=3, size=(37, 53))
    done = run_test(weights, "--dataset", "set", "--save_images", "--tile", "32", "--tile_overlap", "8", cwd=tmp_path)
    assert "images and scores" in done.stdout
    (row,) = results(tmp_path)
    assert row["images"] == "3" and float(row["input_psnr"]) > 10 and "tile=32" in row["settings"]
    for path in sorted((tmp_path / "set/input").iterdir()):
        expected = restore(load_model(weights), read_image(path), tile=32, tile_overlap=8)
        restored = read_image(out(tmp_path, weights) / f"{tmp_path.name}_set" / path.name).astype(int)
        assert np.abs(restored - expected).max() <= 1  # one rounds 255 x + 0.5 in another order
    run_test(weights, "--dataset", "set", cwd=tmp_path)
    assert len(results(tmp_path)) == 2  # appended


def test_folder_of_images_alone(tmp_path, weights):
    (tmp_path / "photos").mkdir()
    image = np.random.default_rng(0).integers(0, 256, (21, 30, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photos" / "one.png"), image)
    run_test(weights, "--dataset", "photos", cwd=tmp_path)
    assert read_image(out(tmp_path, weights) / f"{tmp_path.name}_photos/one.png").shape == (21, 30, 3)
    assert not (tmp_path / "results/denoising.csv").exists()


def write(path: Path, image: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((20, 20), np.uint8), "grey"),
        (np.zeros((20, 20, 4), np.uint8), "transparency"),
        (np.zeros((20, 20, 3), np.uint16), "16 bits"),
    ],
)
def test_unsuitable_image_is_reported_and_the_others_are_scored(tmp_path, weights, image_pairs, image, message):
    image_pairs(tmp_path / "set", count=2, size=(24, 24))
    for side in ("input", "target"):
        write(tmp_path / "set" / side / "unsuitable.png", image)
    done = run_test(weights, "--dataset", "set", cwd=tmp_path, check=2)
    assert message in done.stderr and "unsuitable.png" in done.stderr
    assert results(tmp_path)[0]["images"] == "2"


def test_data_mistakes(tmp_path, weights, image_pairs):
    assert "nowhere" in run_test(weights, "--dataset", "nowhere", cwd=tmp_path, check=2).stderr
    (tmp_path / "empty").mkdir()
    assert "empty" in run_test(weights, "--dataset", "empty", cwd=tmp_path, check=2).stderr
    image_pairs(tmp_path / "set", count=2, size=(24, 24))
    write(tmp_path / "set/input/alone.png", np.zeros((24, 24, 3), np.uint8))
    error = run_test(weights, "--dataset", "set", cwd=tmp_path, check=2).stderr
    assert "alone.png" in error and error.strip().count("\n") == 0
    write(tmp_path / "set/target/alone.png", np.zeros((25, 24, 3), np.uint8))
    assert "alone.png" in run_test(weights, "--dataset", "set", cwd=tmp_path, check=2).stderr


def test_weight_mistakes(tmp_path):
    other = tmp_path / "other.pth"
    save_checkpoint(create_model("deraining_dgunet").state_dict(), other)
    (tmp_path / "text.pth").write_text("these are no weights")
    for path, message in (
        (other, "deraining"),
        (tmp_path / "text.pth", "damaged"),
        (tmp_path / "nowhere.pth", "checkpoint"),
    ):
        error = run_test(path, cwd=tmp_path, check=2).stderr
        assert message in error and path.name in error and error.strip().count("\n") == 0


def test_interrupted_test_goes_on_where_it_was(tmp_path, weights, image_pairs):
    image_pairs(tmp_path / "set", count=3, size=(24, 24))
    run_test(weights, "--dataset", "set", "--save_images", cwd=tmp_path)
    folder = out(tmp_path, weights) / f"{tmp_path.name}_set"
    complete = (folder / "scores.csv").read_text()
    lines = complete.splitlines(keepends=True)
    (folder / "scores.csv").write_text("".join(lines[:3]) + lines[3][:9])  # killed while the third line was written
    stamp = (folder / "img1.png").stat().st_mtime_ns
    for k in (2, 3):
        (folder / f"img{k}.png").unlink()
    done = run_test(weights, "--dataset", "set", "--save_images", cwd=tmp_path)
    assert "2 of 3 images are done already" in done.stdout
    assert stamp == (folder / "img1.png").stat().st_mtime_ns  # done images are not restored again
    assert (folder / "img2.png").exists() and (folder / "img3.png").exists()
    assert (folder / "scores.csv").read_text() == complete
    assert results(tmp_path)[0]["psnr"] == results(tmp_path)[1]["psnr"]
    done = run_test(weights, "--dataset", "set", "--tile", "16", "--tile_overlap", "4", cwd=tmp_path)
    assert "done already" not in done.stdout  # other settings, other scores


def test_score_only(tmp_path, weights, image_pairs):
    image_pairs(tmp_path / "set", count=2, size=(24, 24))
    run_test(weights, "--dataset", "set", "--save_images", cwd=tmp_path)
    restored = out(tmp_path, weights)
    words = [ROOT / "Denoising" / "test.py", "--score_only", restored, "--dataset", "set"]
    done = run_script(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = results(tmp_path)
    assert float(second["psnr"]) == pytest.approx(float(first["psnr"]), abs=0.02)  # now rounded to 8 bits
    assert second["psnr"] != first["psnr"] and second["input_psnr"] == first["input_psnr"]
    (restored / f"{tmp_path.name}_set/img2.png").unlink()
    done = run_script(*words, cwd=tmp_path)
    assert done.returncode == 2 and "no restored img2" in done.stderr and results(tmp_path)[2]["images"] == "1"
    assert results(tmp_path)[2]["dataset"] == f"{tmp_path.name}_set (incomplete: 1 of 2)"


def test_folders_of_one_name_and_changed_images_are_told_apart(tmp_path, weights, image_pairs):
    for seed, name in enumerate(("a", "b")):
        image_pairs(tmp_path / name / "test", count=2, size=(24, 24), seed=seed)
    run_test(weights, "--dataset", "a/test", "b/test", cwd=tmp_path)
    first, second = results(tmp_path)
    assert (first["dataset"], second["dataset"]) == ("a_test", "b_test") and first["psnr"] != second["psnr"]
    image_pairs(tmp_path / "a" / "test", count=1, size=(24, 24), seed=7)
    done = run_test(weights, "--dataset", "a/test", cwd=tmp_path)
    assert "1 of 2 images are done already" in done.stdout and results(tmp_path)[2]["psnr"] != first["psnr"]


def test_a_missing_data_set_does_not_cost_the_others(tmp_path, weights, image_pairs):
    image_pairs(tmp_path / "set", count=2, size=(24, 24))
    done = run_test(weights, "--dataset", "SIDD", "set", cwd=tmp_path, check=2)
    assert "SIDD: no " in done.stderr and results(tmp_path)[0]["dataset"] == f"{tmp_path.name}_set"


def test_device_mistake(tmp_path, weights):
    done = run_test(weights, "--device", "cuda:99", cwd=tmp_path, check=2)
    assert "--device cuda:99" in done.stderr and done.stderr.strip().count("\n") == 0


def test_grey_images_with_noise(tmp_path, weights):
    """A colour network restores them as the command `dgunet denoise` does: three equal channels, and their mean."""
    clean = np.full((32, 40), 120, np.uint8)
    write(tmp_path / "Datasets/Set12/01.png", clean)
    run_test(weights, "--dataset", "Set12_25", cwd=tmp_path)
    noisy = (clean / 255 + np.random.RandomState(0).normal(0, 25 / 255, clean.shape)).astype(np.float32)
    restored = restore(load_model(weights), np.repeat(noisy[..., None], 3, axis=2)).mean(axis=2)
    psnr = 20 * np.log10(255 / np.sqrt(np.mean((np.round(255 * restored) - clean) ** 2)))
    (row,) = results(tmp_path)
    assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-3)
    # Weights that know which noise they are for look at it first.
    done = run_test("denoising_gaussian", "--dataset", "Set12_50", cwd=tmp_path)
    assert "note:" not in done.stdout and len(results(tmp_path)) == 2
