"""The helper that runs functions in forks of a clean process."""

import os
import signal
import time

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.helpers.forks import fork


def end_with(code: int) -> None:
    raise SystemExit(code)


def gradient_of_square(value: float) -> float:
    x = torch.tensor(value, requires_grad=True)
    (x * x).backward()
    assert x.grad is not None
    return x.grad.item()


def test_fork_reports_result_and_exit_code() -> None:
    process = fork(divmod, 7, 2)
    process.join(60)
    assert (process.result, process.exitcode) == ((3, 1), 0)
    process = fork(end_with, 3)
    process.join(60)
    assert (process.result, process.exitcode) == (None, 3)
    process = fork(divmod, 1, 0)  # an error, whose traceback is printed
    process.join(60)
    assert process.exitcode == 1


def test_fork_can_be_killed() -> None:
    process = fork(time.sleep, 100)
    process.join(0.01)
    assert process.exitcode is None and process.pid != os.getpid()
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_dropped_fork_dies() -> None:
    process = fork(time.sleep, 100)
    pid = process.pid
    del process
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.01)


def test_forks_run_backward_after_autograd_started_threads() -> None:
    with FakeTensorMode():  # starts threads of autograd; after that, no fork of this process can run backward
        torch.ones(1, requires_grad=True).sum().backward()
    process = fork(gradient_of_square, 3.0)
    process.join(60)
    assert process.result == 6.0
