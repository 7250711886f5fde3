"""A degradation of the user's own, by ``module:name``: from training to a score through the real command line."""

import contextlib
import csv
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from processes import run_script
from yacs.config import CfgNode

from dgunet import UserError, load_model, restore
from dgunet.checkpoints.load import read_checkpoint
from dgunet.data.images import read_image, write_image
from dgunet.data.transforms import to_uint8
from dgunet.evaluation.metrics import evaluate_pair
from dgunet.model.degradations import measure
from dgunet.model.network import DGUNet
from dgunet.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]

OPERATORS = '''
import torch

class Sums:
    """Sums of the channels in pairs of rows: fewer numbers than pixels, and of no image's shape."""

    def A(self, x):
        return x.unflatten(-2, (-1, 2)).sum((1, 3)).flatten(1)[:, :, None]

    def A_adjoint(self, y):
        return y.reshape(len(y), 1, -1, 1, self.width).expand(-1, self.channels, -1, 2, -1).flatten(2, 3)

def sums(cfg):
    made = Sums()
    made.width, made.channels = cfg.TRAINING.TRAIN_PS, 3
    return made

class Mosaic:
    """One of three colours in each pixel, with noise; for images of any size."""

    calls = 0

    def _masks(self, x):
        place = torch.arange(x.shape[-1], device=x.device) + torch.arange(x.shape[-2], device=x.device)[:, None]
        return torch.stack([place % 3 == k for k in range(3)]).to(x)

    def A(self, x):
        return (self._masks(x) * x).sum(1, keepdim=True)

    def A_adjoint(self, y):
        return self._masks(y) * y

    def measure(self, x):
        return self.A(x) + 0.1 * torch.randn_like(x[:, :1])

class Unfinished:
    def A(self, x):
        return x

def nothing():
    pass

def of_32():
    mosaic, size = Mosaic(), 32
    mosaic.A = lambda x: Mosaic.A(mosaic, x) * torch.ones(size, size)
    return mosaic

def physics(name, cfg):
    import deepinv
    side = cfg.TRAINING.TRAIN_PS
    noise = deepinv.physics.GaussianNoise(0.1, rng=torch.Generator())
    mask = torch.zeros(side, side)
    mask[:, ::2] = 1
    known = {
        "Inpainting": lambda: deepinv.physics.Inpainting((3, side, side), mask=0.5, noise_model=noise),
        "Demosaicing": lambda: deepinv.physics.Demosaicing((3, side, side)),
        "Tomography": lambda: deepinv.physics.Tomography(12, side, normalize=True, noise_model=noise),
        "MRI": lambda: deepinv.physics.MRI(mask, (side, side), noise_model=noise),
        "Downsampling": lambda: deepinv.physics.Downsampling((3, side, side), filter="bicubic", factor=2),
        "Blur": lambda: deepinv.physics.Blur(torch.ones(1, 1, 3, 5) / 15, padding="valid"),
    }
    return known[name]()
'''
PHYSICS = ["Inpainting", "Demosaicing", "Tomography", "MRI", "Downsampling", "Blur"]
OPERATORS += "".join(f"\n\ndef {name}(cfg):\n    return physics('{name}', cfg)\n" for name in PHYSICS)

SMALL = {"width": 8, "growth": 4, "final_growth": 4, "stages": 2}
WORDS = [
    "TRAINING.TRAIN_DIR", "clean", "TRAINING.VAL_DIR", "clean", "TRAINING.SAVE_DIR", "runs", "OPTIM.NUM_EPOCHS", 1,
    "OPTIM.BATCH_SIZE", 2, "TRAINING.TRAIN_PS", 32, "TRAINING.VAL_PS", 32, "TRAINING.WORKERS", 0, "DEVICE", "cpu",
    "SPEED.AMP", "fp32", "MODEL.OVERRIDES", str(SMALL), "TRAINING.VAL_TIMES", 1, "TRAINING.VAL_FROM_EPOCH", 0,
    "TRAINING.VAL_EPOCHS", "[1, 2]",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, with the module ``own_operators`` and clean images."""
    rng = np.random.default_rng(0)
    (tmp_path / "own_operators.py").write_text(OPERATORS)
    for k in range(4):
        small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        write_image(tmp_path / f"clean/{k}.png", cv2.resize(small, (32, 32), interpolation=cv2.INTER_CUBIC))
    yield tmp_path
    sys.modules.pop("own_operators", None)


def train(folder: Path, name: str, *words, session: str = "run", check: int = 0) -> str:
    known = ["MODEL.DEGRADATION", f"own_operators:{name}", "MODEL.SESSION", session]
    done = run_script(ROOT / "Deblurring/train.py", *WORDS, *known, *words, cwd=folder)
    assert done.returncode == check, done.stderr
    return done.stderr


def score(folder: Path, name: str | None, dataset: str = "clean", *words, check: int = 0):
    """Test the network that `train` has saved: the standard error, and the rows of the table."""
    options = ["--weights", "runs/run/model_best.pth", "--dataset", dataset, "--device", "cpu", *words]
    options += ["--degradation", f"own_operators:{name}"] if name else []
    done = run_script(ROOT / "Deblurring/test.py", *options, cwd=folder)
    assert done.returncode == check, done.stderr
    assert "Traceback" not in done.stderr
    if check:
        return done.stderr, []
    with open(folder / "results/deblurring.csv", newline="") as file:
        return done.stderr, list(csv.DictReader(file))


def own(name: str, *arguments):
    import own_operators

    return getattr(own_operators, name)(*arguments)


@pytest.mark.parametrize("name", PHYSICS)
def test_deepinvs_operators_from_a_config_to_a_score(folder, monkeypatch, name):
    pytest.importorskip("deepinv")
    monkeypatch.syspath_prepend(folder)
    channels = {"Tomography": ["MODEL.GREY", True], "MRI": ["MODEL.COMPLEX", True]}.get(name, [])
    train(folder, name, *channels, "SPEED.AMP", "bf16" if name == "Blur" else "fp32")
    (row,) = score(folder, name)[1]
    assert row["images"] == "4" and 0 < float(row["input_psnr"]) < 60 and 0 < float(row["psnr"]) < 60
    assert f"degradation=own_operators:{name}" in row["settings"]

    content = read_checkpoint(folder / "runs/run/model_best.pth")
    physics = own(name, CfgNode(yaml.safe_load(content["config"])))
    model = load_model(folder / "runs/run/model_best.pth", degradation=physics)
    if name == "Inpainting":
        assert torch.equal(physics.mask, content["state_dict"]["degradation.mask"]), "the mask that was trained with"
    count = {"Tomography": 1, "MRI": 2}.get(name, 3)
    assert model.channels == count
    y = physics.A(torch.rand(2, count, 32, 32))
    restored = restore(model, y)
    assert restored.shape == (2, count, 32, 32)
    array = restore(model, y.numpy())
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, restored.permute(0, 2, 3, 1), atol=1e-5)
    expected = model(y)[0].detach()
    torch.testing.assert_close(restored, expected if count == 2 else expected.clamp(0, 1), rtol=0, atol=1e-5)


def test_own_class_measures_with_noise_images_of_any_size(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    train(folder, "Mosaic", "OPTIM.LR_INITIAL", 1e-12, "OPTIM.LR_MIN", 0, "OPTIM.NUM_EPOCHS", 2)
    with open(folder / "runs/run/history.csv", newline="") as file:
        first, second = (float(row["psnr"]) for row in csv.DictReader(file))
    assert first == pytest.approx(second, abs=1e-4), "the noise of the validation is the same each time"
    rng = np.random.default_rng(1)
    for size in ((33, 21), (16, 47)):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        write_image(folder / f"sizes/target/{size[0]}.png", image)
        write_image(folder / f"sizes/input/{size[0]}.png", image)  # a folder of pairs: the targets are clean
    rows = [score(folder, "Mosaic", "sizes", "--save_images")[1][-1] for _ in range(2)]
    assert rows[0]["psnr"] == rows[1]["psnr"] and rows[0]["images"] == "2", "as is that of a test"
    (restored,) = folder.glob("results/deblurring/*/*_sizes/33.png")
    assert read_image(restored).shape == (33, 21, 3)

    known = own("Mosaic")
    model = load_model(folder / "runs/run/model_best.pth", degradation=known)
    y = known.A(torch.rand(1, 3, 33, 21))
    assert y.shape == (1, 1, 33, 21) and restore(model, y).shape == (1, 3, 33, 21)
    # x_0 and the data term are of the image itself, whatever it is padded to
    whole = DGUNet(**SMALL, gradient=False, degradation=known).eval()
    with torch.no_grad():
        for p in whole.parameters():
            p.zero_()
    torch.testing.assert_close(restore(whole, y), known.A_adjoint(y))
    np.save(folder / "measured.npy", y.numpy())
    (folder / "files").mkdir()
    np.save(folder / "files/one.npy", y.numpy())
    score(folder, "Mosaic", "files")
    (written,) = folder.glob("results/deblurring/*/*_files/one.png")
    np.testing.assert_allclose(read_image(written) / 255, restore(model, y.numpy())[0], atol=0.6 / 255)


def test_scores_are_those_of_the_images_and_of_x_0(folder, monkeypatch):
    """By hand: what is measured, restored and compared."""
    monkeypatch.syspath_prepend(folder)
    train(folder, "sums")
    (row,) = score(folder, "sums")[1]
    known = own("sums", CfgNode({"TRAINING": {"TRAIN_PS": 32}}))
    model = load_model(folder / "runs/run/model_best.pth", degradation=known)
    before, after = [], []
    for path in (folder / "clean").iterdir():
        target = read_image(path)
        y = known.A(torch.from_numpy(target / np.float32(255)).permute(2, 0, 1)[None])
        assert y.shape == (1, 16 * 32, 1)
        initial = known.A_adjoint(y)[0].permute(1, 2, 0).numpy()
        images = (to_uint8(initial), to_uint8(restore(model, y.numpy())[0]))
        for scores, image in zip((before, after), images, strict=True):
            scores.append(evaluate_pair(image, target, "rgb_matlab")[0])
    assert float(row["input_psnr"]) == pytest.approx(np.mean(before), abs=1e-3)
    assert float(row["psnr"]) == pytest.approx(np.mean(after), abs=1e-3)


@pytest.mark.parametrize("name", ["Mosaic", "Inpainting"])
def test_stopped_training_resumes_with_the_same_measurements(folder, monkeypatch, name):
    if name == "Inpainting":
        pytest.importorskip("deepinv")
    train(folder, name, session="whole")
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_sync_stop_flag", lambda self, _=0.0: setattr(self.stop, "agreed", 15))
        train(folder, name, session="parts", check=143)
    train(folder, name, "TRAINING.RESUME", True, session="parts")
    whole, parts = (read_checkpoint(folder / f"runs/{name}/model_latest.pth") for name in ("whole", "parts"))
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][key]), key
    assert whole["history"][-1]["psnr"] == parts["history"][-1]["psnr"]


def test_noise_of_an_image_does_not_depend_on_its_batch(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    known, x = own("Mosaic"), torch.rand(3, 3, 8, 8)
    seeded = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    before = torch.get_rng_state()
    whole = measure(known, x, seeded(0), [seeded(k) for k in range(3)])
    ones = [measure(known, x[k : k + 1], seeded(0), [seeded(k)]) for k in range(3)]
    assert torch.equal(whole, torch.cat(ones)) and not torch.equal(whole, known.A(x))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(whole[0] - known.A(x)[0], whole[1] - known.A(x)[1])


def test_loading_never_imports_what_a_checkpoint_names(folder):
    train(folder, "Mosaic")
    sys.modules.pop("own_operators")
    path = folder / "runs/run/model_best.pth"
    for load in (lambda: load_model(path), lambda: load_model(path, task="deblurring")):
        with pytest.raises(UserError, match="own_operators:Mosaic") as told:
            load()
        assert "\n" not in str(told.value)
    assert "own_operators:Mosaic" in score(folder, None, check=2)[0]
    assert "own_operators" not in sys.modules

    content = read_checkpoint(path)
    for name in ("not a name", "a:b" * 100, 7):
        content["model"]["degradation"]["name"] = name
        torch.save(content, folder / "odd.pth")
        with pytest.raises(UserError) as told:
            load_model(folder / "odd.pth")
        assert str(name) not in str(told.value).removeprefix(str(folder))


def test_training_starts_from_weights_of_another_operator(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    train(folder, "Mosaic")
    weights = read_checkpoint(folder / "runs/run/model_best.pth")["state_dict"]
    words = ["MODEL.WEIGHTS", "runs/run/model_best.pth", "OPTIM.LR_INITIAL", 1e-12, "OPTIM.LR_MIN", 0]
    train(folder, "sums", *words, session="next")
    after = read_checkpoint(folder / "runs/next/model_best.pth")["state_dict"]
    for key, value in weights.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size, kept", [(32, False), (24, True)])
def test_mask_of_another_size_stays_as_it_is_given(tmp_path, size, kept):
    class Masked(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.register_buffer("mask", (torch.rand(size, size) < 0.5).float())

        def A(self, x):
            return self.mask * x

        A_adjoint = A

    model, given = DGUNet(**SMALL, degradation=Masked(32)), Masked(size)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    before = given.mask.clone()
    loaded = load_model(tmp_path / "a.pth", degradation=given)
    assert torch.equal(loaded.degradation.mask, before if kept else model.degradation.mask)
    assert torch.equal(loaded.last.rho, model.last.rho)


@pytest.mark.parametrize(
    "name, words, named",
    [
        ("Unfinished", [], ["MODEL.DEGRADATION own_operators:Unfinished", "A_adjoint"]),
        ("nothing", [], ["own_operators:nothing", "NoneType"]),
        ("OPERATOR", [], ["own_operators", "OPERATOR"]),
        ("of_32", ["TRAINING.VAL_PS", 24], ["own_operators:of_32", "TRAINING.VAL_PS", "own_operators.py, line"]),
        ("of_32", ["TRAINING.TRAIN_PS", 16], ["own_operators:of_32", "TRAINING.TRAIN_PS"]),
        ("Sums", [], ["own_operators:Sums", "A_adjoint", "width", "own_operators.py, line"]),
        ("Mosaic", ["MODEL.GREY", True], ["own_operators:Mosaic", "(1, 1, 32, 32)"]),
        ("Mosaic", ["MODEL.NOISE", 5], ["MODEL.NOISE", "measure"]),
        ("Mosaic", ["MODEL.KERNEL", "motion"], ["MODEL.KERNEL", "own_operators:Mosaic"]),
        ("Mosaic", ["SYNTHESIS.NAME", "rain_streaks"], ["set one of the two"]),
    ],
)
def test_operator_that_cannot_be_used_is_refused_before_the_training(folder, name, words, named):
    told = train(folder, name, *words, check=2)
    assert all(part in told for part in named), told
    assert len(told.strip().splitlines()) == 1 and not (folder / "runs").exists()


def test_image_that_an_operator_cannot_measure_costs_no_other(folder):
    train(folder, "of_32")
    write_image(folder / "clean/small.png", np.zeros((24, 24, 3), np.uint8))
    told, _ = score(folder, "of_32", check=2)
    assert "small.png" in told and "(1, 3, 24, 24)" in told
    with open(folder / "results/deblurring.csv", newline="") as file:
        assert [row["images"] for row in csv.DictReader(file)] == ["4"]
    assert "--dataset FOLDER" in score(folder, "of_32", "clean", "--score_only", "clean", check=2)[0]


def test_page_does_what_it_says(tmp_path, monkeypatch):
    """Its files and commands, in its order, on corners of the photographs and for an epoch."""
    for name in ("configs", "scripts", "Deblurring"):
        (tmp_path / name).symlink_to(ROOT / name)
    kind = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    blocks = kind.findall((ROOT / "docs/own_operator.md").read_text())
    tiny = ["OPTIM.NUM_EPOCHS", 1, "TRAINING.VAL_AFTER_EVERY", 1, "TRAINING.REPEAT", 12, "TRAINING.TRAIN_PS", 32,
            "OPTIM.EMA_DECAY", 0.8, "MODEL.OVERRIDES.width", 8, "TRAINING.WORKERS", 0, "SPEED.AMP", "fp32"]  # fmt: skip
    for file in (code for language, code in blocks if language == "python"):
        (tmp_path / re.match(r"# (\w+\.py)\n", file)[1]).write_text(file)
    commands = "".join(code for language, code in blocks if language == "bash").replace("\\\n", " ").splitlines()
    said = []
    monkeypatch.syspath_prepend(tmp_path)
    for command in [*commands, "python fill_in.py"]:
        python, script, *words = shlex.split(command, comments=True)
        if script.endswith(("/train.py", "/test.py")):
            words += [*tiny, "DEVICE", "cpu"] if script.endswith("/train.py") else ["--device", "cpu"]
        if "/" in script:
            done = run_script(ROOT / script, *words, cwd=tmp_path)
        else:  # a file of the page
            out = io.StringIO()
            with monkeypatch.context() as here, contextlib.redirect_stdout(out):
                here.chdir(tmp_path)
                runpy.run_path(script)
            done = subprocess.CompletedProcess(script, 0, out.getvalue(), "")
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        for path in (tmp_path / "Datasets").rglob("*.png"):
            write_image(path, read_image(path)[:61, :45])
    made, trained, tested, by_variation, filled = said
    with open(tmp_path / "results/deblurring.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["images"] == "3" and float(row["psnr"]) > float(row["input_psnr"]) + 1, "it has learned something"
    assert float(re.search(r"([\d.]+) dB", by_variation)[1]) > float(row["input_psnr"]) + 5
    sys.modules.pop("inpainting")

    pytest.importorskip("deepinv")
    import my_physics

    physics = my_physics.tomography(CfgNode({"TRAINING": {"TRAIN_PS": 16}}))
    assert physics.A_adjoint(physics(torch.rand(1, 1, 16, 16))).shape == (1, 1, 16, 16)
