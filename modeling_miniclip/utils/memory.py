"""How much memory is left for this process, and which errors say that there was too little."""

import gc
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil
import torch

from .performance import release_freed_memory

# Of the free memory, what a computation may take: other processes take some of it meanwhile.
USABLE = 0.9

# What libraries say in errors that have no class of their own.
TOO_LITTLE = re.compile(
    r"out[ _]of[ _](\w+[ _])?memory|(can't|cannot) allocate memory|not enough memory|bad_alloc|ALLOC_FAILED|"
    r"could not create a memory", re.IGNORECASE
)  # fmt: skip

# Files of a control group: its limit, what it uses, and the parts of its statistics that the kernel gives up first.
GROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),  # version 1
)


class NotEnoughMemory(MemoryError):
    """A computation was stopped because it would probably need more memory than there is."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library says that memory was too short, of the device or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and TOO_LITTLE.search(str(error)) is not None


def release_memory(device: torch.device) -> None:
    """After a computation that failed: give back what it left, on a device and in this process."""
    gc.collect()  # an error's traceback, which refers to all that the computation held, may be part of a cycle
    if device.type not in ("cpu", "meta"):  # the latter of a model whose weights are elsewhere
        torch.get_device_module(device).empty_cache()
    release_freed_memory()


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take, by what its machine, its containers and its own limits leave.

    Args:
        root: folder with the folders `proc` and `sys`.
    """
    left = [psutil.virtual_memory().available, *_left_in_groups(root), *_left_of_own_limits()]
    return max(0, min(left))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What is left in each control group of this process that has a limit: its own, and those that this one is in."""
    with suppress(OSError):  # other systems have none
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            folder = root / "sys/fs/cgroup"
            if "memory" in controllers.split(","):
                folder /= "memory"
            elif number != "0":
                continue
            # In a container, the folder of the whole system may be that of the container: the path is not in it then.
            inside = PurePosixPath(path).parts[1:]
            for depth in range(len(inside), -1, -1):
                if (left := _left_in_group(folder.joinpath(*inside[:depth]))) is not None:
                    yield left


def _left_in_group(folder: Path) -> int | None:
    """What is left in a control group, with the files that the kernel keeps in memory for it; None without a limit."""
    for *files, caches in GROUP_FILES:
        try:
            limit, usage = (int((folder / name).read_text(encoding="utf-8")) for name in files)
        except (OSError, ValueError):  # there is no such file, or its limit is "max"
            continue
        left = limit - usage
        with suppress(OSError, ValueError):
            lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            statistics = dict(line.split() for line in lines)
            left += sum(int(statistics.get(name, 0)) for name in caches)
        return left
    return None


def _left_of_own_limits() -> Iterator[int]:
    """What is left of the limits that `ulimit -v` and `ulimit -d` set."""
    process = psutil.Process()
    if not hasattr(process, "rlimit"):  # only Linux has it
        return
    used = process.memory_info()
    for kind, taken in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
        limit, _ = process.rlimit(kind)
        if limit != psutil.RLIM_INFINITY:
            yield limit - taken
