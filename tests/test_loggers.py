"""Loggers of one's own, of Weights & Biases and of MLflow, through the real train.py."""

import csv
import json
import logging
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from processes import run_script
from test_engine import TRAIN, folders, make_trainer, options  # noqa: F401  fixtures

import dgunet.training.loggers
from dgunet.checkpoints.load import read_checkpoint, save_checkpoint
from dgunet.data.transforms import unit_range
from dgunet.runtime.errors import UserError
from dgunet.training.config import load_config
from dgunet.training.loggers import LOGGERS, Logger, RunLogger, make_loggers
from dgunet.training.validation import side_by_side

OWN = """
import json
import os
from dgunet.training.loggers import Logger

class JSONLogger(Logger):
    def start(self, run):
        self.run, self.file = run, open(run.folder / "log.jsonl", "a")
        self.write("start", [run.epoch, run.step, run.resumed, run.config["OPTIM.BATCH_SIZE"], os.getpid()])

    def log_step(self, epoch, step, values):
        self.write("step", [epoch, step, values])

    def log_row(self, row, images):
        self.write("row", [row, [image.shape for image in images]])

    def close(self, failed):
        self.write("close", failed)
        self.file.close()

    def write(self, kind, what):
        print(json.dumps([kind, what]), file=self.file)

class Broken(Logger):
    calls = 0

    def log_step(self, epoch, step, values):
        self.log_row(None, None)

    def log_row(self, row, images):
        Broken.calls += 1
        raise OSError(28, "No space left on device", "/net/log")

    def close(self, failed):
        raise RuntimeError("lost")
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of a user's in the current folder."""
    (tmp_path / "my_loggers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "my_loggers"
    sys.modules.pop("my_loggers", None)


def test_ones_own_logger_through_train_py(folders, own_module, curves):  # noqa: F811
    """By name, from a file beside; it is told of steps, validations and images, and of the resumption."""
    later = dict(TRAINING__RESUME=True, TRAINING__VAL_EPOCHS="[3]")
    settings = dict(TRAINING__LOGGERS="[csv, my_loggers:JSONLogger, images]", OPTIM__CLIP_NORM=0.01)
    for changed in (dict(OPTIM__NUM_EPOCHS=1), dict(OPTIM__NUM_EPOCHS=3, **later)):
        done = run_script(TRAIN, *options(folders, **settings | changed), cwd=folders)
        assert done.returncode == 0, done.stderr
        assert "note" not in done.stdout or "LOGGERS" not in done.stdout
    folder = folders / "runs/run"
    told = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kinds = [kind for kind, _ in told]
    epoch = [*["step"] * 4, "row"]
    assert kinds == ["start", *epoch, "close", "start", *epoch, *epoch, "close"]
    first, second = (what for kind, what in told if kind == "start")
    assert first[:4] == [1, 0, False, 2] and second[:4] == [1, 4, True, 2]
    steps = [what for kind, what in told if kind == "step"]
    assert [(epoch, step) for epoch, step, _ in steps] == [(e, s) for e in (1, 2, 3) for s in (1, 2, 3, 4)]
    rows = [what for kind, what in told if kind == "row"]
    for epoch, (row, _) in enumerate(rows, start=1):
        values = [values for e, _, values in steps if e == epoch]
        assert row["loss"] == pytest.approx(np.mean([v["loss"] for v in values]))
        assert values[-1]["epoch_loss"] == pytest.approx(row["loss"])
        norms = [v["grad_norm"] for v in values]
        assert row["grad_norm"] == pytest.approx(np.mean(norms)) and row["grad_norm_max"] == pytest.approx(max(norms))
        assert min(norms) > 0.01, "it is that before clipping"
        assert 0 < row["data_wait"] < 1 and 50 < row["peak_memory_mib"] < 100_000 and row["images_per_second"] > 0
    assert [shapes for _, shapes in rows] == [[[32, 96, 3]] * 2, [], [[32, 96, 3]] * 2]
    assert [row["psnr"] is None for row, _ in rows] == [False, True, False]
    with open(folder / "history.csv") as file:
        written = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in written] == [row["loss"] for row, _ in rows]
    newer = ["grad_norm", "grad_norm_max", "data_wait", "peak_memory_mib", "best_epoch", "share_of_peak"]
    assert [*written[0]][9:] == newer
    assert not (folder / "train.log").exists() and (folder / "curves.png").exists()
    # input | restored | target, of the validation images as they are in their files
    names = [f"epoch_{epoch}_step_4_image_{number}.png" for epoch in (1, 3) for number in (1, 2)]
    assert sorted(path.name for path in (folder / "images").iterdir()) == names
    one = folder / "images" / names[0]
    picture, sides = (
        cv2.imread(str(one)),
        [cv2.imread(str(folders / "val" / s / "img1.png")) for s in ("input", "target")],
    )
    assert np.array_equal(picture[:, :32], sides[0]) and np.array_equal(picture[:, 64:], sides[1])
    restored = picture[:, 32:64]
    assert 0 < np.abs(restored.astype(int) - sides[0]).mean() < 60


def test_share_of_the_peak_is_logged_where_it_is_known(folders, monkeypatch, capsys):  # noqa: F811
    """On GPUs, of whose rate this is a stand-in; at each step, in each line, in the history."""
    monkeypatch.setattr(dgunet.training.loggers, "_peak_image_rate", lambda trainer: 1600)
    trainer = make_trainer(folders, TRAINING__LOGGERS="[console]")
    told = []
    monkeypatch.setattr(trainer.log.loggers[0], "log_step", lambda epoch, step, values: told.append(values))
    trainer.fit()
    (row, *_) = trainer.log.rows
    assert all(v["share_of_peak"] == v["images_per_second"] / 1600 and v["peak_memory_mib"] > 50 for v in told)
    assert row["share_of_peak"] == pytest.approx(row["images_per_second"] / 1600, abs=1e-4)
    line = next(line for line in capsys.readouterr().out.splitlines() if "% of peak, " in line)
    assert f"waiting for data, {row['share_of_peak']:.0%} of peak, {row['peak_memory_mib']} MiB" in line


def test_loggers_change_no_loss_and_a_broken_one_ends_nothing(folders, own_module, capsys):  # noqa: F811
    trainer = make_trainer(folders, session="broken", TRAINING__LOGGERS="[console, my_loggers:Broken]")
    trainer.fit()
    broken = trainer.log.loggers[1]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "Broken" in line]
    assert len(warnings) == 1 and "/net/log: No space left on device" in warnings[0] and "my_loggers.py:" in warnings[0]
    assert broken.calls == 3, "a step, and then the rows, for which there may be space again"
    make_trainer(folders, session="none", TRAINING__LOGGERS="[]").fit()
    one, two = (read_checkpoint(folders / "runs" / name / "model_latest.pth") for name in ("broken", "none"))
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    columns = ("loss", "psnr", "grad_norm", "grad_norm_max")
    assert [[row[c] for c in columns] for row in one["history"]] == [
        [row[c] for c in columns] for row in two["history"]
    ]


class Unreachable(Logger):
    def __init__(self, error):
        self.error, self.told = error, []

    def start(self, run):
        raise self.error

    def log_row(self, row, images):
        self.told.append(row)

    def close(self, failed):
        self.told.append(failed)


@pytest.mark.parametrize(
    ("error", "ends"), [(UserError("not logged in"), (True, True)), (ConnectionError("no network"), (True, False))]
)
def test_what_fails_at_the_start(folders, error, ends):  # noqa: F811
    """A run that begins ends with it; one that is resumed only where the user has to do something."""
    from dgunet.training.trainer import Trainer

    beside = logging.getLogger("dgunet").handlers[:]
    for again, end in zip((False, True), ends, strict=True):
        one = make_trainer(folders, session="both", OPTIM__NUM_EPOCHS=1, TRAINING__RESUME="auto")
        logger = Unreachable(error)
        trainer = Trainer(one.cfg, one.train_state.model, one.train_set, one.val_set, loggers=["console", logger])
        if end:
            with pytest.raises(type(error), match=str(error)):
                trainer.fit()
        else:
            trainer.fit()
        assert not logger.told and logging.getLogger("dgunet").handlers == beside
        if not again:
            make_trainer(folders, session="both", OPTIM__NUM_EPOCHS=1).fit()


def test_loggers_are_told_whether_a_run_failed(folders):  # noqa: F811
    trainer, logger = make_trainer(folders, TRAINING__LOGGERS="[]"), Unreachable(None)
    logger.start = lambda run: None
    trainer.log = RunLogger([logger])
    trainer.train_state.train_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert logger.told == [True]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("[csv, wandbb]", "wandbb"),
        ("my_loggers:None_", "my_loggers has no None_"),
        ("no_such_module:Logger", "no module no_such_module"),
        ("collections:OrderedDict", "collections:OrderedDict is no"),
        ("[1]", "TRAINING.LOGGERS must be"),
        ("False", "TRAINING.LOGGERS must be"),
        ("{a: b}", "TRAINING.LOGGERS must be"),
    ],
)
def test_names_that_are_none(own_module, value, named):
    with pytest.raises(UserError, match="TRAINING.LOGGERS") as error:
        make_loggers(load_config(None, ["TRAINING.LOGGERS", value]).TRAINING.LOGGERS)
    assert named in str(error.value)


def test_loggers_by_name_and_by_object(own_module):
    own = Unreachable(None)
    csv_logger, mine, same = make_loggers(["csv", "my_loggers:JSONLogger", own], "loggers")
    assert type(csv_logger) is LOGGERS["csv"] and type(mine).__name__ == "JSONLogger" and same is own
    assert load_config(None, ["TRAINING.LOGGERS", "console"]).TRAINING.LOGGERS == ["console"]
    assert {type(x) for x in make_loggers("auto")} >= {LOGGERS["csv"], LOGGERS["console"]}


def test_a_missing_package_is_named(folders, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = run_script(TRAIN, *options(folders, TRAINING__LOGGERS="[csv, wandb]"), "--dry_run", cwd=folders)
    assert done.returncode == 2 and "wandb" in done.stderr and "[wandb]" in done.stderr


def test_states_of_earlier_versions_have_no_norms(folders):  # noqa: F811
    """Within an epoch; the norms of that epoch stay unknown, those of the next are there."""
    make_trainer(folders, OPTIM__NUM_EPOCHS=1).fit()
    latest = folders / "runs/run/model_latest.pth"
    state = read_checkpoint(latest)
    for row in state["history"]:
        for column in ("grad_norm", "grad_norm_max", "data_wait", "peak_memory_mib", "best_epoch"):
            del row[column]
    save_checkpoint(state | {"step": 2, "totals": state["totals"][:4], "history": []}, latest)
    trainer = make_trainer(folders, TRAINING__RESUME=True)
    trainer.fit()
    norms = [row["grad_norm_max"] for row in trainer.log.rows]
    assert np.isnan(norms[0]) and norms[1] > 0 and trainer.log.rows[0]["loss"] > 0
    assert make_trainer(folders, TRAINING__RESUME=True).resumed


@pytest.mark.parametrize("count", [1, 4, 6])
def test_images_in_blocks(count):
    """Four are a square; six are not: one is shown. At most 256 pixels; grey as RGB."""
    sides = [torch.full((count, 1, 160, 200), value) for value in (0.0, 0.2, 1.5)]
    sides[2][0, 0, 80, 100] = torch.nan
    picture = side_by_side(sides)
    width = 256 if count == 4 else 200
    assert picture.shape == (256 if count == 4 else 160, 3 * width, 3) and picture.dtype == np.uint8
    assert [int(np.median(picture[:, i * width : (i + 1) * width])) for i in range(3)] == [0, 51, 255]


def test_measured_images_are_what_the_network_got(folders):  # noqa: F811
    """Of a known blur: not the clean image, which its data set gives; the noise is that of the score."""
    from test_engine import diverging_trainer

    trainer = diverging_trainer(folders, MODEL__KERNEL_EXTENT="[3, 5]", MODEL__NOISE=10)
    given = []
    trainer.train_state.eval_model.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    trainer.validate()
    assert len(trainer.panels) == len(given) == 2
    clean = unit_range(trainer.val_set[0][1])[:, 8:-8, 8:-8]
    y, _, x = np.split(trainer.panels[0], 3, axis=1)
    as_image = lambda t: (t.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()  # noqa: E731
    assert np.array_equal(y, as_image(given[0][0])) and np.array_equal(x, as_image(clean))


def two_runs(folders, monkeypatch, **changed) -> Path:  # noqa: F811
    """A run of one epoch, and its continuation by another."""
    for epochs, resume in ((1, False), (2, True)):
        make_trainer(folders, OPTIM__NUM_EPOCHS=epochs, TRAINING__RESUME=resume, **changed).fit()
    return folders / "runs/run"


def records(data: bytes):
    """The records of a file of W&B's: as in LevelDB's logs, in blocks of 32 KiB, but after 7 bytes of its own."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if (left := -place % 32768) < 7 and left:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline(folders, monkeypatch):  # noqa: F811
    """Its real library and files; a resumed run has the same id, under which `wandb sync` puts both together."""
    pytest.importorskip("wandb").teardown()  # it reads the environment once
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = two_runs(folders, monkeypatch, TRAINING__LOGGERS="[wandb]")
    run_id = (folder / "wandb_run_id").read_text()
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {path.stem for path in files} == {f"run-{run_id}"}
    expected = read_checkpoint(folder / "model_latest.pth")["history"]
    deadline = time.monotonic() + 60  # a process of W&B's own writes the files
    while True:
        logged = []
        for path in files:
            for data in records(path.read_bytes()):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(data)
                if items := record.history.item:
                    logged.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        rows = [row for row in logged if "psnr" in row]
        if len(rows) == len(expected) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert [row["psnr"] for row in rows] == [row["psnr"] for row in expected]
    assert [row["global_step"] for row in rows] == [4, 8]
    assert [row["global_step"] for row in logged if "step/grad_norm" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len([*folder.glob("wandb/offline-run-*/files/media/images/*.png")]) == 4


def test_wandb_without_a_login(folders, monkeypatch, tmp_path):  # noqa: F811
    """One line, before anything is trained."""
    pytest.importorskip("wandb").teardown()  # it reads the environment once
    for name, value in {"WANDB_MODE": "online", "HOME": tmp_path, "NETRC": tmp_path / "none"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="wandb login.*WANDB_MODE=offline"):
        make_trainer(folders, TRAINING__LOGGERS="[wandb]").fit()
    assert not (folders / "runs/run/history.csv").exists()


def test_mlflow_in_local_files(folders, monkeypatch):  # noqa: F811
    """Its real library; a resumed run goes on in the same one."""
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    folder = two_runs(folders, monkeypatch, TRAINING__LOGGERS="[mlflow]")
    client = mlflow.MlflowClient((folders / "runs/mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("dgunet").experiment_id])
    assert run.info.run_id == (folder / "mlflow_run_id").read_text() and run.info.status == "FINISHED"
    assert run.data.params["OPTIM.BATCH_SIZE"] == "2" and run.info.run_name == "run"
    expected = read_checkpoint(folder / "model_latest.pth")["history"]
    psnr = client.get_metric_history(run.info.run_id, "psnr")
    assert [(m.step, m.value) for m in psnr] == [(4, expected[0]["psnr"]), (8, expected[1]["psnr"])]
    assert client.get_metric_history(run.info.run_id, "step/grad_norm")[0].value > 0
    assert len([file for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]) == 4


def test_only_the_main_process_logs(folders, own_module, monkeypatch):  # noqa: F811
    assert len(make_trainer(folders, TRAINING__LOGGERS="[my_loggers:JSONLogger]").log.loggers) == 1
    monkeypatch.setattr("dgunet.runtime.distributed.rank", lambda: 1)
    trainer = make_trainer(folders, TRAINING__LOGGERS="[my_loggers:JSONLogger]")
    trainer.validate()
    assert trainer.log.loggers == trainer.panels == []


def test_the_logger_of_the_documentation(folders, monkeypatch):  # noqa: F811
    text = (Path(__file__).resolve().parents[1] / "docs/extending.md").read_text()
    (code,) = re.findall(r"```python\n# my_loggers.py\n(.*?)```", text, re.DOTALL)
    (folders / "my_loggers.py").write_text(code)
    monkeypatch.chdir(folders)
    (logger,) = make_loggers(["my_loggers:JSONLogger"])
    sys.modules.pop("my_loggers")
    log = RunLogger([logger])
    run = SimpleNamespace(folder=folders)
    logger.start(run)
    log.started = [logger]
    log.log_row({"epoch": 1, "loss": 0.5}, [])
    logger.close(failed=False)
    assert json.loads((folders / "log.jsonl").read_text()) == {"epoch": 1, "loss": 0.5} and not log.failed
