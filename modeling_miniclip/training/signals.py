"""Ctrl-C and SIGTERM end a run at the end of a step."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

# What is told at a signal. SIGTERM, which leaves less time, goes first where processes got different ones.
HANDLED = {
    signal.SIGTERM: "SIGTERM: saving after this step",
    signal.SIGINT: "Ctrl-C: saving after this step; again to stop at once",
}


class Interrupt:
    """Within the block Ctrl-C and SIGTERM only make themselves known, so that a run ends in good order.

    A second Ctrl-C ends it at once, as SIGKILL does. SIGTERM is what schedulers (Slurm, Kubernetes) send some seconds
    before that.

    Args:
        told: called with a line when the first one came.
    """

    def __init__(self, told: Callable[[str], None]):
        self.told = told
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None  # as `in_any_process` found last
        self.since = 0.0

    def __enter__(self) -> "Interrupt":
        self.process = os.getpid()
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # the only one that gets signals
            self.previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _handle(self, number: int, _: object) -> None:
        if os.getpid() != self.process:  # a loader's process that was just forked
            return
        # A launcher passes on what the terminal or the scheduler sent to all: that is not a second one.
        if self.received is None:
            self.received, self.since = signal.Signals(number), time.monotonic()
            self.told(HANDLED[self.received])
        elif number == signal.SIGTERM:
            self.received = signal.SIGTERM
        elif time.monotonic() > self.since + 1:
            signal.signal(number, self.previous[number] or signal.SIG_DFL)
            signal.raise_signal(number)

    def in_any_process(self, accelerator: Any) -> bool:
        """Whether any process was interrupted; every process has to ask at the same step and gets the same answer."""
        if accelerator.num_processes == 1:
            self.agreed = self.received
        else:
            flags = torch.tensor([self.received == s for s in HANDLED], device=accelerator.device).int()
            flags = accelerator.reduce(flags, "sum")
            self.agreed = next((s for s, count in zip(HANDLED, flags, strict=True) if count), None)
        return self.agreed is not None
