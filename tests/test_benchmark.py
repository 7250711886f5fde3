"""The benchmark compares like with like, and says what it found."""

import argparse
import csv
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import benchmark
import pytest
import torch
from benchmark import Case, as_original, prepare

from dgunet import create_model
from dgunet.runtime.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("variant", ["deblurring_dgunet", "deraining_dgunet"])
def test_baseline_computes_the_same(variant):
    torch.manual_seed(0)
    model = create_model(variant, width=8, growth=4, final_growth=4).double()
    y = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    expected = [x.detach() for x in model(y)]
    for found, x in zip(as_original(model)(y), expected, strict=True):
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-6)


@pytest.fixture
def forked(monkeypatch):
    """Cases are measured in forked processes, which need not import PyTorch again."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda _: fork)


def test_tables(forked, monkeypatch, capfd, tmp_path):
    """A size that does not fit fails alone; the rest is measured, and compared with the baseline."""
    options = ["--variants", "compressive_sensing_dgunet", "--sizes", "40x40", "64x32", "--runs", "1"]
    command = ["benchmark.py", "forward", *options, "--device", "cpu", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    out, err = capfd.readouterr()
    content = json.loads((tmp_path / "out.json").read_text())
    bf16 = benchmark.has_bf16("cpu")
    assert content["matrix_peak"]["float32"] > 1e9 and bool(content["matrix_peak"]["bfloat16"]) == bf16
    assert sum("ValueError: block sampling" in line for line in err.splitlines()) == 2 + bf16
    assert "Traceback" not in err
    rows = {(row["width"], row["name"]): row for row in content["rows"]}
    assert len(rows) == 2 * (2 + bf16)
    for (width, name), row in rows.items():
        if width == 40:
            assert not row["times"]
            continue
        baseline = rows[width, "baseline"]
        assert row["iqr"] >= 0 and row["times"]
        assert row["speed_ratio"] == pytest.approx(baseline["seconds"] / row["seconds"])
        assert 0 < row["share_of_peak"] and name in out


def test_hardware_without_bfloat16_is_not_asked_for_it(monkeypatch):
    """It would emulate a large product for minutes."""
    monkeypatch.setattr(benchmark, "autocast_dtype", lambda choice, device: None)
    randn = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *a, dtype, **k: pytest.fail() if dtype == torch.bfloat16 else randn(*a, **k)
    )
    peaks = benchmark.matrix_peak("cpu", size=64)
    assert peaks[True] is None and peaks[False] > 0
    args = argparse.Namespace(device="cpu", profile=False, compile=True)
    cases = benchmark.network_cases(args, "train", "deraining_dgunet", 32, 32, 1)
    assert [case.name for case in cases] == ["baseline", "float32", "float32, checkpointing", "float32, compiled"]
    assert not any(case.bf16 for case in cases)


def test_baseline_trains_with_the_originals_settings(monkeypatch):
    """Adam and float32 as PyTorch chooses them on the device; nothing that training does not do, on either side."""
    options, adam = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda p, **k: options.append(k) or adam(p, **k))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert benchmark.select("cuda:0")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    prepare(Case("train", "baseline", "compressive_sensing_dgunet", 1, 32, 32, baseline=True))
    assert not {"foreach", "fused"} & options[-1].keys() and torch.backends.cudnn.benchmark


def settings(**other) -> argparse.Namespace:
    """Options of the command that measuring reads."""
    return argparse.Namespace(**dict(runs=2, seconds=60, case_seconds=60, deadline=math.inf) | other)


def test_case_without_end_is_ended(forked, monkeypatch, capfd):
    """And one for which there is no time any more is not begun; both are named."""
    waiting = {"long": 60, "short": 0.25}
    monkeypatch.setattr(benchmark, "prepare", lambda case: lambda: time.sleep(waiting[case.name]) or torch.ones(1))
    cases = [Case("train", "long"), Case("train", "short")]
    (_, ended), (_, done) = benchmark.measure(cases, settings(case_seconds=1))
    assert ended["times"] == [] and len(done["times"]) == 2
    assert list(benchmark.measure(cases, settings(deadline=0))) == []
    messages = capfd.readouterr().err.splitlines()
    assert messages[0] == "long: not done after 1 s" and "long; short" in messages[1] and len(messages) == 2


def test_rows_are_written_as_they_come(monkeypatch, tmp_path, capsys):
    """What is known is in the files when a later case ends the process, as a time limit does."""

    def measured(cases, args):
        yield cases[0], {"times": [2.0], "seconds": 2.0, "iqr": 0.0, "peak_memory": 2**31}
        yield cases[1], {"times": [], "seconds": math.nan, "iqr": math.nan, "peak_memory": math.nan}
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", measured)
    results = benchmark.Results(tmp_path / "out.json", dict(date="2026-01-02", machine="H100", torch="2.11"))
    case = Case("train", "baseline", "compressive_sensing_dgunet", 4, 32, 32)
    with pytest.raises(KeyboardInterrupt):
        results.measure("a table", [case, replace(case, name="fails")], settings(), {False: 1e12})
    line, failed = (tmp_path / "out.md").read_text().splitlines()[-2:]
    share = benchmark.operations(case) / 2e12
    assert line == f"| baseline | 2000.0 ms | 2.00 | 1.00x | 2048 MiB | {share:.1%} |" and 0 < share < 1
    assert failed == "| fails |  |  |  |  |  |"
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].split() == "baseline 2000.0 ms 2.00 1.00x 2048 MiB".split() + [f"{share:.1%}"]
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["baseline", "fails"] and rows[0]["machine"] == "H100"
    assert float(rows[0]["images_per_second"]) == 2 and rows[0]["table"] == "a table"
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2


@pytest.mark.parametrize("operation", benchmark.PARTS)
def test_forms_of_an_operation_compute_the_same(operation):
    """But the one without a bias."""
    grads = []
    for form in benchmark.PARTS[operation]:
        torch.manual_seed(0)
        case = Case("parts", form, "compressive_sensing_dgunet", 2, 32, 32, operation=operation)
        grads.append(benchmark.prepare(case)())
    same = torch.allclose(*grads, rtol=1e-3, atol=1e-3 * grads[0].abs().max())
    assert same == (operation != "convolution, LeakyReLU") and grads[0].any()


def test_process_that_dies_is_reported_in_a_line(forked, monkeypatch, capfd):
    """While it is timed, as by the system where memory is full; the others are measured to the end."""
    calls = []

    def prepare(case):
        def run():
            calls.append(case)
            if case.name == "dies" and len(calls) > 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.25)
            return torch.ones(1)

        return run

    monkeypatch.setattr(benchmark, "prepare", prepare)
    cases = [Case("train", "dies"), Case("train", "lives")]
    dead, alive = (row for _, row in benchmark.measure(cases, settings()))
    assert dead["times"] == [] and dead["seconds"] != dead["seconds"]
    assert len(alive["times"]) == 2 and alive["seconds"] == pytest.approx(0.25, rel=0.5) and alive["iqr"] < 0.1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("dies: ") and "memory" in line


def test_several_calls_for_each_measurement(monkeypatch):
    """Of crops, which differ: one call would not stand for all."""
    calls = []
    monkeypatch.setattr(benchmark, "prepare", lambda case: lambda: calls.append(1) or torch.ones(1))
    case = Case("data", "crops")
    benchmark._start(case)
    calls.clear()
    measurement = benchmark._measure_again(case)
    assert measurement.number_per_run == 20 and len(calls) >= 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["forward", "--sizes", "12"], "--sizes: invalid size value: '12'"),
        (["forward", "--sizes", "64x63"], "64x63"),
        (["forward", "--sizes", "0x8"], "0x8"),
        (["train", "--batch", "0"], "--batch"),
        (["data", "--runs", "0"], "--runs"),
        (["data", "--images", "nowhere"], "/nowhere/input"),
        (["forward", "--device", "banana"], "--device banana"),
        (["nothing"], "nothing"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as end:
        run_cli(benchmark.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.startswith("error: ") and said.count("\n") == 1
