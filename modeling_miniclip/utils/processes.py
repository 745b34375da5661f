"""The processes of a run and those that it starts, on every system, for code that must not import torch."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

SECONDS_BETWEEN_CHECKS = 2  # after which a child process checks again whether its parent is still running
SECONDS_TO_DIE = 5  # for which the end of a killed process is awaited


def process_rank() -> int:
    """Rank of this process: from `torch.distributed` if that is initialised, else from the launcher's `RANK`."""
    distributed = sys.modules.get("torch.distributed")  # importing it would take seconds
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", "0"))


def usable_cpus() -> int:
    """Number of processors that this process may use; only Linux knows which are kept from it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def forks_processes() -> bool:
    """Whether `multiprocessing` forks this process, as by default on Linux with Python up to 3.13.

    Otherwise a process that it starts imports everything again and gets what it needs as a pickle.
    """
    default = multiprocessing.get_all_start_methods()[0]
    return (multiprocessing.get_start_method(allow_none=True) or default) == "fork"


def is_child() -> bool:
    """Whether `multiprocessing` started this process.

    If it was not forked (start methods spawn and forkserver), it has its parent's command line, and loads the file of
    its parent's program once more before it does its work.
    """
    return multiprocessing.current_process().name != "MainProcess"


def follow_parent() -> None:
    """In a process that `multiprocessing` has just started: leave Ctrl-C to the parent, and end when it has ended.

    Without this, each child would print a traceback at Ctrl-C, and outlive a parent that was killed: it waits for work
    on a pipe that it, or another child, keeps open itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    if os.name == "nt" or os.getppid() != parent.pid:
        # On Windows the number of a parent stays when it has ended, and a fork server is not the parent that counts.
        # The other end of this pipe, or on Windows this handle, belongs to the parent alone.
        parent.join()
    else:  # forked processes keep the pipes of each other open
        while os.getppid() == parent.pid:
            time.sleep(SECONDS_BETWEEN_CHECKS)
    os._exit(1)


@contextmanager
def ended_children() -> Iterator[None]:
    """After the block, however it ends, no process is left that `multiprocessing` started in it.

    At its own end, Python waits for such processes as long as they live; and after an error, its traceback keeps alive
    what would have ended them.
    """
    before = multiprocessing.active_children()
    try:
        yield
    finally:
        _kill([child for child in multiprocessing.active_children() if child not in before])


def end_daemons_at_exit() -> None:
    """Kill this process's daemonic children when it exits: Python only sends them SIGTERM, which they may ignore."""
    _end_daemons_at_exit_of(os.getpid())


@cache
def _end_daemons_at_exit_of(_: int) -> None:
    Finalize(None, _kill_daemons, exitpriority=1)


def _kill_daemons() -> None:
    _kill([child for child in multiprocessing.active_children() if child.daemon])


def _kill(children: Sequence[BaseProcess]) -> None:
    """Kill processes, which hold nothing that must be saved, and wait for their end."""
    if children:
        with _unwatched_children():
            for child in children:
                child.kill()
            for child in children:
                child.join(SECONDS_TO_DIE)


@contextmanager
def _unwatched_children() -> Iterator[None]:
    """Within the block, no handler of SIGCHLD runs: torch has one that raises an error for each killed process."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)  # None: it was not set from Python
