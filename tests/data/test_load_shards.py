"""Shards as sources of splits."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_miniclip.data.captions import load_captions
from modeling_miniclip.errors import DataError
from tests.helpers.shards import pairs, write_tar
from tests.helpers.trees import picture


@pytest.fixture
def folder(tmp_path):
    """Folder with three archives of four images, and a table about one of them."""
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", pairs([f"{i}{k}" for k in range(4)], 4 * i))
    pq.write_table(pa.table({"caption": ["x"], "url": ["y"]}), tmp_path / "0.parquet")
    return tmp_path


@pytest.mark.parametrize("source", ["", "*.tar", "{0..2}.tar", "*"])
def test_a_pattern_or_folder_of_shards_is_one_dataset(folder, source):
    splits = load_captions(str(folder / source), validation_fraction=0.25, cache_dir=folder / "cache")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 9, "validation": 3}
    rows = sorted(
        ((row["image_id"], row["captions"], row["image"]) for rows in splits.values() for row in rows),
        key=lambda row: row[0],
    )
    assert [row[:2] for row in rows] == [
        (f"{i}.tar/{i}{k}", [f"caption of {i}{k}"]) for i in range(3) for k in range(4)
    ]
    assert [row[2].getpixel((0, 0))[0] for row in rows] == list(range(12))


def test_shards_with_the_names_of_splits(tmp_path):
    for name, keys in (("train-0.tar", "01"), ("train-1.tar", "2"), ("val-0.tar", "3")):
        write_tar(tmp_path / name, pairs(keys))
    splits = load_captions(tmp_path, cache_dir=tmp_path / "cache")
    assert {split: rows["captions"] for split, rows in splits.items()} == {
        "train": [["caption of 0"], ["caption of 1"], ["caption of 2"]], "validation": [["caption of 3"]]
    }  # fmt: skip


def test_a_changed_shard_is_read_again(folder):
    before = load_captions(folder, cache_dir=folder / "cache")
    write_tar(folder / "1.tar", pairs("ab"))
    after = load_captions(folder, cache_dir=folder / "cache")
    assert [sum(map(len, splits.values())) for splits in (before, after)] == [12, 10]


def test_parquet_files_are_a_dataset(tmp_path):
    for i in range(2):
        table = {"jpg": [picture(2 * i), picture(2 * i + 1)], "caption": [["a", "b"], ["c"]]}
        pq.write_table(pa.table(table), tmp_path / f"{i}.parquet")
    splits = load_captions(tmp_path, cache_dir=tmp_path / "cache", validation_fraction=0.25)
    rows = sorted((row["image_id"], row["captions"]) for rows in splits.values() for row in rows)
    assert rows == [(f"{i}.parquet/00000{k}", [["a", "b"], ["c"]][k]) for i in range(2) for k in range(2)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("*.csv", "no file matches"),
        ("{0..9}.tar", "7 of 10 shards are missing, first .*3.tar"),
        ("[a-z]*", "notes.md is neither a tar archive nor a Parquet file"),
        ("3.tar", "no such file or folder"),
    ],
)
def test_patterns_that_match_something_else(folder, source, message):
    (folder / "notes.md").touch()
    with pytest.raises(DataError, match=message):
        load_captions(str(folder / source))
