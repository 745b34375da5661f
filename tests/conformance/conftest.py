"""Counts the skips of a run, prints them with their reasons, and fails the run for one that is not in skips.py."""

from collections import Counter

import pytest

from tests.conformance import upstream
from tests.conformance.skips import FAILING, NOT_RUN, SKIPPED_UPSTREAM, SWITCHED_OFF, skip_reason

MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "torch_compile_test",
)

upstream.mount()
_skips: Counter[str] = Counter()
_unlisted: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: upstream's")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2]
    listed = skip_reason(reason)
    if listed is None:
        _unlisted[report.nodeid] = reason
    else:
        _skips[listed] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unlisted:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("skipped, and why (tests/conformance/skips.py)")
    for reason, count in sorted(_skips.items()):
        terminalreporter.write_line(f"{count:4}  {reason}: {SKIPPED_UPSTREAM[reason]}")
    for what, why in (FAILING | SWITCHED_OFF | NOT_RUN).items():
        terminalreporter.write_line(f"   -  {what}: {why}")
    for test, reason in _unlisted.items():
        terminalreporter.write_line(f"FAILED {test}: skipped for a reason that is not listed: {reason}", red=True)
