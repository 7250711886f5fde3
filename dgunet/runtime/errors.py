"""Errors that a user can mend, reported in one line."""

import errno
import os
import re
import select
import shlex
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Modules of other packages, and the extra of pyproject.toml that installs each; "" is no extra. They are imported where
# they are needed, so that `import dgunet` does without; `describe_error` says what to install where one is missing.
EXTRAS = {
    **dict.fromkeys(("PIL", "cv2", "imagecodecs", "natsort", "psutil", "safetensors", "tifffile", "tqdm"), ""),
    **dict.fromkeys(("filelock", "h5py", "matplotlib", "scipy", "skimage"), "train"),
    **dict.fromkeys(("torchvision", "warmup_scheduler", "yacs", "yaml"), "train"),
    "gdown": "data",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "gradio": "demo",
    "huggingface_hub": "hub",
    "deepinv": "deepinv",
    "spandrel": "spandrel",
    "pyiqa": "metrics",
    **{name: name for name in ("tensorboard", "wandb", "mlflow")},
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
    """An error of the user's: its message is one line that says what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text, in which names of files may hold anything, as one line that can be printed everywhere."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in _os_error_text(text))


def _os_error_text(message: str) -> str:
    """The text of an error; that of a data loading process comes after its traceback, of which it is the last line."""
    if "\nOriginal Traceback" not in message:
        return message
    return re.sub(r"^[\w.]+: ", "", message.strip().splitlines()[-1])


def shorten_list(names: list[str], most: int = 6) -> str:
    """The first names of a list, for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name:.100}" for name in names[:most]) + more


def describe_error(error: BaseException) -> str | None:
    """One line on what is wrong with the user's machine, and what to do; None if that is not what ``error`` shows.

    That is so for full disks, files that may not be written, missing packages, too little memory, ended data loading
    processes; also if they come from such a process, with its traceback as their message.
    """
    text = _os_error_text(str(error)).strip()
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
    if is_out_of_memory(error):
        return "out of memory; use smaller images or batches, or fewer processes at once"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"{text.rstrip('.')}, perhaps for lack of memory; try a lower TRAINING.WORKERS"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's, NumPy's or PyTorch's for too little memory, of the CPU or another device."""
    text = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text


@contextmanager
def friendly_errors():
    """Within it, what `describe_error` describes becomes a `UserError`; names that are not UTF-8 can be printed."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged images, for which there are errors of our own
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (message := describe_error(error)) is None:
            raise
        raise UserError(message) from error


@contextmanager
def command_imports(module: str):
    """Around the imports of a script: where a package is missing, it reports that and exits with status 2.

    Args:
        module: the script's ``__name__``; where another module imports it, nothing is changed.
    """
    if module != "__main__":
        yield
        return
    _open_closed_streams()  # before what is imported opens files
    try:
        yield
    except ModuleNotFoundError as error:
        if (message := describe_error(error)) is None:
            raise
        _print_error(f"error: {message}")
        sys.exit(2)


def run_cli(main):
    """Run ``main()`` as a command and exit with what it returns.

    A ``UserError`` becomes one line on stderr and exit status 2. Where the reader of stdout is gone, as in
    ``command | head -1``, the command ends silently, with the status of a process that SIGPIPE ends.
    """
    _open_closed_streams()
    try:
        with friendly_errors():
            try:
                status = main()
            except SystemExit as stop:  # argparse's --help prints, too
                status = stop.code
            sys.stdout.flush()  # a closed pipe or a full disk shows here, not while the interpreter exits
    except UserError as error:
        if isinstance(error.__cause__, BrokenPipeError) and _is_broken_pipe(sys.stdout):
            status = 128 + 13  # SIGPIPE
        else:
            _print_error(f"error: {error}")
            status = 2
    except KeyboardInterrupt:
        _print_error("interrupted")
        status = 130
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the interpreter would try again, and change the exit status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _open_closed_streams():
    """Give the null device to a process that was started without stdin, stdout or stderr (``>&-``, pythonw).

    Otherwise the next file that is opened would be what libraries print to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))


def _print_error(message: str):
    with suppress(OSError):  # stderr may be a full disk itself
        print(message, file=sys.stderr, flush=True)


def _is_broken_pipe(stream) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
