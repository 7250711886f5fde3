"""Local statistics at test time: what a window sees, where it ends, and that nothing shows where windows meet."""

import copy
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import local_statistics
import numpy as np
import pytest
import torch
import yaml
from processes import run_script
from torch import Tensor

from dgunet import UserError, create_model, load_model
from dgunet.apps.export import export_model
from dgunet.apps.figures import restore_stages
from dgunet.checkpoints.load import describe_model
from dgunet.checkpoints.safetensors import save_weights
from dgunet.data.images import read_image, write_image
from dgunet.data.pairs import find_pairs
from dgunet.data.transforms import to_uint8, unit_range
from dgunet.evaluation.metrics import psnr_batch
from dgunet.evaluation.runner import evaluate
from dgunet.inference import restore
from dgunet.model.instance_norm import HalfInstanceNorm
from dgunet.model.layers import ChannelAttention
from dgunet.model.local import (
    OPERATIONS,
    LocalChannelAttention,
    LocalHalfInstanceNorm,
    check_windows,
    project_locally,
    window_means,
    window_moments,
    with_local_statistics,
)
from dgunet.model.projection import project

EVERYWHERE = dict.fromkeys(OPERATIONS, 64)


def maps(*shape: int, seed: int = 0, smooth: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for _ in range(2 if smooth else 0):
        x = torch.nn.functional.avg_pool2d(x, smooth, stride=1, padding=smooth // 2, count_include_pad=False)
    return x


def estimates(model, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(y)[0]


@pytest.fixture
def model(tiny_model):
    """Three stages, norms that do something, and an output layer whose changes are visible."""
    model = tiny_model(stages=3)
    with torch.no_grad():
        model.last.proximal.image_conv.weight.mul_(5)
        for module in model.modules():
            if isinstance(module, HalfInstanceNorm):
                module.norm.weight.uniform_(0.5, 1.5)
                module.norm.bias.uniform_(-0.5, 0.5)
    return model


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_means_are_those_of_a_window_around_each_cell(count):
    cells = maps(2, 3, 9, 12)
    found = window_means(cells, count)
    # Longhand: half cells at both ends of an even window; windows are moved inside the image near its border.
    weights = torch.ones(count + 1 - count % 2)
    if count % 2 == 0:
        weights[[0, -1]] = 0.5
    half = count // 2
    for row in range(9):
        for column in range(12):
            i, j = min(max(row, half), 8 - half), min(max(column, half), 11 - half)
            window = cells[:, :, i - half : i + half + 1, j - half : j + half + 1]
            mean = (window * weights[:, None] * weights).sum(dim=(2, 3)) / count**2
            assert torch.allclose(found[:, :, row, column], mean, atol=1e-6)


@pytest.mark.parametrize("cell", [1, 2, 8])
def test_moments_of_a_window(cell):
    x = 3 + 2 * maps(1, 2, 10 * cell, 9 * cell)
    mean, variance = window_moments(x, 3, cell)
    window = x[:, :, 4 * cell : 7 * cell, 2 * cell : 5 * cell]  # around the cell (5, 3)
    assert torch.allclose(mean[:, :, 5, 3], window.mean(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(variance[:, :, 5, 3], window.var(dim=(2, 3), correction=0), atol=1e-5)


def test_moments_of_a_large_photograph_keep_their_digits():
    """24 megapixels of faint texture that lies far from zero: running sums in float32 would lose it."""
    x = 100 + 0.1 * torch.randn((1, 1, 4000, 6000), generator=torch.Generator().manual_seed(0))
    mean, variance = window_moments(x, 7, 8)
    for row, column in ((300, 500), (499, 749)):
        i, j = min(row, 496), min(column, 746)  # near the far corner: the nearest window inside
        window = x[0, 0, 8 * i - 24 : 8 * i + 32, 8 * j - 24 : 8 * j + 32].double()
        assert abs(mean[0, 0, row, column].item() - window.mean().item()) < 3e-5
        assert abs(variance[0, 0, row, column].item() / window.var(correction=0).item() - 1) < 1e-3


@pytest.mark.parametrize("size", [(40, 48), (64, 16)])
def test_image_that_is_smaller_than_the_window_is_seen_as_a_whole(model, size):
    y = torch.rand(2, 3, *size)
    local = with_local_statistics(model, EVERYWHERE)
    assert torch.allclose(estimates(local, y), estimates(model, y), atol=1e-5)


def test_maps_that_are_alike_everywhere_have_the_same_statistics_everywhere():
    """Of a periodic map every window is the whole map."""
    x = maps(1, 8, 8, 8).repeat(1, 1, 12, 12)
    norm, attention = HalfInstanceNorm(8), ChannelAttention(8)
    torch.nn.init.uniform_(norm.norm.weight)
    for module, local in (
        (norm, LocalHalfInstanceNorm(norm, 32, cell=8)),
        (attention, LocalChannelAttention(attention, 32)),
    ):
        assert torch.allclose(local(x), module(x).expand_as(x), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- projection


def test_projection_of_a_window_that_holds_the_image_is_the_projection():
    basis, features = maps(2, 4, 40, 56), maps(2, 5, 40, 56, seed=1)
    assert torch.equal(project_locally(basis, features, 64), project(basis, features))


def test_projection_at_the_centre_of_a_window_is_that_of_the_window():
    basis, features = maps(1, 4, 128, 160, smooth=9), maps(1, 5, 128, 160, seed=1, smooth=9)
    found = project_locally(basis, features, 64)
    for row, column in ((32, 32), (64, 96), (96, 128)):
        area = ..., slice(row - 32, row + 32), slice(column - 32, column + 32)
        expected = project(basis[area], features[area])[..., 31:33, 31:33]
        assert torch.allclose(found[..., row - 1 : row + 1, column - 1 : column + 1], expected, rtol=0.1, atol=0.02)


def test_features_within_the_span_stay_as_they_are():
    basis = maps(1, 4, 88, 120)
    features = (torch.randn(5, 4) @ basis.flatten(2)).unflatten(2, basis.shape[2:])
    assert torch.allclose(project_locally(basis, features, 32), features, atol=1e-3)


def test_projection_is_local():
    basis, features = maps(1, 4, 96, 256), maps(1, 5, 96, 256, seed=1)
    before = project_locally(basis, features, 64)
    basis[..., 200:] += 1
    features[..., 200:] -= 1
    after = project_locally(basis, features, 64)
    assert torch.equal(before[..., :128], after[..., :128])
    assert not torch.allclose(before[..., 160:192], after[..., 160:192])


def test_projection_leaves_no_seams():
    """Of smooth maps the largest step between neighbours is no larger where windows begin and end than elsewhere."""
    basis, features = maps(1, 4, 256, 256, smooth=31), maps(1, 8, 256, 256, seed=1, smooth=31)
    projected = project_locally(basis, features, 64)
    assert (projected - features).abs().max() > 0.1 * features.abs().max()  # it has done something
    for dim in (2, 3):
        steps = projected.diff(dim=dim).abs().movedim(dim, 0).flatten(1).amax(dim=1)
        borders = torch.zeros(255, dtype=torch.bool)
        borders[31::32] = True
        assert steps[borders].max() < 1.2 * steps[~borders].max()


@pytest.mark.parametrize("case", ["coinciding", "constant", "zero", "zero here and there"])
def test_projection_onto_degenerate_maps_is_finite(case):
    basis, features = maps(1, 4, 96, 96), maps(1, 5, 96, 96, seed=1)
    if case == "coinciding":
        basis = basis[:, :1].expand(-1, 4, -1, -1)
    elif case == "constant":
        basis = torch.ones_like(basis)
    else:
        basis[..., : 96 if case == "zero" else 40, :] = 0
    found = project_locally(basis, features, 32)
    assert torch.isfinite(found).all() and found.abs().max() < 10 * features.abs().max()


# ------------------------------------------------------------------------------------------------------------ networks


def test_network_itself_stays_as_it_is(model):
    y = torch.rand(1, 3, 96, 128)
    before, weights = estimates(model, y), copy.deepcopy(model.state_dict())
    model.train()
    local = with_local_statistics(model, EVERYWHERE)
    assert not torch.allclose(estimates(local, y), before, atol=1e-4)
    assert model.training and not local.training
    assert torch.equal(estimates(model.eval(), y), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {id(p) for p in local.parameters()} <= {id(p) for p in model.parameters()}  # shared, not copied


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_alone(model, name):
    """What is far away changes nothing but through the operations that still see the whole image."""
    y = torch.rand(1, 3, 96, 160)
    alone = estimates(with_local_statistics(model, {name: 32}), y)
    assert not torch.allclose(alone, estimates(model, y), atol=1e-5)
    assert torch.allclose(alone, estimates(with_local_statistics(model, {name: 32}), y))
    others = {other: 32 for other in OPERATIONS if other != name}
    assert not torch.allclose(alone, estimates(with_local_statistics(model, others), y), atol=1e-5)


def test_nothing_global_is_left(tiny_model):
    """With all operations local, what is beyond the reach of convolutions and windows does not matter at all."""
    model = tiny_model(stages=2)
    local = with_local_statistics(model, dict.fromkeys(OPERATIONS, 16))
    y = torch.rand(1, 3, 64, 640)
    changed = y.clone()
    changed[..., 600:] = 0
    far, scale = (..., slice(0, 64)), y.abs().max()
    assert (estimates(local, y)[far] - estimates(local, changed)[far]).abs().max() < 1e-5 * scale
    assert (estimates(model, y)[far] - estimates(model, changed)[far]).abs().max() > 1e-4 * scale


def test_tiles_whose_overlap_covers_the_reach_give_the_whole(tiny_model):
    model = tiny_model(stages=2)
    image = np.random.default_rng(0).random((64, 720, 3)).astype(np.float32)
    local = dict.fromkeys(OPERATIONS, 16)
    whole = restore(model, image, tile=None, local=local)
    tiles = restore(model, image, tile=512, tile_overlap=256, local=local)
    assert np.abs(tiles - whole).max() < 1e-4
    assert np.abs(restore(model, image, tile=512, tile_overlap=256) - restore(model, image, tile=None)).max() > 1e-4


def test_sensing_network_has_no_projection():
    torch.manual_seed(0)
    model = create_model("compressive_sensing_dgunet", ratio=0.1, stages=3, width=8, growth=4, final_growth=4).eval()
    y = model.degradation.A(torch.rand(1, 1, 96, 160))
    local = with_local_statistics(model, EVERYWHERE)
    assert local.degradation is model.degradation
    assert not torch.allclose(estimates(local, y), estimates(model, y), atol=1e-5)


def test_bfloat16_and_half_precision_are_close(model):
    y = torch.rand(1, 3, 96, 128)
    local = with_local_statistics(model, EVERYWHERE)
    with torch.autocast("cpu", torch.bfloat16):
        low = estimates(local, y)
    assert (low.float() - estimates(local, y)).abs().mean() < 0.02
    double = with_local_statistics(copy.deepcopy(model).double(), EVERYWHERE)
    assert (estimates(double, y.double()) - estimates(local, y)).abs().max() < 1e-3


def test_memory_format_changes_nothing(model):
    y = torch.rand(1, 3, 96, 128)
    local = with_local_statistics(model, EVERYWHERE)
    assert torch.allclose(estimates(local, y.to(memory_format=torch.channels_last)), estimates(local, y), atol=1e-5)


@pytest.mark.parametrize(
    "windows", [{"norms": 64}, {"norm": 60}, {"norm": 0}, {"norm": 64.0}, {"norm": True}, 64, True]
)
def test_unknown_windows_are_refused(windows):
    with pytest.raises(UserError):
        check_windows(windows)


# ----------------------------------------------------------------------------------------------- where it is asked for


@pytest.fixture
def shipped(tmp_path, tiny_model):
    """Weights whose record asks for windows."""
    model = tiny_model(stages=2)
    path = tmp_path / "w.safetensors"
    save_weights(path, model.state_dict(), describe_model(model), {"local": {"norm": 32, "projection": 32}})
    return path


def test_record_says_which_windows(shipped):
    image = np.random.default_rng(0).random((64, 96, 3)).astype(np.float32)
    model = load_model(shipped)
    assert model.local == {"norm": 32, "projection": 32}
    whole, local = (restore(model, image, local=choice) for choice in (False, None))
    assert np.array_equal(local, restore(model, image, local={"projection": 32, "norm": 32}))
    assert np.abs(whole - local).max() > 1e-5
    model.local = {}
    assert np.array_equal(restore(model, image), whole)


def test_record_may_ask_for_tiles(model, image_pairs, tmp_path):
    """Wherever no tile is asked for; one that is, and local=False, come before the record."""
    pairs = image_pairs(tmp_path / "pairs", count=1, size=(96, 128))
    y = unit_range(read_image(find_pairs(pairs)[0].input))
    whole, tiles = restore(model, y, tile=None), restore(model, y, tile=64)
    assert np.abs(whole - tiles).max() > 1e-5
    assert np.array_equal(restore(model, y, local={"tile": 64}), tiles)
    model.local = {"tile": 64}
    assert np.array_equal(restore(model, y), tiles)
    assert np.array_equal(restore(model, y, local=False), whole)
    assert np.array_equal(restore(model, y, tile=None), whole)
    assert np.array_equal(restore(model, y, tile=48), restore(model, y, tile=48, local=False))
    assert np.array_equal(restore_stages(model, y)[-1], to_uint8(tiles))

    record = evaluate(model, pairs, "sidd_unit_range", tmp_path / "scores")
    assert record.rows[0].tile == "64" and record.settings["local"] == {"tile": 64}
    without = evaluate(model, pairs, "sidd_unit_range", tmp_path / "whole", local=False)
    assert without.rows[0].tile == "whole" and without.psnr != record.psnr
    assert evaluate(model, pairs, "sidd_unit_range", tmp_path / "other", tile=None).psnr == without.psnr


def test_restore_of_several_images_and_turns(model):
    images = [np.random.default_rng(k).random((40 + 8 * k, 72, 3)).astype(np.float32) for k in range(2)]
    options = dict(local=EVERYWHERE, self_ensemble=True)
    together = restore(model, images, **options)
    assert all(
        np.array_equal(one, restore(model, image, **options)) for one, image in zip(together, images, strict=True)
    )


def test_scores_note_the_windows(shipped, image_pairs, tmp_path):
    pairs = image_pairs(tmp_path / "pairs", count=2, size=(64, 72))
    model = load_model(shipped)
    local = evaluate(model, pairs, "sidd_unit_range", tmp_path / "scores")
    assert local.settings["local"] == {"norm": 32, "projection": 32}
    told = []
    again = evaluate(model, pairs, "sidd_unit_range", tmp_path / "scores", say=told.append)
    assert again.psnr == local.psnr and "2 of 2" in told[0]
    whole = evaluate(model, pairs, "sidd_unit_range", tmp_path / "scores", local=False)
    assert whole.settings["local"] is False and whole.psnr != local.psnr


def test_local_networks_are_not_exported(model, tmp_path):
    with pytest.raises(UserError, match="local statistics"):
        export_model(with_local_statistics(model, EVERYWHERE), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_windows_of_a_network_for_all_ratios_are_scored_at_several(tiny_model):
    model = tiny_model("compressive_sensing_dgunet", stages=2, ratio=(0.1, 0.5), block=8)
    score = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts/choose_windows.py"))["score"]
    x = torch.rand(1, 32, 48, generator=torch.Generator().manual_seed(0))
    for windows in ({}, {"norm": 16}):
        local = with_local_statistics(model, windows)
        with torch.no_grad():
            restored = [local(model.degradation.at(ratio).A(x[None]))[0] for ratio in (0.1, 0.25, 0.5)]
        expected = np.mean([psnr_batch(found.clamp(0, 1), x[None]).item() for found in restored])
        assert score(model, windows, [(x, x)], False) == pytest.approx(expected, abs=1e-4)


def test_windows_are_chosen_on_held_back_images(tmp_path, tiny_model, image_pairs):
    """Every trial has its line, the last line is the record's, and what it says is what `restore` gives."""
    model = tiny_model(stages=2)
    save_weights(tmp_path / "w.safetensors", model.state_dict(), describe_model(model))
    pairs = image_pairs(tmp_path / "pairs", count=4, size=(64, 96))
    (tmp_path / "run.yaml").write_text("TRAINING: {TRAIN_DIR: pairs, VAL_HOLD_BACK: 2}\n")
    script = Path(__file__).resolve().parents[1] / "scripts/choose_windows.py"
    words = "--weights", tmp_path / "w.safetensors", "--config", "run.yaml"
    done = run_script(script, *words, "--windows", "32,64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    trials = [line.split() for line in lines if line.startswith("norm")]
    assert len(trials) == 9 and len({tuple(words) for words in trials}) == 9
    held_back = find_pairs(pairs)[-1]  # a tenth, but one at least
    y, x = (unit_range(read_image(path)) for path in (held_back.input, held_back.target))
    expected = -10 * np.log10(np.mean((restore(model, y, tile=None, local={"norm": 32}) - x) ** 2))
    (found,) = (float(words[-1]) for words in trials if words[:6] == "norm 32 attention whole projection whole".split())
    assert found == pytest.approx(expected, abs=2e-3)
    local = yaml.safe_load(lines[-1])["local"]
    assert local is False or check_windows(local)
    assert "--windows" in run_script(script, *words, "--windows", "small", cwd=tmp_path).stderr


def test_study_measures_every_form(tmp_path, monkeypatch, capsys):
    """studies/local_statistics.py, with the same threads in place of its processes."""
    (tmp_path / "set11").mkdir()
    write_image(tmp_path / "set11/a.png", np.random.default_rng(0).integers(0, 256, (40, 150, 3), dtype=np.uint8))
    monkeypatch.setattr(local_statistics, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    monkeypatch.setattr(sys, "argv", ["", "--data_root", str(tmp_path), "--only", "sensing_25"])
    local_statistics.main()
    *cases, _, _, _, row, left_out = capsys.readouterr().out.splitlines()
    scores = [re.search(r"of Set11, (.*): ([\d.]+) dB", case).groups() for case in cases]
    assert [form for form, _ in scores] == ["whole", "windows of 128", "tiles of 128"]
    assert all(score in row for _, score in scores) and "BSD68" in left_out
