"""Which shards a pattern stands for."""

import pytest

from modeling_miniclip.data.shards.shard_patterns import (
    expand_braces,
    expand_shards,
    inputs_of_shards,
    is_pattern,
    shard_kind,
    short_names,
    split_of_shard,
)
from modeling_miniclip.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Folder with shards of two kinds, and other files."""
    for name in ("a/2.tar", "a/10.tar", "a/.3.tar", "b/0.tar.gz", "b/2.tar", "p/0.parquet", "a/2.json", "x[1].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{00008..00011}.tar", ["00008.tar", "00009.tar", "00010.tar", "00011.tar"]),
        ("{9..10}", ["9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{1..02}", ["01", "02"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{0..1}{x,}", ["0x", "0", "1x", "1"]),
        ("{a}{..}{0..}", ["{a}{..}{0..}"]),
    ],
)
def test_braces_are_expanded_as_in_a_shell(pattern, expected):
    assert list(expand_braces(pattern)) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/*.tar", ["a/10.tar", "a/2.tar"]),
        ("a/{2,10}.tar", ["a/2.tar", "a/10.tar"]),
        ("{b,a}/2.tar", ["b/2.tar", "a/2.tar"]),
        ("**/2.tar", ["a/2.tar", "b/2.tar"]),
        ("x[1].tar", ["x[1].tar"]),
        ("none.tar", ["none.tar"]),
        ("a", ["a/10.tar", "a/2.tar"]),
        ("", ["a/10.tar", "a/2.tar", "b/0.tar.gz", "b/2.tar", "p/0.parquet", "x[1].tar"]),
    ],
)
def test_shards_of_patterns_and_folders(folder, pattern, expected):
    found = expand_shards(str(folder / pattern))
    assert [name.removeprefix(f"{folder}/") for name in found] == expected


def test_a_kind_of_shards_of_a_folder(folder):
    assert expand_shards(str(folder), "parquet") == [str(folder / "p/0.parquet")]
    assert len(expand_shards(str(folder), "tar")) == 5
    kinds = [shard_kind(str(folder / name)) for name in ("", "p", "*/*.parquet", "a/2.tar", "a/2.json")]
    assert kinds == ["tar", "parquet", "parquet", None, None]
    assert shard_kind("https://x.org/{0..9}.tar") == "tar"
    assert [is_pattern(str(folder / name)) for name in ("x[1].tar", "*.tar", "{0..3}.tar", "a")] == [
        False, True, True, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.tgz", "no file matches"),
        ("{3..5}.tar", "no file matches"),
        ("a/{0..10}.tar", r"a/{0..10}.tar: 9 of 11 shards are missing, first .*a/0.tar; narrow the range, or use \*"),
    ],
)
def test_missing_shards_are_named(folder, pattern, message):
    with pytest.raises(DataError, match=message):
        expand_shards(str(folder / pattern))


def test_short_names():
    assert short_names(["/d/a/0.tar", "/d/b/1.tar"]) == ["0.tar", "1.tar"]
    assert short_names(["/d/a/0.tar", "/d/ab/0.tar"]) == ["a/0.tar", "ab/0.tar"]
    assert short_names(["s3://x/a/0.tar", "s3://x/a/c/0.tar"]) == ["0.tar", "c/0.tar"]


def test_splits_by_name():
    names = ["train-00000-of-00003.parquet", "d/coco_val2017.tar", "val/0.tar", "train2017/0.tar", "my tests/0.tar"]
    assert [split_of_shard(name) for name in names] == ["train", "validation", "validation", "train", None]


def test_inputs_change_with_size_and_time(folder):
    shards = [str(folder / "a/2.tar"), str(folder / "none.tar")]
    before = list(inputs_of_shards(shards))
    assert list(inputs_of_shards(shards)) == before
    (folder / "a/2.tar").write_bytes(b"x")
    (folder / "none.tar").touch()
    assert all(new != old for new, old in zip(inputs_of_shards(shards), before, strict=True))
