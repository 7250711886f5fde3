"""What depends on the hardware: devices, precision, memory format, and how the CPU's memory is had."""

import ctypes
import os
import sys

import torch

from dgunet.errors import UserError


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
    """The device of this one of a training's processes: its own GPU of those that the config lists, or the CPU.

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
        else:  # PyTorch has no public question for this
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


def keep_freed_memory():
    """Let glibc keep what a training step on the CPU frees: the next one needs it again.

    Given back to the system it would return page by page, each of them cleared first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc, with the numbers of its malloc.h
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets pages of its own


def use_huge_pages():
    """Have Linux make the memory for large feature maps on the CPU 2 MiB at a time, not 4 KiB.

    At 1280x720 every map is new memory. To be called before the first tensor is made, when PyTorch reads the variable.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
