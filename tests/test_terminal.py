"""Commands as a person starts them: on a terminal, where progress bars are drawn."""

import os
import pty
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from dgunet.checkpoint import describe_model, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
# Bars are redrawn at every update: whatever drawing one can break, it breaks here.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "0", "TERM": "xterm"}


class Screen(NamedTuple):
    status: int
    text: str

    @property
    def has_bar(self) -> bool:
        return "%|" in self.text


def on_terminal(*words, cwd: Path, columns: int = 80, seconds: float = 120) -> Screen:
    """Run a Python command with a pseudo-terminal as its stdin, stdout and stderr."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    size = f"stty cols {columns} rows 24 2>/dev/null; exec {shlex.join([sys.executable, *map(str, words)])}"
    process = subprocess.Popen(
        ["bash", "-c", size], cwd=cwd, env=ENVIRONMENT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    text, end = b"", time.monotonic() + seconds
    try:
        while select.select([master], [], [], max(0, end - time.monotonic()))[0]:
            try:
                part = os.read(master, 2**16)
            except OSError:  # Linux: nobody holds the other end any more
                break
            if not part:
                break
            text += part
        status = process.wait(max(1, end - time.monotonic()))
    finally:
        process.kill()
        os.close(master)
    return Screen(status, text.decode(errors="replace"))


@pytest.fixture
def photographs(tmp_path, tiny_model) -> Path:
    """A folder with ``photos/`` of three pictures, and ``weights.pth`` of a tiny network for each task's command."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"photos/{name}.png")
    model = tiny_model(stages=3)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "weights.pth")
    return tmp_path


@pytest.mark.parametrize("words", [["denoise"], ["derain", "--stages"], ["deblur", "--tile", "32"]], ids=lambda w: w[0])
def test_photographs_are_restored_beside_a_progress_bar(photographs, words):
    screen = on_terminal(
        "-m", "dgunet", *words, "photos", "--weights", "weights.pth", "--out", "out", cwd=photographs
    )
    assert (screen.status, screen.has_bar) == (0, True), screen.text
    assert {"a.png", "b.png", "c.png"} <= {path.name for path in (photographs / "out").iterdir()}
    assert "Traceback" not in screen.text
