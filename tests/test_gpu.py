"""What only a CUDA GPU shows: ``pytest -m gpu``."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engine import TRAIN, batch, history, make_trainer, options, train
from test_model import assert_fusion_survives, random_maps, split_and_concatenated
from test_parity import OURS, SPECS, write_original

import dgunet.training.cost
from dgunet import load_model, restore
from dgunet.model.instance_norm import HalfInstanceNorm
from dgunet.model.projection import project
from dgunet.training.config import load_config
from dgunet.training.cost import peak_image_rate, step_memory
from dgunet.training.step import TrainState

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests/parity/cases"
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Without TF32, which keeps 10 bits of a factor; compiling that gives up is an error; peaks are not measured."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    monkeypatch.setattr(dgunet.training.cost, "matrix_rate", lambda *_: 1e15)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


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
    assert_fusion_survives(kind, bf16, DEVICE)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_projection_and_its_gradients_are_those_of_the_cpu(memory_format):
    basis, features = random_maps(size=(64, 48))
    basis[:, 1] = basis[:, 0] + 1e-2 * basis[:, 1]
    weights = torch.randn_like(features)

    def compute(device: str):
        maps = [x.float().to(device).contiguous(memory_format=memory_format) for x in (basis, features)]
        basis_, features_ = (x.requires_grad_() for x in maps)
        projected = project(basis_, features_)
        gradients = torch.autograd.grad((weights.float().to(device) * projected).sum(), maps)
        return [x.detach().cpu() for x in (projected, *gradients)]

    for found, expected in zip(compute(DEVICE), compute("cpu"), strict=True):
        assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 6, 8, 10), (4, 80, 64, 64), (1, 128, 90, 160)])
def test_half_instance_norm_and_its_gradients_are_those_of_the_cpu(shape, memory_format):
    """The norm of training, which computes its gradients itself."""
    norm = HalfInstanceNorm(shape[1]).train()
    torch.nn.init.normal_(norm.norm.weight), torch.nn.init.normal_(norm.norm.bias)
    x = (3 + 2 * torch.randn(shape)).contiguous(memory_format=memory_format)
    weights = torch.randn_like(x)

    def compute(norm: HalfInstanceNorm, function, device: str, dtype: torch.dtype):
        norm = copy.deepcopy(norm).to(device, dtype)
        x_ = x.to(device, dtype).requires_grad_()
        out = function(x_, norm)
        loss = (weights.to(device, dtype) * out.square()).sum()
        gradients = torch.autograd.grad(loss, (x_, norm.norm.weight, norm.norm.bias))
        return [y.detach().cpu().double() for y in (out, *gradients)]

    found = compute(norm, lambda x, norm: norm(x), DEVICE, torch.float32)
    plain = compute(norm, lambda x, norm: split_and_concatenated(x, norm.norm), "cpu", torch.float64)
    for a, b in zip(found, plain, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
    for a, b in zip(compute(norm, lambda x, norm: norm(x), DEVICE, torch.bfloat16), plain, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_network_gradients_are_those_of_the_cpu(tiny_model):
    """In training mode, all of them, so that an operation that goes wrong on a GPU shows by its weight's name."""
    model = tiny_model(stages=4).train()
    twin = copy.deepcopy(model).to(DEVICE, memory_format=torch.channels_last)
    y = torch.rand(2, 3, 64, 64)
    for network, x in ((model, y), (twin, y.to(DEVICE, memory_format=torch.channels_last))):
        sum((estimate - 0.3).square().mean() for estimate in network(x)).backward()
    largest = max(p.grad.norm() for p in model.parameters())
    for (name, expected), found in zip(model.named_parameters(), twin.parameters(), strict=True):
        difference = (found.grad.cpu() - expected.grad).norm()
        assert difference < 1e-3 * expected.grad.norm() + 1e-5 * largest, name


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


def test_stages_compiled_one_by_one_agree_with_eager(tiny_model):
    """The networks of shared and of own stages, in training and in inference, at a second size as well."""
    for shared in (True, False):
        model = tiny_model(stages=4, shared=shared).to(DEVICE, memory_format=torch.channels_last).train()
        compiled = copy.deepcopy(model)
        compiled.compile()
        for size in (64, 96):
            y = torch.rand(2, 3, size, size, device=DEVICE)
            if size == 64:  # training has one size
                for a, b in zip(model(y), compiled(y), strict=True):
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            with torch.inference_mode():
                for a, b in zip(model(y), compiled(y), strict=True):
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_projection_can_be_held_by_a_cuda_graph():
    """Captured once, replayed on other maps, five times: nothing in it waits, nothing is decided on the CPU."""
    static = [x.float().to(DEVICE).contiguous(memory_format=torch.channels_last) for x in random_maps(size=(64, 48))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            project(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = project(*static)
    for seed in range(1, 6):
        maps = [x.float().to(DEVICE) for x in random_maps(seed, size=(64, 48))]
        for place, x in zip(static, maps, strict=True):
            place.copy_(x)
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(out, project(*maps), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("restoring", [{}, dict(tile=64, tile_overlap=16), dict(self_ensemble=True)], ids=str)
def test_restore_is_that_of_the_cpu(tiny_model, restoring):
    model = tiny_model(stages=3)
    image = np.random.default_rng(0).random((93, 141, 3)).astype(np.float32)
    expected = restore(model, image, **restoring)
    model.to(DEVICE)
    restored = restore(model, image, **restoring)
    assert restored.dtype == np.float32
    assert np.abs(restored - expected).max() < 1e-3
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    assert restore(model, tensor).device.type == "cpu"
    assert restore(model, tensor.to(DEVICE)).device.type == DEVICE
    assert np.abs(restore(model, image, bf16=True, **restoring) - expected).max() < 0.05


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture
def folders(tmp_path, image_pairs):
    image_pairs(tmp_path / "train", count=8, size=(40, 48))
    image_pairs(tmp_path / "val", count=2, size=(32, 32))
    return tmp_path


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"SPEED__AMP": "bf16"},
        {"SPEED__COMPILE": True},
        {"SPEED__COMPILE": True, "SPEED__COMPILE_MODE": "reduce-overhead"},
        {"SPEED__CHECKPOINTING": True},
        {"SPEED__CAPTURE": False},
    ],
    ids=str,
)
def test_training_and_resuming(folders, extra):
    """Through the command line, on every GPU there is: NCCL where there are several."""
    settings = dict(DEVICE="cuda", OPTIM__BATCH_SIZE=8, OPTIM__EMA_DECAY=0.9, TRAINING__WORKERS=1, **extra)
    settings |= dict(TRAINING__REPEAT=4)  # 4 steps an epoch: the step is recorded beside the thread that pins batches
    train(folders, OPTIM__NUM_EPOCHS=2, **settings)
    train(folders, OPTIM__NUM_EPOCHS=4, TRAINING__RESUME=True, **settings)
    rows = history(folders)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert all(float(row["loss"]) < 10 and row["skipped_steps"] == "0" for row in rows)
    assert all(0 < float(row["share_of_peak"]) < 1 for row in rows)
    assert "cannot be recorded" not in (folders / "runs/run/train.log").read_text()


def losses(folders, steps: int = 8, **extra) -> list[float]:
    """Of so many steps, each on a batch and with a rate of its own; then how far the average is from the weights.

    The validation between them is that of training.
    """
    settings = dict(DEVICE="cuda", OPTIM__BATCH_SIZE=4, OPTIM__EMA_DECAY=0.9, SPEED__CAPTURE=False) | extra
    settings |= dict(OPTIM__NUM_EPOCHS=steps, OPTIM__WARMUP_EPOCHS=0, OPTIM__COSINE_EXTRA_EPOCHS=0)
    trainer = make_trainer(folders, **settings)
    found, before = [], 0.0
    for step in range(steps):
        trainer.schedule.go_to(step + 1)
        samples = [trainer.train_set[step + 1, i] for i in range(4)]
        trainer.train_state.train_step(
            *(trainer.train_state.to_device(torch.stack(side)) for side in zip(*samples, strict=True))
        )
        total = trainer.train_state.counters.loss.item()
        found.append(total - before)
        before = total
        if step == 3:
            assert 5 < trainer.validate() < 60
    assert trainer.train_state.counters.read()[1:4] == (steps, 0, 0) and trainer.train_state.lr < 5e-4
    if trainer.train_state.ema is not None:
        pairs = zip(trainer.train_state.ema.parameters(), trainer.train_state.parameters, strict=True)
        found.append(sum((a - b).square().sum() for a, b in pairs).sqrt().item())
    captured = trainer.train_state.captured_step
    assert (captured is not None and captured.batch is not None) == settings["SPEED__CAPTURE"], "it is recorded"
    return found


@pytest.mark.parametrize(
    "extra",
    [
        {"SPEED__COMPILE": True},
        {"SPEED__COMPILE": True, "SPEED__COMPILE_MODE": "reduce-overhead"},
        {"SPEED__COMPILE": True, "SPEED__COMPILE_MODE": "reduce-overhead", "OPTIM__EMA_DECAY": 0.0},
        {"SPEED__COMPILE": True, "SPEED__CHECKPOINTING": True},
        {"SPEED__CHECKPOINTING": True},
        {"SPEED__CHANNELS_LAST": False},
        {"OPTIM__ACCUMULATE": 2},
        {"SPEED__CAPTURE": True},
        {"SPEED__CAPTURE": True, "SPEED__COMPILE": True},
        {"SPEED__CAPTURE": True, "SPEED__CHECKPOINTING": True, "OPTIM__ACCUMULATE": 2, "OPTIM__CLIP_NORM": 0.1},
        {"SPEED__CAPTURE": True, "OPTIM__EMA_DECAY": 0.0, "OPTIM__NAME": "adamw"},
    ],
    ids=str,
)
def test_losses_are_those_of_eager(folders, extra):
    """Step by step, in float32. With CUDA graphs: some steps warm up, one is recorded, five at least are replayed."""
    same = ("OPTIM__EMA_DECAY", "OPTIM__CLIP_NORM", "OPTIM__NAME")
    plain = {"SPEED__CAPTURE": False} | {key: value for key, value in extra.items() if key in same}
    found, expected = (losses(folders, 10, **options) for options in (extra, plain))
    rtol = 2e-3 if extra.get("SPEED__COMPILE") else 5e-4
    np.testing.assert_allclose(found[:10], expected[:10], rtol=rtol)
    np.testing.assert_allclose(found[10:], expected[10:], rtol=2e-2)


def wait_for_the_gpu(restored, target):
    """A loss that reads a number."""
    return (restored - target).abs().mean() * (1 if target.mean().item() > 0 else 2)


def test_a_step_that_waits_is_not_recorded(folders, caplog):
    """It says where that is, and leaves the stream and the random generator as they were."""
    waiting = {"LOSS__TERMS": "{test_gpu:wait_for_the_gpu: 1}"}
    trainer = make_trainer(folders, DEVICE="cuda", OPTIM__BATCH_SIZE=4, **waiting)
    input, target = (trainer.train_state.to_device(side) for side in batch(trainer, 4))
    with caplog.at_level("INFO", "dgunet"):
        for _ in range(6):
            trainer.train_state.train_step(input, target)
    (told,) = [line for line in caplog.messages if "SPEED.CAPTURE" in line]
    assert "test_gpu.py" in told and "waits for the GPU" in told
    assert trainer.train_state.captured_step.failed and trainer.train_state.counters.read().counted == 6
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and torch.rand(1, device=DEVICE).item() < 1


def test_a_step_of_compressive_sensing_is_recorded(tiny_model):
    """Its learned matrix measures within the step."""
    states = []
    for capture in (False, True):
        words = ["DEVICE", "cuda", "GPU", "[0]", "OPTIM.BATCH_SIZE", "4", "SPEED.CAPTURE", str(capture)]
        cfg = load_config(ROOT / "configs/compressive_sensing/dgunet.yaml", words)
        states.append(TrainState(cfg, tiny_model("compressive_sensing_dgunet", stages=3)))
    for seed in range(8):
        x = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(seed))
        for state in states:
            state.train_step(state.to_device(x), state.to_device(x))
    assert states[1].captured_step.batch is not None
    eager, captured = (state.counters.read() for state in states)
    assert captured.counted == 8 and captured.loss == pytest.approx(eager.loss, rel=5e-4)


def test_memory_known_beforehand(tiny_model):
    """Of a step that is computed, with what the libraries take besides."""
    cfg = load_config(ROOT / "configs/denoising/dgunet.yaml", ["DEVICE", "cuda", "GPU", "[0]", "OPTIM.BATCH_SIZE", "8"])
    state = TrainState(cfg, tiny_model(width=32, growth=16, final_growth=16))
    expected = step_memory(state, 128)
    x = state.to_device(torch.rand(8, 3, 128, 128))
    state.compute_step(x, x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    state.compute_step(x, x)
    held = sum(p.numel() * p.element_size() for p in state.parameters) * 4
    assert torch.cuda.max_memory_allocated() - before + held == pytest.approx(expected, rel=0.2)
    rate = peak_image_rate(state, 128)
    assert 1 < rate < 1e9 and all(p.device.type == DEVICE for p in state.parameters)


def test_losses_are_those_of_the_cpu(folders):
    cpu = make_trainer(folders)
    gpu = make_trainer(folders, DEVICE="cuda")
    for _ in range(5):
        for trainer in (cpu, gpu):
            trainer.train_state.train_step(*(trainer.train_state.to_device(side) for side in batch(trainer)))
    assert gpu.train_state.counters.loss.item() == pytest.approx(cpu.train_state.counters.loss.item(), rel=2e-3)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_training_step_never_waits(folders, amp, capture):
    settings = dict(OPTIM__EMA_DECAY=0.9, OPTIM__CLIP_NORM=1.0, SPEED__AMP=amp, SPEED__CAPTURE=capture)
    trainer = make_trainer(folders, DEVICE="cuda", **settings)
    input, target = (trainer.train_state.to_device(side) for side in batch(trainer))
    for _ in range(6):
        trainer.train_state.train_step(input, target)
    assert not capture or trainer.train_state.captured_step.batch is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_state.train_step(input, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("extra", [{}, {"SPEED__COMPILE": True}, {"SPEED__CHECKPOINTING": True}], ids=str)
def test_a_group_trains_as_a_lone_process(folders, extra):
    """NCCL and DistributedDataParallel, on the one GPU that there may be."""
    settings = dict(DEVICE="cuda", GPU=[0], OPTIM__NUM_EPOCHS=2, **extra)
    train(folders, "alone", DEVICE="cuda", GPU=[0], OPTIM__NUM_EPOCHS=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", TRAIN]
    done = subprocess.run(
        [*command, *options(folders, "group", **settings)], capture_output=True, text=True, timeout=400,
        env=os.environ | {"NVIDIA_TF32_OVERRIDE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    alone, group = ([float(row["loss"]) for row in history(folders, run)] for run in ("alone", "group"))
    np.testing.assert_allclose(group, alone, rtol=5e-3)


@pytest.mark.parametrize("steps", [1, 6])
def test_non_finite_step_leaves_the_weights_alone(folders, steps):
    """Computed, and replayed; and from good weights the recorded step goes on."""
    trainer = make_trainer(folders, DEVICE="cuda", OPTIM__EMA_DECAY=0.9)
    state = trainer.train_state
    input, target = (state.to_device(side) for side in batch(trainer))
    for _ in range(steps):
        state.train_step(input, target)
    assert (state.captured_step.batch is not None) == (steps > 4)
    moments = [moment for moments in state.optimizer.state.values() for moment in moments.values()]
    kept = [*state.model.parameters(), *state.ema.parameters(), *moments]
    before = [x.clone() for x in kept]
    state.train_step(torch.full_like(input, torch.nan), target)
    assert all(map(torch.equal, kept, before))
    assert state.counters.read()[1:4] == (steps, 1, 1)
    assert state.roll_back()
    state.train_step(input, target)
    averaged = before[len(state.parameters) : 2 * len(state.parameters)]
    moved = max((p - good).abs().max().item() for p, good in zip(state.parameters, averaged, strict=True))
    assert state.counters.read()[1:4] == (steps + 1, 1, 0) and 0 < moved < 0.1
