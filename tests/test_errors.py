"""What goes wrong on a user's machine ends in one line: full disks, missing packages, ended processes."""

import ast
import errno
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

from dgunet.runtime.errors import EXTRAS, UserError, describe_error

ROOT = Path(__file__).resolve().parents[1]


def disk_error(number: int, name: str | None = "runs/a.png") -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (disk_error(errno.ENOSPC), "runs/a.png: No space left on device; free some space, or choose another place"),
        (disk_error(errno.ENOSPC, None), "No space left on device; free some space, or choose another place"),
        (disk_error(errno.EROFS), "runs/a.png: Read-only file system; change its permissions, or choose another place"),
        (disk_error(errno.EACCES), "runs/a.png: Permission denied; change its permissions, or choose another place"),
        (disk_error(errno.ENOTDIR), "runs/a.png: Not a directory; something is in the way; move it away"),
        (disk_error(errno.EEXIST), "runs/a.png: File exists; something is in the way; move it away"),
        (disk_error(errno.EISDIR), "runs/a.png: Is a directory; that is a folder, but a file belongs there"),
        (disk_error(errno.EMFILE), "runs/a.png: Too many open files; raise the limit on open files (ulimit -n)"),
        (disk_error(errno.EHOSTDOWN), "runs/a.png: Host is down"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out of memory"),
        (UserError("as it is"), "as it is"),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "),
            "DataLoader worker (pid 3) is killed by signal: Killed, perhaps",
        ),
    ],
)
def test_told(error, message):
    told = describe_error(error)
    assert told.startswith(message) and "\n" not in told


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault of ours"), KeyError("k"), OSError("no number"), ValueError("")]
)
def test_faults_of_ours_keep_their_traceback(error):
    assert describe_error(error) is None


class Failing(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if self.error is None:
            os._exit(1)
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (disk_error(errno.ENOSPC), "runs/a.png: No space left on device; free some space"),
        (
            ModuleNotFoundError("No module named 'h5py'", name="h5py"),
            "h5py is not installed; pip install",
        ),
        (MemoryError(), "out of memory"),
        (UserError("a.png: of 16 bits"), "a.png: of 16 bits"),
        (None, "DataLoader worker (pid"),  # ended, as by the system when memory is short
    ],
)
def test_what_a_loading_process_met(error, message):
    with pytest.raises(Exception) as caught:
        list(torch.utils.data.DataLoader(Failing(error), num_workers=1))
    told = describe_error(caught.value)
    assert told.startswith(message) and "\n" not in told


# ------------------------------------------------------------------------------------------------------------ commands


def command(tmp_path: Path, code: str, **options) -> subprocess.CompletedProcess:
    """Run ``code`` as a command's main(); the module alone, without the package, starts in no time."""
    path = str(ROOT / "dgunet/runtime")
    head = f"import sys; sys.path.insert(0, {path!r})\nfrom errors import *\nimport os\ndef main():\n"
    body = head + "".join(f"    {line}\n" for line in code.splitlines()) + "run_cli(main)"
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.run([sys.executable, "-c", body], cwd=tmp_path, timeout=60, **options)


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("os.makedirs('file/folder')", 2, "error: file/folder: Not a directory; something is in the way"),
        ("open('folder', 'w')", 2, "error: folder: Is a directory; "),
        ("open('none')", 2, "error: none: No such file or directory; check the path"),
        ("raise MemoryError", 2, "error: out of memory; "),
        ("import warmup_scheduler.none", 2, "error: warmup_scheduler"),
        ("raise UserError('no')", 2, "error: no"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("return 3", 3, ""),
    ],
)
def test_exit_status_and_one_line(tmp_path, code, status, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    done = command(tmp_path, code)
    assert (done.returncode, done.stderr.count(b"\n")) == (status, min(len(message), 1))
    assert done.stderr.decode().startswith(message)


def test_fault_of_ours_has_its_traceback(tmp_path):
    done = command(tmp_path, "{}['key']")
    assert done.returncode == 1 and b"Traceback" in done.stderr and b"KeyError: 'key'" in done.stderr


def test_names_that_are_not_utf8_are_printed(tmp_path):
    done = command(tmp_path, "print(os.fsdecode(b'a\\xff.png'))\nraise UserError(os.fsdecode(b'b\\xff.png'))")
    assert (done.returncode, done.stdout, done.stderr) == (2, b"a\\udcff.png\n", b"error: b\\udcff.png\n")


PRINTING = ["print('a result')", "print('a result', flush=True)", "raise SystemExit(print('help'))"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("code", PRINTING)
def test_stdout_on_a_full_disk(tmp_path, code):
    with open("/dev/full", "wb") as full:
        done = command(tmp_path, code, stdout=full)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"No space left on device" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("code", ["raise UserError('no')", "print('a result')"])
def test_nothing_can_be_written_at_all(tmp_path, code):
    with open("/dev/full", "wb") as full:
        assert command(tmp_path, code, stdout=full, stderr=full).returncode == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("code", PRINTING)
def test_reader_that_leaves(tmp_path, code, unbuffered):
    """As in ``command | head -1``: quiet, as a process that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    done = command(tmp_path, code, stdout=writer, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_broken_pipe_that_is_not_stdout(tmp_path):
    """A fault that has nothing to do with who reads the output is not passed over."""
    done = command(tmp_path, "reader, writer = os.pipe()\nos.close(reader)\nos.write(writer, b'x')")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1) and b"Broken pipe" in done.stderr


@pytest.mark.parametrize("closed", [[1], [2], [1, 2], [0, 1, 2]], ids=str)
def test_started_without_streams(tmp_path, closed):
    """As by ``>&-`` or pythonw: what is printed, also by libraries and other processes, gets into no file."""
    code = "file = open('file', 'w')\nprint('a'), print('b', file=sys.stderr), sys.stdout.flush()\n"
    code += "[os.write(number, b'c') for number in (1, 2)], os.system('echo d; echo e >&2')\nreturn file.fileno() <= 2"
    done = command(tmp_path, code, stdin=subprocess.DEVNULL, preexec_fn=lambda: [os.close(number) for number in closed])
    assert done.returncode == 0 and (tmp_path / "file").read_bytes() == b""
    assert done.stdout == (b"" if 1 in closed else b"a\ncd\n") and done.stderr == (b"" if 2 in closed else b"b\nce\n")


# ------------------------------------------------------------------------------------------------------------ packages


def imported(path: Path) -> set[str]:
    """Names of the packages that import statements of a file name, wherever in it they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def requirements(section: str) -> list[str]:
    text = re.search(
        rf"^{section} = \[(.*?)\](?:  #.*?)?$", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )[1]
    return re.findall(r'"([\w-]+)[>=]', text)


def test_every_extra_package_is_known():
    names = {name: {d.lower().replace("_", "-") for d in found} for name, found in packages_distributions().items()}
    for extra in set(EXTRAS.values()):
        for package in set(requirements(extra or "dependencies")) - {"torch", "numpy"}:
            known = {m.replace("_", "-") for m in EXTRAS}.union(*(names.get(m, ()) for m in EXTRAS), {"mlflow-skinny"})
            assert package.lower().replace("_", "-") in known, f"EXTRAS lacks the module of {package}"


def test_a_missing_package_is_described_whichever_module_imports_it():
    known = set(sys.stdlib_module_names) | {"dgunet", "torch", "numpy", "pillow_heif"} | EXTRAS.keys()
    for path in (ROOT / "dgunet").rglob("*.py"):
        assert imported(path) <= known, f"errors.EXTRAS lacks what {path.name} imports"


def test_importing_the_package_imports_no_extras(run_command):
    code = "import sys, dgunet.model, dgunet.checkpoints.load, dgunet.inference, dgunet.training.cli\n"
    code += "print({'PIL', 'cv2', 'h5py', 'matplotlib', 'psutil', 'skimage'} & sys.modules.keys())"
    assert run_command(["-c", code]).stdout == "set()\n"


COMMANDS = [path for path in ROOT.glob("[!.]*/*.py") if "run_cli(" in path.read_text() and path.parent.name != "tests"]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_installed_is_told_by_every_command(path):
    command = [sys.executable, "-E", "-s", "-S", path, "--help"]  # without any site-packages
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert re.match(r"error: \w+ is not installed", done.stderr) and str(ROOT) in done.stderr


@pytest.mark.parametrize("start", [["-m", "other"], ["other/__main__.py"]], ids=["module", "file"])
def test_importing_the_package_changes_nothing_in_a_program_of_others(tmp_path, start):
    """Nor where the program is installed beside it."""
    for name in ("__init__.py", "_moved.py", "runtime/__init__.py", "runtime/errors.py"):
        (tmp_path / "dgunet/runtime").mkdir(parents=True, exist_ok=True)
        (tmp_path / "dgunet" / name).write_text((ROOT / "dgunet" / name).read_text())
    (tmp_path / "other").mkdir()
    code = "import sys; sys.path.insert(0, '.'); before = sys.excepthook, sys.stdout, sys.stderr\n"
    code += "import dgunet.runtime.errors\n"
    code += "assert (sys.excepthook, sys.stdout, sys.stderr) == before\n"
    code += "try:\n    import gradio\nfinally:\n    print('the program ends itself')"
    (tmp_path / "other/__main__.py").write_text(code)
    done = subprocess.run([sys.executable, "-S", *start], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (1, "the program ends itself\n")
    assert "Traceback" in done.stderr and "No module named 'gradio'" in done.stderr


def test_missing_package_and_its_extra_are_named():
    message = describe_error(ModuleNotFoundError("No module named 'scipy.none'", name="scipy.none"))
    assert "scipy.none" in message and "pip install" in message and "[train]" in message
    assert describe_error(ModuleNotFoundError("No module named 'foreign'", name="foreign")) is None


def test_missing_package_is_told_by_a_command(tmp_path):
    """Before its main() is reached."""
    (tmp_path / "h5py.py").write_text("raise ModuleNotFoundError(\"No module named 'h5py'\", name='h5py')")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/pack_dataset.py", "folder"],
        capture_output=True, text=True, cwd=tmp_path, timeout=240, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr == f"error: h5py is not installed; pip install '{ROOT}[train]'\n"


def test_windows_lacks_these(run_command):
    others = "import cv2, dgunet, torch.utils.data, tqdm, warmup_scheduler"  # which do without them in their own ways
    code = "import os, signal; del os.register_at_fork, signal.alarm\n"
    code += "from dgunet.data import loader; loader._ignore_sigterm()"
    done = run_command(["-c", f"{others}; {code}"])
    assert (done.returncode, done.stderr) == (0, "")
