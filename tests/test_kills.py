"""Nothing is lost: runs that are killed again and again, at random moments, end as if they had never been."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from processes import Forked, run_forked

from dgunet.checkpoints.load import describe_model, read_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def kill_until_done(command: list, first_file: Path, kills: int, seconds: float) -> int:
    """Run a command, kill it ``kills`` times at most, each time up to ``seconds`` after it has something to lose.

    Returns how often it was killed; it must end by itself then.
    """
    rng, killed = np.random.default_rng(kills), 0
    while True:
        process = Forked(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        before = first_file.stat().st_mtime_ns if first_file.exists() else 0
        while killed < kills and process.poll() is None:
            if first_file.exists() and first_file.stat().st_mtime_ns > before:  # it has begun to write
                time.sleep(rng.uniform(0, seconds))
                process.kill()
                break
            time.sleep(0.005)
        output = process.communicate(timeout=300)[0].decode()
        if process.returncode == 0:
            print(f"killed {killed} times")
            return killed
        assert process.returncode == -9, output
        killed += 1


def test_training_killed_at_random(tmp_path, image_pairs, fuzz):
    """Weights, averaged weights, optimizer and history are those of a run that was never killed, to the last bit."""
    kills = 2 * fuzz
    image_pairs(tmp_path / "train", count=8, size=(40, 48))
    image_pairs(tmp_path / "val", count=2, size=(32, 32))
    command = [sys.executable, ROOT / "Denoising" / "train.py", "DEVICE", "cpu", "SPEED.AMP", "fp32"]
    settings = {
        "TRAINING.TRAIN_DIR": tmp_path / "train", "TRAINING.VAL_DIR": tmp_path / "val", "TRAINING.SAVE_DIR": tmp_path,
        "TRAINING.TRAIN_PS": 32, "TRAINING.VAL_PS": 32, "TRAINING.WORKERS": 0, "TRAINING.SAVE_MINUTES": 0,
        "TRAINING.SAVE_EACH_VALIDATION": False, "TRAINING.RESUME": "auto", "TRAINING.REPEAT": 2,
        "OPTIM.BATCH_SIZE": 2, "OPTIM.LR_INITIAL": 1e-3, "OPTIM.NUM_EPOCHS": kills, "OPTIM.WARMUP_EPOCHS": 1,
        "OPTIM.EMA_DECAY": 0.9, "AUGMENT.MIXUP_FROM_EPOCH": 1,
        "MODEL.OVERRIDES": "{width: 8, growth: 4, final_growth: 4, stages: 2}",
    }  # fmt: skip
    command += [word for pair in settings.items() for word in pair]
    run_forked([*command, "MODEL.SESSION", "whole"], check=True)
    latest = tmp_path / "killed" / "model_latest.pth"
    assert kill_until_done([*command, "MODEL.SESSION", "killed"], latest, kills, seconds=0.4) >= kills / 2

    whole, killed = read_checkpoint(tmp_path / "whole" / "model_latest.pth"), read_checkpoint(latest)
    for key in ("state_dict", "raw_state_dict"):
        assert all(torch.equal(value, killed[key][name]) for name, value in whole[key].items())
    for number, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, killed["optimizer"]["state"][number][name]) for name, value in moments.items())
    rows = []
    for run in ("whole", "killed"):
        with open(tmp_path / run / "history.csv") as file:
            measured = dict.fromkeys(("images_per_second", "data_wait", "peak_memory_mib"))
            rows.append([row | measured for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    assert not list(latest.parent.glob(".*.tmp"))


def test_testing_killed_at_random(tmp_path, image_pairs, tiny_model, fuzz):
    """Every image is scored once, and the images written are those of a test that was never killed."""
    kills = fuzz
    pairs = image_pairs(tmp_path / "images", count=12 * kills, size=(40, 48))
    model = tiny_model(stages=2)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "model.pth")
    command = [sys.executable, ROOT / "Denoising" / "test.py", "--weights", tmp_path / "model.pth", "--dataset", pairs]
    command += ["--save_images", "--device", "cpu", "--results"]
    run_forked([*command, tmp_path / "whole"], check=True)
    (scores,) = (tmp_path / "whole").rglob("scores.csv")
    place = scores.relative_to(tmp_path / "whole")
    assert kill_until_done([*command, tmp_path / "killed"], tmp_path / "killed" / place, kills, seconds=0.1) >= 1
    for path in (tmp_path / "whole").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes()
    tables = []
    for run in ("whole", "killed"):
        with open(tmp_path / run / place) as file:
            tables.append(sorted([row | {"seconds": None} for row in csv.DictReader(file)], key=str))
    assert len(tables[0]) == 12 * kills and tables[0] == tables[1]
