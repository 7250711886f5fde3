"""Mistakes a user can mend, told in one line."""

import errno
import importlib
import os
import re
import shlex
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]

# What `import dgunet` does without: module to the extra of pyproject.toml that installs it; "" is no extra.
EXTRAS = {
    **dict.fromkeys(("PIL", "cv2", "psutil", "safetensors", "tqdm"), ""),
    **dict.fromkeys(("filelock", "h5py", "kornia_rs", "matplotlib", "natsort", "scipy", "skimage"), "train"),
    **dict.fromkeys(("torchvision", "warmup_scheduler", "yacs", "yaml"), "train"),
    "gdown": "data",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "gradio": "demo",
    "huggingface_hub": "hub",
    "deepinv": "deepinv",
    "spandrel": "spandrel",
    "pyiqa": "metrics",
}

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or choose another place"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "something is in the way; move it away, or choose another place"),
    errno.EISDIR: "that is a folder, but a file belongs there; choose another place",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)"),
    errno.EIO: "the disk or the network drive fails",
}


class UserError(ValueError):
    """A mistake of the user's: its message is one line saying what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text, in which names of files may hold anything, as one line that can be printed everywhere."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in _own_words(text))


def _own_words(message: str) -> str:
    """What an error says; a loading process hands its own on with the traceback, which ends with that, before it."""
    if "\nOriginal Traceback" not in message:
        return message
    return re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1])


def shorten(names: list[str], most: int = 6) -> str:
    """The first names of a list, for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name:.100}" for name in names[:most]) + more


def optional(module: str) -> ModuleType:
    """A module that only some functions need.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        told = explain(error)
        if told is None:
            raise
        raise ModuleNotFoundError(told, name=error.name) from None


def explain(error: BaseException) -> str | None:
    """One line on what is wrong with the user's machine, and what to do; None if that is not what ``error`` shows.

    Told are full disks, files that may not be written, missing packages, too little memory, ended loading processes;
    also those that a loading process met, which arrive with its traceback as their message.
    """
    text = _own_words(str(error)).strip()
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        missing = error.name or (re.findall(r"No module named '([\w.]+)'", text) or [""])[0]
        bare = missing in ("numpy", "torch")  # nothing is installed, so a command of this repository was started
        extra = "train" if bare else EXTRAS.get(missing.split(".")[0])
        if extra is None:
            return None
        if bare and (activate := ROOT / ".venv/bin/activate").exists():
            return f"{missing} is not installed here, but in .venv; source {shlex.quote(str(activate))} first"
        package = str(ROOT) if (ROOT / "pyproject.toml").exists() else "dgunet"
        return f"{missing} is not installed; pip install {shlex.quote(f'{package}[{extra}]' if extra else package)}"
    if isinstance(error, OSError):
        number, reason, name = error.errno, error.strerror, error.filename
        if number is None:
            found = re.search(r"\[Errno (\d+)\] ([^:]+)(?:: '(.*)')?$", text)
            if found is None:
                return None
            number, reason, name = int(found[1]), found[2], found[3]
        advice = f"; {_ADVICE[number]}" if number in _ADVICE else ""
        return f"{os.fsdecode(name)}: {reason}{advice}" if isinstance(name, str | bytes | Path) else f"{reason}{advice}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory; use smaller pictures or batches, or fewer processes at once"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"{text.rstrip('.')}, perhaps for lack of memory; try a lower TRAINING.WORKERS"
    return None


@contextmanager
def told_in_one_line():
    """Inside, what `explain` can tell becomes a `UserError`; names that are not UTF-8 can be printed."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what they say of damaged pictures is told in other words
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        raise UserError(told) from error


def run_cli(main):
    """Run ``main()`` as a command: a ``UserError`` becomes one line on stderr and exit status 2."""
    try:
        with told_in_one_line():
            status = main()
            sys.stdout.flush()  # a reader that has left, or a full disk, shows here and not while the interpreter ends
        sys.exit(status)
    except UserError as error:
        _give_up(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _give_up(error: BaseException):
    print(f"error: {error}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # nor shall the interpreter try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _excepthook(kind, error, trace):
    """For the imports of a command, which fail before `run_cli` is reached."""
    told = explain(error) if isinstance(error, ModuleNotFoundError) else None
    if told is None:
        return sys.__excepthook__(kind, error, trace)
    _give_up(UserError(told))
    os._exit(2)  # a hook cannot choose the status otherwise


_command = getattr(sys.modules["__main__"], "__file__", None)
if _command is not None and Path(_command).resolve().parent.parent == ROOT:  # one of this repository's own
    sys.excepthook = _excepthook
