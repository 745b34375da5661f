"""What `make bench` names, and the facts that a record carries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def lines(*ratios: float) -> list[dict[str, object]]:
    """Turns of the group `encode` in which the package is that many times as fast as the bare tower."""
    return [
        {"group": "encode", "side": side, "turn": turn, "images_per_second": rate}
        for turn, ratio in enumerate(ratios)
        for side, rate in (("encode_timm", 10.0), ("encode_package", 10.0 * ratio))
    ]


@pytest.mark.parametrize(
    ("now", "is_lower"), [((1.5, 1.9), True), ((1.5, 2.05), False), ((2.0,), False), ((9.0,), False)]
)
def test_a_ratio_is_lower_if_its_range_lies_below_the_recorded_one(
    monkeypatch: pytest.MonkeyPatch, now: tuple[float, ...], is_lower: bool
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench  # type: ignore[import-not-found]

    unfinished = [*lines(*now), {"group": "encode", "side": "encode_timm", "turn": 9, "images_per_second": 1e9}]
    table, lower = bench.compare(unfinished, lines(2.0, 2.2, 2.1))
    assert len(lower) == is_lower and all("bare tower with default settings" in what for what in lower)
    (row,) = table.splitlines()[2:]
    cells = [f"{min(now):.2f} to {max(now):.2f}", "2.00 to 2.20", "lower" if is_lower else ""]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == cells


def test_a_record_names_commit_and_machine() -> None:
    argv = [sys.executable, "benchmarks/machine.py"]
    done = subprocess.run(argv, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts.keys() == {"commit", "processor", "cores", "memory_gib", "torch"}
    assert facts["cores"] >= 1 and facts["memory_gib"] >= 1 and facts["torch"][0].isdigit()
