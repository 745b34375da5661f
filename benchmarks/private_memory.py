"""Memory that processes have for themselves: pages backed by files, such as memory-mapped tables, are not counted."""

import re
import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType

INTERVAL = 0.2  # seconds between two samples
SHARES_EVERY = 10  # samples between two of the sum over all processes, which takes the kernel long


def private_mib(pid: int) -> float:
    """`RssAnon` and `RssShmem` of a process (proc(5)), in MiB; 0 once it has ended."""
    return _sum_of(Path(f"/proc/{pid}/status"), r"^Rss(?:Anon|Shmem):\s+(\d+) kB")


def share_mib(pid: int) -> float:
    """The same as a part of all processes: a page that a forked process has in common with others counts in parts."""
    return _sum_of(Path(f"/proc/{pid}/smaps_rollup"), r"^Pss_(?:Anon|Shmem):\s+(\d+) kB")


def _sum_of(path: Path, pattern: str) -> float:
    try:
        return sum(map(int, re.findall(pattern, path.read_text(), re.MULTILINE))) / 2**10
    except OSError:  # the process has ended
        return 0.0


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
        total: highest sum over all processes, sampled less often, MiB; shared pages count once.
        largest: highest value of any single process, MiB; shared pages count in full.
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
        samples = 0
        while not self.ended.wait(INTERVAL):
            processes = process_tree(self.pid)
            for pid in processes:
                self.peaks[pid] = max(self.peaks[pid], private_mib(pid))
            if samples % SHARES_EVERY == 0:
                self.total = max(self.total, sum(map(share_mib, processes)))
            samples += 1
