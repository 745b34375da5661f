"""What is promised of bad data and bad days, and how it went when it was tried last.

    python benchmarks/reliability.py                 # print the table of benchmarks/RELIABILITY.md
    python benchmarks/reliability.py --write         # write it there
    python benchmarks/reliability.py --record        # run all these tests, the slow ones too, and keep their figures
    python benchmarks/reliability.py --record kills  # those of one line

The figures are in `reliability.json`: what pytest counted, and what the tests record of themselves. Those under load
are of `load.jsonl`, which `load.py` measures.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FIGURES, LOAD, PAGE = HERE / "reliability.json", HERE / "load.jsonl", HERE / "RELIABILITY.md"
BEGIN, END = "<!-- figures: written by `python benchmarks/reliability.py --write` -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Promise:
    """A line of the table: what is promised, and the tests that try it (arguments of pytest)."""

    text: str
    tests: tuple[str, ...]


PROMISES = {
    "data": Promise(
        "A caption file, split file, recipe or flag ends in exactly the rows and values that it says, or in one line "
        "with file, row or key; nothing else, whatever is in it",
        ("tests/data/test_fuzz_data.py",),
    ),
    "images": Promise(
        "An image of any mode and size and an array of any type become the same pixels as by Pillow alone, a damaged "
        "file an image or an error with its name; a text is embedded as if it were alone, however odd",
        ("tests/inference/test_fuzz_images.py",),
    ),
    "exports": Promise(
        "An export loads as the model that was saved, or is told: one flipped bit in the weights is enough; pickles "
        "are not opened",
        ("tests/hub/test_fuzz_exports.py",),
    ),
    "index": Promise(
        "A damaged index gives the answers of the whole one, or is told with its folder: one flipped bit is enough",
        ("tests/search/test_fuzz_index.py",),
    ),
    "concurrency": Promise(
        "An index gives many threads and forked processes the answers that it gives to one, and stays what it was "
        "when its folder is updated",
        ("tests/search/test_concurrency.py",),
    ),
    "folders": Promise(
        "A folder that is replaced is the old or the new one, whole, whenever the process dies",
        ("tests/utils/test_files.py",),
    ),
    "kills": Promise(
        "A run killed at any moment keeps every complete checkpoint and export, and resumed ends with the bits of one "
        "that was not",
        ("tests/training/test_kills.py", "tests/training/test_checkpoints.py"),
    ),
    "disk": Promise(
        "On a full or read-only disk a run says what is left, and ends the same once there is room; two runs never "
        "share a folder",
        ("tests/training/test_output_dir.py",),
    ),
    "processes": Promise(
        "Two processes give the gradients and results of one", ("tests/training/test_distributed.py",)
    ),
    "bad_images": Promise(
        "An undecodable image costs that image and nothing else, the same for any number of processes, after resuming "
        "and from cached features; too many end the run; a loader process that dies is told with the likely cause",
        ("tests/training/test_bad_images.py",),
    ),
    "checks": Promise(
        "`miniclip check` finds each kind of problem at its row and reads on; the mended copy has none of them",
        ("tests/data/test_check.py",),
    ),
    "untrusted": Promise(
        "Names stay in their folder, pickles are refused, YAML makes no objects, and neither a message nor a card "
        "shows control characters, markup or a token",
        ("tests/test_untrusted.py",),
    ),
    "trouble": Promise(
        "A loss that is not a number, one stuck at chance, collapsed embeddings: told, and no damaged state saved",
        ("tests/training/test_diagnostics.py",),
    ),
    "commands": Promise(
        "A command ends with code 2 where it has to be written otherwise, with 1 for any other failure, and tells it "
        "in one line",
        ("tests/test_cli.py", "tests/test_package.py"),
    ),
    "pushes": Promise(
        "A push that fails anywhere leaves the target as it was, and no token is told",
        ("tests/hub/test_push.py", "tests/hub/test_export.py", "tests/test_errors.py"),
    ),
}
LOADS = {
    "page": "`miniclip app` answers many users at once without an error",
    "encode": "The memory of `encode_images` does not grow with the number of images",
    "index": "`miniclip index` takes little more memory for ten times as many images: a few kB each",
}
LOAD_WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "page": lambda x: (
        f"{x['users']} users for {x['seconds']:.0f} s: {x['searches']:,} searches and {x['files']:,} pictures, "
        f"{x['errors']} errors, an answer within {x['answer'][1]:.1f} s (p99), {x['memory'][2]:.0f} MiB after half "
        f"of the time, {x['memory'][3]:.0f} MiB at the end"
    ),
    **dict.fromkeys(
        ("encode", "index"),
        lambda x: (
            f"{x['memory'][0]:.0f} MiB with {x['images'] // 10:,} images, {x['memory'][1]:.0f} MiB with "
            f"{x['images']:,}"
        ),
    ),
}
# What tests record of themselves, in words.
COUNTED = {"cases": "inputs tried", "kills": "kills survived", "faults": "full disks survived"}


def record(name: str) -> dict[str, Any]:
    """Run the tests of a promise, the slow ones too, and count.

    Raises:
        SystemExit: one failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        start = time.monotonic()
        code = subprocess.run([*command, *PROMISES[name].tests], cwd=ROOT, env={**os.environ}).returncode
        if code:
            sys.exit(f"{name}: pytest ended with code {code}; its figures stay as they were")
        return count(report) | {"seconds": round(time.monotonic() - start), "date": time.strftime("%Y-%m-%d")}


def count(report: Path) -> dict[str, int]:
    """Tests that passed or were skipped, and the sums of what they recorded, of a JUnit report."""
    figures = {"passed": 0, "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase"):
        figures["skipped" if case.find("skipped") is not None else "passed"] += 1
        for entry in case.iter("property"):
            if entry.get("name") in COUNTED:
                figures[entry.attrib["name"]] = figures.get(entry.attrib["name"], 0) + int(entry.attrib["value"])
    return figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The promises with the figures of their last run, as Markdown."""
    lines = ["| promise | tests | last run |", "|---|---|---|"]
    for name, promise in PROMISES.items():
        tests = ", ".join(f"[{Path(path).name}](../{path})" for path in promise.tests)
        lines.append(f"| {promise.text} | {tests} | {in_words(figures.get(name))} |")
    measured = [json.loads(line) for line in LOAD.read_text(encoding="utf-8").splitlines()] if LOAD.exists() else []
    for part, text in LOADS.items():
        told = [LOAD_WORDS[part](line) for line in measured if line["part"] == part]
        lines.append(f"| {text} | [load.py](load.py), [load.md](load.md) | {'; '.join(told) or 'not recorded'} |")
    return "\n".join(lines) + "\n"


def in_words(figures: dict[str, Any] | None) -> str:
    """One cell: what was counted, and when."""
    if figures is None:
        return "not recorded"
    parts = [f"{figures[key]:,} {words}" for key, words in COUNTED.items() if key in figures]
    parts.append(f"{figures['passed']} tests passed")
    if figures["skipped"]:
        parts.append(f"{figures['skipped']} skipped")
    return f"{', '.join(parts)} ({figures['date']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into RELIABILITY.md")
    parser.add_argument("--record", nargs="*", choices=[*PROMISES, []], metavar="NAME", help=", ".join(PROMISES))
    args = parser.parse_args()
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    if args.record is not None:
        for name in args.record or PROMISES:
            figures[name] = record(name)
            FIGURES.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(figures)}{END}{rest.split(END)[1]}", encoding="utf-8")
    else:
        print(table(figures), end="")


if __name__ == "__main__":
    main()
