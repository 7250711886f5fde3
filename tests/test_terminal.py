"""Commands as a person starts them: on a terminal, where progress bars are drawn, in a pipe, or without any stream."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from processes import driver

from dgunet.checkpoints.load import describe_model, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "denoising": "Denoising",
    "deraining": "Deraining",
    "deblurring": "Deblurring",
    "compressive_sensing": "CompressiveSensing",
}


class Screen(NamedTuple):
    status: int
    text: str

    @property
    def has_bar(self) -> bool:
        return "%|" in self.text


def on_terminal(
    commands: list[tuple[list, int | None]], cwd: Path, seconds: float = 300, **environment
) -> list[Screen]:
    """Run command lines, each on a pseudo-terminal of so many columns that is its stdin, stdout and stderr."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    # Bars are redrawn at every update: whatever drawing one can break, it breaks here.
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{cwd}", "TQDM_MININTERVAL": "0", "TERM": "xterm"} | environment
    process = subprocess.Popen(
        driver(commands), cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
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
        process.wait(max(1, end - time.monotonic()))
    finally:
        process.kill()
        os.close(master)
    text = text.decode(errors="replace")
    screens = re.findall(r"(.*?)\[exit status (\d+)\]", text, re.DOTALL)
    assert len(screens) == len(commands), text
    return [Screen(int(status), told) for told, status in screens]


def save_network(tiny_model, task: str, path: Path) -> Path:
    model = tiny_model(f"{task}_dgunet", stages=1)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, path)
    return path


def tiny_run(session: str, data: str) -> list:
    """Words for train.py: an epoch of three steps on the CPU."""
    settings = {
        "DEVICE": "cpu", "MODEL.SESSION": session, "TRAINING.TRAIN_DIR": data, "TRAINING.VAL_DIR": data,
        "TRAINING.SAVE_DIR": "runs", "TRAINING.WORKERS": 0, "TRAINING.TRAIN_PS": 32, "TRAINING.VAL_PS": 32,
        "TRAINING.VAL_TIMES": 1, "TRAINING.VAL_FROM_EPOCH": 0, "TRAINING.VAL_EPOCHS": "[]", "OPTIM.BATCH_SIZE": 1,
        "OPTIM.NUM_EPOCHS": 1, "OPTIM.WARMUP_EPOCHS": 0, "MODEL.OVERRIDES.width": 8, "MODEL.OVERRIDES.growth": 4,
        "MODEL.OVERRIDES.final_growth": 4, "MODEL.OVERRIDES.stages": 1,
    }  # fmt: skip
    return [word for pair in settings.items() for word in pair]


def save_photographs(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


# A stand-in for the package that downloads.
GDOWN = """
import shutil
def download(id, output, resume):
    return shutil.copy("archive.zip", output)
"""


@pytest.fixture(scope="module")
def screens(tmp_path_factory, tiny_model, image_pairs) -> dict[str, Screen]:
    """What every command that draws a progress bar shows."""
    here = tmp_path_factory.mktemp("terminal")
    save_photographs(here / "photos", "a.png", "照片 b.png", os.fsdecode(b"c\xff.png"))
    image_pairs(here / "pairs", count=3, size=(40, 48))
    image_pairs(here / "archive/val/SIDD", count=3, size=(16, 16))
    shutil.make_archive(str(here / "archive"), "zip", here / "archive")
    (here / "gdown.py").write_text(GDOWN)
    weights = {task: save_network(tiny_model, task, here / f"{task}.pth") for task in FOLDERS}
    commands = {}
    for words, columns in (("denoise", 80), ("derain --stages", 20), ("deblur --tile 32", 0)):
        task = {"denoise": "denoising", "derain": "deraining", "deblur": "deblurring"}[words.split()[0]]
        words = ["dgunet", *words.split(), "photos", "--out", f"{task} out", "--weights", weights[task]]
        commands[words[1]] = words, columns
    commands["export"] = ["dgunet", "export", weights["deblurring"], "--out", "network.pt2"], 0
    for task, folder in FOLDERS.items():
        data = "pairs/target" if task == "compressive_sensing" else "pairs"
        train = [ROOT / folder / "train.py", *tiny_run(task, data)]
        test = [ROOT / folder / "test.py", "--weights", weights[task], "--dataset", data, "--device", "cpu"]
        commands |= {f"train {task}": (train, 0), f"test {task}": (test, 60)}
    scripts = ROOT / "scripts"
    commands["pack"] = [scripts / "pack_dataset.py", "pairs"], 80
    patches = [scripts / "prepare_patches.py", "gopro", "--source", "pairs", "--out", "patches", "--size", 32]
    commands["patches"] = [*patches, "--overlap", 8, "--max_side", 32, "--workers", 1], 80
    commands["download"] = [scripts / "download_data.py", "sidd-val"], 0
    shown = dict(zip(commands, on_terminal(list(commands.values()), cwd=here), strict=True))
    made = {
        "denoise": "denoising out/照片 b.png",
        "derain": "deraining out/照片 b.png.stages.png",
        "deblur": "deblurring out/a.png",
        "export": "network.pt2",
        **{f"train {task}": f"runs/{task}/model_best.pth" for task in FOLDERS},
        **{f"test {task}": f"results/{task}.csv" for task in FOLDERS},
        "pack": "pairs.h5",
        "patches": "patches/input",
        "download": "Datasets/SIDD/val/target/img3.png",
    }
    return {name: (screen, here / made[name]) for name, screen in shown.items()}


@pytest.mark.parametrize(
    "name",
    [
        *("denoise", "derain", "deblur", "export", "pack", "patches", "download"),
        *(f"{script} {task}" for task in FOLDERS for script in ("train", "test")),
    ],
)
def test_work_is_done_beside_a_progress_bar(screens, name):
    screen, made = screens[name]
    assert (screen.status, screen.has_bar) == (0, True), screen.text
    assert made.exists() and "Traceback" not in screen.text and "Warning" not in screen.text, screen.text


@pytest.fixture
def data(tmp_path, tiny_model, image_pairs) -> Path:
    """A folder with photos, pairs, and weights of a denoiser; all names hold Chinese characters, or are no UTF-8."""
    save_network(tiny_model, "denoising", tmp_path / "权.pth")
    save_photographs(tmp_path / "photos", "照片.png", os.fsdecode(b"c\xff.png"))
    image_pairs(tmp_path / "pairs", count=3, size=(40, 48))
    for side in ("input", "target"):
        (tmp_path / "pairs" / side / "img1.png").rename(tmp_path / "pairs" / side / "照.png")
        (tmp_path / "pairs" / side / "img2.png").rename(tmp_path / "pairs" / side / os.fsdecode(b"\xff.png"))
    return tmp_path


DENOISE = ["dgunet", "denoise", "photos", "--out", "out", "--weights", "权.pth", "--stages"]
TRAIN = [ROOT / "Denoising/train.py", *tiny_run("跑", "pairs")]
TEST = [ROOT / "Denoising/test.py", "--weights", "权.pth", "--dataset", "pairs", "--save_images", "--device", "cpu"]


def made(folder: Path) -> bool:
    out = {path.name for path in (folder / "out").iterdir()}
    names = ("照片.png", os.fsdecode(b"c\xff.png"))
    assert out == {f"{name}{end}" for name in names for end in ("", ".stages.png")}
    assert (folder / "runs/跑/curves.png").exists()
    return len(list((folder / "results").rglob("*.png"))) == 3


def test_started_without_streams(data):
    commands = [(words, None) for words in (DENOISE, TRAIN, TEST)]
    subprocess.run(driver(commands), cwd=data, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300, check=True)
    assert (data / "statuses").read_text() == "0 0 0 " and made(data)


def test_names_on_a_terminal_of_ascii(data):
    """What it cannot show is escaped, and nothing else comes of it."""
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    screens = on_terminal([(words, 80) for words in (DENOISE, TRAIN, TEST)], data, **environment)
    for screen in screens:
        assert (screen.status, screen.has_bar) == (0, True) and screen.text.isascii(), screen.text
        assert "Warning" not in screen.text and "Traceback" not in screen.text
    assert made(data)


def test_reader_that_leaves_ends_the_command_quietly(data):
    """As in ``dgunet denoise ... | head -1``: what is restored by then stays."""
    save_photographs(data / "more", *(f"{k}.png" for k in range(10, 30)))
    words = [sys.executable, "-m", "dgunet", "denoise", "more", *DENOISE[3:-1]]
    environment, pipe = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.PIPE
    command = subprocess.Popen(words, cwd=data, env=environment, stdout=pipe, stderr=pipe)
    assert command.stdout.readline().startswith(b"network")
    end = time.monotonic() + 60
    while not (data / "out/10.png").exists() and time.monotonic() < end:
        time.sleep(0.01)
    command.stdout.close()
    with command.stderr as stderr:
        assert (stderr.read(), command.wait(60)) == (b"", 141)
    assert np.asarray(Image.open(data / "out/10.png")).shape == (48, 64, 3)
