"""Apply faults to temporary copies of the checkout, one at a time, and run the tests that must catch them.

Each run of pytest is forked from a process that has imported the large libraries already, which saves seconds a fault.
"""

import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.mutants.faults import Fault

CAUGHT, SURVIVED = "caught", "SURVIVED"
SECONDS = 300  # limit of one run of pytest
IGNORED = (".*", "__pycache__", "build", "dist", "runs", "miniclip-output", "miniclip-scenes")
PRELOADED = (
    "accelerate",
    "albumentations",
    "datasets",
    "pytest",
    "timm",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.distilbert.modeling_distilbert",
    "transformers.models.timm_wrapper.modeling_timm_wrapper",
    "transformers.processing_utils",
)


def try_faults(faults: Sequence[Fault], root: Path, jobs: int = 2) -> int:
    """Try each fault and print its outcome.

    Args:
        faults: faults to try.
        root: checkout to copy; it is not changed.
        jobs: number of faults to try at the same time.

    Returns:
        0 if the tests pass without a fault and catch every fault, else 1.
    """
    selections = list(dict.fromkeys(fault.tests for fault in faults))
    with tempfile.TemporaryDirectory(prefix="mutants-") as work, ThreadPoolExecutor(jobs) as threads:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copies.put(Path(shutil.copytree(root, Path(work, str(number)), ignore=shutil.ignore_patterns(*IGNORED))))

        def without_fault(tests: tuple[str, ...]) -> int:
            with taken_from(copies) as copy:
                code, output = run_pytest(copy, root, tests)
            if code != 0:
                print(f"{' '.join(tests)} fails without a fault (pytest exit code {code}):\n{output}", flush=True)
            return code

        def with_fault(fault: Fault) -> str:
            with taken_from(copies) as copy:
                outcome = try_fault(fault, copy, root)
            print(f"{outcome:9} {fault.file}: {fault.what}", flush=True)
            return outcome

        if any(list(threads.map(without_fault, selections))):
            return 1
        print(f"the tests pass without a fault; trying {len(faults)} faults", flush=True)
        outcomes = list(threads.map(with_fault, faults))
    print(f"{outcomes.count(CAUGHT)} of {len(faults)} faults caught")
    return 0 if outcomes.count(CAUGHT) == len(faults) else 1


@contextlib.contextmanager
def taken_from(copies: "SimpleQueue[Path]") -> Iterator[Path]:
    """One of the copies, which nobody else uses within the block."""
    copy = copies.get()
    try:
        yield copy
    finally:
        copies.put(copy)


def try_fault(fault: Fault, copy: Path, root: Path) -> str:
    """Apply a fault to a copy of the checkout, run its tests, and restore the file.

    Returns:
        `"caught"`, `"SURVIVED"`, or why the fault could not be tried.
    """
    path = copy / fault.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (count := text.count(fault.old)) != 1:
        return f"NOT FOUND ({count} times {fault.old!r})"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        code, output = run_pytest(copy, root, ["-x", *fault.tests])
    finally:
        shutil.copy2(root / fault.file, path)  # with its time, so that bytecode of the fault is not used again
    if code == pytest.ExitCode.TESTS_FAILED:
        return CAUGHT
    return SURVIVED if code == 0 else f"NOT RUN (pytest exit code {code}):\n{output}\n"


def run_pytest(copy: Path, root: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and last lines of pytest in a copy of the checkout; -1 for a run that takes too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    log = copy.with_name(f"{copy.name}.log")
    process = context.Process(target=_pytest_in_child, args=(copy, root, log, list(arguments)))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return -1, f"no end after {SECONDS} s"
    return process.exitcode or 0, "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


def _pytest_in_child(copy: Path, root: Path, log: Path, arguments: list[str]) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # the tests start processes as usual, not by the fork server
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    os.environ.pop("PYTHONWARNINGS", None)
    os.environ.setdefault("MINICLIP_SHARED", str(root.parent / "shared"))
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # those of the copy are to be imported
    code = pytest.main(["-q", "-n", "0", *arguments])
    sys.stdout.flush()
    os._exit(code)
