"""Train in forks of a clean process, which has loaded the libraries: a new process would import them for seconds.

PyTorch cannot run backward in the fork of a process that has. So `clean_process` is forked before the first test, when
everything has been imported and nothing has run, and forks whenever a test needs a process.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import pytest

_requests: socket.socket  # to the clean process


class Fork:
    """A function that runs in a fork of the clean process, until it returns or this object is deleted.

    Attributes:
        pid: id of the process.
        exitcode: exit code, negative for the signal that killed it; None until `join` has seen the end.
        result: what the function returned.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        self.pid: int = connection.recv()
        self.exitcode: int | None = None
        self.result: Any = None

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the process, for at most `timeout` seconds."""
        while self.exitcode is None and self._connection.poll(timeout):
            name, value = self._connection.recv()
            setattr(self, name, value)

    def kill(self) -> None:
        """Kill the process, if it has not ended."""
        if self.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)


def fork(function: Callable[..., Any], *args: Any) -> Fork:
    """Start a function of a module in a fork of the clean process; arguments and result are pickled."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork processes")
    ours, theirs = multiprocessing.Pipe()
    socket.send_fds(_requests, [b"fork"], [theirs.fileno()])
    theirs.close()
    ours.send_bytes(pickle.dumps((function, args)))
    return Fork(ours)


@pytest.fixture(scope="session", autouse=True)
def clean_process() -> Iterator[None]:
    """Start the process before the first test; it ends with the session or with this process."""
    if not hasattr(os, "fork"):
        yield
        return
    global _requests
    _requests, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _requests.close()
        _serve(theirs)
    theirs.close()
    yield
    _requests.close()
    os.waitpid(pid, 0)


def _serve(requests: socket.socket) -> NoReturn:
    """Start a keeper for each connection that arrives, until the test process closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    try:
        while descriptors := socket.recv_fds(requests, len(b"fork"), 1)[1]:
            _import_late_modules()
            if os.fork() == 0:
                requests.close()
                _keep(Connection(descriptors[0]))
                break
            os.close(descriptors[0])
    finally:
        os._exit(0)


def _import_late_modules() -> None:
    """Import what a run only imports when it needs it, so that not each fork does."""
    import albumentations.pytorch  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import transformers.models.bert.tokenization_bert  # noqa: F401
    import transformers.models.distilbert.modeling_distilbert  # noqa: F401

    with suppress(ImportError):
        import deepspeed  # noqa: F401  (accelerate imports it, where it is installed, when a model is saved)


def _reap() -> None:
    """Wait for the keepers that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _keep(connection: Connection) -> None:
    """Run what is requested in a process and report its end; kill it if the test process drops the connection."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(connection, connection.recv_bytes()))

    def kill_if_dropped() -> None:
        if connection.poll(None):
            process.kill()

    process.start()
    threading.Thread(target=kill_if_dropped, daemon=True).start()
    process.join()
    connection.send(("exitcode", process.exitcode))


def _run(connection: Connection, call: bytes) -> None:
    connection.send(os.getpid())
    function, args = pickle.loads(call)
    connection.send(("result", function(*args)))


def train_in_processes(
    argv: list[str],
    processes: int,
    log: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[int], object] | None = None,
) -> str:
    """Run `train_miniclip.main` in several processes joined by gloo, as a launcher would.

    Args:
        argv: flags of the run.
        processes: number of processes.
        log: file for the output of all processes.
        environment: more variables of their environment.
        before: function of a module that each process calls first, with its rank.

    Returns:
        The output.
    """
    ranks = start_in_processes(argv, processes, log, environment, before)
    for process in ranks:
        process.join(120)
    output = log.read_text(encoding="utf-8", errors="replace")
    assert [process.exitcode for process in ranks] == [0] * processes, output[-3000:]
    return output


def start_in_processes(
    argv: list[str],
    processes: int,
    log: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[int], object] | None = None,
) -> list[Fork]:
    """Like `train_in_processes`, without waiting for the end; returns the processes."""
    port = free_port()
    return [
        fork(_train_as_rank, argv, rank, processes, port, log, environment or {}, before) for rank in range(processes)
    ]


def _train_as_rank(
    argv: list[str],
    rank: int,
    processes: int,
    port: int,
    log: Path,
    environment: dict[str, str],
    before: Callable[[int], object] | None = None,
) -> None:
    from tests.helpers.runs import leave_out_figures
    from train_miniclip import main

    write_to(log)
    leave_out_figures(pytest.MonkeyPatch())
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in values.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= environment
    if before is not None:
        before(rank)
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
