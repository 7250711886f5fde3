"""What `inside` says of a forward pass and of degradations."""

import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import ablation
import analyse_sensing
import cv2
import numpy as np
import pytest
import runs
import torch
from processes import Forked, run_forked, run_script

from dgunet import DGUNet, create_model, load_model
from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.evaluation.metrics import evaluate_pair, psnr_batch
from dgunet.introspect import Step, adjoint_mismatch, after_each_stage, data_term, impulse_response, measure_step, trace
from dgunet.model.degradations import Blur, LearnedDegradation, MotionBlur
from dgunet.model.sampling import BlockSampling, init_sampling_matrix
from dgunet.tasks.compressive_sensing import block_sampling
from dgunet.training.config import load_config

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(width=8, growth=4, final_growth=4)


@pytest.mark.parametrize(
    "options",
    [dict(stages=k) for k in (1, 2, 5)]
    + [dict(stages=4, shared=False), dict(stages=3, pathways=False), dict(stages=3, gradient=False)]
    + [dict(stages=3, channels=1, degradation=BlockSampling(0.25)), dict(stages=3, checkpointing=True)],
    ids=str,
)
@pytest.mark.parametrize("grad", [True, False])
def test_trace_is_the_forward_pass(options, grad):
    torch.manual_seed(0)
    model = DGUNet(**SMALL | options)
    y = torch.rand(1, model.channels, 32, 32)
    known = model.degradation
    y = y if known is None else known.A(y)
    with torch.set_grad_enabled(grad):
        estimates = model(y)
        record = trace(model, y)
    assert [step.k for step in record.steps] == list(range(1, model.stages + 1))
    assert len(record.estimates) == model.stages + 1
    for x, expected in zip(record.estimates[1:], estimates[::-1], strict=True):
        assert torch.equal(x, expected)
    x = y if known is None else known.A_adjoint(y)
    assert torch.equal(record.initial, x)
    for step, stage in zip(record.steps, model.iter_stages(), strict=True):
        assert torch.equal(step.before, x)
        assert torch.equal(step.v, stage.gradient_step(x, y, known))
        torch.testing.assert_close(x + step.gradient_step + step.proximal_step, step.x)
        assert step.rho == (None if stage.rho is None else stage.rho.item())
        assert step.degradation is (stage.degradation if known is None else known)
        x = step.x
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_trace_of_a_compiled_network_and_after_a_mistake():
    model = DGUNet(**SMALL, stages=3)
    y = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        expected = model(y)[0]
        model.compile(backend="eager")
        with pytest.raises(ValueError, match="multiples of 8"):
            trace(model, y[..., :-1])
        assert torch.equal(trace(model, y).estimates[-1], expected)
    assert all(stage._compiled_call_impl is not None for stage in model.iter_stages())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("answer", [True, 0, (torch.zeros(1), None), torch.zeros(1, 3, 16, 16)], ids=type)
def test_what_watches_a_forward_pass_cannot_alter_it(tiny_model, answer):
    """PyTorch takes what a hook returns for the stage's result."""
    model, y = tiny_model(stages=3), torch.rand(1, 3, 16, 16)
    seen = []
    with torch.no_grad():
        expected = model(y)
        with after_each_stage(model, lambda stage, inputs, result: seen.append(result[0]) or answer):
            watched = model(y)
    assert all(torch.equal(a, b) for a, b in zip(watched, expected, strict=True))
    assert torch.equal(seen[-1], expected[0]) and len(seen) == 3


def test_adjoint_mismatch_of_known_and_of_learned_operators():
    torch.manual_seed(0)
    x = torch.rand(1, 1, 32, 32)
    for known in (Blur(torch.rand(3, 5)), BlockSampling(0.1)):
        assert adjoint_mismatch(known, x, known.A(torch.rand_like(x))) < 1e-5

    class Wrong:
        def A(self, x):
            return 2 * x

        def A_adjoint(self, y):
            return -y

    assert adjoint_mismatch(Wrong(), x, x) == pytest.approx(1.5, abs=1e-5)

    class Nothing(Wrong):
        def A_adjoint(self, y):
            return 0 * y

    assert adjoint_mismatch(Nothing(), x, x) == pytest.approx(1, abs=1e-5)
    learned = LearnedDegradation(3)
    assert 0 < adjoint_mismatch(learned, torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)) < 2
    # as the inner products say that it stands for
    x, y = torch.rand(2, 1, 3, 8, 8)
    d, e = torch.randn(2, 400, 1, 3, 8, 8)
    A = torch.stack([torch.func.jvp(learned.A, (x,), (v,))[1] for v in d])
    adjoint = torch.stack([torch.func.jvp(learned.A_adjoint, (learned.A(x) - y,), (v,))[1] for v in e])
    products = (A * e).sum(dim=(1, 2, 3, 4))
    wrong = products - (d * adjoint).sum(dim=(1, 2, 3, 4))
    expected = (wrong.square().mean() / products.square().mean()).sqrt().item()
    assert adjoint_mismatch(learned, x, y, probes=200) == pytest.approx(expected, rel=0.2)


def test_impulse_response_of_a_blur_is_its_kernel():
    kernel = torch.rand(3, 5)
    response = impulse_response(Blur(kernel).A, torch.rand(1, 3, 16, 16), 7, 8)
    torch.testing.assert_close(response[6:9, 6:11], kernel)
    assert response.sum() == pytest.approx(kernel.sum().item(), rel=1e-5)


def test_data_term():
    blur = Blur(torch.full((1, 1), 0.5))
    x = torch.ones(1, 1, 8, 8)
    assert data_term(blur, x, torch.zeros_like(x)) == pytest.approx(0.5)


def test_measures_of_a_step():
    torch.manual_seed(0)
    truth = torch.rand(1, 3, 16, 16)
    blur = Blur(torch.full((1, 3), 1 / 3))
    y = blur.A(truth)
    model = DGUNet(**SMALL, stages=2, degradation=MotionBlur())
    with torch.no_grad():
        record = trace(model, y, blur)
        first = measure_step(record.steps[0], y, truth)
    step = record.steps[0]
    assert step.degradation is blur and torch.equal(step.before, blur.A_adjoint(y))
    assert first.psnr_x == pytest.approx(psnr_batch(step.x, truth).item())
    assert first.gradient_step == pytest.approx((step.v - step.before).square().mean().sqrt().item())
    assert first.data_term_v < first.data_term_before and first.data_term_truth < 1e-6
    assert first.descent == pytest.approx(1, abs=1e-5)
    assert first.truth_to_y == pytest.approx((truth - y).square().mean().sqrt().item())

    class Tint:  # A is the identity but for a constant, and A_adjoint goes the wrong way
        def A(self, x):
            return x + 0.25

        def A_adjoint(self, y):
            return -y

    x = torch.rand(1, 3, 16, 16)
    wrong = measure_step(Step(1, x, x + 0.5 * (y - x), x, 0.5, Tint()), y, truth)
    assert wrong.descent == pytest.approx(-1, abs=1e-5) and wrong.adjoint_mismatch == pytest.approx(2, abs=1e-5)
    assert wrong.towards_y == pytest.approx(1, abs=1e-5)
    assert wrong.data_term_truth_tinted == pytest.approx(wrong.truth_to_y_tinted, abs=1e-6)
    assert wrong.data_term_truth > wrong.truth_to_y
    assert measure_step(Step(1, y, y, x, 0.5, Tint()), y, truth).towards_y is None


# ------------------------------------------------------------------------------------------------------------- scripts


def save(model, path):
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, path)
    return path


@pytest.mark.parametrize("network", ["learned", "no gradient", "sensing", "any blur"])
def test_analyse(tiny_model, image_pairs, tmp_path, network):
    torch.manual_seed(0)
    image_pairs(tmp_path / "set", size=(37, 45))
    if network == "sensing":
        model, folder = tiny_model("compressive_sensing_dgunet", stages=3, ratio=0.1), "set/target"
    else:
        known = MotionBlur(3, 5) if network == "any blur" else None
        model, folder = tiny_model(stages=3, gradient=network != "no gradient", degradation=known), "set"
    np.save(tmp_path / "kernel.npy", np.full((3, 5), 1 / 15))
    words = ["--weights", save(model, tmp_path / "w.pth"), "--pair", tmp_path / folder, "img2"]
    words += ["--out", tmp_path / "out", "--kernel", tmp_path / "kernel.npy"]
    done = run_script(ROOT / "studies/analyse.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line[2:-2].split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    header, lines = rows[0], [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert [line["stage"] for line in lines] == ["1", "2", "3"]
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    if network == "no gradient":
        assert drawn == {"stages.png", "curves.png"} and "not adjoint" not in header
        assert {line["gradient step"] for line in lines} == {"0.00"}
    else:
        assert drawn == {"stages.png", "curves.png", "degradation.png"}
        known = network in ("sensing", "any blur")
        assert all((line["not adjoint"], line["descent"]) == ("0.00", "1.00") for line in lines) == known
        assert ("truth - y" in header) == (network != "sensing")
    if network == "sensing":  # measured, not read
        assert {line["A truth - y"] for line in lines} == {"0.00"}
    if network == "any blur":
        done = run_script(ROOT / "studies/analyse.py", *words[:5], cwd=tmp_path)
        assert done.returncode == 2 and "Blur(kernel)" in done.stderr


def test_analyse_sensing(tiny_model, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for k, size in enumerate(((192, 288), (96, 100))):
        cv2.imwrite(str(images / f"$p_{k}$ 照.png"), np.random.default_rng(k).integers(0, 256, size).astype(np.uint8))
    weights = []
    for name, start in (("dct", init_sampling_matrix("dct", 0.1)), ("other", init_sampling_matrix("orthonormal", 0.1))):
        torch.manual_seed(0)
        model = tiny_model("compressive_sensing_dgunet", stages=1, degradation=BlockSampling(0.1, matrix=start))
        (tmp_path / name).mkdir()
        weights.append(save(model, tmp_path / name / "model_best.pth"))
    words = [sys.executable, ROOT / "studies/analyse_sensing.py", "--images", images, "--out", tmp_path / "out"]
    done = run_forked([*words, "--weights", *weights])
    assert (done.returncode, done.stderr) == (0, "")  # no warnings of Matplotlib's on names either
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[2][:3] == ["dct/model_best.pth", "103", "100.0 %"] and float(rows[3][2].removesuffix(" %")) < 30
    assert all(float(cell) > 0 for row in rows[6:] for cell in row[1:]) and len(rows) == 8
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"matrix.png", "seams.png"}
    done = run_forked([*words, "--weights", weights[0], weights[0]])
    assert done.returncode == 2 and "--weights" in done.stderr


def test_curve_over_the_ratios(tiny_model):
    """Of a network for a range as test.py scores it, beside the one ratio of another."""
    rng, small = np.random.default_rng(0), dict(stages=1, growth=4, final_growth=4)
    images = [rng.integers(0, 256, size).astype(np.uint8) for size in ((64, 96), (40, 33))]
    scalable = tiny_model("compressive_sensing_dgunet", ratio=(0.04, 0.25), **small)
    found = analyse_sensing.over_ratios(scalable, images)
    assert list(found) == [0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25]
    restored = [analyse_sensing.reconstruct_tiles(scalable, image, ratio=0.15)[0] for image in images]
    scores = [evaluate_pair(x, image, "cs_y")[0] for x, image in zip(restored, images, strict=True)]
    assert found[0.15] == pytest.approx(np.mean(scores))
    one = analyse_sensing.over_ratios(tiny_model("compressive_sensing_dgunet", ratio=0.5, **small), images)
    assert list(one) == [0.5]
    (axes,) = analyse_sensing.draw_ratios({"all": found, "one": one}).axes
    assert [len(line.get_xdata()) for line in axes.lines] == [7, 1]
    assert f"| one | 50: {one[0.5]:.2f} |" in analyse_sensing.ratio_table({"all": found, "one": one})


def test_distances_to_seams():
    distance = analyse_sensing.to_border((70, 96), 32)
    assert distance[31, 0] == distance[32, 5] == distance[0, 63] == 0 and distance[30, 0] == distance[33, 0] == 1
    assert distance[0, 0] == 31 and distance[69, 95] == 5  # an image's edge is no seam
    within = analyse_sensing.inside_a_tile((256, 288), 32)
    assert not within[:32].any() and not within[:, 256:].any() and not within[128, :].any()
    assert within[64, 64] and analyse_sensing.to_border((256, 288), 32)[within].max() == 15


@pytest.fixture
def forked(monkeypatch):
    """The trainings of a study are forked."""
    stand_in = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(runs, "subprocess", stand_in)


def test_study_of_sensing(forked, image_pairs, tmp_path):
    image_pairs(tmp_path / "pairs", count=4, size=(32, 32))
    words = [ROOT / "studies/study_sensing.py", "--train_dir", tmp_path / "pairs/target", "--out", tmp_path / "out"]
    words += ["--only", "recipe", "then seven", "--", "OPTIM.NUM_EPOCHS", "1", "TRAINING.VAL_HOLD_BACK", "2"]
    words += ["TRAINING.TRAIN_PS", "32", "TRAINING.VAL_PS", "32", "OPTIM.BATCH_SIZE", "2"]
    done = run_script(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = {path.parent.name for path in (tmp_path / "out").rglob("model_latest.pth")}
    steps = {f"three stages, then seven, step {k}" for k in (1, 2)}
    assert runs == steps | {"the recipe DCT, rho 1, three stages, step 1"}
    assert "| three stages, then seven | " in done.stdout


def test_ablation(forked, image_pairs, tmp_path):
    """Every run trains and is tested; a second call finds them all done."""
    run = partial(run_script, cwd=tmp_path)
    image_pairs(tmp_path / "pairs", count=6, size=(32, 32))
    words = ["--train_dir", tmp_path / "pairs/target", "--out", tmp_path / "out", "--epochs", "1", "--seeds", "1"]
    words += ["--only", "identity", "--", "OPTIM.BATCH_SIZE", "2"]
    words += ["TRAINING.VAL_HOLD_BACK", "2", "TRAINING.TRAIN_PS", "32", "TRAINING.VAL_PS", "32"]
    done = run(ROOT / "studies/ablation.py", *words)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out/ablation.md").read_text()
    assert table.count("| as in the paper, 5 stages |") == 2 and "| A known, the identity |" in table
    assert cv2.imread(str(tmp_path / "out/ablation.png")).shape[1] > 500
    states = sorted((tmp_path / "out/runs").rglob("model_latest.pth"))
    learned, known, as_in_paper = (load_model(path) for path in states)
    assert known.arguments == as_in_paper.arguments and as_in_paper.degradation is None
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(known.degradation.A(x), x) and known.degradation.noise == pytest.approx(25 / 255)
    assert learned.degradation.learned
    for folder, path, images in (("CompressiveSensing", states[0], "target"), ("Deblurring", states[1], "")):
        test = [ROOT / folder / "test.py", "--weights", path, "--dataset", tmp_path / "pairs" / images]
        tested = run(*test, "--results", tmp_path / "results")
        assert tested.returncode == 0 and " 6 " in tested.stdout, tested.stderr
    before = [path.stat().st_mtime_ns for path in states]
    assert run(ROOT / "studies/ablation.py", *words).stdout == done.stdout
    assert [path.stat().st_mtime_ns for path in states] == before
    refused = run(ROOT / "studies/ablation.py", *words, "OPTIM.LR_INITIAL", "0.1")
    assert refused.returncode == 2 and "OPTIM.LR_INITIAL" in refused.stderr and "--out" in refused.stderr
    (tmp_path / "pairs/target/img6.png").unlink()
    refused = run(ROOT / "studies/ablation.py", *words)
    assert refused.returncode == 2 and "pairs/target" in refused.stderr and "--out" in refused.stderr
    refused = run(ROOT / "studies/ablation.py", *words[:6], "--only", "nothing of it")
    assert refused.returncode == 2 and "--only" in refused.stderr


def test_every_ablation_is_a_network(tmp_path):
    for task, settings in ablation.TASKS.items():
        for variant in ablation.VARIANTS:
            if variant.task in ("", task):
                args = Namespace(epochs=1, train_dir="images", out=tmp_path)
                words = [str(w) for pair in ablation.settings_of(task, variant, 1, args).items() for w in pair]
                cfg = load_config(ROOT / f"configs/{variant.trained_as or task}/dgunet.yaml", words)
                if variant.name == "DCT as matrix, fixed":
                    made = block_sampling(cfg, [])
                    assert torch.equal(made.matrix, init_sampling_matrix("dct", 0.25)) and not made.learned
                model = create_model(settings["MODEL.NAME"], **ablation.SMALL | variant.arguments)
                for key, value in variant.arguments.items():
                    assert model.arguments[key] == value
                default = create_model(settings["MODEL.NAME"], **ablation.SMALL)
                assert variant.settings or variant is ablation.BASE or model.arguments != default.arguments
