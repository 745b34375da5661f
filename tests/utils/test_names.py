"""Names of files as text, and back."""

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_miniclip.errors import printable
from modeling_miniclip.utils.names import name_of, path_of
from tests.helpers.fuzzing import PATHS, cases, fuzz


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        ("café.jpg".encode(), "café.jpg"),
        (rb"caf\xe9.jpg", r"caf\x5cxe9.jpg"),  # a backslash, an x and two letters
        (rb"a\b.jpg", r"a\b.jpg"),
        (b"\\\xe9", r"\\xe9"),
    ],
)
def test_bytes_that_are_not_utf8_are_escaped(path: bytes, name: str) -> None:
    assert name_of(os.fsdecode(path)) == name
    assert os.fsencode(path_of(name)) == path
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\xe9"


@cases(200, 5000)
def test_names_are_text_and_lead_back(record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(paths=st.sets(PATHS, min_size=2, max_size=4))
    def check(paths: set[bytes]) -> None:
        names = {name_of(os.fsdecode(path)) for path in paths}
        assert len(names) == len(paths) and all(name.encode() for name in names)
        assert {os.fsencode(path_of(name)) for name in names} == paths

    check()
