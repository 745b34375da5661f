"""Let Ctrl-C, SIGTERM and the program itself end a run only after the current step, with a checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from ...utils.interrupts import TERMINATING

# The line to print for each signal. SIGTERM, which leaves less time, comes first: it wins if processes got different
# ones.
MESSAGES = {
    signal.SIGTERM: "SIGTERM: saving after this step",
    signal.SIGINT: "Ctrl-C: saving after this step; press again to stop at once",
}


class SignalHandler:
    """Defers Ctrl-C and SIGTERM to the end of the current step, so that the run can save and exit.

    A second Ctrl-C ends the run at once, as SIGKILL does. Schedulers (Slurm, Kubernetes) send SIGTERM some seconds
    before SIGKILL.

    Args:
        report: function that prints a line when the first signal arrives.
    """

    def __init__(self, report: Callable[[str], None]):
        self.report = report
        self.received: signal.Signals | None = None
        self.stopped = False  # by the program itself
        self.agreed: signal.Signals | None = None  # the last result of `received_by_any_process`
        self.since = 0.0

    @property
    def terminated(self) -> bool:
        """Whether the processes agreed on SIGTERM: only seconds are left."""
        return self.agreed == signal.SIGTERM

    @property
    def wanted(self) -> signal.Signals | None:
        """How this process wants the run to end; None while it does not."""
        return self.received or (signal.SIGINT if self.stopped else None)

    def stop(self) -> None:
        """End the run after the current step, as Ctrl-C does."""
        self.stopped = True

    def __enter__(self) -> "SignalHandler":
        self.process = os.getpid()
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # the only one that receives signals
            numbers = (*TERMINATING, signal.SIGINT)
            self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def _handle(self, number: int, _: object) -> None:
        if os.getpid() != self.process:  # a loader process that was just forked
            return
        asked = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM  # or Ctrl-Break, on Windows
        # A launcher forwards what the terminal or the scheduler sent to all processes: that is not a second signal.
        if self.received is None:
            self.received, self.since = asked, time.monotonic()
            self.report(MESSAGES[self.received])
        elif asked == signal.SIGTERM:
            self.received = signal.SIGTERM
        elif time.monotonic() > self.since + 1:
            signal.signal(number, self.previous[number] or signal.SIG_DFL)
            signal.raise_signal(number)

    def received_by_any_process(self, accelerator: Accelerator) -> bool:
        """Whether any process got a signal or was stopped; every process must ask at the same step, and all agree."""
        if accelerator.num_processes == 1:
            self.agreed = self.wanted
        else:
            flags = torch.tensor([self.wanted == number for number in MESSAGES], device=accelerator.device).int()
            flags = accelerator.reduce(flags, "sum")
            self.agreed = next((number for number, count in zip(MESSAGES, flags, strict=True) if count), None)
        return self.agreed is not None
