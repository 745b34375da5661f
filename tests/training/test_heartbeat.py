"""A lost process or machine ends the others with one line; waiting for a slow process is no loss.

Three processes on two machines, which differ only in what a launcher sets: process 0, and processes 1 and 2.
"""

import fcntl
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from modeling_miniclip.errors import MiniClipError
from modeling_miniclip.training.processes import connections, heartbeat
from modeling_miniclip.training.processes.heartbeat import ends_with_lost_processes, join_processes
from tests.helpers.forks import Fork, fork, free_port, write_to

Role = Callable[[int, Path], None]
HOST = socket.gethostname()
FAST = {"BEAT": 0.5, "SILENCE": 2.0, "NOTICE": 5.0, "GRACE_AFTER_ERROR": 0.3}


def member(role: Role, rank: int, port: int, folder: Path) -> None:
    machine, local_rank = (0, 0) if rank == 0 else (1, rank - 1)
    write_to(folder / f"machine-{machine}.log")
    values = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": machine + 1,
              "GROUP_RANK": machine, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ |= {name: str(value) for name, value in values.items()}
    for name, seconds in FAST.items():
        setattr(heartbeat, name, seconds)
    try:
        with ends_with_lost_processes(lambda: "start again"):
            join_processes(on_cpu=True)
            dist.barrier()
            role(rank, folder)
    except MiniClipError as error:
        print(f"error: {error}", flush=True)
        os._exit(3)


def run(role: Role, folder: Path) -> list[Fork]:
    """Run a role in three processes."""
    port = free_port()
    return [fork(member, role, rank, port, folder) for rank in range(3)]


def lines(folder: Path) -> list[list[str]]:
    """What was printed on each machine."""
    return [
        [line for line in (folder / f"machine-{machine}.log").read_text().splitlines() if "[Gloo]" not in line]
        for machine in (0, 1)
    ]


def sum_for_ever() -> None:
    while True:
        dist.all_reduce(torch.ones(10))


def load_for_ever(lock: Path, started: Any) -> None:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        started.set()
        time.sleep(100)


def lose_process_1(rank: int, folder: Path) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sum_for_ever()


def lose_process_0(rank: int, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    context.Process(target=load_for_ever, args=(folder / f"loader-{rank}", started)).start()
    started.wait()
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)  # no operation fails


def lose_machine_1(rank: int, folder: Path) -> None:
    pids: list[int] = [0, 0, 0]
    dist.all_gather_object(pids, os.getpid())
    if rank == 1:
        os.kill(pids[2], signal.SIGKILL)
        os.kill(pids[1], signal.SIGKILL)
    time.sleep(100)


def stop_process_2(rank: int, folder: Path) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)  # as silent as a machine without power
    time.sleep(100)


def fail_in_process_2(rank: int, folder: Path) -> None:
    if rank == 2:
        raise MiniClipError("no such image")
    sum_for_ever()


def be_slow_in_process_2(rank: int, folder: Path) -> None:
    if rank == 0:
        assert heartbeat._current is not None and heartbeat._current._listener is not None
        port = heartbeat._current._listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    if rank == 2:
        time.sleep(FAST["SILENCE"] + 0.7)
    dist.barrier()
    if rank == 0:
        time.sleep(0.5)  # the last one to end


LOSS = "error: lost {} (its connection closed); start again"
LOSSES: dict[str, tuple[Role, list[int | None], list[str | None]]] = {
    "process 1": (lose_process_1, [1, -9, 1], [LOSS.format(f"process 1 of machine 1 ({HOST})")] * 2),
    "process 0": (lose_process_0, [-9, 1, 1], [None, LOSS.format(f"process 0 of machine 0 ({HOST})")]),
    "machine 1": (lose_machine_1, [1, -9, -9], [LOSS.format(f"machine 1 ({HOST}) with processes 1 and 2"), None]),
    "silence": (
        stop_process_2,
        [1, 1, None],
        [f"error: lost process 2 of machine 1 ({HOST}) (silent for 2 s); start again"] * 2,
    ),
    "error": (
        fail_in_process_2,
        [1, 1, 3],
        [f"error: process 2 of machine 1 ({HOST}) failed: no such image; start again", "error: no such image"],
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("machine 1", "silence") else []) for name in LOSSES],
)
def test_loss_ends_others_with_one_line(name: str, tmp_path: Path) -> None:
    role, codes, expected = LOSSES[name]
    processes = run(role, tmp_path)
    for process, code in zip(processes, codes, strict=True):
        process.join(30 if code is not None else 0)
    assert [process.exitcode for process in processes] == codes
    for process in processes:
        process.kill()
    assert lines(tmp_path) == [[line] if line else [] for line in expected]
    for lock in tmp_path.glob("loader-[12]"):
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # at once, as the loader process has ended too


@pytest.mark.slow
def test_slow_process_is_no_loss(tmp_path: Path) -> None:
    processes = run(be_slow_in_process_2, tmp_path)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert lines(tmp_path) == [[], []]


def start_without_the_others() -> str:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    connections.JOIN = 0.2
    with pytest.raises(MiniClipError) as error, ends_with_lost_processes(str):
        pass
    return str(error.value)


def test_process_without_the_others_gives_up() -> None:
    process = fork(start_without_the_others)
    process.join(30)
    assert "process 0 cannot join the others at 127.0.0.1, port" in process.result
