"""The shell scripts, with stand-ins for what they call, and the figure that the quickstart shows."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from processes import run_forked

from dgunet.checkpoints.load import describe_model, save_checkpoint
from dgunet.model.degradations import Blur
from dgunet.runtime.fonts import set_title

ROOT = Path(__file__).resolve().parents[1]

# In the place of Python: notes what it was called with, and leaves behind what the script looks at.
PYTHON = """#!/usr/bin/env bash
echo "$CUDA_VISIBLE_DEVICES $*" >> calls
case "$1" in
    *plot_stages.py) echo "cat: 20.00 dB -> 30.00 dB, drawn in $PWD/image.png" ;;
    Denoising/test.py)
        mkdir -p results/quickstart/denoising/quickstart_model_best/test
        touch results/quickstart/denoising/quickstart_model_best/test/cat.png
        echo "date,psnr,new,input_psnr" > results/quickstart/denoising.csv
        echo "1,1.0,x,1.0" >> results/quickstart/denoising.csv
        echo "2,29.456,x,21.984" >> results/quickstart/denoising.csv ;;
esac
"""


def stand_in(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return path


@pytest.fixture
def quickstart(tmp_path):
    stand_in(tmp_path / "scripts/quickstart.sh", (ROOT / "scripts/quickstart.sh").read_text())
    stand_in(tmp_path / "scripts/setup_venv.sh", f'cd "{tmp_path}"\n')
    stand_in(tmp_path / ".venv/bin/python", PYTHON)

    def run(**environment) -> tuple[list[str], list[str]]:
        command = ["bash", tmp_path / "scripts/quickstart.sh"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "calls").read_text().splitlines(), done.stdout.splitlines()

    return run


def test_quickstart(quickstart):
    """Shipped networks come before the training; every file named is there; the end says where the images are."""
    calls, printed = quickstart()
    drawn = [k for k, call in enumerate(calls) if "plot_stages.py --weights" in call and "pretrained_models" in call]
    training = next(k for k, call in enumerate(calls) if "Denoising/train.py" in call)
    assert len(drawn) >= 2 and max(drawn) < training
    shipped = [word for k in drawn for word in calls[k].split() if word.endswith("/weights.safetensors")]
    scripts = [call.split()[1] for call in calls]
    configs = [word for word in calls[training].split() if word.endswith(".yaml")]
    assert configs and len(shipped) == len(drawn)
    assert all((ROOT / name).is_file() for name in (*shipped, *scripts, *configs))
    end = printed[printed.index(next(line for line in printed if "images to open" in line)) :]
    assert sum(line.endswith("/image.png") for line in end) == len(drawn) + 1
    assert printed[-1] == "quickstart: noisy 21.98 dB -> restored 29.46 dB"


@pytest.mark.parametrize("visible, used", [({}, "0"), ({"CUDA_VISIBLE_DEVICES": "2,3"}, "2")])
def test_quickstart_takes_one_gpu(quickstart, monkeypatch, visible, used):
    """Its batch does not divide among any number of them."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    calls, _ = quickstart(**visible)
    assert {call.split()[0] for call in calls} == {used}


VENV = """#!/usr/bin/env bash
if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit; fi
[ "$1" = -c ] || echo "$*" >> calls
! [[ "$*" =~ requirements && -e offline ]]
"""


@pytest.fixture
def gpu_report(tmp_path):
    """The script in a folder of its own, with a Python that writes what a benchmark leaves."""
    stand_in(tmp_path / "scripts/gpu_report.sh", (ROOT / "scripts/gpu_report.sh").read_text())
    python = """#!/usr/bin/env bash
    echo "$*" >> calls
    case "$*" in
        *device_name*) echo "NVIDIA H100 80GB" ;;
        *others*) exit 3 ;;
        *parts*) echo "left out, for the time is over: x" ;;
        *--out*) while [ "$1" != --out ]; do shift; done
            printf 'name,seconds\\n%s,1\\n' "$(basename "$2")" > "${2%.json}.csv"; echo "| a row |" > "${2%.json}.md" ;;
    esac"""
    stand_in(tmp_path / ".venv/bin/python", python)

    def run(*words) -> tuple[list[str], list[str]]:
        (tmp_path / "calls").write_text("")
        command = ["bash", tmp_path / "scripts/gpu_report.sh", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "calls").read_text().splitlines(), done.stdout.splitlines()

    return run


def test_gpu_report_goes_on_where_it_ended(gpu_report, tmp_path):
    """What failed, or had no time, is done again by the next call, and only that."""
    calls, planned = gpu_report("--dry_run")
    assert not calls and len(planned) > 10 and not (tmp_path / "results").exists()
    calls, _ = gpu_report()
    measured = [call for call in calls if "benchmark.py" in call or "pytest" in call]
    assert len(measured) == len(planned)
    for line, call in zip(planned, measured, strict=True):
        assert call.split(" --minutes")[0] in line
    report = (tmp_path / "results/gpu_report/report.md").read_text()
    assert report.count("| a row |") == len(planned) - 3 and "## train_paper" in report
    table = (tmp_path / "results/gpu_report/benchmark-NVIDIA-H100-80GB.csv").read_text().splitlines()
    assert table[0] == "name,seconds" and len(table) == len(planned) - 2
    calls, said = gpu_report()
    assert [call.split()[1] for call in calls if "benchmark.py" in call] == ["parts", "others"]
    assert sum("not complete" in line for line in said) == 2


def test_gpu_report_without_time(gpu_report):
    calls, said = gpu_report("0")
    assert not any("benchmark.py" in call for call in calls)
    assert sum("left to the next call" in line for line in said) > 10


def test_setting_up_is_done_once_and_again_where_it_failed(tmp_path):
    stand_in(tmp_path / "scripts/setup_venv.sh", (ROOT / "scripts/setup_venv.sh").read_text())
    (tmp_path / "requirements.txt").write_text("torch\n")
    python = stand_in(tmp_path / "python", VENV)

    def source() -> tuple[int, list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        command = ["bash", "-c", "set -e; source scripts/setup_venv.sh"]
        code = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHON": str(python)}).returncode
        return code, (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    (tmp_path / "offline").touch()
    assert source()[0] == 1
    (tmp_path / "offline").unlink()
    code, calls = source()
    assert code == 0
    installed = [call.split("--disable-pip-version-check ")[1] for call in calls]
    assert installed == ["pip>=23", "-r requirements.txt", "--no-deps --editable ."]
    assert source() == (0, [])
    (tmp_path / "requirements.txt").write_text("torch\nnumpy\n")
    assert len(source()[1]) == 3


@pytest.mark.parametrize("degradation", [None, Blur(torch.full((3, 5), 1 / 15))], ids=["learned", "known blur"])
def test_stages_of_an_image(tiny_model, image_pairs, tmp_path, degradation):
    model = tiny_model(stages=3, degradation=degradation)
    save_checkpoint({"state_dict": model.state_dict(), "model": describe_model(model)}, tmp_path / "weights.pth")
    image_pairs(tmp_path / "pairs")
    options = ["--weights", tmp_path / "weights.pth", "--pair", tmp_path / "pairs", "img2", "--title", "Noise"]
    plot = [sys.executable, ROOT / "scripts/plot_stages.py", *options, "--out", tmp_path / "new/stages.png"]
    done = run_forked(plot)
    assert done.returncode == 0, done.stderr
    printed, path = done.stdout.strip().split(", drawn in ")
    before, after = (float(number) for number in printed.removeprefix("img2: ").replace(" dB", "").split(" -> "))
    assert 15 < before < 30 and after < 30
    assert Path(path).is_absolute() and cv2.imread(path).shape[1] > 500


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("café, мир", "café, мир"),
        ("a $x^2$ \\frac{ $", "a $x^2$ \\frac{ $"),
        ("照片", "\\u7167\\u7247"),
        ("\u1d81 of another font", "\u1d81 of another font"),
        ("\udcff", "\\udcff"),
        ("x" * 200, "xxx...xxx"),
        ("照" * 60, "\\u7167...7167"),
    ],
    ids=ascii,
)
def test_title_of_a_figure(monkeypatch, recwarn, name, drawn):
    """Where Matplotlib's own fonts are the only ones: DejaVu, and STIX with further characters."""
    fonts = [font for font in font_manager.fontManager.ttflist if font.name in ("DejaVu Sans", "STIXGeneral")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    figure = Figure(figsize=(6.9, 5.6), layout="constrained")
    set_title(figure, f"{name}.png")
    FigureCanvasAgg(figure).draw()
    title = figure.texts[0]
    start, _, end = drawn.partition("...")
    assert title.get_text().startswith(start) and title.get_text().endswith(f"{end}.png")
    box = title.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.height < 60
    assert not recwarn.list  # of glyphs that are missing


SRUN = """#!/usr/bin/env bash
echo "$*" > srun_arguments
trap 'echo saved > saved; exit 143' TERM
touch started
for _ in $(seq 100); do sleep 0.1; done & wait
exit 3
"""


@pytest.mark.parametrize("told_to_stop", [True, False])
def test_slurm_file_saves_and_queues_again(tmp_path, told_to_stop):
    """At SIGTERM the training saves and the job is queued again; a training that fails is not."""
    script = SRUN if told_to_stop else "#!/usr/bin/env bash\nexit 3\n"
    stand_in(tmp_path / "bin/srun", script)
    stand_in(tmp_path / "bin/scontrol", '#!/usr/bin/env bash\n[ "$1" = show ] && echo node7 || echo "$*" > requeued\n')
    environment = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "1234567", "PYTHON": sys.executable,
    }  # fmt: skip
    command = ["bash", ROOT / "scripts/slurm.sbatch", "Deraining/train.py", "OPTIM.BATCH_SIZE", "8"]
    job = subprocess.Popen(command, cwd=tmp_path, env=environment)
    while told_to_stop and not (tmp_path / "started").exists():
        assert job.poll() is None
    if told_to_stop:
        job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == (143 if told_to_stop else 3)
    assert (tmp_path / "requeued").exists() == (tmp_path / "saved").exists() == told_to_stop
    if told_to_stop:
        assert (tmp_path / "requeued").read_text() == "requeue 1234567\n"
        arguments = (tmp_path / "srun_arguments").read_text()
        assert "--nnodes 2 " in arguments and "--rdzv_endpoint node7:24567 " in arguments
        assert arguments.endswith(" Deraining/train.py OPTIM.BATCH_SIZE 8 TRAINING.RESUME auto\n")
