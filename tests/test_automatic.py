"""`dgunet restore`: what is recognised, what is chosen for it, and what becomes of the photographs."""

import filecmp
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from dgunet import automatic, restore
from dgunet.apps import batch
from dgunet.apps import cli as command
from dgunet.automatic import DEGRADATIONS, NETWORKS, Candidate, Diagnosis, choose, cut_crops, diagnose
from dgunet.data.samples import sample_photos
from dgunet.data.synthesis import added_rain, bayer_noise, degrade_image, gaussian_noise, jpeg_compress, motion_blur
from dgunet.runtime.errors import UserError

DEGRADE = {
    "clean": lambda x, rng: x,
    "gaussian noise": lambda x, rng: gaussian_noise(x, rng, 25),
    "camera noise": lambda x, rng: bayer_noise(x, rng, (0.01, 0.01), (1e-4, 1e-4)),
    "JPEG blocks": lambda x, rng: jpeg_compress(x, 20),
    "rain": lambda x, rng: added_rain(x, rng, (60, 60)),
    "blur": lambda x, rng: motion_blur(x, rng, (12, 12)),
}


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Photographs that no shipped network was trained on."""
    return [photo.load()[:320, :320] for photo in sample_photos("test")]


def found(**probabilities: float) -> Diagnosis:
    given = {name.replace("_", " "): p for name, p in probabilities.items()}
    rest = (1 - sum(given.values())) / (len(DEGRADATIONS) - len(given))
    return Diagnosis(dict(sorted({**dict.fromkeys(DEGRADATIONS, rest), **given}.items(), key=lambda pair: -pair[1])))


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_each_degradation_is_recognised(photos, degradation):
    images = [degrade_image(photo, DEGRADE[degradation], k, "") for k, photo in enumerate(photos)]
    diagnoses = [diagnose(image) for image in images]
    assert [diagnosis.degradation for diagnosis in diagnoses] == [degradation] * len(photos)
    for diagnosis in diagnoses:
        assert sum(diagnosis.probabilities.values()) == pytest.approx(1) and set(diagnosis.probabilities) == set(
            NETWORKS
        )
        assert degradation in str(diagnosis) and f"{100 * diagnosis.confidence:.0f} %" in str(diagnosis)


def test_types_and_shapes_of_one_image_give_one_diagnosis(photos):
    grey = cv2.cvtColor(photos[0], cv2.COLOR_RGB2GRAY)
    forms = [grey, grey[..., None], np.repeat(grey[..., None], 3, 2), grey.astype(np.uint16) * 257, grey / 255]
    diagnoses = [diagnose(form) for form in forms]
    for other in diagnoses[1:]:
        assert other.probabilities == pytest.approx(diagnoses[0].probabilities, abs=1e-4)
    with pytest.raises(UserError, match=r"\(4, 5, 2\)"):
        diagnose(np.zeros((4, 5, 2)))


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (160, 161), (1000, 600), (3000, 4000)])
def test_crops_are_of_the_whole_image(size):
    image = np.zeros((*size, 3), np.uint8)
    image[-1, -1] = 255
    crops = cut_crops(image)
    assert 1 <= len(crops) <= automatic.MOST_CROPS and crops.shape[1:] == (3, 160, 160)
    assert crops[-1].max() == 1  # the last pixel is in the last crop


def test_what_is_chosen():
    """The network for most of the probability, at its strength; rain and blur only where they are sure."""
    assert choose(found(clean=0.8))[0] == Candidate("clean", None, 1.0)
    assert str(found(rain=0.5, clean=0.3)).startswith("rain (50 %) or clean (30 %)")
    assert choose(found(rain=0.95))[0] == Candidate("rain", "deraining_mixture", 1.0)
    # Noise of both kinds and JPEG blocks are one task.
    both = choose(found(clean=0.35, camera_noise=0.3, **{"JPEG blocks": 0.3}))
    assert both[0] == Candidate("camera noise", "denoising_photo", 0.6)
    assert [candidate.network for candidate in both[1:]] == ["denoising_gaussian", None]
    doubtful = choose(found(rain=0.5, clean=0.3))
    assert doubtful[0].network is None and "deraining_mixture" in {
        candidate.network for candidate in doubtful + [*choose(found(rain=0.5, clean=0.3), 5)]
    }
    for count in (2, 3):
        candidates = choose(found(rain=0.7, blur=0.2, gaussian_noise=0.08), count)
        assert len(candidates) == count and [c.network for c in candidates].count(None) == 1
        assert candidates[0].network == "deraining_mixture" and candidates[0].strength == 0.7
    assert len(choose(found(rain=0.7), 1)) == 1
    denoisers = choose(found(rain=0.7, gaussian_noise=0.2), networks=automatic.DENOISERS)
    assert [candidate.network for candidate in denoisers] == ["denoising_photo", "denoising_gaussian"]


@pytest.fixture
def tiny(tiny_model, monkeypatch):
    """All networks are replaced by one tiny one."""
    model = tiny_model(stages=2)
    monkeypatch.setattr(automatic, "_network", lambda name, device: model)
    monkeypatch.setattr(batch, "load_model", lambda path, **options: model)
    return model


@pytest.fixture
def judged(monkeypatch):
    """Images are recognised by their mean, without the classifier."""
    kinds = {60: "clean", 120: "camera noise", 180: "rain"}

    def diagnose(image: np.ndarray) -> Diagnosis:
        level = 255 * float(image.mean()) / np.iinfo(image.dtype).max
        return found(**{kinds[min(kinds, key=lambda mean: abs(mean - level))].replace(" ", "_"): 0.95})

    monkeypatch.setattr(automatic, "diagnose", diagnose)
    monkeypatch.setattr(batch, "diagnose", diagnose)


def grey(level: int, side: int = 24, channels: int = 3) -> np.ndarray:
    noise = np.random.default_rng(level).integers(-20, 20, (side, side, channels))
    return (level + noise).astype(np.uint8).squeeze()


def test_function(tiny, judged):
    clean = grey(60)
    restored, diagnosis, candidate = automatic.restore_automatic(clean)
    assert restored is clean and diagnosis.degradation == "clean" and candidate.network is None
    noisy = grey(120)
    restored, _, candidate = automatic.restore_automatic(noisy, tile=None, strength=0.5)
    assert candidate.network == "denoising_photo"
    assert np.array_equal(restored, restore(tiny, noisy, tile=None, strength=0.5))
    noisy = grey(120, channels=1)
    restored, _, _ = automatic.restore_automatic(noisy)
    assert restored.shape == noisy.shape and restored.dtype == np.uint8 and not np.array_equal(restored, noisy)
    assert np.array_equal(automatic.restore_automatic(noisy[..., None])[0], restored[..., None])


@pytest.fixture
def dgunet(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command.main([str(word) for word in words])
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_command(dgunet, tiny, judged):
    """A clean photograph is copied to the last byte, the others are restored; a second call finds all done."""
    Path("photos/night").mkdir(parents=True)
    for name, level in ("a.jpg", 60), ("night/b.png", 120), ("c.bmp", 60), ("d.png", 180):
        cv2.imwrite(f"photos/{name}", grey(level))
    Path("photos/notes.txt").write_text("none")
    status, out, err = dgunet("restore", "photos")
    assert status == 0 and not err
    assert filecmp.cmp("photos/a.jpg", "restored/a.jpg", shallow=False)
    assert np.array_equal(cv2.imread("restored/c.png"), cv2.imread("photos/c.bmp"))
    assert not np.array_equal(cv2.imread("restored/d.png"), cv2.imread("photos/d.png"))
    lines = out.splitlines()
    assert lines[-1] == "2 restored, 2 left as they are, in restored"
    for name, text in ("a.jpg", "clean (95 % sure); left as it is"), ("night/b.png", "95 % sure); denoising_photo"):
        assert any(line.startswith(f"photos/{name}: ") and text in line for line in lines)
    before = {path: path.stat().st_mtime_ns for path in Path("restored").rglob("*.*")}
    status, out, _ = dgunet("restore", "photos")
    assert status == 0 and "4 done before" in out
    assert before == {path: path.stat().st_mtime_ns for path in Path("restored").rglob("*.*")}
    os.remove("restored/d.png")
    assert "1 restored, 3 done before" in dgunet("restore", "photos")[1]


def test_explain(dgunet, tiny, judged):
    cv2.imwrite("a.png", grey(180, 40))
    cv2.imwrite("b.png", grey(60, 40))
    status, out, _ = dgunet("restore", "a.png", "b.png", "--explain")
    assert status == 0 and "1 restored, 1 left as they are" in out
    for name in "ab":
        assert cv2.imread(f"restored/{name}.png.candidates.png").shape[1] > 400
    assert "2 done before" in dgunet("restore", "a.png", "b.png", "--explain")[1]
    status, _, err = dgunet("restore", "a.png", "--explain", "--weights", "denoising_photo")
    assert status == 2 and err.count("\n") == 1 and "--weights" in err


def test_denoise_chooses_between_its_networks(dgunet, tiny, judged):
    """And restores what looks clean, too: it was asked to."""
    cv2.imwrite("a.png", grey(60))
    status, out, _ = dgunet("denoise", "a.png")
    assert status == 0 and "a.png: clean (95 % sure); denoising_photo" in out and "1 restored, in restored" in out


def test_a_network_for_something_else_is_told(dgunet, tiny, judged):
    cv2.imwrite("a.png", grey(60))
    cv2.imwrite("b.png", grey(180))
    status, out, _ = dgunet("derain", "a.png", "b.png")
    assert status == 0 and "recognised as clean" in out and "b.png" not in out.split("note:")[1]


def test_the_classifier_and_its_record():
    """The weights are small, and the record beside them is that in them."""
    import yaml

    from dgunet.checkpoints.safetensors import read_about

    assert automatic.WEIGHTS.stat().st_size < 500_000
    record = yaml.safe_load(automatic.WEIGHTS.with_suffix(".yaml").read_text())
    assert record == read_about(automatic.WEIGHTS)["record"] and record["licence"] == "MIT"


def test_training_of_the_classifier(tmp_path, monkeypatch, capsys, image_pairs):
    """The command runs, and what it writes is what `diagnose` reads."""
    import train_diagnosis

    image_pairs(tmp_path / "pairs", count=11, size=(64, 64))
    words = ["--images", tmp_path / "pairs/target", "--pairs", f"rain={tmp_path / 'pairs'}", "--steps", "2"]
    monkeypatch.setattr(train_diagnosis, "BATCH", 8)
    monkeypatch.setattr(train_diagnosis, "HELD_OUT_CROPS", 40)
    train_diagnosis.main(
        [str(word) for word in [*words, "--workers", "0", "--device", "cpu", "--out", tmp_path / "out"]]
    )
    assert "true \\ found" in capsys.readouterr().out
    automatic._classifier.cache_clear()
    monkeypatch.setattr(automatic, "WEIGHTS", tmp_path / "out/automatic.safetensors")
    try:
        assert sum(diagnose(grey(100, 64)).probabilities.values()) == pytest.approx(1)
    finally:
        automatic._classifier.cache_clear()
    assert "9 with rain" in (tmp_path / "out/automatic.yaml").read_text()  # every tenth is held out
