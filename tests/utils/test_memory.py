"""How much memory is left, by machine, control groups and own limits; which errors say that it was too little."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_miniclip.errors import MiniClipError
from modeling_miniclip.utils import memory
from modeling_miniclip.utils.memory import NotEnoughMemory, free_memory, is_out_of_memory
from tests.helpers.forks import fork

MACHINE = 10_000  # bytes that are free on the machine
NO_LIMIT = "9223372036854771712"  # of version 1


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with little memory, and no limits of this process."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    monkeypatch.setattr(memory, "_left_of_own_limits", list)


def write_group(folder: Path, version: int, limit: str, usage: int, **statistics: int) -> None:
    """The files of a control group."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    if statistics:
        lines = [f"{name} {value}\n" for name, value in ({"anon": 1} | statistics).items()]
        (folder / "memory.stat").write_text("".join(lines))


def write_membership(root: Path, text: str) -> Path:
    """What a process's own file says about its groups; returns the folder of all groups."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(text)
    return root / "sys" / "fs" / "cgroup"


# --- how much is left ------------------------------------------------------------------------------------------------


def test_without_groups_the_machine_counts(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == MACHINE
    write_membership(tmp_path, "0::/\n")
    assert free_memory(tmp_path) == MACHINE


def test_smallest_of_nested_groups_counts(tmp_path: Path) -> None:
    groups = write_membership(tmp_path, "0::/pod/container\n")
    write_group(groups / "pod" / "container", 2, "max", 600)
    assert free_memory(tmp_path) == MACHINE
    write_group(groups / "pod", 2, "1000", 700)
    assert free_memory(tmp_path) == 300
    write_group(groups / "pod", 2, "1000", 700, inactive_file=100, active_file=50)
    assert free_memory(tmp_path) == 450, "files that the kernel keeps in memory give way"
    write_group(groups / "pod" / "container", 2, "800", 600)
    assert free_memory(tmp_path) == 200
    write_group(groups, 2, "800", 700)
    assert free_memory(tmp_path) == 100


def test_groups_of_version_1_count(tmp_path: Path) -> None:
    groups = write_membership(tmp_path, "5:cpu,memory:/job/step\n4:pids:/job\n0::/\n") / "memory"
    write_group(groups, 1, NO_LIMIT, 5)
    assert free_memory(tmp_path) == MACHINE
    write_group(groups / "job" / "step", 1, "5000", 4000, total_inactive_file=10, total_active_file=5, active_file=99)
    assert free_memory(tmp_path) == 1015
    write_group(groups / "job", 1, "900", 1000)
    assert free_memory(tmp_path) == 0, "not below"


def test_container_that_sees_only_itself_counts(tmp_path: Path) -> None:
    groups = write_membership(tmp_path, "0::/docker/0123\n")
    write_group(groups, 2, "1000", 400)
    assert free_memory(tmp_path) == 600


def free_with_limit(left: int) -> tuple[int, bool]:
    """Free memory with an address space limited to some bytes more, and whether a larger tensor's error is known."""
    import resource

    import psutil

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + left, hard))
    free = free_memory()
    try:
        torch.empty(2 * left, dtype=torch.uint8)
    except Exception as error:  # of the class that torch chooses
        return free, is_out_of_memory(error)
    return free, False


def test_limit_of_the_process_counts() -> None:
    process = fork(free_with_limit, 2**28)
    process.join(60)
    free, is_known = process.result
    assert 2**27 < free <= 2**28 and is_known


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        NotEnoughMemory("a step"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                     "tried to allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
        RuntimeError("std::bad_alloc"),
    ],
)  # fmt: skip
def test_errors_about_memory_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("out of memory"),
        MiniClipError("not enough memory to load an image: lower --batch_size"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)
