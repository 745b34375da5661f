"""What makes a process faster without changing a result. For entry points only: importing the package does nothing."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    glibc = _glibc()
    return glibc is not None and bool(glibc.mallopt(M_MMAP_MAX, 0)) and bool(glibc.mallopt(M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Give it back to the kernel now: each loader process that is forked would come to hold a copy of it."""
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def _glibc() -> Any:
    try:
        glibc = ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None
    except OSError:
        return None
    return glibc if hasattr(glibc, "mallopt") else None


def to_channels_last(vision_model: nn.Module) -> None:
    """Lay the image tower's convolutions out as NHWC, which CPUs and tensor cores compute faster. Same values."""
    vision_model.to(memory_format=torch.channels_last)


def allow_tf32(device: torch.device) -> None:
    """Let float32 matrix products on CUDA use TF32 (10 bits of mantissa), as PyTorch lets convolutions by default."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def compile_towers(vision_model: nn.Module, text_model: nn.Module) -> None:
    """Let `torch.compile` make faster code of both towers when they are first run. Same parameters, same names.

    Images all have one size, texts any length: the text tower is compiled for all lengths at once.
    """
    vision_model.compile()
    text_model.compile(dynamic=True)


def best_mixed_precision(device: torch.device) -> str:
    """`"bf16"` on an accelerator that has it, else `"no"`: a CPU without such instructions is many times slower."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "no"


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes by the calling thread alone.

    Threads of OpenMP wait for each other in loops: where others compute too, that costs a small product many times
    what its second thread gains.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
