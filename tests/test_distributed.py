"""Starting processes, what they share, and how they end."""

import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from processes import run_forked

from dgunet.runtime import distributed
from dgunet.runtime.errors import UserError
from dgunet.training.config import load_config

CODE = """
import pathlib, signal, sys, time
import torch, torch.distributed as dist
from dgunet.training.config import load_config
from dgunet.runtime.distributed import launch
from dgunet.runtime.errors import UserError, run_cli

def work(cfg, failing, error, waiting, stamp):
    dist.barrier()
    if dist.get_rank() == failing:
        pathlib.Path(stamp).write_text(str(time.time()))
        raise {"mistake": UserError("the mistake"), "bug": KeyError("the bug")}[error]
    if waiting == "deaf":  # as one that waits in NCCL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(300)
    dist.all_reduce(torch.ones(1))

if __name__ == "__main__":
    failing, *words = sys.argv[1:]
    run_cli(lambda: launch(work, load_config(None, ["DEVICE", "cpu", "PROCESSES", "2"]), int(failing), *words))
"""


@pytest.mark.parametrize(
    ("started", "failing", "error", "waiting"),
    [
        ("forked", 0, "mistake", "all_reduce"),
        ("by python", 1, "mistake", "deaf"),
        ("forked", 0, "bug", "deaf"),
        ("by torchrun", 1, "mistake", "deaf"),
    ],
)
def test_a_failure_ends_all_processes(tmp_path, started, failing, error, waiting):
    """At once, with one message, though the others wait for the one that failed and hear no signal."""
    script, stamp = tmp_path / "script.py", tmp_path / "stamp"
    script.write_text(CODE)
    torchrun = started == "by torchrun"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if torchrun else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command, script, str(failing), error, waiting, stamp]
    run = run_forked if started == "forked" else partial(subprocess.run, capture_output=True, text=True)
    done = run(command, timeout=240, env=environment)
    assert time.time() - float(stamp.read_text()) < 20  # a deaf process would be killed after 30 seconds, or never
    lines = done.stderr.strip().splitlines()
    if torchrun:  # which has a report of its own to make, and its own status
        assert [line for line in lines if "the mistake" in line] == ["error: the mistake"]
        assert "exitcode  : 2" in done.stderr
    elif error == "mistake":
        assert (done.returncode, lines) == (2, ["error: the mistake"])
    else:
        assert done.returncode == 1
        assert lines[0].startswith("Traceback") and lines[-1] == "KeyError: 'the bug'" and lines.count(lines[0]) == 1


@pytest.mark.parametrize(("device", "gpus", "threads"), [("cpu", True, 4), ("auto", False, 4), ("auto", True, None)])
def test_processes_on_the_cpu_share_its_threads(monkeypatch, device, gpus, threads):
    """Also where there are GPUs that are not to be used."""
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(distributed, "_run", lambda *_, **__: None)
    monkeypatch.setattr(os, "environ", {})
    cfg = load_config(None, ["DEVICE", device])
    distributed._child(0, 2, 29500, print, cfg, ())
    torchrun = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    monkeypatch.setattr(os, "environ", torchrun)
    distributed.launch(print, cfg)
    assert found == ([threads] * 2 if threads else [])
    torchrun["OMP_NUM_THREADS"] = "3"  # as torchrun sets it: for each process
    distributed.launch(print, cfg)
    assert len(found) == (2 if threads else 0)


@pytest.mark.parametrize("options", [["GPU", "[0, 1]"], ["GPU", "[0]", "DEVICE", "cuda"], ["DEVICE", "cuda"]])
def test_gpus_asked_for_are_not_replaced_by_the_cpu(monkeypatch, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="DEVICE cpu"):
        distributed.launch(print, load_config(None, options))


def test_gpus_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"GPU .*\[2\]"):
        distributed.launch(print, load_config(None, ["GPU", "[0, 2]"]))


def test_lock_ends_with_its_owner(tmp_path):
    """It is exclusive, ends with the process however that ends, and a child of it does not keep it."""
    code = """
import os, sys, time
from pathlib import Path
from dgunet.runtime.distributed import lock_dir
with lock_dir(Path(sys.argv[1]), "test", "wait"):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as owner:
        assert owner.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"{tmp_path}; wait"):
            with distributed.lock_dir(tmp_path, "test", "wait"):
                pass
        owner.kill()
        owner.wait()
        for _ in range(2):
            with distributed.lock_dir(tmp_path, "test", "wait"):
                pass
        os.killpg(owner.pid, 9)  # the child


def test_disk_without_locks(tmp_path, monkeypatch, capsys):
    import fcntl

    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with distributed.lock_dir(tmp_path, "test", "wait"):
        assert str(tmp_path) in capsys.readouterr().err
