"""Shared by the fuzz tests: numbers of cases, a time limit for each, and strategies for unusual input."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from modeling_miniclip import MiniClipError

CPU_SECONDS = 20


def cases(some: int, many: int) -> Any:
    """Parametrize `count`: a quarter of `some` by default, `some` in slow tests, `many` new ones in long tests."""
    return pytest.mark.parametrize(
        "count",
        [
            pytest.param(some // 4, id="few"),
            pytest.param(some, id="some", marks=pytest.mark.slow),
            pytest.param(many, id="many", marks=pytest.mark.long),
        ],
    )


def fuzz(count: int, record_property: Callable[[str, object], None]) -> settings:
    """Settings of a test that runs its inner function on `count` cases; the report shows their number."""
    record_property("cases", count)
    return settings(
        max_examples=count,
        derandomize=count < 200,
        database=None,
        deadline=None,  # wall time means nothing on a busy machine
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """Raised when a function computes for too long; not an `Exception`, so that no function catches it."""


@contextmanager
def no_hang() -> Iterator[None]:
    """End a block that has computed for `CPU_SECONDS`."""

    def stop(*_: object) -> None:
        raise Hang(f"still computing after {CPU_SECONDS} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def result_or_error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, str]:
    """A function's result and "", or None and the message of the package's error; any other error is raised."""
    try:
        with no_hang():
            return function(*args, **kwargs), ""
    except MiniClipError as error:
        message = str(error)
        assert message.strip()
        assert message.isprintable(), "a quoted text must not control the terminal"
        return None, message


# Emoji of several code points, right-to-left text and overrides, combining marks, control characters, formulas and
# markup of other programs, and a caption of 100 kB.
NASTY = (
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u202egpj.exe\u202c\u2066x",
    "e" + "\u0301" * 60,
    "a\0b",
    "\x1b[2J\x07\x7f\x85",
    "\ufeff",
    "\u2028\u2029\x0b\x0c",
    '=HYPERLINK("x")',
    "<script>alert(1)</script>&amp;",
    'a"b""c',
    "\U0010ffff\ue000",
    "ﬁ ǅ İ ß",
    "two dogs " * 11_200,
)
TEXT = st.one_of(st.text(st.characters(codec="utf-8"), max_size=40), st.sampled_from(NASTY))
CAPTIONS = TEXT.filter(lambda text: bool(text.strip()))

# Names of files as Linux allows them: any bytes but "/" and "\0", often hardly different from each other.
PATHS = st.lists(
    st.sampled_from([b"a", b"\xe9", b"\\", b"x", b"e9", "é".encode(), b"\xff\xfe", b"5c", b" ", b"\n"]),
    min_size=1,
    max_size=6,
).map(b"".join) | st.binary(min_size=1, max_size=12).map(lambda name: name.translate(None, b"/\0") or b"b")


@st.composite
def damaged(draw: Any, contents: st.SearchStrategy[bytes]) -> bytes:
    """A file damaged one to four times: bits flipped, or parts lost, doubled or overwritten."""
    data = bytearray(draw(contents))
    for _ in range(draw(st.integers(1, 4))):
        size = len(data)
        start = draw(st.integers(0, size))
        length = draw(st.integers(0, min(64, size - start)))
        kind = draw(st.sampled_from(("flip", "lose", "double", "write", "truncate")))
        if kind == "flip" and start < size:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "lose":
            del data[start : start + length]
        elif kind == "double":
            data[start:start] = data[start : start + length]
        elif kind == "write":
            data[start : start + length] = draw(st.binary(max_size=16) | st.sampled_from(NASTY).map(str.encode))
        elif kind == "truncate":
            del data[start:]
    return bytes(data)


# Values of JSON and YAML, with numbers that cannot be a count of anything.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from((-(2**31), 2**31, 2**63, 10**30)),
    st.floats(),
    TEXT,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
