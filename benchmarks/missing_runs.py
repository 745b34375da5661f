"""Record the runs of a benchmark that are not recorded yet, so that it can be stopped and started again."""

import gc
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from modeling_miniclip.utils.performance import release_freed_memory

Line = dict[str, Any]


def recorded(path: Path) -> list[Line]:
    """Recorded lines, one per run; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def is_of(line: Line, run: Line) -> bool:
    """Whether a recorded line has all values that identify a run."""
    return all(name in line and line[name] == value for name, value in run.items())


def record_missing(
    path: Path, runs: Iterable[Line], measure: Callable[[Line], Line], same: Callable[[Line, Line], bool] = is_of
) -> None:
    """Measure each run that is not recorded yet, and add one line for it.

    Args:
        path: JSON Lines file.
        runs: what identifies each run, such as its variant and seed.
        measure: takes a run; its figures, which are recorded after what identifies it.
        same: takes a recorded line and a run; whether the line is the run's.
    """
    for run in runs:
        if any(same(line, run) for line in recorded(path)):
            continue
        line = run | measure(run)
        gc.collect()
        release_freed_memory()  # or each loader process of the next run would hold a copy of it
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
