"""Train in forks of this process, which has loaded the libraries: a new process would import them for seconds."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

FORK: ForkContext = multiprocessing.get_context("fork")


def fork(function: Callable[..., None], *args: Any) -> ForkProcess:
    """Start a function in a fork of this process that has no memory of earlier runs."""
    process = FORK.Process(target=_start_afresh, args=(function, args))
    process.start()
    return process


def _start_afresh(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    function(*args)


def train_in_processes(argv: list[str], processes: int, log: Path) -> str:
    """Run `train_miniclip.main` in several processes joined by gloo, as a launcher would.

    Args:
        argv: flags of the run.
        processes: number of processes.
        log: file for the output of all processes.

    Returns:
        The output.
    """
    port = free_port()
    ranks = [fork(_train_as_rank, argv, rank, processes, port, log) for rank in range(processes)]
    for process in ranks:
        process.join(120)
    output = log.read_text(encoding="utf-8", errors="replace")
    assert [process.exitcode for process in ranks] == [0] * processes, output[-3000:]
    return output


def _train_as_rank(argv: list[str], rank: int, processes: int, port: int, log: Path) -> None:
    from train_miniclip import main

    write_to(log)
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in values.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    main(argv)


def write_to(log: Path) -> None:
    """Append what this process prints to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
