"""The training engine, mostly through the real command line on tiny images."""

import csv
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
import pytest
import torch
from matplotlib.figure import Figure
from processes import Forked, run_forked, run_script
from test_model import Operations

import dgunet.training.loggers
import dgunet.training.trainer
import dgunet.training.validation
from dgunet import create_model, load_model
from dgunet.checkpoints.load import read_checkpoint, save_checkpoint
from dgunet.data.datasets import CenterCropDataset, LumaPatches, PairedPatches
from dgunet.data.pairs import find_images
from dgunet.data.transforms import unit_range
from dgunet.evaluation.metrics import psnr_batch
from dgunet.model.sampling import BlockSampling, sampling_operator
from dgunet.runtime.distributed import StopSignal
from dgunet.runtime.errors import UserError
from dgunet.runtime.hardware import autocast_dtype, memory_format
from dgunet.tasks import find_task
from dgunet.training.cli import build_model, find_clean_images
from dgunet.training.config import load_config
from dgunet.training.loggers import ConsoleLogger, Run, TensorBoardLogger, describe, plot_history
from dgunet.training.trainer import Trainer
from dgunet.training.validation import validation_batch_size

TRAIN = Path(__file__).resolve().parents[1] / "Denoising" / "train.py"
OVERRIDES = {"width": 8, "growth": 4, "final_growth": 4, "stages": 2}


@pytest.fixture
def folders(tmp_path, image_pairs):
    image_pairs(tmp_path / "train", count=8, size=(40, 48))
    image_pairs(tmp_path / "val", count=2, size=(32, 32))
    return tmp_path


def options(folders, session="run", **changed) -> list[str]:
    """A tiny run on the CPU in float32: 2 epochs of 4 steps."""
    values = {
        "DEVICE": "cpu", "MODEL.SESSION": session, "TRAINING.TRAIN_DIR": folders / "train",
        "TRAINING.VAL_DIR": folders / "val", "TRAINING.SAVE_DIR": folders / "runs", "TRAINING.WORKERS": 0,
        "TRAINING.TRAIN_PS": 32, "TRAINING.VAL_PS": 32, "TRAINING.VAL_EPOCHS": "[]", "TRAINING.VAL_FROM_EPOCH": 0,
        "TRAINING.VAL_TIMES": 1, "OPTIM.BATCH_SIZE": 2, "OPTIM.NUM_EPOCHS": 2, "OPTIM.WARMUP_EPOCHS": 1,
        "OPTIM.LR_INITIAL": 1e-3, "SPEED.AMP": "fp32", "AUGMENT.MIXUP_FROM_EPOCH": 1,
        **{f"MODEL.OVERRIDES.{key}": value for key, value in OVERRIDES.items()},
        **{key.replace("__", "."): value for key, value in changed.items()},
    }  # fmt: skip
    return [str(word) for pair in values.items() for word in pair]


def train(folders, session="run", check=0, timeout=None, **changed) -> subprocess.CompletedProcess:
    """train.py; in a process of its own where it starts others, or may hang."""
    words = options(folders, session, **changed)
    if timeout is None and "PROCESSES" not in changed:
        done = run_script(TRAIN, *words, cwd=folders)
    else:
        done = run_forked([sys.executable, TRAIN, *words], timeout or 240)
    assert done.returncode == check, done.stdout + done.stderr
    return done


def history(folders, session="run") -> list[dict]:
    with open(folders / "runs" / session / "history.csv") as file:
        return list(csv.DictReader(file))


def weights(folders, session="run", name="model_latest.pth") -> dict:
    return read_checkpoint(folders / "runs" / session / name)["state_dict"]


def assert_same_weights(one: dict, other: dict):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def make_trainer(folders, **changed) -> Trainer:
    cfg = load_config(TRAIN.parents[1] / "configs/denoising/dgunet.yaml", options(folders, **changed))
    sets = PairedPatches(folders / "train", 32, seed=cfg.SEED), CenterCropDataset(folders / "val", 32)
    trainer = Trainer(cfg, build_model(cfg, sets[0]), *sets)
    if cfg.TRAINING.RESUME:
        trainer.resume()
    trainer.schedule.go_to(1)
    return trainer


def batch(trainer, count: int = 2):
    samples = [trainer.train_set[1, i] for i in range(count)]
    return [unit_range(torch.stack(side)) for side in zip(*samples, strict=True)]


def test_run_writes_everything_and_says_what_it_does(folders, curves):
    done = train(folders)
    for words in (
        "8 images of",
        "2 images of",
        "denoising_dgunet",
        "parameters",
        "2 epochs of 4 steps",
        "CPU",
        "batch       2 =",
    ):
        assert words in done.stdout
    folder = folders / "runs" / "run"
    for name in (
        "model_latest.pth",
        "model_best.pth",
        "model_epoch_1.pth",
        "model_epoch_2.pth",
        "config.yaml",
        "train.log",
    ):
        assert (folder / name).stat().st_size > 0
    rows = history(folders)
    assert [(int(row["epoch"]), int(row["step"])) for row in rows] == [(1, 4), (2, 4)]
    assert all(float(row["psnr"]) > 0 and float(row["loss"]) > 0 for row in rows)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*tmp"))
    model = load_model(folder / "model_epoch_2.pth", task="denoising")
    assert model.arguments["stages"] == OVERRIDES["stages"] and model.name == "denoising_dgunet"
    reloaded = load_config(folder / "config.yaml")
    assert reloaded.OPTIM.BATCH_SIZE == 2


def test_training_learns(folders):
    """On one batch, the restored image gets much closer to the target than the degraded one is."""
    trainer = make_trainer(folders, MODEL__OVERRIDES__stages=3, OPTIM__LR_INITIAL=3e-3)
    input, target = batch(trainer, 4)
    for _ in range(60):
        trainer.train_state.train_step(input, target)
    restored = trainer.train_state.model(input)[0]
    assert (restored - target).square().mean() < 0.5 * (input - target).square().mean()


def test_killed_run_resumes_to_the_same_bits(folders):
    """SIGKILL in the middle of an epoch; the continued run ends with the weights of one that was never killed."""
    settings = dict(OPTIM__NUM_EPOCHS=5, OPTIM__EMA_DECAY=0.9, TRAINING__SAVE_MINUTES=0, SPEED__AMP="bf16")
    train(folders, "whole", **settings)
    process = Forked([sys.executable, TRAIN, *options(folders, "killed", **settings)])
    latest = folders / "runs" / "killed" / "model_latest.pth"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if latest.exists():
            state = read_checkpoint(latest)
            if state["epoch"] >= 2 and 0 < state["step"] < 4:
                break
        time.sleep(0.01)
    process.kill()
    process.wait()
    state = read_checkpoint(latest)  # whatever was under way, the file under its final name is whole
    assert (state["epoch"], state["step"]) != (5, 4), "the run was over before it could be killed"

    done = train(folders, "killed", TRAINING__RESUME=True, **settings)
    assert "continuing" in done.stdout
    assert_same_weights(weights(folders, "killed"), weights(folders, "whole"))
    whole, killed = read_checkpoint(folders / "runs/whole/model_latest.pth"), read_checkpoint(latest)
    assert_same_weights(killed["raw_state_dict"], whole["raw_state_dict"])
    for one, other in zip(history(folders, "whole"), history(folders, "killed"), strict=True):
        assert (one["loss"], one["psnr"], one["lr"]) == (other["loss"], other["psnr"], other["lr"])


def test_nothing_is_drawn_from_the_global_generator(folders):
    """So that a state need not hold it: only the network's first weights come from it."""
    for seed in (0, 1):
        trainer = diverging_trainer(folders, session=str(seed), OPTIM__NUM_EPOCHS=2)
        torch.manual_seed(seed)
        trainer.fit()
    assert_same_weights(weights(folders, "0"), weights(folders, "1"))
    assert [row["psnr"] for row in history(folders, "0")] == [row["psnr"] for row in history(folders, "1")]


def test_states_of_earlier_versions_resume(folders, finished):
    """They hold random states besides, and lack what came later."""
    state = read_checkpoint(finished / "model_latest.pth")
    for key in ("validation_due", "rollbacks", "lr_factor", "data", "val_data"):
        del state[key]
    random = {"cpu": torch.get_rng_state(), "cuda": None}
    save_checkpoint(state | {"random": random}, finished / "model_latest.pth")
    trainer = make_trainer(folders, TRAINING__RESUME=True)
    assert trainer.resumed == finished / "model_latest.pth" and trainer.step == 4
    assert_same_weights(trainer.train_state.model.state_dict(), state["state_dict"])


@pytest.fixture
def threads_at_exit(tmp_path, monkeypatch):
    """Every Python process started from here leaves a list of its threads when its interpreter begins to end."""
    monkeypatch.setenv("THREADS_AT_EXIT", str(tmp_path / "threads"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "threads").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("""
import atexit, os, pathlib

@atexit.register
def write():
    names = [task.read_text() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
    pathlib.Path(os.environ["THREADS_AT_EXIT"], str(os.getpid())).write_text("".join(names))
""")
    return lambda: [file.read_text() for file in (tmp_path / "threads").iterdir()]


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits(folders, processes, threads_at_exit):
    """As a cluster's scheduler sends it: to every process of the job, loading workers included."""
    settings = dict(OPTIM__NUM_EPOCHS=100000, TRAINING__VAL_AFTER_EVERY=100000)  # it comes between two steps
    settings |= dict(TRAINING__WORKERS=1, PROCESSES=processes)
    process = subprocess.Popen(
        [sys.executable, TRAIN, *options(folders, **settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    latest = folders / "runs" / "run" / "model_latest.pth"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    before = latest.stat().st_mtime_ns
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "TRAINING.RESUME True" in out and "Traceback" not in err
    assert latest.stat().st_mtime_ns > before
    assert read_checkpoint(latest)["epoch"] >= 1
    assert len(threads_at_exit()) >= processes and not any("gloo" in names for names in threads_at_exit())


def test_two_processes_give_the_losses_of_one(folders):
    """Two gloo processes with half the batch each, mix-up included; every epoch is one step, so losses are per step."""
    settings = dict(OPTIM__BATCH_SIZE=8, OPTIM__NUM_EPOCHS=6)
    train(folders, "one", **settings)
    done = train(folders, "two", PROCESSES=2, **settings)
    assert "8 = 2 processes x 1 passes x 4" in done.stdout
    one, two = history(folders, "one"), history(folders, "two")
    assert len(one) == len(two) == 6
    np.testing.assert_allclose([float(r["loss"]) for r in one], [float(r["loss"]) for r in two], rtol=0, atol=1e-5)
    np.testing.assert_allclose([float(r["psnr"]) for r in one], [float(r["psnr"]) for r in two], rtol=0, atol=1e-3)


def test_two_processes_end_by_the_clock_together(folders):
    """In the middle of an epoch, after a validation that is the run's last."""
    settings = dict(
        TRAINING__SECONDS=6, OPTIM__NUM_EPOCHS=10_000, OPTIM__BATCH_SIZE=2, TRAINING__VAL_AFTER_EVERY=10_000
    )
    done = train(folders, PROCESSES=2, timeout=120, **settings)
    assert "done: best PSNR" in done.stdout
    last = history(folders)[-1]
    assert last["psnr"] and last["psnr"] == last["best_psnr"] and 1 < int(last["epoch"]) < 10_000
    latest = read_checkpoint(folders / "runs/run/model_latest.pth")
    assert 3 < latest["seconds"] < 60 and latest["epoch"] == int(last["epoch"])


class PartlyBroken(PairedPatches):
    """Whose first image is not a number in some epochs."""

    broken: tuple[int, ...] = ()

    def __getitem__(self, key):
        sample = map(unit_range, super().__getitem__(key))
        return tuple(side * torch.nan if key[0] in self.broken and key[1] == 0 else side for side in sample)


def diverging_trainer(folders, *broken: int, **changed) -> Trainer:
    """One step in an epoch on known blurs with noise; without a finite loss in the epochs ``broken``."""
    settings = dict(
        OPTIM__BATCH_SIZE=8, OPTIM__NUM_EPOCHS=6, OPTIM__SCHEDULE="constant", OPTIM__EMA_DECAY=0.8,
        OPTIM__ROLLBACK_AFTER_BAD_STEPS=2, MODEL__DEGRADATION="blur", MODEL__KERNEL="motion",
        MODEL__KERNEL_EXTENT="[3, 9]", MODEL__NOISE=20, TRAINING__TRAIN_PS=40,
    )  # fmt: skip
    cfg = load_config(None, options(folders, **settings | changed))
    train_set = PartlyBroken(find_clean_images(folders / "train/target"), cfg.TRAINING.TRAIN_PS, seed=cfg.SEED)
    train_set.broken = broken
    val_set = CenterCropDataset(find_clean_images(folders / "val/target"), cfg.TRAINING.VAL_PS)
    return Trainer(cfg, build_model(cfg, train_set), train_set, val_set)


TWO_HALVES = """
import pathlib, sys
from dgunet.training.config import load_config
from dgunet.runtime.distributed import launch
from test_engine import diverging_trainer

def work(cfg, folders):
    for epochs in (5, 6):
        changed = dict(OPTIM__NUM_EPOCHS=epochs, TRAINING__RESUME="auto", OPTIM__ACCUMULATE=2)
        diverging_trainer(folders, 3, 4, session="two", **changed).fit()

launch(work, load_config(None, ["DEVICE", "cpu"]), pathlib.Path(sys.argv[1]))
"""


def test_two_processes_that_are_resumed_give_the_losses_of_one(folders):
    """With random blurs and noise, accumulation, EMA, and a divergence that only one of the two sees."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    (folders / "two.py").write_text(TWO_HALVES)
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | common | dict(RANK=rank, LOCAL_RANK=rank)
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(Forked([sys.executable, folders / "two.py", folders], env=environment, **streams))
    diverging_trainer(folders, 3, 4, session="one").fit()
    for process in processes:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
    one, two = history(folders, "one"), history(folders, "two")
    assert len(one) == len(two) == 6 and one[3]["rollbacks"] == "1"
    for column in ("lr", "skipped_steps", "rollbacks"):
        assert [row[column] for row in one] == [row[column] for row in two]
    for column, tolerance in (("loss", 1e-5), ("psnr", 1e-3)):
        values = [[float(row[column]) for row in rows] for rows in (one, two)]
        np.testing.assert_allclose(*values, rtol=0, atol=tolerance)


def sensing_trainer(folders, session="run", **changed) -> Trainer:
    """One network for blocks of 8x8 pixels and any ratio from 10 to 50 %."""
    settings = dict(
        MODEL__NAME="compressive_sensing_dgunet", MODEL__RATIO="[0.1, 0.5]", MODEL__OVERRIDES__stages=2,
        OPTIM__BATCH_SIZE=4, OPTIM__SCHEDULE="constant",
    )  # fmt: skip
    cfg = load_config(None, options(folders, session, **settings | changed))
    train_set = LumaPatches(find_images(folders / "train/target"), 16, seed=cfg.SEED, block=8)
    val_set = CenterCropDataset(find_images(folders / "val/target"), 32, luma=True)
    model = build_model(cfg, train_set, lambda cfg, _: sampling_operator(cfg.MODEL.RATIO, block=8))
    return Trainer(cfg, model, train_set, val_set)


def test_ratio_is_drawn_for_each_step_and_alike_in_all_processes(folders):
    """Were it not, the gradients of two halves of a batch would not be those of the whole."""

    def gradients(step: int, rank: int = 0, world: int = 1, **changed) -> dict:
        train_state = sensing_trainer(folders, **changed).train_state
        train_state.rank, train_state.world = rank, world
        x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        train_state.train_step(x, x, (1, step))
        return {name: p.grad for name, p in train_state.trained.items()}

    rows = set()
    for step in range(2):
        whole = gradients(step)
        halves = [gradients(step, rank, 2) for rank in (0, 1)]
        accumulated = gradients(step, OPTIM__ACCUMULATE=2)
        for name, gradient in whole.items():
            torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, gradient, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-6)
        rows.add(int(whole["degradation.matrix"].any(dim=1).sum()))
    assert len(rows) == 2 and rows <= set(range(7, 33))


def test_run_at_random_ratios_resumes_to_the_same_bits(folders):
    sensing_trainer(folders, "whole", OPTIM__NUM_EPOCHS=3).fit()
    for epochs in (1, 3):
        sensing_trainer(folders, "parts", OPTIM__NUM_EPOCHS=epochs, TRAINING__RESUME="auto").fit()
    assert_same_weights(weights(folders, "whole"), weights(folders, "parts"))
    assert history(folders, "whole")[-1]["psnr"] == history(folders, "parts")[-1]["psnr"]


def test_network_for_all_ratios_is_validated_at_some_of_them(folders):
    trainer = sensing_trainer(folders)
    model, scores = trainer.train_state.model, []
    for ratio in (0.1, 0.25, 0.5):  # the paper's that are in the range
        for x, _ in trainer.val_set:
            x = unit_range(x)[None]
            with torch.no_grad():
                scores.append(psnr_batch(model(model.degradation.at(ratio).A(x))[0], x).item())
    assert trainer.validate() == trainer.validate() == pytest.approx(np.mean(scores), abs=1e-4)


def test_torchrun(folders, threads_at_exit):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options(folders, OPTIM__NUM_EPOCHS=1)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout and len(history(folders)) == 1
    # A thread of gloo that works on while the interpreter ends would abort a finished run, now and then.
    assert len(threads_at_exit()) >= 3 and not any("gloo" in names for names in threads_at_exit())


def test_number_of_workers_changes_nothing(folders):
    train(folders, "none", OPTIM__NUM_EPOCHS=1)
    train(
        folders, "two", OPTIM__NUM_EPOCHS=1, TRAINING__WORKERS=2, timeout=50
    )  # its workers do not keep it from ending
    assert_same_weights(weights(folders, "none"), weights(folders, "two"))


def test_accumulation_equals_the_large_batch(folders):
    whole, parts = (
        make_trainer(folders, OPTIM__BATCH_SIZE=4),
        make_trainer(folders, OPTIM__BATCH_SIZE=4, OPTIM__ACCUMULATE=2),
    )
    parts.train_state.model.load_state_dict(whole.train_state.model.state_dict())
    for trainer in (whole, parts):
        trainer.train_state.train_step(*batch(trainer, 4))
    assert whole.train_state.counters.loss.item() == pytest.approx(parts.train_state.counters.loss.item(), rel=1e-6)
    # Gradients, not weights: Adam blows up the rounding of gradients that are zero, as of biases before a norm.
    weights = whole.train_state.model.named_parameters()
    for (name, one), other in zip(weights, parts.train_state.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_activation_checkpointing_changes_no_gradient(folders):
    plain, recomputed = make_trainer(folders), make_trainer(folders)
    recomputed.train_state.model.load_state_dict(plain.train_state.model.state_dict())
    recomputed.train_state.model.checkpointing = True
    for trainer in (plain, recomputed):
        trainer.train_state.train_step(*batch(trainer))
    for one, other in zip(plain.train_state.model.parameters(), recomputed.train_state.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_compile_switch_compiles(folders, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    trainer = make_trainer(folders, SPEED__COMPILE=True)
    assert compiled == [
        trainer.train_state.model.first,
        *trainer.train_state.model.middle,
        trainer.train_state.model.last,
    ]


def test_clipping_bounds_the_step(folders):
    trainer = make_trainer(folders, OPTIM__CLIP_NORM=1e-6)
    trainer.train_state.train_step(*batch(trainer))
    total = torch.nn.utils.get_total_norm([p.grad for p in trainer.train_state.parameters])
    assert total.item() == pytest.approx(1e-6, rel=1e-2)


def test_ema_follows_the_weights(folders):
    trainer = make_trainer(folders, OPTIM__EMA_DECAY=0.5)
    name = "last.proximal.image_conv.weight"
    expected = None
    for _ in range(3):
        trainer.train_state.train_step(*batch(trainer))
        now = trainer.train_state.model.state_dict()[name].clone()
        expected = now if expected is None else 0.5 * expected + 0.5 * now
    torch.testing.assert_close(trainer.state_dict()["state_dict"][name], expected)
    assert not torch.equal(trainer.state_dict()["raw_state_dict"][name], expected)


def test_validation_is_of_the_averaged_weights(folders):
    trainer = make_trainer(folders, OPTIM__EMA_DECAY=0.5)
    for _ in range(2):
        trainer.train_state.train_step(*batch(trainer))
    averaged = create_model("denoising_dgunet", **OVERRIDES)
    averaged.load_state_dict(trainer.state_dict()["state_dict"])
    expected = []
    for input, target in trainer.val_set:
        with torch.inference_mode():
            restored = averaged.eval()(unit_range(input)[None])[0][0].clamp(0, 1)
        expected.append(-10 * (restored - unit_range(target)).square().mean().log10().item())
    with torch.no_grad():
        for parameter in trainer.train_state.model.parameters():
            parameter.fill_(torch.nan)
    assert trainer.validate() == pytest.approx(np.mean(expected), abs=1e-4)


@pytest.mark.parametrize("clamp", [True, False])
def test_clamping_of_the_estimates(folders, clamp):
    """LOSS.CLAMP decides whether what is outside of [0, 1] costs anything, and is pulled back."""
    trainer = make_trainer(folders, LOSS__CLAMP=clamp)
    estimate = torch.tensor([1.5, -0.25, 0.5]).expand(1, 3, 8, 3).clone().requires_grad_()
    loss = trainer.train_state.loss([estimate], torch.tensor([1.0, 0.0, 0.5]).expand(1, 3, 8, 3))
    expected = np.mean([0.001 if clamp else np.hypot(d, 0.001) for d in (0.5, 0.25, 0)])
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert (estimate.grad[..., :2] == 0).all() == clamp


def test_curves_of_one_epoch(folders, monkeypatch):
    """A single point is inside the image, with ticks and a value that can be read."""
    figures = []
    write = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), write(self, *a, **k)))
    row = {"epoch": 1, "step": 4, "lr": 1e-4, "loss": 0.031, "psnr": 31.25}
    for changes in ({}, {"psnr": None, "loss": float("nan")}):
        plot_history([row | changes], 4, folders / "curves.png", "run")
        loss, psnr, lr = figures[-1].axes
        for axes in (loss, psnr, lr):
            low, high = axes.get_xlim()
            assert low == 0 and 1 < high < 1.2
            ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
            assert ticks == [0, 1]
        assert lr.get_ylim()[0] == 0 and "0.0001" in lr.get_title()
    assert "0.031" in figures[0].axes[0].get_title() and "31.25" in figures[0].axes[1].get_title()
    assert "none" in loss.get_title() and "none" in psnr.get_title()


def test_ema_is_that_of_pytorch(folders):
    """To the last bit that of AveragedModel, whose state older checkpoints hold."""
    trainer = make_trainer(folders, OPTIM__EMA_DECAY=0.9)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    expected = torch.optim.swa_utils.AveragedModel(trainer.train_state.model, multi_avg_fn=average)
    for _ in range(3):
        trainer.train_state.train_step(*batch(trainer))
        expected.update_parameters(trainer.train_state.model)
    state = trainer.state_dict()
    assert_same_weights(state["state_dict"], expected.module.state_dict())
    assert state["averaged"] == 3 and type(state["averaged"]) is int


def test_average_has_the_fixed_matrix_of_its_network(folders):
    """Also where the matrix comes with a run that is continued, and was not averaged before."""
    cfg = load_config(None, options(folders, OPTIM__EMA_DECAY=0.9))
    model = create_model("compressive_sensing_dgunet", degradation=BlockSampling(0.1, learned=False), **OVERRIDES)
    trainer = Trainer(cfg, model, PairedPatches(folders / "train", 32), CenterCropDataset(folders / "val", 32))
    trainer.train_state.model.degradation.matrix.neg_()
    trainer.train_state.train_step(*torch.rand(2, 2, 1, 32, 32))
    assert torch.equal(trainer.train_state.ema.degradation.matrix, trainer.train_state.model.degradation.matrix)


def test_training_step_does_nothing_that_waits_for_a_gpu(folders):
    trainer = make_trainer(folders, OPTIM__EMA_DECAY=0.9, OPTIM__CLIP_NORM=1.0, OPTIM__ACCUMULATE=2)
    data = batch(trainer)
    trainer.train_state.train_step(*data)
    with Operations() as operations:
        trainer.train_state.train_step(*data)
    assert "_foreach_lerp_" in operations.names and "_fused_adam_" in operations.names
    assert not {"_local_scalar_dense", "nonzero", "_cholesky_solve_helper"} & operations.names


@pytest.mark.parametrize(
    ("choice", "capability", "amp", "device", "channels_last"),
    [
        ("auto", "AVX2", None, "cpu", False),
        ("auto", "DEFAULT", None, "cpu", False),
        ("auto", "AVX512", None, "cpu", True),
        ("auto", "AVX2", torch.bfloat16, "cpu", True),
        ("auto", "AVX2", None, "cuda", True),
        (True, "AVX2", None, "cpu", True),
        (False, "AVX512", torch.bfloat16, "cuda", False),
    ],
)
def test_memory_format_is_the_one_that_trains_faster(monkeypatch, choice, capability, amp, device, channels_last):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert memory_format(choice, torch.device(device), amp) == expected


def test_trainer_takes_the_memory_format(folders, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for choice, expected in (("auto", torch.contiguous_format), (True, torch.channels_last)):
        trainer = make_trainer(folders, SPEED__CHANNELS_LAST=choice)
        assert trainer.train_state.model.last.proximal.image_conv.weight.is_contiguous(memory_format=expected)
        assert trainer.train_state.to_device(torch.rand(2, 3, 32, 32)).is_contiguous(memory_format=expected)


def test_processor_without_avx512_computes_no_bfloat16(monkeypatch):
    """Also where that is only emulated (ATEN_CPU_CAPABILITY=avx2)."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for capability, dtype in (("AVX2", None), ("AVX512", torch.bfloat16)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert autocast_dtype("auto", torch.device("cpu")) == dtype


def test_group_of_one_is_distributed(folders):
    """What several GPUs run, one runs as well: torchrun --nproc_per_node 1."""
    alone = make_trainer(folders)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = make_trainer(folders, OPTIM__ACCUMULATE=2)
        group.train_state.wrap_ddp()
        assert isinstance(group.train_state.network, torch.nn.parallel.DistributedDataParallel)
        for trainer in (alone, group):
            trainer.train_state.train_step(*batch(trainer))
        assert group.train_state.counters.loss.item() == pytest.approx(alone.train_state.counters.loss.item(), rel=1e-6)
        for one, other in zip(alone.train_state.model.parameters(), group.train_state.model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-3)
        del group, trainer
    finally:
        gc.collect()
        torch.distributed.destroy_process_group()


def test_non_finite_step_is_skipped_and_counted(folders):
    trainer = make_trainer(folders)
    input, target = batch(trainer)
    trainer.train_state.train_step(input, target)
    before = {key: value.clone() for key, value in trainer.train_state.model.state_dict().items()}
    moments = {
        key: value["exp_avg"].clone() for key, value in trainer.train_state.optimizer.state_dict()["state"].items()
    }
    trainer.train_state.train_step(torch.full_like(input, torch.nan), target)
    assert_same_weights(trainer.train_state.model.state_dict(), before)
    for key, value in trainer.train_state.optimizer.state_dict()["state"].items():
        assert torch.equal(value["exp_avg"], moments[key]) and value["step"].item() == 1
    assert trainer.train_state.counters.read()[1:4] == (1, 1, 1)
    trainer.train_state.train_step(input, target)
    assert trainer.train_state.counters.read()[1:4] == (2, 1, 0)
    assert not torch.equal(trainer.train_state.model.last.rho, before["last.rho"])


def test_many_non_finite_steps_end_the_run(folders):
    changed = dict(OPTIM__LR_INITIAL=1, OPTIM__MAX_BAD_STEPS=3, OPTIM__NUM_EPOCHS=5, TRAINING__SAVE_MINUTES=0)
    done = train(folders, check=2, **changed)
    assert "3 steps" in done.stderr and "LR_INITIAL" in done.stderr
    assert "Traceback" not in done.stderr
    assert "model_best.pth" not in done.stderr  # there is none yet
    # what was saved after each step, after each epoch and at the validations is not replaced after the second of these
    saved = read_checkpoint(folders / "runs/run/model_latest.pth")
    assert saved["totals"][3] == 1 and saved["totals"][1] >= 1


@pytest.mark.parametrize("skipped_first", [True, False])
def test_average_stays_where_it_is_in_a_skipped_step(folders, skipped_first):
    """To the last bit that of the steps that count, also where the first of all does not."""
    trainer, other = (make_trainer(folders, OPTIM__EMA_DECAY=0.9) for _ in range(2))
    input, target = batch(trainer)
    bad, good = torch.full_like(input, torch.nan), (input, input.flip(0), input.flip(3))
    for x in [bad, *good] if skipped_first else [good[0], bad, good[1], bad, bad, good[2]]:
        trainer.train_state.train_step(x, target)
    for x in good:
        other.train_state.train_step(x, target)
    assert_same_weights(trainer.train_state.ema.state_dict(), other.train_state.ema.state_dict())
    assert_same_weights(trainer.train_state.model.state_dict(), other.train_state.model.state_dict())


def test_parameter_without_gradient_is_named(folders):
    """One that is frozen before is not trained, nor missed when the run is resumed."""
    trainer = make_trainer(folders)
    trainer.train_state.model.middle.register_parameter("spare", torch.nn.Parameter(torch.zeros(1)))
    cfg, sets = trainer.cfg, (trainer.train_set, trainer.val_set)
    with pytest.raises(UserError, match="middle.spare"):
        Trainer(cfg, trainer.train_state.model, *sets).train_state.train_step(*batch(trainer))

    def frozen(**changed) -> Trainer:
        cfg = load_config(None, options(folders, **changed))
        model = build_model(cfg, sets[0])
        model.first.requires_grad_(False)
        return Trainer(cfg, model, *sets)

    first = frozen(OPTIM__NUM_EPOCHS=1, OPTIM__EMA_DECAY=0.9)
    before = {name: value.clone() for name, value in first.train_state.model.first.state_dict().items()}
    first.fit()
    second = frozen(TRAINING__RESUME=True, OPTIM__EMA_DECAY=0.9)
    second.fit()
    for weights in (second.train_state.model.first, second.train_state.ema.first):
        assert_same_weights(weights.state_dict(), before)
    assert len(second.log.rows) == 2


@pytest.mark.parametrize("words", [["DEVICE", "cuda"], ["GPU", "[0]"]])
def test_trainer_for_a_gpu_that_is_not_there(folders, monkeypatch, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer = make_trainer(folders)
    cfg = load_config(None, [*options(folders, DEVICE="auto"), *words])
    with pytest.raises(UserError, match=words[0]):
        Trainer(cfg, trainer.train_state.model, trainer.train_set, trainer.val_set)


# ---------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("ema", [0.8, 0])
def test_diverged_run_goes_back_to_good_weights_with_a_lower_rate(folders, ema):
    """Those of the average, or of the last validation; with Adam as new. A run that is resumed does the same."""
    settings = dict(OPTIM__EMA_DECAY=ema, OPTIM__ROLLBACK_LR_FACTOR=0.25, TRAINING__VAL_AFTER_EVERY=6)
    trainer, returned = diverging_trainer(folders, 3, 4, session="whole", **settings), []
    go_back = trainer.train_state.roll_back

    def watched():
        train_state = trainer.train_state
        expected = {name: value.clone() for name, value in train_state.eval_model.state_dict().items()}
        assert ema or not train_state.good_is_current
        assert go_back()
        assert_same_weights(train_state.model.state_dict(), expected)
        assert not any(value.any() for moments in train_state.optimizer.state.values() for value in moments.values())
        return not returned.append(trainer.epoch)

    trainer.train_state.roll_back = watched
    trainer.fit()
    assert returned == [4]
    rows = trainer.log.rows
    assert [row["rollbacks"] for row in rows] == [0, 0, 0, 1, 1, 1] and [row["skipped_steps"] for row in rows][2:4] == [
        1,
        1,
    ]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3] * 3 + [2.5e-4] * 3)
    assert np.isfinite([row["loss"] for row in rows][4:]).all()
    assert "2 steps in a row" in (folders / "runs/whole/train.log").read_text()
    for epochs in (3, 5, 6):  # stopped within the bad steps, and after the return
        parts = diverging_trainer(
            folders, 3, 4, session="parts", **settings, OPTIM__NUM_EPOCHS=epochs, TRAINING__RESUME="auto"
        )
        parts.fit()
    assert (parts.rollbacks, parts.schedule.factor) == (1, 0.25)
    assert_same_weights(parts.train_state.model.state_dict(), trainer.train_state.model.state_dict())
    assert_same_weights(parts.train_state.eval_model.state_dict(), trainer.train_state.eval_model.state_dict())
    assert [row["loss"] for row in parts.log.rows][4:] == [row["loss"] for row in rows][4:]


def test_weights_to_return_to_are_saved_where_they_are_not_the_present_ones(folders):
    trainer = diverging_trainer(folders, OPTIM__EMA_DECAY=0, OPTIM__NUM_EPOCHS=1)
    trainer.fit()
    assert "good_weights" not in trainer.state_dict()
    good = {name: value.clone() for name, value in trainer.train_state.model.state_dict().items()}
    trainer.train_state.train_step(*torch.rand(2, 8, 3, 40, 40))
    trainer.save("model_latest.pth")
    resumed = diverging_trainer(folders, OPTIM__EMA_DECAY=0, TRAINING__RESUME=True)
    resumed.resume()
    assert not torch.equal(resumed.train_state.model.last.rho, good["last.rho"])
    assert resumed.train_state.roll_back()
    assert_same_weights(resumed.train_state.model.state_dict(), good)


def test_run_with_far_too_high_a_rate_is_led_back(folders):
    """That diverges by itself: weights and loss are no longer finite numbers, until the rate is low enough."""
    changed = dict(OPTIM__LR_INITIAL=1, OPTIM__LR_MIN=0, OPTIM__NUM_EPOCHS=6, OPTIM__WARMUP_EPOCHS=0)
    trainer = make_trainer(folders, **changed, OPTIM__ROLLBACK_AFTER_BAD_STEPS=2, OPTIM__ROLLBACK_LR_FACTOR=1e-3)
    trainer.fit()
    assert trainer.rollbacks >= 1 and trainer.train_state.counters.read().skipped_in_a_row == 0
    assert np.isfinite(trainer.log.rows[-1]["loss"]) and trainer.log.rows[-1]["lr"] <= 1e-3


@pytest.mark.parametrize(("returns", "after"), [(2, 1), (0, 1), (5, 0), (5, 3)])
def test_run_that_returning_does_not_help_gives_up(folders, returns, after):
    """After as many returns as it may make, MAX_BAD_STEPS in a row end it; at once where it may make none."""
    changed = dict(OPTIM__MAX_ROLLBACKS=returns, OPTIM__ROLLBACK_AFTER_BAD_STEPS=after, OPTIM__MAX_BAD_STEPS=3)
    trainer = diverging_trainer(folders, *range(20), OPTIM__NUM_EPOCHS=20, **changed)
    with pytest.raises(UserError, match="OPTIM.LR_INITIAL"):
        trainer.fit()
    made = 2 if (returns, after) == (2, 1) else 0
    assert (trainer.rollbacks, trainer.epoch) == (made, made + 3)


# ------------------------------------------------------------------------------------------------------------ resuming


def test_another_run_is_never_overwritten(folders):
    train(folders, OPTIM__NUM_EPOCHS=1)
    before = weights(folders)
    done = train(folders, check=2, OPTIM__NUM_EPOCHS=1)
    assert str(folders / "runs/run") in done.stderr and "TRAINING.RESUME True" in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert_same_weights(weights(folders), before)


def test_one_training_writes_to_a_folder(folders):
    """A second one is refused in a line while the first lives; a killed one can be continued at once."""
    settings = dict(OPTIM__NUM_EPOCHS=100000, TRAINING__SAVE_MINUTES=0, TRAINING__WORKERS=1)
    started_beside = make_trainer(folders, **settings)
    words = options(folders, **settings)
    first = Forked([sys.executable, TRAIN, *words])
    latest = folders / "runs" / "run" / "model_latest.pth"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = make_trainer(folders, **settings | dict(TRAINING__RESUME=True, OPTIM__NUM_EPOCHS=1))
    for trainer in (started_beside, second):
        with pytest.raises(UserError, match="/runs/run.*MODEL.SESSION"):
            trainer.fit()
    seen = latest.stat().st_mtime_ns
    while latest.stat().st_mtime_ns == seen and time.monotonic() < deadline:
        time.sleep(0.01)
    loading = psutil.Process(first.pid).children(recursive=True)
    first.kill()  # but not its loading process, which lives some seconds longer
    first.wait()
    state = read_checkpoint(latest)
    second.fit()  # from what was written last, not from what it saw first
    assert second.resumed == latest and second.epoch >= state["epoch"]
    assert "continuing" in (latest.parent / "train.log").read_text()
    assert len(loading) == 1 and psutil.wait_procs(loading, timeout=30) == (loading, [])


@pytest.fixture
def saved(monkeypatch) -> list[tuple]:
    """What is written from now on: (name, state)."""
    found = []
    save = dgunet.training.trainer.save_checkpoint

    def noting(state, path):
        found.append((path.name, state | {"history": list(state.get("history", []))}))  # as it is now
        save(state, path)

    monkeypatch.setattr(dgunet.training.trainer, "save_checkpoint", noting)
    return found


def test_a_save_after_an_epochs_last_step_has_its_row(folders, saved):
    make_trainer(folders, TRAINING__SAVE_MINUTES=0, TRAINING__VAL_AFTER_EVERY=2).fit()
    states = [state for name, state in saved if name == "model_latest.pth"]
    assert {(state["epoch"], state["step"]) for state in states} == {(e, s) for e in (1, 2) for s in (1, 2, 3, 4)}
    for state in states:
        rows = state["epoch"] - (state["step"] < 4 or state["validation_due"])
        assert [(row["epoch"], row["step"]) for row in state["history"]] == [(e, 4) for e in range(1, rows + 1)]


def test_the_state_is_saved_after_what_it_speaks_of(folders, saved):
    """A run killed between two files repeats the validation, and so writes the other; one of the first can resume."""
    trainer = make_trainer(folders)
    scores = iter((20.0, 21.0))
    trainer.validate = lambda: next(scores)
    trainer.fit()
    latest, best = "model_latest.pth", "model_best.pth"
    names = [latest, "model_epoch_1.pth", best, latest, latest, "model_epoch_2.pth", best, latest]
    assert [name for name, _ in saved] == names
    due = [state["validation_due"] for name, state in saved if name == latest]
    assert due == [True, False, True, False]  # before a validation, and after it
    (folders / "runs/run/model_best.pth").unlink()
    assert make_trainer(folders, TRAINING__RESUME=True).best["epoch"] == 0


def test_resuming_a_finished_run_changes_nothing(folders):
    train(folders, OPTIM__NUM_EPOCHS=1)
    before = weights(folders)
    train(folders, OPTIM__NUM_EPOCHS=1, TRAINING__RESUME=True)
    assert_same_weights(weights(folders), before)


def test_best_score_survives_resuming(folders):
    train(folders, OPTIM__NUM_EPOCHS=1)
    latest = folders / "runs/run/model_latest.pth"
    state = read_checkpoint(latest)
    state["best"] = {"psnr": 99.0, "epoch": 1}
    save_checkpoint(state, latest)
    best = (folders / "runs/run/model_best.pth").read_bytes()
    train(folders, TRAINING__RESUME=True)
    assert (folders / "runs/run/model_best.pth").read_bytes() == best
    assert read_checkpoint(latest)["best"]["psnr"] == 99.0


@pytest.mark.parametrize("change", ["images", "size"])
def test_best_score_of_another_validation_is_forgotten(folders, image_pairs, change):
    """It would keep model_best.pth from ever being written again."""
    train(folders, OPTIM__NUM_EPOCHS=1)
    latest = folders / "runs/run/model_latest.pth"
    save_checkpoint(read_checkpoint(latest) | {"best": {"psnr": 99.0, "epoch": 1}}, latest)
    if change == "images":
        image_pairs(folders / "val", count=3, size=(32, 32))
    done = train(folders, TRAINING__RESUME=True, TRAINING__VAL_PS=32 if change == "images" else 24)
    assert "best score" in done.stdout
    assert read_checkpoint(latest)["best"]["epoch"] == read_checkpoint(latest.with_name("model_best.pth"))["epoch"] == 2


def test_resume_with_another_model_is_refused(folders):
    train(folders, OPTIM__NUM_EPOCHS=1)
    done = train(folders, check=2, TRAINING__RESUME=True, MODEL__OVERRIDES__width=12)
    assert "model_latest.pth" in done.stderr and "Traceback" not in done.stderr


def test_resume_names_what_changed(folders):
    train(folders, OPTIM__NUM_EPOCHS=1)
    done = train(folders, TRAINING__RESUME=True, OPTIM__LR_INITIAL=5e-4)
    assert any("OPTIM.LR_INITIAL" in line for line in done.stdout.splitlines() if line.startswith("note"))


@pytest.fixture
def finished(folders) -> Path:
    """The folder of a run of one epoch."""
    make_trainer(folders, OPTIM__NUM_EPOCHS=1).fit()
    return folders / "runs/run"


def test_run_whose_latest_state_is_missing_is_resumed_from_its_best(folders, finished, capsys):
    (finished / "model_latest.pth").unlink()
    trainer = make_trainer(folders, TRAINING__RESUME=True)
    trainer.fit()
    assert trainer.resumed == finished / "model_best.pth" and len(trainer.log.rows) == 2
    for told in (capsys.readouterr().out, (finished / "train.log").read_text()):
        assert "model_latest.pth" in told and "model_best.pth" in told


def only_weights(folder: Path):
    (folder / "model_latest.pth").unlink()
    state = read_checkpoint(folder / "model_best.pth")
    save_checkpoint({key: state[key] for key in ("state_dict", "model")}, folder / "model_best.pth")


def only_epochs(folder: Path):
    (folder / "model_latest.pth").unlink()
    (folder / "model_best.pth").unlink()


def cut(*names: str):
    return lambda folder: [(folder / name).write_bytes((folder / name).read_bytes()[:-100]) for name in names]


def without_epoch(folder: Path):
    state = read_checkpoint(folder / "model_latest.pth")
    save_checkpoint({key: state[key] for key in state if key != "epoch"}, folder / "model_latest.pth")


@pytest.mark.parametrize("resume", [True, "auto"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (only_weights, ["model_latest.pth", "model_best.pth cannot be resumed", "MODEL.WEIGHTS"]),
        (only_epochs, ["model_latest.pth", "MODEL.WEIGHTS", "model_epoch_1.pth"]),
        (cut("model_latest.pth"), ["model_latest.pth", "model_best.pth can be resumed"]),
        (without_epoch, ["model_latest.pth", "model_best.pth can be resumed", "epoch 1, step 4"]),
        (cut("model_latest.pth", "model_best.pth"), ["model_latest.pth"]),
        (shutil.rmtree, ["runs/run", "TRAINING.RESUME auto"]),
    ],
)
def test_run_that_cannot_be_resumed(folders, finished, change, named, resume):
    """Says what is there, and does not advise what was given."""
    shutil.copytree(finished, finished.with_name("other"))
    change(finished)
    if change is shutil.rmtree:
        named = [*named, "other"]
        if resume == "auto":
            return
    with pytest.raises(UserError) as error:
        make_trainer(folders, TRAINING__RESUME=resume)
    assert all(words in str(error.value) for words in named), error.value
    assert "TRAINING.RESUME True" not in str(error.value)


def test_run_that_resumes_itself_begins_with_a_word(folders, capsys):
    """What a job that is queued again gives from its first start on."""
    for epochs, told in ((1, str(folders / "runs/run")), (2, "continuing")):
        make_trainer(folders, TRAINING__RESUME="auto", OPTIM__NUM_EPOCHS=epochs).fit()
        assert told in capsys.readouterr().out and told in (folders / "runs/run/train.log").read_text()
    assert [row["epoch"] for row in history(folders)] == ["1", "2"]


def test_history_of_another_version(folders, finished):
    """It may have other columns, or lack some."""
    state = read_checkpoint(finished / "model_latest.pth")
    state["history"] = [{"epoch": 1, "step": 4, "loss": 0.5, "ssim": 0.9, "device": "gpu"}]
    save_checkpoint(state, finished / "model_latest.pth")
    make_trainer(folders, TRAINING__RESUME=True).fit()
    first, second = history(folders)
    assert (first["ssim"], first["device"], first["rollbacks"], first["psnr"]) == ("0.9", "gpu", "", "")
    assert (second["ssim"], second["rollbacks"]) == ("", "0") and float(second["psnr"]) > 0
    assert list(second)[:2] == ["epoch", "step"]


def stopped_run(folders, **changed) -> Trainer:
    """A trainer that has taken two steps and saved."""
    trainer = make_trainer(folders, **changed)
    for _ in range(2):
        trainer.train_state.train_step(*batch(trainer))
        trainer.step += 1
    trainer.folder.mkdir(parents=True)
    trainer.save("model_latest.pth")
    return trainer


@pytest.mark.parametrize("before", [True, False])
def test_resumed_moments_lie_as_their_parameters(folders, before):
    """Resumed in the other memory format, which the optimizer does not look at, the run goes on as it would have."""
    first = stopped_run(folders, SPEED__CHANNELS_LAST=before)
    second = make_trainer(folders, SPEED__CHANNELS_LAST=not before, TRAINING__RESUME=True)
    for trainer in (first, second):
        trainer.schedule.go_to(1)
        trainer.train_state.optimizer.found_inf = torch.zeros(())
        torch.manual_seed(1)
        for parameter in trainer.train_state.parameters:
            gradient = torch.rand(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        trainer.train_state.optimizer.step()
    parameters = list(zip(first.train_state.parameters, second.train_state.parameters, strict=True))
    assert any(a.stride() != b.stride() for a, b in parameters)
    for a, b in parameters:
        for key, value in second.train_state.optimizer.state[b].items():
            assert value.stride() == (b.stride() if value.dim() else ())
            torch.testing.assert_close(value, first.train_state.optimizer.state[a][key])
        torch.testing.assert_close(a, b)


def test_resuming_takes_the_weight_decay_of_the_config(folders):
    stopped_run(folders)
    updated = []
    for decay in (0.0, 0.3):
        trainer = make_trainer(folders, TRAINING__RESUME=True, OPTIM__WEIGHT_DECAY=decay)
        assert [group["weight_decay"] for group in trainer.train_state.optimizer.param_groups] == [decay]
        trainer.train_state.train_step(*batch(trainer))
        updated.append(trainer.train_state.model.state_dict())
    assert not torch.equal(updated[0]["last.proximal.image_conv.weight"], updated[1]["last.proximal.image_conv.weight"])


def test_weights_that_are_not_finite_do_not_start_a_run(folders):
    weights = create_model("denoising_dgunet", **OVERRIDES).state_dict()
    weights["last.rho"] = torch.full((1,), torch.inf)
    save_checkpoint({"state_dict": weights}, folders / "bad.pth")
    with pytest.raises(UserError, match="bad.pth .*last.rho"):
        make_trainer(folders, MODEL__WEIGHTS=folders / "bad.pth")


def test_resume_with_other_training_data_is_refused(folders):
    """The same samples could not be seen; the same data elsewhere are fine."""
    stopped_run(folders)
    folders = folders.rename(folders.with_name("elsewhere"))
    assert make_trainer(folders, TRAINING__RESUME=True).resumed is not None
    for side in ("input", "target"):
        (folders / "train" / side / "img3.png").rename(folders / "train" / side / "img9.png")
    with pytest.raises(UserError, match="train .*input/img9.*MODEL.WEIGHTS"):
        make_trainer(folders, TRAINING__RESUME=True)


def test_file_where_a_folder_belongs_is_one_line(folders):
    (folders / "file").touch()
    done = train(folders, check=2, TRAINING__SAVE_DIR=folders / "file")
    assert f"{folders / 'file'}" in done.stderr and done.stderr.strip().count("\n") == 0


FULL_DISK = """
import errno, os
from dgunet.runtime.distributed import launch
from dgunet.runtime.errors import run_cli
from dgunet.training.config import load_config

def fill_the_disk(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a.png")

run_cli(lambda: launch(fill_the_disk, load_config(None, ["DEVICE", "cpu", "PROCESSES", "2"])))
"""


def test_full_disk_in_started_processes_is_one_line(tmp_path):
    (tmp_path / "script.py").write_text(FULL_DISK)
    done = run_forked([sys.executable, tmp_path / "script.py"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "runs/a.png: No space left on device" in done.stderr


def test_start_from_given_weights(folders):
    train(folders, "first", OPTIM__NUM_EPOCHS=1)
    given = folders / "runs/first/model_best.pth"
    trainer = make_trainer(folders, session="second", MODEL__WEIGHTS=given)
    assert_same_weights(trainer.train_state.model.state_dict(), weights(folders, "first", "model_best.pth"))
    assert trainer.epoch == 1


def test_dry_run_writes_nothing(folders):
    done = run_forked([sys.executable, TRAIN, "--dry_run", *options(folders)])
    assert done.returncode == 0 and "epochs of 4 steps" in done.stdout
    assert "WEIGHT_DECAY: 1.0e-08  # *" in done.stdout
    assert not (folders / "runs").exists()


def test_dry_run_before_there_is_data(folders, monkeypatch, capsys):
    changed = dict(TRAINING__TRAIN_DIR="/nowhere", TRAINING__VAL_DIR="/neither", MODEL__WEIGHTS="step1.pth")

    def dry_run(**more):
        find_task("denoising").train(["--dry_run", *options(folders, **changed, **more)])
        return capsys.readouterr().out

    out = dry_run()
    missing = [line for line in out.splitlines() if line.startswith("missing")]
    assert len(missing) == 3
    assert "/nowhere/input" in missing[0] and "/neither/input" in missing[1] and "step1.pth" in missing[2]
    assert "BATCH_SIZE: 2  # *" in out and "parameters, 2 stages" in out and "schedule    2 epochs\n" in out
    assert not (folders / "runs").exists()
    out = dry_run(SYNTHESIS__NAME="gaussian_noise", AUGMENT__MIXUP=0)
    assert out.count("missing ") == 3
    changed["TRAINING__VAL_DIR"] = ""
    assert dry_run().count("missing ") == 2
    with pytest.raises(UserError, match="TRAIN_PS"):  # reported as in a run
        dry_run(TRAINING__TRAIN_PS=33)


def test_validation_within_an_epoch(folders):
    train(folders, OPTIM__NUM_EPOCHS=1, TRAINING__VAL_TIMES=2)
    assert [int(row["step"]) for row in history(folders)] == [2, 4]
    assert (folders / "runs/run/model_epoch_1_step_2.pth").exists()


def test_batch_must_fit_the_processes(folders):
    with pytest.raises(UserError, match="OPTIM.BATCH_SIZE"):
        make_trainer(folders, OPTIM__ACCUMULATE=3)


@pytest.mark.parametrize(
    "words, message",
    [
        (["OPTIM.LR_INTIAL", "1e-3"], "OPTIM.LR_INITIAL"),
        (["TRAINING.TRAIN_DIR", "/nowhere"], "/nowhere/input"),
        (["DEVICE", "gpu"], "DEVICE"),
        (["MODEL.NAME", "denoising_dgnet"], "denoising_dgunet"),
        (["SPEED.AMP", "fp16"], "SPEED.AMP"),
        (["SPEED.COMPILE", "True", "SPEED.COMPILE_MODE", "fast"], "SPEED.COMPILE_MODE"),
        (
            ["SPEED.COMPILE", "True", "SPEED.COMPILE_MODE", "reduce-overhead", "OPTIM.ACCUMULATE", "2"],
            "OPTIM.ACCUMULATE",
        ),
        (["OPTIM.SCHEDULE", "linear"], "OPTIM.SCHEDULE"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["MODEL.WEIGHTS", "missing.pth"], "missing.pth"),
        (["TRAINING.TRAIN_PS", "100"], "TRAIN_PS"),
        (["MODEL.NAME", "compressive_sensing_dgunet"], "MODEL.NAME"),
        (["MODEL.NAME", "deraining_dgunet"], "denoising_dgunet_plus"),
        (["--dry_run", "MODEL.NAME", "deraining_dgunet"], "deraining_dgunet"),
        (["SYNTHESIS.NAME", "gaussian_noise"], "SYNTHESIS.NAME"),
        (["SYNTHESIS.OPTIONS", "{sigma: 5}"], "SYNTHESIS.OPTIONS"),
        (["MODEL.RATIO", "0.1"], "MODEL.RATIO"),
    ],
)
def test_mistakes_are_one_line(folders, words, message):
    first, last = (words, []) if words[0] == "--config" else ([], words)
    done = run_script(TRAIN, *first, *options(folders), *last, cwd=folders)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.strip().count("\n") == 0
    assert not (folders / "runs").exists()


@pytest.mark.parametrize("side", ["train", "val"])
def test_unsuitable_image_in_a_loading_process_is_one_line(folders, side):
    """16 bits do not show in the header. The process that loads the image ends the run, and the run its processes."""
    cv2.imwrite(str(folders / side / "input" / "img1.png"), np.zeros((40, 48, 3), np.uint16))
    cv2.imwrite(str(folders / side / "target" / "img1.png"), np.zeros((40, 48, 3), np.uint16))
    done = train(folders, check=2, timeout=50, TRAINING__WORKERS=1)
    assert "img1.png" in done.stderr and done.stderr.strip().count("\n") == 0


def test_overrides_may_be_given_as_one(folders):
    train(folders, OPTIM__NUM_EPOCHS=1, MODEL__OVERRIDES="{width: 12}")
    assert load_model(folders / "runs/run/model_best.pth").arguments["width"] == 12


def test_resuming_with_another_batch_size(folders):
    train(folders, OPTIM__NUM_EPOCHS=1, TRAINING__SAVE_MINUTES=0)
    latest = folders / "runs/run/model_latest.pth"
    save_checkpoint(read_checkpoint(latest) | {"step": 3}, latest)  # as if stopped after 3 of 4 steps
    train(folders, OPTIM__NUM_EPOCHS=2, OPTIM__BATCH_SIZE=4, TRAINING__RESUME=True)
    assert [(int(row["epoch"]), int(row["step"])) for row in history(folders)][1:] == [(1, 2), (2, 2)]


def test_config_is_shown_on_request_and_always_written(folders, capsys):
    trainer = make_trainer(folders)
    describe(trainer)
    assert "WEIGHT_DECAY" not in capsys.readouterr().out
    describe(trainer, config=True)
    assert "WEIGHT_DECAY: 1.0e-08  # *" in capsys.readouterr().out
    trainer.fit()
    assert "WEIGHT_DECAY: 1.0e-08  # *" in (folders / "runs/run/config.yaml").read_text()


def test_progress_without_a_terminal(folders, monkeypatch):
    """The bar is silent in a log; a line every 20 seconds says how far it is."""
    clock = iter(range(0, 10**9, 3))
    fake = SimpleNamespace(**vars(time) | {"monotonic": lambda: next(clock)})
    for module in (dgunet.training.trainer, dgunet.training.loggers):
        monkeypatch.setattr(module, "time", fake)
    make_trainer(folders).fit()
    lines = [line for line in (folders / "runs/run/train.log").read_text().splitlines() if line.endswith(" left")]
    assert 1 < len(lines) <= next(clock) / 20
    assert all(
        part in line for line in lines for part in ("loss 0.", "images/s, gradient ", "% waiting for data, ", " MiB, 0")
    ), lines


def tiny_run(folder: Path) -> Run:
    return Run("run", folder, {}, epochs=10, steps=4, epoch=6, step=0, resumed=True, rows=[])


def test_time_left_is_that_of_the_steps_to_come(tmp_path, monkeypatch, caplog):
    clock, console = iter([0, 100]), ConsoleLogger()
    monkeypatch.setattr(dgunet.training.loggers, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", "dgunet"):  # step 2 of epoch 6: two steps more, and four epochs
        console.start(tiny_run(tmp_path))
        values = {"epoch_loss": 1.0, "lr": 1e-4, "grad_norm": 0.25, "data_wait": 0.1, "peak_memory_mib": 345}
        console.log_step(6, 2, values | {"images_per_second": 0.5, "step_seconds": 60})
        console.close(failed=False)
    (line,) = caplog.messages
    assert line.startswith("epoch 6/10  step 2/4  loss 1.0000, PSNR -, lr 1.0e-04, 0.5 images/s, ")
    assert line.endswith("gradient 0.25, 10% waiting for data, 345 MiB, 18:00 left")


def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    found = []

    class Writer:
        def __init__(self, folder):
            found.append(folder)

        def add_scalar(self, *scalar):
            found.append(scalar)

        def close(self):
            found.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    board = TensorBoardLogger()
    board.start(tiny_run(tmp_path))
    board.log_row({"epoch": 6, "step": 2, "lr": 1e-4, "loss": 0.5, "psnr": None}, [])
    board.close(failed=False)
    assert found == [tmp_path / "tensorboard", ("epoch", 6, 22), ("lr", 1e-4, 22), ("loss", 0.5, 22), "closed"]


def test_curves_show_all_values(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **options: drawn.append(self))
    rows = [dict(epoch=e, step=2, loss=1 / e, psnr=20.0 + e, lr=2e-4 / e) for e in (1, 2, 3)]
    plot_history(rows, 4, tmp_path / "curves.png", "run")
    loss, psnr, lr = drawn[0].axes
    assert [list(axes.lines[0].get_ydata()) for axes in (loss, psnr, lr)] == [
        [1, 1 / 2, 1 / 3], [21, 22, 23], [2e-4, 1e-4, 2e-4 / 3]
    ]  # fmt: skip
    assert list(loss.lines[0].get_xdata()) == [0.5, 1.5, 2.5] and loss.get_xlim()[1] >= 3
    assert lr.get_ylim() == (0, pytest.approx(2.2e-4)) and loss.get_yscale() == "linear"
    rows[2]["loss"] = 0.05
    plot_history(rows, 4, tmp_path / "curves.png", "run")
    assert drawn[1].axes[0].get_yscale() == "log"


def test_a_signal_stops_the_epoch_under_way(folders):
    trainer = make_trainer(folders)
    step = trainer.train_state.train_step

    def signalled(*batch):
        step(*batch)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer.train_state.train_step = signalled
    with pytest.raises(SystemExit) as stopped:
        trainer.fit()
    assert stopped.value.code == 128 + signal.SIGTERM
    state = read_checkpoint(folders / "runs/run/model_latest.pth")
    assert (state["epoch"], state["step"]) == (1, 1)


def send_sigterm(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def stop(trainer: Trainer) -> int:
    with pytest.raises(SystemExit) as stopped:
        trainer.fit()
    return stopped.value.code


@pytest.mark.parametrize("epoch", [1, 2])
def test_signal_stops_a_validation_which_is_then_done_again(folders, image_pairs, epoch):
    """After the batch under way; the last one of the run as well. What comes of it is what would have come."""
    image_pairs(folders / "val", count=3, size=(32, 32))
    settings = dict(OPTIM__EMA_DECAY=0.9, TRAINING__VAL_TIMES=2)
    make_trainer(folders, session="whole", **settings).fit()
    trainer, looked_at = make_trainer(folders, **settings), []
    assert validation_batch_size(trainer.train_state, trainer.val_set) == 2
    center_crop = trainer.val_set.center_crop

    def signalled(source):
        if trainer.epoch == epoch and trainer.step == 4:
            looked_at.append(source)
            send_sigterm()
        return center_crop(source)

    trainer.val_set.center_crop = signalled
    assert stop(trainer) == 128 + signal.SIGTERM
    assert len(looked_at) == 4, "input and target of two pairs"
    state = read_checkpoint(folders / "runs/run/model_latest.pth")
    assert (state["epoch"], state["step"], len(state["history"])) == (epoch, 4, 2 * epoch - 1)
    make_trainer(folders, TRAINING__RESUME=True, **settings).fit()
    columns = ("epoch", "step", "lr", "loss", "psnr", "best_psnr")
    one, other = ([[row[c] for c in columns] for row in history(folders, name)] for name in ("whole", "run"))
    assert one == other
    assert_same_weights(weights(folders), weights(folders, "whole"))


def test_signal_before_a_validation_does_not_wait_for_it(folders):
    trainer, validated = make_trainer(folders), []
    step, trainer.validate = trainer.train_state.train_step, lambda: validated.append(1) or 20.0
    trainer.train_state.train_step = lambda *given: (step(*given), send_sigterm() if trainer.step == 3 else None)
    assert stop(trainer) == 128 + signal.SIGTERM and not validated
    assert read_checkpoint(folders / "runs/run/model_latest.pth")["validation_due"]
    resumed = make_trainer(folders, TRAINING__RESUME=True)
    resumed.fit()
    assert [(row["epoch"], row["step"]) for row in resumed.log.rows] == [(1, 4), (2, 4)]


def test_signal_after_a_validation_is_heeded_before_another_step(folders):
    trainer = make_trainer(folders, TRAINING__VAL_TIMES=2)
    trainer.validate = lambda: send_sigterm() or 20.0
    stop(trainer)
    state = read_checkpoint(folders / "runs/run/model_latest.pth")
    assert (state["step"], state["validation_due"], len(state["history"])) == (2, False, 1)


@pytest.mark.parametrize("late", [True, False])
def test_second_signal_ends_a_run_at_once_if_it_is_late(folders, monkeypatch, late):
    """Not one that comes with the first, as by way of the process that started this one."""
    monkeypatch.setattr(StopSignal, "seconds", -1 if late else 60)
    trainer, after = make_trainer(folders), []

    def twice(*_):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.001)  # the handler runs
        after.append(1)

    trainer.train_state.train_step = twice
    assert stop(trainer) == 128 + (signal.SIGTERM if late else signal.SIGINT)
    assert bool(after) != late and (folders / "runs/run/model_latest.pth").exists() != late


def test_images_per_second_are_those_of_training(folders, monkeypatch):
    """A step takes 2 seconds, each validation and what is saved after it 100."""
    clock = [0.0]
    for module in (dgunet.training.trainer, dgunet.training.loggers):
        monkeypatch.setattr(module, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: clock[0]}))
    trainer = make_trainer(folders, TRAINING__VAL_TIMES=4, TRAINING__SAVE_MINUTES=0)

    def spend(seconds, result=None):
        clock[0] += seconds
        return result

    step, save = trainer.train_state.train_step, trainer.save
    trainer.train_state.train_step = lambda *given: (step(*given), spend(2))
    trainer.save = lambda *names, **given: (save(*names, **given), spend(50))
    trainer.validate = lambda: spend(50, 20.0)
    trainer.fit()
    assert [row["images_per_second"] for row in trainer.log.rows] == [1.0] * 8  # 2 images in each step


@pytest.mark.parametrize(("exact", "expected"), [(1, 20.0), (2, np.inf)])
def test_images_that_are_restored_exactly_are_counted_and_left_out_of_the_mean(
    folders, monkeypatch, caplog, exact, expected
):
    scores = iter([torch.inf] * exact + [20.0])
    psnr = lambda restored, target: torch.tensor([next(scores) for _ in restored])  # noqa: E731
    monkeypatch.setattr(dgunet.training.validation, "psnr_batch", psnr)
    with caplog.at_level("INFO", "dgunet"):
        assert make_trainer(folders).validate() == expected
    assert [f"{exact} of 2 validation images" in message for message in caplog.messages] == [True]
    monkeypatch.setattr(dgunet.training.validation, "psnr_batch", lambda *_: torch.tensor([torch.nan, torch.inf]))
    assert np.isnan(make_trainer(folders).validate()), "a score that is no number is not left out"


def test_validation_takes_as_many_pixels_at_once_as_training(folders):
    """That fits into the memory. The training pass has 32x32 pixels of each image, validation 16x16."""
    trainer = make_trainer(folders, OPTIM__BATCH_SIZE=12, OPTIM__ACCUMULATE=2)
    trainer.val_set.sizes = {(16, 16)}
    assert validation_batch_size(trainer.train_state, trainer.val_set) == 6 * 4
    trainer.train_state.world = 3
    assert validation_batch_size(trainer.train_state, trainer.val_set) == 2 * 4
    trainer.val_set.sizes = {(64, 128)}
    assert validation_batch_size(trainer.train_state, trainer.val_set) == 1


def test_gradients_accumulate_in_a_compiled_network(folders):
    assert make_trainer(folders, SPEED__COMPILE=True, OPTIM__ACCUMULATE=2).cfg.SPEED.COMPILE_MODE == "default"


def test_environment_of_a_cluster_does_not_pass_for_torchrun(folders, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    train(folders, OPTIM__NUM_EPOCHS=1)
    assert len(history(folders)) == 1


def test_mistake_in_a_started_process_is_one_line(folders):
    done = train(folders, check=2, PROCESSES=2, OPTIM__BATCH_SIZE=3)
    assert "OPTIM.BATCH_SIZE" in done.stderr and "Traceback" not in done.stderr


def test_trains_on_clean_images_with_synthetic_noise(folders):
    changed = dict(TRAINING__TRAIN_DIR=folders / "train/target", SYNTHESIS__NAME="gaussian_noise", AUGMENT__MIXUP=0)
    done = train(
        folders, TRAINING__VAL_DIR="", TRAINING__VAL_HOLD_BACK=2, SYNTHESIS__OPTIONS__sigma="[0, 50]", **changed
    )
    assert "7 images of" in done.stdout and "1 images of" in done.stdout
    assert float(history(folders)[-1]["psnr"]) > 10
    listing = folders / "names.txt"
    listing.write_text("img1.png\nimg2\n")
    fewer = train(folders, "fewer", OPTIM__NUM_EPOCHS=1, TRAINING__EXCLUDE=listing, TRAINING__VAL_DIR="", **changed)
    assert "5 images of" in fewer.stdout and "1 images of" in fewer.stdout
    failed = train(folders, check=2, SYNTHESIS__OPTIONS__sigma=5, **changed | {"SYNTHESIS__NAME": "fog"})
    assert "SYNTHESIS.NAME" in failed.stderr
