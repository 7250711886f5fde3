"""Training runs of a study: started or resumed, and their final PSNR."""

import csv
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from shared import ROOT, Parser, UserError

from dgunet.data.pairs import changed_items, find_images, fingerprint
from dgunet.training.config import load_config
from dgunet.training.resume import changed_settings

SHORT_RUN = {
    "OPTIM.BATCH_SIZE": 4, "OPTIM.LR_INITIAL": 1e-3, "OPTIM.CLIP_NORM": 1.0, "TRAINING.REPEAT": 1,
    "TRAINING.TRAIN_PS": 64, "TRAINING.VAL_PS": 256, "TRAINING.VAL_HOLD_BACK": 20, "TRAINING.VAL_AFTER_EVERY": 1000,
    "TRAINING.SAVE_EACH_VALIDATION": False, "TRAINING.WORKERS": 0, "TRAINING.RESUME": "auto",
}  # fmt: skip

_running: set[subprocess.Popen] = set()


def study_parser(description: str, out: str) -> Parser:
    """The options that all studies have."""
    parser = Parser(description=description)
    parser.add_argument("--train_dir", required=True, help="folder of images; the last 20 by name are held out")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder to write (default: %(default)s)")
    parser.add_argument("--only", nargs="*", metavar="WORDS", help="only variants with one of these in their names")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys for all runs")
    return parser


def check_images(train_dir: str, out: Path):
    """Record in ``out`` which images its runs are trained on: one table is of one training set.

    Raises:
        UserError: they were trained on others.
    """
    items, record = find_images(train_dir), out / "images.pth"
    if not record.exists():
        out.mkdir(parents=True, exist_ok=True)
        torch.save(fingerprint(items), record)
    elif changes := changed_items(items, torch.load(record)):
        raise UserError(f"{train_dir} is not what {out} was trained on: {changes}; choose another --out")


@contextmanager
def terminate_runs_at_exit():
    """Inside, an interrupt or SIGTERM of the study ends the trainings that it has started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in list(_running):
            process.terminate()


def train(task: str, settings: dict, options: list[str] = ()) -> float:
    """Train with a task's train.py, or resume the run, or find it finished; the PSNR of its last validation.

    Raises:
        UserError: what the command reported; or a run of this name has other settings.
    """
    config = ROOT / f"configs/{task}/dgunet.yaml"
    words = [*(str(word) for pair in settings.items() for word in pair), *options]
    folder = Path(settings["TRAINING.SAVE_DIR"]) / settings["MODEL.SESSION"]
    cfg = load_config(config, words)
    former = folder / "config.yaml"
    if former.exists() and (changed := changed_settings(cfg, load_config(former))):
        raise UserError(f"{folder} was trained with another {', '.join(changed)}; choose another --out")
    if (psnr := final_psnr(folder / "history.csv", cfg.OPTIM.NUM_EPOCHS)) is not None:
        return psnr
    command = [sys.executable, ROOT / task.title().replace("_", "") / "train.py", "--config", config, *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        _running.add(process)
        _, message = process.communicate()
        _running.discard(process)
    if process.returncode:
        raise UserError(f"{settings['MODEL.SESSION']}: {message.strip().removeprefix('error: ')}")
    return final_psnr(folder / "history.csv", cfg.OPTIM.NUM_EPOCHS)


def final_psnr(history: Path, epochs: int) -> float | None:
    """The PSNR of a run's last validation; None where the run is not finished."""
    if not history.exists():
        return None
    with open(history) as file:
        last = list(csv.DictReader(file))[-1]
    return float(last["psnr"]) if int(last["epoch"]) == epochs and last["psnr"] else None
