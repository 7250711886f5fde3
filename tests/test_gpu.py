"""What only a CUDA GPU shows: ``pytest -m gpu``."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engine import assert_same_weights, batch, history, make_trainer, train
from test_parity import OURS, SPECS, write_original

from dgunet import load_model, restore
from dgunet.pathways import SubspaceFusion

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
CASES = Path(__file__).parent / "parity" / "cases"
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def full_float32():
    """Without TF32, which keeps 10 bits of a factor."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("variant", OURS)
def test_every_stage_matches_in_float32(variant, tmp_path):
    assert OURS.keys() == SPECS.keys()
    write_original(tmp_path / "original.pth", variant, "module.")
    model = load_model(tmp_path / "original.pth", device=DEVICE)
    case = np.load(CASES / f"{variant}.npz")
    y = torch.from_numpy(case["input"]).to(DEVICE)
    with torch.inference_mode():
        estimates = model(y if model.degradation is None else model.degradation.A(y))
    for k, x in enumerate(estimates[::-1], start=1):
        assert np.abs(x.cpu().numpy() - case[f"stage{k}"]).max() < 1e-3


@pytest.mark.parametrize("kind", ["constant", "coinciding", "zero"])
@pytest.mark.parametrize("bf16", [True, False])
def test_fusion_survives_degenerate_maps(kind, bf16):
    torch.manual_seed(0)
    fusion = SubspaceFusion(32).to(DEVICE)
    with torch.no_grad():
        if kind == "coinciding":
            fusion.basis_conv.weight[:] = fusion.basis_conv.weight[:1].clone()
            fusion.basis_conv.bias[:] = 0.1
        else:
            fusion.basis_conv.weight.zero_()
            fusion.basis_conv.bias.fill_(0.5 if kind == "constant" else 0)
    x, bridge = (torch.randn(2, 32, 64, 64, device=DEVICE, requires_grad=True) for _ in range(2))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        out = fusion(x, bridge)
    out.float().square().mean().backward()
    for tensor in (out, x.grad, bridge.grad, *(p.grad for p in fusion.parameters())):
        assert torch.isfinite(tensor).all()


def test_training_step_under_bf16_is_finite(tiny_model):
    model = tiny_model().to(DEVICE, memory_format=torch.channels_last)
    y = torch.rand(2, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        expected = model(y)[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        estimates = model(y)
    assert (estimates[0].float() - expected).abs().max() < 0.05
    sum(x.float().square().mean() for x in estimates).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_compiled_model_agrees_with_eager(tiny_model):
    model = tiny_model(stages=3).to(DEVICE)
    compiled = torch.compile(copy.deepcopy(model))
    y = torch.rand(2, 3, 64, 64, device=DEVICE)
    for a, b in zip(model(y), compiled(y), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    for network in (model, compiled):
        sum(x.square().mean() for x in network(y)).backward()
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("options", [{}, dict(tile=64, tile_overlap=16), dict(self_ensemble=True)], ids=str)
def test_restore_is_that_of_the_cpu(tiny_model, options):
    model = tiny_model(stages=3)
    image = np.random.default_rng(0).random((93, 141, 3)).astype(np.float32)
    expected = restore(model, image, **options)
    model.to(DEVICE)
    restored = restore(model, image, **options)
    assert restored.dtype == np.float32
    assert np.abs(restored - expected).max() < 1e-3
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    assert restore(model, tensor).device.type == "cpu"
    assert restore(model, tensor.to(DEVICE)).device.type == DEVICE
    assert np.abs(restore(model, image, bf16=True, **options) - expected).max() < 0.05


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture
def folders(tmp_path, picture_pairs):
    picture_pairs(tmp_path / "train", count=8, size=(40, 48))
    picture_pairs(tmp_path / "val", count=2, size=(32, 32))
    return tmp_path


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"SPEED__AMP": "bf16"},
        {"SPEED__COMPILE": True},
        {"SPEED__COMPILE": True, "SPEED__COMPILE_MODE": "reduce-overhead"},
        {"SPEED__CHECKPOINTING": True},
    ],
)
def test_training_and_resuming(folders, extra):
    """Through the command line, on every GPU there is: NCCL where there are several."""
    settings = dict(DEVICE="cuda", OPTIM__BATCH_SIZE=8, OPTIM__EMA_DECAY=0.9, TRAINING__WORKERS=1, **extra)
    train(folders, OPTIM__NUM_EPOCHS=2, **settings)
    train(folders, OPTIM__NUM_EPOCHS=4, TRAINING__RESUME=True, **settings)
    rows = history(folders)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert all(float(row["loss"]) < 10 and row["skipped_steps"] == "0" for row in rows)


def test_non_finite_step_leaves_the_weights_alone(folders):
    trainer = make_trainer(folders, DEVICE="cuda")
    input, target = (side.to("cuda") for side in batch(trainer))
    trainer.train_step(input, target)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train_step(torch.full_like(input, torch.nan), target)
    assert_same_weights(trainer.model.state_dict(), before)
    assert trainer.totals.tolist()[1:] == [1, 1, 1]
