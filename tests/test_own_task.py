"""A task, a test set and a score of a user's own: the module of docs/extending.md, by the real command lines."""

import csv
import re
import sys
from pathlib import Path

import pytest

from dgunet import UserError, load_model
from dgunet.apps.cli import main
from dgunet.model.variants import VARIANTS
from dgunet.tasks import TASKS, Task, find_task

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
MODEL: {NAME: dehazing_dgunet, SESSION: small, OVERRIDES: {width: 8, growth: 4, final_growth: 4, stages: 2}}
OPTIM: {BATCH_SIZE: 4, NUM_EPOCHS: 1, WARMUP_EPOCHS: 0}
TRAINING: {TRAIN_DIR: nowhere, SAVE_DIR: checkpoints/dehazing, TRAIN_PS: 16, VAL_PS: 16, WORKERS: 0}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, image_pairs, capsys):
    """``run(*words)``: the ``dgunet`` command beside the module: what it printed, or the error."""
    text = (ROOT / "docs/extending.md").read_text()
    (code,) = re.findall(r"```python\n(# dehaze.py\n.*?)```", text, flags=re.DOTALL)
    (tmp_path / "dehaze.py").write_text(code)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/dgunet.yaml").write_text(CONFIG)
    image_pairs(tmp_path / "pairs", count=4, size=(24, 24))
    image_pairs(tmp_path / "Datasets/SOTS/outdoor", count=2, size=(24, 24), seed=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def command(*words) -> str:
        with pytest.raises(SystemExit) as end:
            main([*words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return err if end.value.code else out

    yield command
    VARIANTS.pop("dehazing_dgunet", None)
    sys.modules.pop("dehaze", None)


def results(task: str) -> list[dict]:
    return list(csv.DictReader(Path(f"results/{task}.csv").open()))


def test_a_task_is_a_record_and_a_config(run):
    assert "unknown model 'dehazing_dgunet'" in run("train", "deraining", "MODEL.NAME", "dehazing_dgunet")
    told = run("train", "dehaze:TASK", "--help")
    assert "usage: dgunet train dehaze:TASK" in told and "Train DGUNet for dehazing." in told and "dgunet" in told
    told = run("train", "dehaze:TASK", "--config", "cpu")
    assert "--config cpu is neither a file nor the name of one of this task's configs: dgunet" in told
    out = run("train", "dehaze:TASK", "TRAINING.TRAIN_DIR", "pairs", "DEVICE", "cpu")
    assert "done: best PSNR" in out and "model       dehazing_dgunet" in out
    best = "checkpoints/dehazing/small/model_best.pth"
    test = ["--weights", best, "--device", "cpu"]
    out = run("test", "dehaze:TASK", *test, "--metrics", "dehaze:mean_error")
    assert "33.00/0.98" in out and "mean_error" in out
    (row,) = results("dehazing")
    assert (row["dataset"], row["model"], row["images"]) == ("SOTS", "dehazing_dgunet", "2")
    assert float(row["mean_error"]) > 0
    assert "not a network for denoising" in run("test", "denoising", *test, "--dataset", "pairs")
    assert "does nothing in dehazing" in run("train", "dehaze:TASK", "MODEL.RATIO", "0.1")
    del VARIANTS["dehazing_dgunet"]  # as where nobody has imported the module
    assert load_model(best).stages == 2


def test_a_test_set_of_ones_own_for_a_task_of_ours(run):
    words = ["--device", "cpu", "--weights", "deraining_mixture", "--dataset"]
    run("test", "deraining", *words, "dehaze:SOTS", "pairs")
    assert [(row["dataset"], row["protocol"]) for row in results("deraining")][0] == ("SOTS", "rgb_matlab")
    assert "no dgunet.evaluation.cli.Benchmark" in run("test", "deraining", *words, "dehaze:TASK")
    assert "dehaze has no RAIN" in run("test", "deraining", *words, "dehaze:RAIN")


def test_tasks_that_are_none(run, tmp_path):
    assert "did you mean deraining?" in run("train", "derainin")
    assert "your own is module:name" in run("test", "x")
    assert "TASK dehaze:SOTS is a Benchmark, not a dgunet.tasks.Task" in run("train", "dehaze:SOTS")
    assert "no module nothing" in run("train", "nothing:TASK")
    with pytest.raises(UserError, match="network deraining_dgunet of another task"):
        Task("dehazing", {"deraining_dgunet": VARIANTS["deraining_dgunet"]})


@pytest.mark.parametrize("name", TASKS)
def test_every_task_of_ours_has_configs_networks_and_help(name):
    task = find_task(name)
    assert task.name == name and task.variants and all(variant.task == name for variant in task.variants.values())
    assert (ROOT / "configs" / name / "dgunet.yaml").exists()
    assert f"dgunet train {name}" in task.train_help and f"dgunet test {name}" in task.test_help


@pytest.mark.parametrize("script", sorted(ROOT.glob("[A-Z]*/t*.py")), ids=lambda path: "/".join(path.parts[-2:]))
def test_scripts_of_the_task_folders_are_thin(script, capsys, monkeypatch):
    text = script.read_text()
    assert len(text.splitlines()) <= 20
    name = re.search(r"run_task\(\"(?:train|test)\", \"(\w+)\"", text)[1]
    with pytest.raises(SystemExit):
        find_task(name).train(["--help"], f"python {script.parent.name}/train.py")
    told = capsys.readouterr().out
    assert f"    python {script.parent.name}/train.py" in told and "dgunet train" not in told
