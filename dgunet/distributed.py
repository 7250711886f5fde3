"""One process for each GPU: starting them, joining them into a group, and what they have to agree on.

Code above this module never branches on the number of processes: a lone process is a world of one.
"""

import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  imported later, by DistributedDataParallel, it would keep the group for ever
from torch import Tensor

from dgunet.errors import UserError, told_in_one_line


def launch(function: Callable, cfg, *args):
    """Call ``function(cfg, *args)`` in as many processes as the config asks for, each joined to the group.

    Under torchrun the processes are there already. Otherwise one process is started for each GPU (or, on the CPU,
    PROCESSES of them); a single one runs here. SIGTERM and Ctrl-C reach all of them.
    """
    processes = _count(cfg)
    if os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}:
        gpus = 0 if pick_device(cfg).type == "cpu" else processes
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if gpus and here > gpus:
            raise UserError(f"torchrun starts {here} processes here for {gpus} GPUs; use --nproc_per_node {gpus}")
        return _run(function, cfg, args)
    if processes == 1:
        return _run(function, cfg, args)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        _child, args=(processes, port, function, cfg, args), nprocs=processes, join=False, start_method="spawn"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: [os.kill(pid, received) for pid in context.pids()])
    try:
        while not context.join():
            pass
    except torch.multiprocessing.ProcessRaisedException as error:
        # The first failure of a process arrives as the text of its traceback.
        *_, last = str(error).strip().splitlines()
        if last.startswith(f"{UserError.__module__}.{UserError.__qualname__}: "):
            raise UserError(last.split(": ", 1)[1]) from None
        raise
    except torch.multiprocessing.ProcessExitedException as error:
        sys.exit(error.exit_code if error.exit_code > 0 else 128 + abs(error.exit_code))


def _count(cfg) -> int:
    if cfg.DEVICE not in ("auto", "cpu", "cuda"):
        raise UserError(f"DEVICE is auto, cuda or cpu, got {cfg.DEVICE!r}")
    gpus = torch.cuda.device_count() if cfg.DEVICE != "cpu" else 0
    if cfg.DEVICE == "cuda" and gpus == 0:
        raise UserError("DEVICE is cuda but PyTorch sees no GPU; check nvidia-smi and the driver, or use DEVICE cpu")
    if gpus == 0:
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
    if not torch.cuda.is_available():
        torch.set_num_threads(max(torch.get_num_threads() // processes, 1))
    with told_in_one_line():
        _run(function, cfg, args)


def _run(function: Callable, cfg, args):
    group = os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}
    device = pick_device(cfg)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if group:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    try:
        function(cfg, *args)
    except SystemExit as stop:
        traceback.clear_frames(stop.__traceback__)  # they hold what used the group
        raise
    finally:
        if group:
            # Only a group that nothing holds any more ends its threads with it. A thread of gloo that lives on and lets
            # go of a tensor while the interpreter ends would abort the process, after all its work is done.
            gc.collect()
            dist.destroy_process_group()


def pick_device(cfg) -> torch.device:
    """This process's device: its own GPU of those listed, or the CPU."""
    if cfg.DEVICE == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    listed = list(cfg.GPU) or list(range(torch.cuda.device_count()))
    return torch.device("cuda", listed[int(os.environ.get("LOCAL_RANK", 0))])


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
