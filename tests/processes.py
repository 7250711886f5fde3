"""Python scripts of the repository, as tests run them: in this process, or in one that is quickly there."""

import io
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import weakref
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# Importing these takes up to four seconds of a core, more than most runs here: one process does it, and all others are
# forked from it. It computes nothing itself, and so holds no threads, which would not survive.
_ready = multiprocessing.get_context("forkserver")
_ready.set_forkserver_preload(["torch._dynamo", "cv2", "matplotlib.figure", "scipy.ndimage", "dgunet.tasks"])


def run_script(script: Path, *words, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script as from its command line, but in this process."""
    import pytest  # not at the top: forked processes import this module

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(word) for word in (script, *words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
    return subprocess.CompletedProcess(sys.argv, end.value.code or 0, out.getvalue(), err.getvalue())


class Forked:
    """``subprocess.Popen([sys.executable, script, *words])``, but for the start of Python and the imports.

    It is a process of its own, which can be killed and is told of signals. The processes that ``launch`` starts are
    forked as well; whatever else it starts is started as by default in Python 3.14. Output is there at the end.
    """

    def __init__(self, command, *, stdout=None, stderr=None, cwd=None, env=None, text=False, start_new_session=False):
        self.args, self._text = command, text
        pipes = [stream == subprocess.PIPE for stream in (stdout, stderr)]
        self._files = [tempfile.NamedTemporaryFile() if pipe else None for pipe in pipes]
        paths = [file.name if file else os.devnull for file in self._files]
        if stderr == subprocess.STDOUT:
            paths[1] = None
        environment = dict(os.environ if env is None else env)
        words = [str(word) for word in command[1:]]
        arguments = words, cwd or os.getcwd(), environment, paths, start_new_session
        self._process = _ready.Process(target=_run, args=arguments)
        self._process.start()
        weakref.finalize(self, self._process.kill)  # of a test that failed
        self.pid, self.kill, self.terminate = self._process.pid, self._process.kill, self._process.terminate

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple:
        self.wait(timeout)
        output = [Path(file.name).read_bytes() if file else None for file in self._files]
        return tuple(part.decode() if self._text and part is not None else part for part in output)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()


def run_forked(command, timeout: float = 240, check: bool = False, **options) -> subprocess.CompletedProcess:
    """``subprocess.run(command, capture_output=True, text=True)``, by ``Forked``."""
    process = Forked(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert not (check and process.returncode), out + err
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _run(words: list[str], cwd: Path, environment: dict, paths: list, new_session: bool):
    """In the forked process: what ``python words...`` does."""
    import torch

    import dgunet.training.loggers

    dgunet.training.loggers.plot_history = lambda *_: None  # as in this process: see conftest.py
    if new_session:
        os.setsid()
    for number, path in zip((1, 2), paths, strict=True):
        os.dup2(1 if path is None else os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))
    start = torch.multiprocessing.start_processes
    torch.multiprocessing.start_processes = lambda *args, **more: start(*args, **more | {"start_method": "fork"})
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


# Runs command lines one after the other, as if each were a process of its own: PyTorch is imported once. Each has a
# terminal of its own size where there is one, or none of stdin, stdout and stderr.
DRIVER = """
import fcntl, json, os, runpy, struct, sys, termios
for words, columns in json.loads(sys.argv[1]):
    if columns is None:
        sys.stdin = sys.stdout = sys.stderr = None
        os.closerange(0, 3)
    elif os.isatty(1):
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("4H", 24 if columns else 0, columns, 0, 0))
    sys.argv = words
    try:
        if words[0] == "dgunet":
            runpy.run_module("dgunet", run_name="__main__")
        else:
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        print(f"[exit status {stop.code or 0}]", flush=True)
        with open("statuses", "a") as file:
            file.write(f"{stop.code or 0} ")
"""


def driver(commands: list[tuple[list, int | None]]) -> list[str]:
    """A command that runs others, (words, columns of the terminal or None), and tells the exit status of each."""
    commands = [([str(word) for word in words], columns) for words, columns in commands]
    return [sys.executable, "-c", DRIVER, json.dumps(commands)]
