"""What makes a process faster without changing a result. For entry points only: importing the package does nothing."""

import ctypes
import sys

import torch
from torch import nn

# glibc's numbers of the two mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next tensor instead of giving it back to the kernel each time.

    Large tensors are otherwise mapped, page-faulted and unmapped at every step. To be called before the first large
    tensor; a training process then holds its peak memory until it ends.

    Returns:
        Whether it took effect (Linux with glibc only).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def to_channels_last(vision_model: nn.Module) -> None:
    """Lay the image tower's convolutions out as NHWC, which CPUs and tensor cores compute faster. Same values."""
    vision_model.to(memory_format=torch.channels_last)


def best_mixed_precision(device: torch.device) -> str:
    """`"bf16"` on an accelerator that has it, else `"no"`: a CPU without such instructions is many times slower."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "no"
