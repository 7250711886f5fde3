"""One process for each GPU: starting them, joining them into a process group, synchronising them.

Code above this module never branches on the number of processes: a lone process is a world of one.
"""

import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  imported later, by DistributedDataParallel, it would keep the group alive
from torch import Tensor

from dgunet.runtime.errors import UserError, friendly_errors, run_cli
from dgunet.runtime.hardware import training_device


def launch(function: Callable, cfg, *args, spawn: bool = True):
    """Call ``function(cfg, *args)`` in as many processes as the config asks for, each joined to the group.

    Under torchrun the processes are there already. Otherwise one process is started for each GPU (or, on the CPU,
    PROCESSES of them); a single one runs here, as without ``spawn``. SIGTERM and Ctrl-C reach all of them. When one
    fails, it reports why, and all end with its exit status.
    """
    processes = _count(cfg)
    if os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}:
        gpus = 0 if training_device(cfg).type == "cpu" else processes
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if gpus and here > gpus:
            raise UserError(f"torchrun starts {here} processes here for {gpus} GPUs; use --nproc_per_node {gpus}")
        if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, other launchers may not
            _set_num_threads(cfg, here)
        return _run(function, cfg, args, group=True)
    if processes == 1 or not spawn:
        return _run(function, cfg, args, group=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        _child, args=(processes, port, function, cfg, args), nprocs=processes, join=False, start_method="spawn"
    )

    def forward_signal(received, _):
        for process in context.processes:
            if process.is_alive():  # the others have no process id any more
                os.kill(process.pid, received)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward_signal)
    try:
        while not context.join(grace_period=10):
            pass
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name:
            print(
                f"error: process {error.error_index} was ended by {error.signal_name}"
                + ("; is there enough memory?" if error.signal_name == "SIGKILL" else ""),
                file=sys.stderr,
            )
        sys.exit(error.exit_code if error.exit_code > 0 else 128 + abs(error.exit_code))


def _count(cfg) -> int:
    gpus = torch.cuda.device_count() if cfg.DEVICE != "cpu" else 0
    if gpus == 0:
        training_device(cfg)  # refuses a config that asks for GPUs
        return max(cfg.PROCESSES, 1)
    absent = [index for index in cfg.GPU if not 0 <= index < gpus]
    if absent:
        raise UserError(f"GPU lists {absent}, but the {gpus} GPUs here are numbered 0 to {gpus - 1}")
    listed = len(cfg.GPU) or gpus
    if cfg.PROCESSES not in (0, listed):
        raise UserError(f"PROCESSES is {cfg.PROCESSES}, but each of the {listed} GPUs needs one; leave it at 0")
    return listed


def _child(local_rank: int, processes: int, port: int, function: Callable, cfg, args):
    os.environ |= dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes), RANK=str(local_rank),
        LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(processes),
    )  # fmt: skip
    _set_num_threads(cfg, processes)
    with friendly_errors():
        _run(function, cfg, args, group=True)


def _set_num_threads(cfg, processes: int):
    """Each of the processes on this machine's CPU gets its share of the threads."""
    if training_device(cfg).type == "cpu":
        torch.set_num_threads(max(torch.get_num_threads() // processes, 1))


def _run(function: Callable, cfg, args, group: bool):
    device = training_device(cfg)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    if not group:
        return function(cfg, *args)
    try:
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
        with _terminate_together():
            function(cfg, *args)
    except SystemExit as stop:
        traceback.clear_frames(stop.__traceback__)  # they hold what used the group
        raise
    finally:
        if dist.is_initialized():
            # Only a group that nothing holds any more ends its threads with it. A thread of gloo that lives on and lets
            # go of a tensor while the interpreter ends would abort the process, after all its work is done.
            gc.collect()
            dist.destroy_process_group()


@contextlib.contextmanager
def _terminate_together():
    """Around the work of a group's processes: the first to fail reports why, and all end at once with its exit status.

    The others might wait for it in NCCL, where they handle no signals. So each has a thread that looks for a failure in
    the group's store every half second.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"failure of attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    over = threading.Event()

    def end(status: int):
        sys.stdout.flush()
        os._exit(status)  # nothing that would wait for the others

    def watch():
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it the process of rank 0
            while not over.wait(0.5):
                if store.check(["status"]):
                    end(int(store.get("status")))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        over.set()
        status = 1
        with contextlib.suppress(RuntimeError):
            if store.add("failures", 1) == 1:
                status = _report(error)
                store.set("status", str(status))
                time.sleep(1)  # rank 0 takes the store with it
            else:
                store.wait(["status"], timedelta(seconds=10))
                status = int(store.get("status"))
        end(status)
    finally:
        over.set()
        thread.join()


def _report(error: BaseException) -> int:
    """Report an error on stderr as the command would; returns the exit status."""

    def fail():
        raise error

    try:
        run_cli(fail)
    except SystemExit as stop:
        return stop.code
    except BaseException:
        traceback.print_exc()
    return 1


@contextlib.contextmanager
def lock_dir(folder: Path, what: str, advice: str = "", wait: bool = False):
    """Lock an existing folder for this process: the lock ends with the ``with``, or with the process however it ends.

    Args:
        folder: its ``.lock`` is the file that is locked, and stays.
        what: what two processes must not do at once, e.g. ``"training"``.
        advice: what the user can do, for the message.
        wait: wait for another process to release the lock.

    Raises:
        UserError: another process holds the lock.
    """
    import filelock

    # Not a soft lock, which is a file's existence: that would outlive a killed process.
    lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout as error:
        raise UserError(f"another {what} is writing to {folder}; {advice}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"note: the disk of {folder} has no file locks; see that no other {what} writes there", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


class StopSignal:
    """SIGTERM and Ctrl-C, noted within ``with`` for a loop to stop at a good moment, in all processes at once.

    A second signal, some seconds after the first, ends the process where it is.
    """

    seconds = 5  # one that comes sooner is an echo of the first

    def __init__(self):
        self.received = 0  # the number of the signal that reached this process
        self.agreed = 0  # the one that all processes stop for
        self._time = 0.0

    def __enter__(self):
        self.received = self.agreed = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if not self.received:
            self.received, self._time = number, time.monotonic()
        elif time.monotonic() - self._time > self.seconds:
            if dist.is_initialized():
                os._exit(128 + number)  # nothing that would wait for the others
            sys.exit(128 + number)

    def sync(self, device: torch.device, *seconds: float) -> list[float]:
        """Agree with all processes, of which a signal may have reached only some; the longest of each ``seconds``."""
        agreed = torch.tensor([self.received, *seconds], dtype=torch.float64, device=device)
        if dist.is_initialized():
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        received, *longest = agreed.tolist()
        self.agreed = int(received)
        return longest


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier():
    if dist.is_initialized():
        dist.barrier()
