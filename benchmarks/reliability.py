"""What is promised about bad data and failures, and the figures of the last test run.

    python benchmarks/reliability.py                 # print the table of benchmarks/RELIABILITY.md
    python benchmarks/reliability.py --write         # write it there
    python benchmarks/reliability.py --record        # run all these tests, slow ones included, and keep their figures
    python benchmarks/reliability.py --record kills  # only the tests of one promise

The figures are in `reliability.json`: what pytest counted, and what the tests record themselves. Figures under load
come from `load.jsonl`, which `load.py` writes.
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
    """A line of the table: what is promised, and the tests that check it (arguments of pytest)."""

    text: str
    tests: tuple[str, ...]


PROMISES = {
    "data": Promise(
        "Whatever a caption file, split file, recipe or flag contains, it gives exactly the rows and values it "
        "states, or a one-line error that names the file, row or key",
        ("tests/data/test_fuzz_data.py", "tests/training/test_fuzz_recipes.py"),
    ),
    "images": Promise(
        "An image of any mode and size and an array of any type give the same pixels as Pillow alone; a damaged file "
        "gives an image or an error that names it; any text, however odd, is embedded as if it were alone in its "
        "batch",
        ("tests/inference/test_fuzz_images.py",),
    ),
    "exports": Promise(
        "An export loads as the model that was saved, or raises an error, even if only one bit of its weights has "
        "flipped; pickled weights are never opened",
        ("tests/hub/test_fuzz_exports.py",),
    ),
    "index": Promise(
        "A damaged index gives the correct answers, or an error that names its folder, even if only one bit has "
        "flipped",
        ("tests/search/test_fuzz_index.py",),
    ),
    "concurrency": Promise(
        "An index gives the same answers to many threads and forked processes as to one, and an open index stays as "
        "it was when its folder is updated",
        ("tests/search/test_concurrency.py",),
    ),
    "folders": Promise(
        "Whenever a process dies while it replaces a folder, the folder is completely the old one or completely the "
        "new one",
        ("tests/utils/test_files.py",),
    ),
    "kills": Promise(
        "A run that is killed at any moment keeps every complete checkpoint and export, and after resuming it ends "
        "bit-identical to an uninterrupted run",
        ("tests/training/test_kills.py", "tests/training/test_checkpoints.py"),
    ),
    "disk": Promise(
        "On a full or read-only disk, a run says what it kept, and when it is resumed with enough space, it ends with "
        "the same result; two runs never share a folder",
        ("tests/training/test_output_dir.py",),
    ),
    "processes": Promise(
        "Two processes give the same gradients and results as one", ("tests/training/test_distributed.py",)
    ),
    "bad_images": Promise(
        "An undecodable image is skipped and changes nothing else, the same way for any number of processes, after "
        "resuming and with cached features; too many end the run; if a loader process dies, the error names the "
        "likely cause",
        ("tests/training/test_bad_images.py",),
    ),
    "checks": Promise(
        "`miniclip check` reports every kind of problem with its row and continues; the corrected copy has no "
        "problems",
        ("tests/data/test_check.py",),
    ),
    "untrusted": Promise(
        "File names in a dataset cannot leave its folder, pickled weights are rejected, YAML creates no objects, and "
        "neither messages nor model cards show control characters, markup or access tokens",
        ("tests/test_untrusted.py",),
    ),
    "trouble": Promise(
        "A run reports collapsed embeddings and a loss that is not finite or stuck at chance, and saves no damaged "
        "state",
        ("tests/training/test_diagnostics.py",),
    ),
    "commands": Promise(
        "A command ends with exit code 2 if it is wrong and 1 for any other failure, and explains it in one line",
        ("tests/test_cli.py", "tests/test_package.py"),
    ),
    "pushes": Promise(
        "Wherever a push fails, the target stays as it was, and no access token is shown",
        ("tests/hub/test_push.py", "tests/hub/test_export.py", "tests/test_errors.py"),
    ),
}
LOADS = {
    "page": "`miniclip app` serves many users at once without an error",
    "encode": "The memory of `encode_images` does not grow with the number of images",
    "index": "`miniclip index` needs only a few kB more memory per image",
}
LOAD_WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "page": lambda x: (
        f"{x['users']} users for {x['seconds']:.0f} s: {x['searches']:,} searches and {x['files']:,} pictures, "
        f"{x['errors']} errors, answers within {x['answer'][1]:.1f} s (p99), {x['memory'][2]:.0f} MiB after half "
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
# What tests record themselves, in words.
COUNTED = {"cases": "inputs tested", "kills": "kills survived", "faults": "full disks survived"}


def record(name: str) -> dict[str, Any]:
    """Run the tests of a promise, slow ones included, and count.

    Raises:
        SystemExit: a test failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        start = time.monotonic()
        code = subprocess.run([*command, *PROMISES[name].tests], cwd=ROOT, env={**os.environ}).returncode
        if code:
            sys.exit(f"{name}: pytest exit code {code}; the recorded counts stay as they were")
        return count(report) | {"seconds": round(time.monotonic() - start), "date": time.strftime("%Y-%m-%d")}


def count(report: Path) -> dict[str, int]:
    """Numbers of passed and skipped tests in a JUnit report, and the sums of what they recorded."""
    figures = {"passed": 0, "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase"):
        figures["skipped" if case.find("skipped") is not None else "passed"] += 1
        for entry in case.iter("property"):
            if entry.get("name") in COUNTED:
                figures[entry.attrib["name"]] = figures.get(entry.attrib["name"], 0) + int(entry.attrib["value"])
    return figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the promises with the results of their last run."""
    lines = ["| promise | tests | last run |", "|---|---|---|"]
    for name, promise in PROMISES.items():
        tests = ", ".join(f"[{Path(path).name}](../{path})" for path in promise.tests)
        lines.append(f"| {promise.text} | {tests} | {in_words(figures.get(name))} |")
    measured = [json.loads(line) for line in LOAD.read_text(encoding="utf-8").splitlines()] if LOAD.exists() else []
    for part, text in LOADS.items():
        results = [LOAD_WORDS[part](line) for line in measured if line["part"] == part]
        lines.append(f"| {text} | [load.py](load.py), [load.md](load.md) | {'; '.join(results) or 'not recorded'} |")
    return "\n".join(lines) + "\n"


def in_words(figures: dict[str, Any] | None) -> str:
    """A cell of the table: what was counted, and when."""
    if figures is None:
        return "not recorded"
    parts = [f"{figures[key]:,} {words}" for key, words in COUNTED.items() if key in figures]
    parts.append(f"{figures['passed']} tests passed")
    if figures["skipped"]:
        parts.append(f"{figures['skipped']} skipped")
    return f"{', '.join(parts)} ({figures['date']})"


def main() -> None:
    """Record, write or print the table."""
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
