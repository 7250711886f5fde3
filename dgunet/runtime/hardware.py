"""What depends on the hardware: devices, precision, memory format, and the CPU's memory."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from dgunet.runtime.errors import UserError


def pick_device(name: str) -> torch.device:
    """``auto`` (a CUDA GPU where there is one, else the CPU) or a device by PyTorch's name.

    Raises:
        UserError: no such device here, or one that cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()
    except Exception as error:  # each kind of device that is not there fails in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
        raise UserError(
            f"cannot use --device {name}, which is not here ({reason}); auto takes what there is"
        ) from error
    return device


def training_device(cfg) -> torch.device:
    """The device of this training process: its own GPU of those that the config lists, or the CPU.

    Raises:
        UserError: the config asks for GPUs, and PyTorch sees none.
    """
    if cfg.DEVICE == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if cfg.DEVICE == "cuda" or cfg.GPU:
            asked = "DEVICE is cuda" if cfg.DEVICE == "cuda" else f"GPU lists {list(cfg.GPU)}"
            raise UserError(f"{asked} but PyTorch sees no GPU; check nvidia-smi and the driver, or use DEVICE cpu")
        return torch.device("cpu")
    listed = list(cfg.GPU) or list(range(torch.cuda.device_count()))
    return torch.device("cuda", listed[int(os.environ.get("LOCAL_RANK", 0))])


def autocast_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None (float32) for SPEED.AMP; ``auto`` takes bfloat16 where the hardware computes it."""
    if choice == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # PyTorch has no public function for this
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            fast = fast and _has_avx512()  # which ATEN_CPU_CAPABILITY may have taken away
        choice = "bf16" if fast else "fp32"
    return torch.bfloat16 if choice == "bf16" else None


def memory_format(choice: str | bool, device: torch.device, amp: torch.dtype | None) -> torch.memory_format:
    """The memory format for SPEED.CHANNELS_LAST; ``auto`` takes the one that trains faster.

    That is channels_last, without which oneDNN and cuDNN reorder the maps around each convolution; but for float32 on
    processors without AVX-512, where oneDNN needs twice as long for a weight's gradient as in NCHW.
    """
    if choice == "auto":
        choice = device.type == "cuda" or amp is not None or _has_avx512()
    return torch.channels_last if choice else torch.contiguous_format


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors have taken on a CUDA device; elsewhere that this process has taken of the memory.

    Without its data loading processes. On other systems than Linux what it takes now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        import resource  # which other systems lack

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import psutil

    return psutil.Process().memory_info().rss


def available_memory(process: Path = Path("/proc/self")) -> int:
    """How many bytes of the CPU's memory this process may still take.

    The least of what the machine has free and what is left of the limits of the process's control groups (containers,
    systemd, SLURM), of a SLURM job without a control group, and of the process itself (``ulimit -v``, ``ulimit -d``).

    Args:
        process: its folder in Linux's ``/proc``.
    """
    import psutil

    left = [psutil.virtual_memory().available]
    if sys.platform == "linux":
        import resource  # which other systems lack

        taken = psutil.Process().memory_info()
        for limit, used in ((resource.RLIMIT_AS, taken.vms), (resource.RLIMIT_DATA, taken.data)):
            if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
                left.append(most - used)
        if (most := _slurm_limit()) is not None:
            left.append(most - taken.rss)
        for folder, version in _memory_groups(process):
            left += _left_in_group(folder, version)
    return max(min(left), 0)


def _slurm_limit() -> int | None:
    """The memory that a SLURM job has asked for on this machine, in bytes."""

    def number(name: str) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdecimal() else 0

    mebibytes = number("SLURM_MEM_PER_NODE") or number("SLURM_MEM_PER_CPU") * number("SLURM_CPUS_ON_NODE")
    return mebibytes * 2**20 or None  # 0 stands for all that there is


def _memory_groups(process: Path) -> Iterator[tuple[Path, int]]:
    """The folders of the control groups that limit a process's memory, and their version, 1 or 2.

    First the process's own, then those around it, as far as they can be seen here.
    """
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:  # no control groups
        return
    for mount in mounts:
        # "36 35 0:32 ROOT POINT rw - KIND SOURCE OPTIONS": the group ROOT is seen as the folder POINT.
        root, point, kind, options = mount[3], Path(_unescape(mount[4])), mount[mount.index("-") + 1], mount[-1]
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version is None or (version == 1 and "memory" not in options.split(",")):
            continue
        for _, controllers, path in groups:
            if "memory" in controllers.split(",") if version == 1 else not controllers:
                # A container may see its own group as the root, and what is above not at all.
                below = os.path.relpath(path, _unescape(root)).split(os.sep)
                below = [] if ".." in below else [part for part in below if part != "."]
                for depth in range(len(below), -1, -1):
                    yield point.joinpath(*below[:depth]), version


def _unescape(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), text)


def _left_in_group(folder: Path, version: int) -> Iterator[int]:
    """Bytes left of a control group's limits; none where it sets no limit. Cached files count as free."""

    def read(name: str) -> str:
        with contextlib.suppress(OSError):
            return (folder / name).read_text().strip()
        return ""

    stat = dict(line.split(" ", 1) for line in read("memory.stat").splitlines() if " " in line)
    if version == 1:
        names, usage, cached = ["memory.limit_in_bytes"], read("memory.usage_in_bytes"), stat.get("total_inactive_file")
    else:  # above `high` processes are slowed down until they hardly move
        names, usage, cached = ["memory.max", "memory.high"], read("memory.current"), stat.get("inactive_file")
    # The last is version 1's, the least of all groups around this one, also of those that cannot be seen.
    limits = [*map(read, names), stat.get("hierarchical_memory_limit", "")]
    used = int(usage or 0) - int(cached or 0)
    yield from (int(limit) - used for limit in limits if limit.isdecimal())
