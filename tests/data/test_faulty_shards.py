"""Shards with every fault: all commands that read give the right rows, or one sentence with the shard's name."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import concatenate_datasets

from modeling_miniclip import DataError, load_captions
from modeling_miniclip.data import load_rows as loading
from modeling_miniclip.data.checking.entries import read_entries
from modeling_miniclip.data.load_rows import load_rows
from modeling_miniclip.data.rows import ReadOptions
from modeling_miniclip.errors import Problem
from tests.helpers.listings import images_of
from tests.helpers.shards import pairs, tar_bytes, write_tar
from tests.helpers.trees import picture

ODD = ("new\nline", "a::b", "caf\udce9", "# %20 ?", "ünî", "x" * 150)
SWAPPED = [*pairs("xy", 5)[1::2], *pairs("xy", 5)[::2][::-1]]  # texts before images, images the other way round


def table(rows: int, captions: Any = "caption of {}") -> bytes:
    """A Parquet file."""
    texts = [captions and captions.format(i) for i in range(rows)]
    columns = {"jpg": pa.array(map(picture, range(5, 5 + rows)), pa.binary()), "caption": pa.array(texts, pa.string())}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


# The content of a second shard, and the rows that it adds (name, number of the picture, caption), or what is wrong.
Rows = list[tuple[str, int, str]]
FAULTS: dict[str, tuple[str, bytes, Rows | str]] = {
    "keys of another shard": (
        "1.tar", tar_bytes(pairs("ab", 5)), [("1.tar/a", 5, "caption of a"), ("1.tar/b", 6, "caption of b")]
    ),
    "a key twice": (
        "1.tar", tar_bytes([*pairs("a", 5), ("a.png", picture(6)), ("a.txt", b"another")]),
        [("1.tar/a", 5, "caption of a"), ("1.tar/a.png#2", 6, "another")],
    ),
    "unusual order": (
        "1.tar", tar_bytes(SWAPPED), [("1.tar/y", 6, "caption of y"), ("1.tar/x", 5, "caption of x")]
    ),
    "any characters": (
        "1.tar", tar_bytes([each for i, key in enumerate(ODD)
                            for each in ((f"{key}.png", picture(5 + i)), (f"{key}.txt", b"odd"))]),
        [(f"1.tar/{key}".replace("\udce9", "\\xe9"), 5 + i, "odd") for i, key in enumerate(ODD)],
    ),
    "no captions": ("1.tar", tar_bytes(pairs("xy")[::2]), []),
    "no images": ("1.tar", tar_bytes(pairs("xy")[1::2]), []),
    "no members": ("1.tar", tar_bytes([]), []),
    "no bytes": ("1.tar", b"", "1.tar: an empty file; copy or download it again"),
    "cut": ("1.tar", tar_bytes(pairs("xy", 5))[:2_500], "1.tar: truncated .* more than the 1 images before"),
    "no archive": ("1.tar", b"x" * 2_000, "1.tar: not a tar archive; copy"),
    "no rows in a table": ("1.parquet", table(0), []),
    "no captions in a table": ("1.parquet", table(2, None), []),
    "no bytes in a table": ("1.parquet", b"", "1.parquet: cannot be read as Parquet: .*copy or download it again"),
    "cut table": ("1.parquet", table(2)[:-9], "1.parquet: cannot be read as Parquet: .*copy or download it again"),
}  # fmt: skip


def write_shards(folder: Path, fault: str) -> Rows:
    """Write a good shard and a faulty one; returns the rows of the good one, with those before the fault."""
    name, content, found = FAULTS[fault]
    folder.mkdir()
    (folder / name).write_bytes(content)
    if name.endswith(".tar"):
        write_tar(folder / "0.tar", pairs("ab"))
        rows = [(f"0.tar/{key}", i, f"caption of {key}") for i, key in enumerate("ab")]
        return rows + (
            [("1.tar/x", 5, "caption of x")] if fault == "cut" else found if isinstance(found, list) else []
        )
    (folder / "0.parquet").write_bytes(table(2))
    return [(f"0.parquet/{i:06d}", 5 + i, f"caption of {i}") for i in range(2)]


def loaded(source: Path, **options: Any) -> Rows:
    """The rows that training loads."""
    splits = load_rows(source, ReadOptions(), None, source.parent / "cache", **options)
    rows = concatenate_datasets(list(splits.values()))
    return [(row["image_id"], row["image"].getpixel((0, 0))[0], *row["captions"]) for row in rows]


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_in_rows_or_one_sentence(tmp_path: Path, fault: str) -> None:
    source, message = tmp_path / "shards", FAULTS[fault][2]
    rows = write_shards(source, fault)
    if isinstance(message, list):
        assert loaded(source) == rows
    else:
        with pytest.raises(DataError, match=message):
            load_captions(source, cache_dir=tmp_path / "cache")
        with pytest.warns(UserWarning, match=message):
            assert loaded(source, max_damaged=0.5) == rows
    checked: list[Problem] = []
    entries = read_entries(str(source), ReadOptions(), None, checked.append).entries
    assert [(entry.name, *entry.captions) for entry in entries] == [(name, caption) for name, _, caption in rows]
    images, walked = images_of(source)
    assert [captions for _, captions, *_ in images if captions] == [[caption] for *_, caption in rows]
    for problems in (checked, walked):
        damaged = [str(problem) for problem in problems if problem.kind == "damaged-shard"]
        assert [bool(re.search(str(message), each)) for each in damaged] == [True] * isinstance(message, str)


def test_damaged_shards_are_limited_like_broken_images(tmp_path: Path) -> None:
    source = tmp_path / "shards"
    rows = write_shards(source, "cut")
    with pytest.warns(UserWarning, match="truncated"):
        assert loaded(source, max_damaged=0.5) == rows
    text = "1 of 2 shards of .*shards are damaged, the first one: .*1.tar: truncated .*--max_bad_image_fraction 0.4 "
    with pytest.raises(DataError, match=text):  # the table is there already
        loaded(source, max_damaged=0.4)
    with pytest.raises(DataError, match="1.tar: truncated"):
        loaded(source)
    write_tar(source / "1.tar", pairs("xy", 5))
    assert len(loaded(source)) == 4


def test_a_shard_that_the_system_cannot_read_is_not_left_out(tmp_path: Path) -> None:
    source = tmp_path / "shards"
    rows = write_shards(source, "no members")
    (source / "1.tar").unlink()
    (source / "1.tar").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match="1.tar: cannot be read: .*No such file"):
        loaded(source, max_damaged=1)
    write_tar(tmp_path / "unmounted", pairs("xy", 5))
    assert loaded(source)[:2] == rows and len(loaded(source)) == 4


def write_csv(folder: Path) -> Path:
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(i))
    (folder / "captions.csv").write_text("image,caption\n0.png,one\n1.png,two\n", encoding="utf-8")
    return folder / "captions.csv"


def write_table(folder: Path) -> Path:
    (folder / "a.parquet").write_bytes(table(2))
    return folder / "a.parquet"


# How to change a source while it is read.
CHANGES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "captions": (write_csv, lambda path: path.write_text("image,caption\n1.png,three\n0.png,four\n")),
    "archive": (
        lambda folder: Path(write_tar(folder / "a.tar", pairs("ab"))), lambda path: write_tar(path, pairs("abc"))
    ),
    "table": (write_table, lambda path: path.write_bytes(table(5))),
    "lost table": (write_table, os.remove),
    "lost captions": (write_csv, os.remove),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_a_source_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    write, change = CHANGES[kind]
    source, original = write(tmp_path), loading.write_table

    def write_later(rows: Any, *args: Any, **options: Any) -> Any:
        change(source)
        return original(rows, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "write_table", write_later)
        with pytest.raises(DataError, match=rf"{source.name}: changed while it was read; start again"):
            loaded(source)
    if source.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(loaded(source)) == {"captions": 2, "archive": 3, "table": 5}[kind]
