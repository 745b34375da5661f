"""Counts the skips of a run, prints them with their reasons, and fails the run for one that is not in skips.py."""

from collections import Counter

import pytest

from tests.conformance import upstream
from tests.conformance.skips import NOT_RUN, SKIPPED_UPSTREAM, skip_reason

upstream.mount()
_skips: Counter[str] = Counter()
_unlisted: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    for mark in ("accelerate", "flash_attn", "flash_attn_3", "flash_attn_4", "torch_compile", "generate"):
        config.addinivalue_line("markers", f"{mark}_tests: upstream's")
        config.addinivalue_line("markers", f"{mark}_test: upstream's")


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
        why = SKIPPED_UPSTREAM.get(reason)
        terminalreporter.write_line(f"{count:4}  {reason}{f': {why}' if why else ''}")
    for module, why in NOT_RUN.items():
        terminalreporter.write_line(f"   -  {module}: {why}")
    for test, reason in _unlisted.items():
        terminalreporter.write_line(f"FAILED {test}: skipped for a reason that is not listed: {reason}", red=True)
