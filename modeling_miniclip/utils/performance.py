"""Settings that save time or memory. Importing this module changes none of them."""

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# glibc's constants for two parameters of mallopt (malloc.h), and the values that a process starts with.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 1024, 65536

_keeps_freed_memory = False


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensor instead of returning it to the kernel each time.

    Otherwise large tensors are mapped, page-faulted and unmapped at every step. Call this before creating the first
    large tensor. A process then holds its peak memory until it ends, or until [`return_freed_memory`].

    Returns:
        Whether it took effect (on Linux with glibc only).
    """
    global _keeps_freed_memory
    glibc = _glibc()
    _keeps_freed_memory = (
        glibc is not None and bool(glibc.mallopt(M_MMAP_MAX, 0)) and bool(glibc.mallopt(M_TRIM_THRESHOLD, -1))
    )
    return _keeps_freed_memory


def keeps_freed_memory() -> bool:
    """Whether [`keep_freed_memory`] has taken effect in this process."""
    return _keeps_freed_memory


def return_freed_memory() -> None:
    """Give glibc's allocator its initial thresholds again, and return freed memory to the kernel.

    From now on they stay as they are: what glibc adapts by itself in a new process, it does not adapt any more once
    they have been set.
    """
    global _keeps_freed_memory
    glibc = _glibc()
    if glibc is not None:
        glibc.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        glibc.mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
    _keeps_freed_memory = False
    release_freed_memory()


def release_freed_memory() -> None:
    """Return freed memory to the kernel now; otherwise every forked loader process could end up with a copy of it."""
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def _glibc() -> Any:
    try:
        glibc = ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None
    except OSError:
        return None
    return glibc if hasattr(glibc, "mallopt") else None


def image_layout(device: torch.device) -> torch.memory_format:
    """The order in which convolutions on a device take the numbers of images and weights.

    NHWC is faster on CPUs and tensor cores. With it, gradients of batch norms are wrong on `mps`
    (https://github.com/pytorch/pytorch/issues/175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def to_channels_last(vision_model: nn.Module, device: torch.device) -> None:
    """Store the image tower's convolutions for a device as [`image_layout`] says, with the same values."""
    vision_model.to(memory_format=image_layout(device))


def allow_tf32(device: torch.device) -> None:
    """Let float32 matrix products on CUDA use TF32 (10-bit mantissa), as PyTorch's convolutions do by default."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def compile_towers(vision_model: nn.Module, text_model: nn.Module) -> None:
    """Compile both towers with `torch.compile` on their first run. Parameters and their names stay the same.

    Images have one size, but texts have many lengths, so the text tower is compiled for all lengths at once.
    """
    vision_model.compile()
    text_model.compile(dynamic=True)


def best_mixed_precision(device: torch.device) -> str:
    """`"bf16"` on a GPU that supports it, else `"no"`: bf16 is many times slower on a CPU without it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "no"


def hide_advice_for_gpus() -> None:
    """Without a GPU, leave out transformers' advice to install `causal_conv1d`, which only runs on one."""
    if not torch.cuda.is_available():
        logging.getLogger("transformers.integrations.hub_kernels").addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "falling back to its reference PyTorch implementation" not in record.getMessage()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread only, within the block.

    OpenMP threads wait for each other in busy loops. On shared cores, this costs a small matrix product many times the
    time that a second thread saves.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
