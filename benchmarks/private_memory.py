"""Memory that processes have for themselves: pages backed by files, such as memory-mapped tables, are not counted."""

import re
import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType

INTERVAL = 0.05  # seconds between two samples


def private_mib(pid: int) -> float:
    """`RssAnon` and `RssShmem` of a process (proc(5)), in MiB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))) / 2**10


def process_tree(pid: int) -> list[int]:
    """A process and all that it started, directly or not."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # it has ended
                continue
    return found


class PeakMemory:
    """Samples the private memory of a process tree within a `with` block.

    Attributes:
        total: highest sum over all processes, MiB.
        largest: highest value of any single process, MiB.
    """

    def __init__(self, pid: int):
        self.pid, self.total = pid, 0.0
        self.peaks: dict[int, float] = defaultdict(float)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def largest(self) -> float:
        return max(self.peaks.values(), default=0.0)

    def __enter__(self) -> "PeakMemory":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()

    def _sample(self) -> None:
        while not self.ended.wait(INTERVAL):
            now = {pid: private_mib(pid) for pid in process_tree(self.pid)}
            self.total = max(self.total, sum(now.values()))
            for pid, value in now.items():
                self.peaks[pid] = max(self.peaks[pid], value)
