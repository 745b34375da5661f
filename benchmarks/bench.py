"""Compare this machine's ratios with the recorded ones, or record the speed and memory pages again in one sitting.

    make bench                                  # what fits into ten minutes
    python benchmarks/bench.py --record         # an hour or two: rewrites the pages

A ratio is named as lower if its range over the turns lies wholly below the recorded range; the exit code is 1 then.
The data and towers are those of `MINICLIP_SHARED`, else `../shared`, unless given as flags of `speed.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import made_with
from speed import GROUPS, RESULTS, ROWS, Row, measure

HERE = Path(__file__).resolve().parent
QUICK = [name for name in GROUPS if name != "race"]  # the race alone takes longer than all others
FLAGS = ("dataset", "vision_model", "text_model")
Line = dict[str, Any]


@dataclass(frozen=True)
class Page:
    """A page and the command that writes it: the script's own file, or what it prints."""

    script: str
    flags: Callable[[argparse.Namespace], Iterable[str]]
    printed: str | None = None


def _named(args: argparse.Namespace) -> list[str]:
    return [f"--{name}={getattr(args, name)}" for name in FLAGS]


PAGES = [
    Page("speed.py", _named),
    Page("startup.py", _named),
    Page("memory.py", lambda args: [getattr(args, name) for name in FLAGS], "memory.md"),
    Page("loss.py", lambda args: [], "loss.md"),
    Page("eval_memory.py", lambda args: [], "eval_memory.md"),
]


def ratios(row: Row, lines: list[Line]) -> list[float]:
    """The row's ratio in each turn that has both sides."""
    sides = [
        {line["turn"]: line[row.number] for line in lines if (line["group"], line["side"]) == (row.group, side)}
        for side in row.sides
    ]
    return [row.compare(sides[0][turn], sides[1][turn]) for turn in sorted(sides[0].keys() & sides[1].keys())]


def compare(lines: list[Line], recorded: list[Line]) -> tuple[str, list[str]]:
    """A table of each ratio with the recorded one, and what is lower than it was."""
    table = ["| what | now | recorded | |", "|---|---:|---:|---|"]
    lower = []
    for row in (row for row in ROWS if row.unit == "x"):
        now, then = ratios(row, lines), ratios(row, recorded)
        if not now or not then:
            continue
        is_lower = max(now) < min(then)
        lower += [row.what] * is_lower
        ranges = [f"{min(values):.2f} to {max(values):.2f}" for values in (now, then)]
        table.append(f"| {row.what} | {' | '.join(ranges)} | {'lower' if is_lower else ''} |")
    return "\n".join(table), lower


def turns_within(seconds: float, flags: list[str]) -> list[Line]:
    """Measure all groups again and again, as long as the next group is expected to end in time."""
    end, lines, took = time.monotonic() + seconds, list[Line](), dict[str, float]()
    turn = 0
    while True:
        for name in QUICK:
            start = time.monotonic()
            if start + took.get(name, 0.0) > end:
                return lines
            for side in GROUPS[name].sides:
                lines.append({"group": name, "side": side, "turn": turn, **measure(GROUPS[name], side, flags)})
            took[name] = time.monotonic() - start
            print(f"turn {turn + 1}, {name}: {took[name]:.0f} s", file=sys.stderr, flush=True)
        turn += 1


def record(args: argparse.Namespace) -> None:
    """Run the script of each page; what it prints replaces the page once it has ended well."""
    details = made_with()
    facts = "{processor}, {cores} cores, {memory_gib} GiB, torch {torch}, commit {commit}".format(**details)
    for page in PAGES:
        print(f"{page.script} ...", file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / page.script), *page.flags(args)]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "TQDM_DISABLE": "1"}
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        path = HERE / (page.printed or page.script.replace(".py", ".md"))
        text = printed if page.printed else path.read_text(encoding="utf-8")
        path.write_text(f"{text.rstrip()}\n\nRecorded by `bench.py --record`: {facts}.\n", encoding="utf-8")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the data and towers, by default those of the shared folder."""
    shared = Path(os.environ.get("MINICLIP_SHARED", HERE.parent.parent / "shared"))
    usual = (
        shared / "flickr8k",
        shared / "weights" / "tf_efficientnet_lite0",
        shared / "weights" / "all-MiniLM-L6-v2",
    )
    for name, path in zip(FLAGS, usual, strict=True):
        parser.add_argument(f"--{name}", default=str(path))


def check_data(args: argparse.Namespace) -> None:
    """End with a message if data or towers are missing."""
    missing = [name for name in FLAGS if not Path(getattr(args, name)).exists()]
    if missing:
        sys.exit(f"--{missing[0]}: {getattr(args, missing[0])} does not exist; set MINICLIP_SHARED or pass the flag")


def main(argv: list[str]) -> int:
    """Measure and compare, or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    parser.add_argument("--minutes", type=float, default=10.0, help="time to measure (10)")
    parser.add_argument("--record", action="store_true", help="write the pages again")
    args = parser.parse_args(argv)
    check_data(args)
    if args.record:
        record(args)
        return 0
    recorded = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = turns_within(60 * args.minutes, [*_named(args), "--text_pooling=mean"])
    table, lower = compare(lines, recorded)
    print(table)
    print("lower than recorded: " + "; ".join(lower) if lower else "no ratio is lower than recorded")
    return 1 if lower else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
