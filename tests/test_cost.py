"""What a training step is said to cost beforehand is what it costs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dgunet.training.cost as cost
from dgunet import create_model
from dgunet.data.transforms import center_crop
from dgunet.training.config import load_config
from dgunet.training.step import TrainState

ROOT = Path(__file__).resolve().parents[1]


def make_state(task: str = "denoising", **options) -> TrainState:
    options = {"DEVICE": "cpu", "OPTIM.BATCH_SIZE": 2, "SPEED.AMP": "fp32"} | options
    words = [str(word) for option in options.items() for word in option]
    cfg = load_config(ROOT / "configs" / task / "dgunet.yaml", words)
    size = dict(width=8, growth=4, final_growth=4, stages=3)
    return TrainState(cfg, create_model(f"{task}_dgunet", checkpointing=cfg.SPEED.CHECKPOINTING, **size))


CASES = [
    {"OPTIM.EMA_DECAY": 0.9, "OPTIM.BATCH_SIZE": 4, "OPTIM.ACCUMULATE": 2},
    {"task": "deraining", "SPEED.CHECKPOINTING": True, "OPTIM.NAME": "muon"},
    {"task": "compressive_sensing", "SPEED.AMP": "bf16", "SPEED.CHANNELS_LAST": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_memory_is_that_of_real_tensors(options):
    state = make_state(**options)
    expected = cost.step_memory(state, 64)
    assert all(p.grad is None for p in state.model.parameters())  # the network itself is left alone
    with cost.LiveBytes() as live:
        live.add([state.model.state_dict(), state.ema.state_dict() if state.ema else []])
        target = torch.rand(2, state.model.channels, 64, 64).contiguous(memory_format=state.memory_format)
        for _ in range(2):  # moments are made in the first step
            live.peak = live.now
            state.optimizer.zero_grad()
            with state.autocast():
                estimates = state.network(target)
            state.loss(estimates, center_crop(target, *estimates[0].shape[-2:]), state.network.y).backward()
            del estimates
            state.optimizer.step()
    assert expected == pytest.approx(live.peak, rel=0.03)


def test_memory_grows_with_the_pixels():
    """So the table of docs/gpu.md is for any crop and any number of images."""
    small, half, large = (cost.step_memory(make_state(**{"OPTIM.BATCH_SIZE": n}), 64) for n in (1, 2, 4))
    assert large - half == pytest.approx(2 * (half - small), rel=0.02)
    assert cost.step_memory(make_state(**{"OPTIM.BATCH_SIZE": 1}), 128) == pytest.approx(large, rel=0.03)


def test_operations():
    """Of a convolution they are two for each weight and pixel; the backward pass of a network takes twice as many."""
    model = create_model("deraining_dgunet", width=8, growth=4, final_growth=4, stages=3, checkpointing=True)
    forward = cost.count_operations(model, 1, 32, 32, backward=False)
    weights = sum(p.numel() for name, p in model.named_parameters() if "shallow.conv" in name)
    assert forward > 2 * weights * 32 * 32
    assert cost.count_operations(model, 3, 32, 64, backward=False) == pytest.approx(6 * forward, rel=0.01)
    assert 2.5 * forward < cost.count_operations(model, 1, 32, 32) < 3.2 * forward
    assert model.checkpointing and all(p.grad is None for p in model.parameters())


def test_share_of_the_peak_is_of_all_gpus(monkeypatch):
    state = make_state()
    assert cost.peak_image_rate(state, 32) is None  # on a CPU
    gpu = SimpleNamespace(device=torch.device("cuda:1"), model=state.model, world=4, amp=torch.bfloat16)
    monkeypatch.setattr(cost, "_rate_of_gpu", lambda device, dtype: 1e12 if dtype == torch.bfloat16 else 1e11)
    assert cost.peak_image_rate(gpu, 32) == 4e12 / cost.count_operations(state.model, 1, 32, 32)
    monkeypatch.setattr(state.model, "forward", lambda y: [torch.from_numpy(y.numpy())])
    assert cost.peak_image_rate(gpu, 32) is None


def test_rate_of_matrix_products():
    assert 1e8 < cost.matrix_rate(torch.device("cpu"), torch.float32, 64) < 1e14
