"""Each case for the clients, and a summary of what was compared: `make test-clients` prints it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # nothing may import the package before the tests are collected
    from tests.clients.cases import Case

CLIENTS = (
    "sentence-transformers",
    "clip-benchmark",
    "timm",
    "transformers",
    "torch",
    "huggingface-hub",
    "duckdb",
    "lancedb",
)
COMPARED: list[str] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each of the cases whose data is there."""
    from tests.clients.cases import PRESENT

    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", PRESENT, indirect=True, scope="session")


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Case":
    """A trained export with what it is held against."""
    from tests.clients.cases import train

    return train(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def compared(case: "Case") -> Callable[[str], None]:
    """Call it with what was compared and the outcome, for the summary."""
    return lambda line: COMPARED.append(f"{case.name}: {line}")


def versions_of(names: Iterable[str]) -> Iterator[str]:
    """Names and versions of the packages that are installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The versions of the clients, and a line for each comparison."""
    terminalreporter.section("clients")
    terminalreporter.line(", ".join(versions_of(CLIENTS)))
    for line in COMPARED:
        terminalreporter.line(line)
