"""Names of files as text, and back."""

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_miniclip.errors import UsageError, printable
from modeling_miniclip.utils import names
from modeling_miniclip.utils.names import (
    check_name,
    is_portable,
    name_of,
    path_of,
    portable_name,
    public_name,
    relative_name,
    slashed,
)
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("photos.index", True),
        ("auxiliary", True),
        ("com10", True),
        (".hidden", True),
        ("aux", False),
        ("AUX.index", False),
        ("nul .txt", False),
        ("com1.tar.gz", False),
        ("lpt²", False),
        ("a.", False),
        ("a ", False),
        ("a?b", False),
        ("tab\there", False),
    ],
)
def test_names_that_windows_reserves(name: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_portable(name) is expected
    check_name(f"folder/{name}/run")  # this system stores them
    monkeypatch.setattr(names, "RESERVES_NAMES", True)
    if expected:
        check_name(f"../folder/{name}/run")
        check_name(f"/{name}")
    else:
        with pytest.raises(UsageError, match="--output_dir folder/.*: Windows stores no file or folder called"):
            check_name(f"folder/{name}/run", "--output_dir ")


def test_cached_files_have_names_for_every_system() -> None:
    url_names = ("a b:c?.tar", "café.tar", "x" * 100 + ".tar", "ends.with.dot.")
    found = [portable_name(name) for name in url_names]
    assert found == ["a_b_c_.tar", "caf_.tar", "x" * 76 + ".tar", "ends.with.dot"]
    assert all(map(is_portable, found))


def test_windows_paths_get_slashes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slashed(r"sub/a\b.jpg") == r"sub/a\b.jpg"
    monkeypatch.setattr(os, "sep", "\\")
    assert slashed(r"sub\a.jpg") == "sub/a.jpg"
    assert name_of(r"C:\caf\xe9.jpg") == r"C:\caf\xe9.jpg" == path_of(r"C:\caf\xe9.jpg")


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("/home/me/photos/a.jpg", "a.jpg"),
        ("/runs/my-clip/export", "my-clip/export"),
        ("/runs/my-clip/export/", "my-clip/export"),
        ("/data/shards/{000..009}.tar", "{000..009}.tar"),
        ("file:///home/me/a.tar", "a.tar"),
        ("user/model", "user/model"),
        ("runs/export", "runs/export"),
        ("https://host/a/b.tar", "https://host/a/b.tar"),
        ("open_clip:ViT-B-32/openai", "open_clip:ViT-B-32/openai"),
        ("open_clip:ViT-B-32//home/me/weights.safetensors", "open_clip:ViT-B-32/weights.safetensors"),
        ("scenes", "scenes"),
    ],
)
def test_public_names_have_no_folders_of_this_machine(name: str, public: str) -> None:
    assert public_name(name) == public


@pytest.mark.parametrize(
    ("name", "source", "relative"),
    [
        ("/photos/sea/a.jpg", "/photos", "sea/a.jpg"),
        ("/photos/sea/a.jpg", "/photos/", "sea/a.jpg"),
        ("/photos2/a.jpg", "/photos", "photos2/a.jpg"),
        ("/me/photos2/a.jpg", "/me/x/photos", "a.jpg"),
        ("/data/Images/a.jpg", "/data/captions.csv", "Images/a.jpg"),
        ("/data/0.tar/a.jpg", "/data/*.tar", "0.tar/a.jpg"),
        ("user/set/train/000001", "user/set", "train/000001"),
        ("scene-000001.png", "scenes", "scene-000001.png"),
        ("/elsewhere/a.jpg", "user/set", "a.jpg"),
    ],
)
def test_relative_names_start_below_their_source(name: str, source: str, relative: str) -> None:
    assert relative_name(name, source) == relative
