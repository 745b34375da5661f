"""Reading Parquet files: images as structs, bytes or paths; captions; rows of the same image."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from modeling_miniclip.data.problems import HARMLESS, raise_problem
from modeling_miniclip.data.readers import parquet
from modeling_miniclip.data.readers.parquet import read_parquet
from modeling_miniclip.data.rows import ReadOptions, Row
from modeling_miniclip.data.shards.shard_url import place_of, read_place
from modeling_miniclip.errors import DataError, Problem
from tests.helpers.trees import picture

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TWO = [picture(1), picture(2)]


@pytest.fixture
def read(tmp_path):
    """Function that writes columns to one or more Parquet files and reads them."""

    def read(*tables, options=None, with_problems=False, **columns):
        problems: list[Problem] = []
        for i, table in enumerate(tables or [columns]):
            pq.write_table(pa.table(table), tmp_path / f"{i}.parquet", row_group_size=3)
        rows = list(
            read_parquet(str(tmp_path), options or ReadOptions(), problems.append if with_problems else raise_problem)
        )
        return (rows, problems) if with_problems else rows

    return read


def structs(contents: list[bytes | None]) -> pa.Array:
    """Images as `datasets` stores them."""
    return pa.array([None if each is None else {"bytes": each, "path": None} for each in contents], IMAGE)


def content(row: Row) -> bytes:
    """The image of a row."""
    place = place_of(row.image)
    assert place is not None
    return read_place(place)


def columns_read(monkeypatch) -> set[str]:
    """Names of the columns that are read from now on."""
    names: set[str] = set()
    iter_batches = pq.ParquetFile.iter_batches

    def record(self, *arguments, columns, **more):
        names.update(columns)
        return iter_batches(self, *arguments, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", record)
    return names


@pytest.mark.parametrize("name", ["image", "jpg", "photo"])
@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_images_and_captions(read, name, kind):
    pictures = [picture(i) for i in range(5)]
    images = structs(pictures) if kind == "struct" else pa.array(pictures)
    rows = read(**{name: images, "caption": [f"c{i}" for i in range(5)], "url": ["x"] * 5})
    assert [row.captions for row in rows] == [[f"c{i}"] for i in range(5)]
    assert [row.name for row in rows] == [f"0.parquet/{i:06d}" for i in range(5)]
    assert [content(row) for row in rows] == pictures
    assert [row.number for row in rows] == list(range(5))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"caption": [["a", "b"], ["c", None, ""]]}, [["a", "b"], ["c"]]),
        ({"sentences": [[{"raw": "a", "tokens": ["a"]}, {"raw": "b", "tokens": []}], [{"raw": "c", "tokens": []}]]},
         [["a", "b"], ["c"]]),
        ({"captions": [[{"caption": "a"}], [{"caption": "c"}]]}, [["a"], ["c"]]),
        ({"caption_1": ["b", None], "caption_0": ["a", "c"]}, [["a", "b"], ["c"]]),
        ({"text": ["a ", "a"]}, [["a"], ["a"]]),
    ],
)  # fmt: skip
def test_shapes_of_captions(read, columns, expected):
    assert [row.captions for row in read(image=structs(TWO), **columns)] == expected


def test_rows_without_image_or_caption_are_counted(read):
    images = structs([picture(0), None, *TWO, picture(4)])
    rows, (problem,) = read(image=images, caption=["a", "b", None, "", "e"], with_problems=True)
    assert [row.number for row in rows] == [0, 4]
    assert problem.kind == "left-out" and problem.text == (
        "of 5 rows, left out 1 without an image (first: row 1), 2 without a caption (first: row 2)"
    )
    with pytest.warns(UserWarning, match="of 5 rows, left out"):
        assert len(read(image=images, caption=["a", "b", None, "", "e"])) == 2
    options = ReadOptions(all_images=True)
    assert [row.number for row in read(image=images, caption=[None] * 5, options=options, with_problems=True)[0]] == [
        0, 2, 3, 4
    ]  # fmt: skip


def test_splits_groups_and_ids(read):
    rows = read(image=structs(TWO), caption=["a", "b"], Split=["VAL", "restval"], group=[7, None], id=[10, 11])
    assert [(row.split, row.group, row.ids) for row in rows] == [("validation", "7", ["10"]), ("train", None, ["11"])]


def test_images_are_not_read_to_list_them(read, monkeypatch):
    names = columns_read(monkeypatch)
    read(image=structs(TWO), caption=["a", "b"], filename=["x", "y"], wide=["w", "w"])
    assert names == {"caption", "filename"}


def test_rows_are_one_image_where_name_and_bytes_agree(read):
    one, two, three = (picture(i) for i in range(3))
    first = {"image": structs([one, one, two]), "caption": ["a", "b", "c"], "filename": ["x", "x", "x"]}
    second = {"image": structs([one, three, two]), "caption": ["d", "e", "f"], "filename": ["x", "y", "z"]}
    rows = read(first, second)
    assert [row.name for row in rows] == ["x#0", "x#0", "x#2", "x#0", "y", "z"]
    keys = [row.key for row in rows]
    assert keys[0] == keys[1] == keys[3] != keys[2] and keys[4:] == [None, None]


def test_names_that_are_counted_in_each_split_are_qualified(read):
    pictures = [picture(i) for i in range(4)]
    names = {"image_id": [0, 1, 0, 1], "split": ["train", "train", "val", "val"]}
    rows = read(image=structs(pictures), caption=list("abcd"), **names)
    assert [row.name for row in rows] == ["train/0", "train/1", "validation/0", "validation/1"]
    assert len({row.key for row in rows}) == 4


def test_equal_images_without_names_are_joined_if_they_repeat_early(read):
    pictures = [TWO[0], TWO[0], TWO[1], *(picture(i) for i in range(3, 8)), TWO[1]]
    rows = read(image=structs(pictures), caption=list("abcdefghi"))
    keys = [row.key for row in rows]
    assert keys[0] == keys[1] is not None and keys[2] == keys[8] and keys[3:8] == [None] * 5


def test_paths_are_relative_to_the_file(read, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(TWO[0])
    (tmp_path / "empty.png").write_bytes(b"")
    names = ["in/a.png", "./in/a.png", "none.png", "empty.png", "../a.png"]
    rows, problems = read(file_name=names, caption=list("abcde"), with_problems=True)
    assert [(row.name, row.key, row.image) for row in rows] == [
        ("in/a.png", "in/a.png", str(tmp_path / "in/a.png"))
    ] * 2
    assert [(problem.kind, problem.row) for problem in problems] == [("missing", 2), ("empty", 3), ("outside", 4)]
    images = pa.array([{"bytes": None, "path": "in/a.png"}, {"bytes": TWO[1], "path": "x"}], IMAGE)
    rows = read(image=images, caption=["a", "b"])
    assert rows[0].image == str(tmp_path / "in/a.png") and content(rows[1]) == TWO[1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["a", "b"], "n": [1, 2]}, "expected an image column .image., found .*caption, n; name it"),
        ({"a": TWO, "b": TWO, "caption": ["a", "b"]}, r"found image columns \['a', 'b'\].*image_column"),
        ({"image": TWO, "title": ["a", "b"]}, "no captions: expected a column .caption. .*title. Name the right one"),
    ],
)  # fmt: skip
def test_missing_columns_are_named(read, columns, message):
    with pytest.raises(DataError, match=message):
        read(**columns)


def test_named_columns(read):
    columns = replace(ReadOptions().columns, image="b", caption="title")
    rows = read(a=TWO, b=TWO[::-1], caption=["x", "x"], title=["a", "b"], options=ReadOptions(columns=columns))
    assert [row.captions for row in rows] == [["a"], ["b"]] and content(rows[0]) == TWO[1]


def test_damaged_files_cost_their_own_rows(read, tmp_path):
    columns = {"image": structs([picture(i) for i in range(6)]), "caption": list("abcdef")}
    read(columns, columns, columns)
    path = tmp_path / "1.parquet"
    whole = path.read_bytes()
    sources = [str(tmp_path / f"{i}.parquet") for i in range(3)]
    about = pq.read_metadata(path).row_group(1).column(2)
    assert about.path_in_schema == "caption"
    start = about.dictionary_page_offset or about.data_page_offset
    end = start + about.total_compressed_size
    for damaged, count in ((whole[:-100], 0), (b"", 0), (whole[:start] + b"\xff" * (end - start) + whole[end:], 3)):
        path.write_bytes(damaged)
        problems: list[Problem] = []
        rows = list(read_parquet(str(tmp_path), ReadOptions(), problems.append))
        assert len(rows) == 12 + count
        assert [(problem.kind, problem.file) for problem in problems] == [("damaged-shard", sources[1])]


def test_a_parquet_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="none.parquet: cannot be read as Parquet"):
        list(read_parquet(str(tmp_path / "none.parquet"), ReadOptions(), raise_problem))


def test_large_row_groups_are_named_with_the_way_out(read, monkeypatch):
    pictures = [picture(seed) + bytes(20_000) for seed in range(6)]  # in groups of three, as `read` writes them
    columns = {"jpg": pictures, "caption": list("abcdef")}
    assert read(columns, columns, with_problems=True)[1] == []
    monkeypatch.setattr(parquet, "HELD_BYTES", 50_000)
    monkeypatch.setattr(parquet, "SMALL_GROUP", 45_000)
    rows, (problem,) = read(columns, columns, with_problems=True)
    assert len(rows) == 12 and problem.kind == "row-groups" and problem.kind in HARMLESS
    assert problem.text.startswith("2 of 2 files have row groups of up to 0 MB") and "batch_size=2)" in problem.text
    assert read(columns, with_problems=True, options=ReadOptions(all_images=True))[1] == []
    new = Path(problem.file).with_name("new.parquet")
    Dataset.from_parquet(problem.file).to_parquet(new, batch_size=2)
    assert pq.ParquetFile(new).num_row_groups == 3
