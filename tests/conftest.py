"""Fixtures that several test modules share."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# One thread for each process: the networks here are tiny, and the runs beside each other share the cores.
# It is said before PyTorch is imported, which is left to the tests: the process that deals them out needs none of it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest

if TYPE_CHECKING:
    from dgunet import DGUNet

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz", type=int, default=1, help="how many times as many random faults as usual the fuzzers try"
    )


def pytest_collection_finish():
    """What was imported stays; searching it for garbage again and again took a tenth of the time."""
    gc.freeze()


@pytest.fixture
def fuzz(request) -> int:
    """How many times as many random faults as usual to try (``--fuzz N``)."""
    return request.config.getoption("--fuzz")


@pytest.fixture(autouse=True)
def no_curves(request):
    """Drawing a run's curves takes longer than the runs here; tests that look at them ask for ``curves``."""
    loggers = sys.modules.get("dgunet.training.loggers")
    with pytest.MonkeyPatch.context() as patch:  # not the fixture, which would then be undone after tmp_path
        if loggers and "curves" not in request.fixturenames:
            patch.setattr(loggers, "plot_history", lambda *_: None)
        yield


@pytest.fixture
def curves():
    """Runs draw their curves in this test."""


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., "DGUNet"]:
    """``tiny_model(**overrides)``: a seeded denoising DGUNet of width 8, in evaluation mode."""

    import torch

    from dgunet import create_model

    def make(name: str = "denoising_dgunet", seed: int = 0, **overrides) -> "DGUNet":
        torch.manual_seed(seed)
        return create_model(name, **(dict(width=8, growth=4, final_growth=4) | overrides)).eval()

    return make


@pytest.fixture(scope="session")
def image_pairs() -> Callable[..., Path]:
    """``image_pairs(root, count, size)``: noisy and clean PNGs of one name in ``root/input`` and ``root/target``."""

    import cv2

    def write(root: Path, count: int = 4, size: tuple[int, int] = (40, 48), seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        for side in ("input", "target"):
            (root / side).mkdir(parents=True, exist_ok=True)
        for k in range(1, count + 1):
            clean = cv2.resize(rng.uniform(40, 215, (4, 5, 3)), size[::-1], interpolation=cv2.INTER_CUBIC)
            noisy = clean + rng.normal(0, 20, clean.shape)
            for side, image in (("input", noisy), ("target", clean)):
                assert cv2.imwrite(str(root / side / f"img{k}.png"), image.clip(0, 255).round().astype(np.uint8))
        return root

    return write


@pytest.fixture
def run_command(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """``run_command(args)``: run Python with ``-c code`` or ``-m module`` in an empty folder."""

    def run(args: list, cwd: Path = tmp_path, timeout: float = 240) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment)

    return run
