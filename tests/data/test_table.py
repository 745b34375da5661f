"""Rows of a source as a table on disk: joined by image, in any order of the rows."""

import random
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from modeling_miniclip.data.rows import Row
from modeling_miniclip.data.tables import table
from modeling_miniclip.data.tables.table import About, open_table, write_table
from modeling_miniclip.errors import DataError, Problem


def row(name: str, caption: str, number: int, **others: object) -> Row:
    return Row(name, f"/images/{name}", [caption], name, file="c.csv", number=number, column="image", **others)


def written(folder: Path, rows: Iterable[Row]) -> list[dict]:
    write_table(rows, folder, _raise)
    return open_table(folder).remove_columns("image").to_list()


def _raise(problem: Problem) -> None:
    raise DataError(problem)


@pytest.fixture(params=[2, 4096])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows, so that images and their captions are cut by the edges of blocks; and the usual ones."""
    monkeypatch.setattr(table, "BLOCK", request.param)


@pytest.mark.usefixtures("block")
def test_scattered_rows_of_an_image_become_one(tmp_path: Path) -> None:
    rows = [row("b", "one", 2), row("a", "two", 3), row("b", "three", 4), row("c", "four", 5), row("b", "five", 6)]
    found = written(tmp_path, rows)
    assert [one["image_id"] for one in found] == ["b", "a", "c"]
    assert found[0]["captions"] == ["one", "three", "five"]
    assert found[0]["rows"] == [2, 4, 6]
    assert found[0]["caption_hashes"] == [zlib.crc32(text) for text in (b"one", b"three", b"five")]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("seed", range(5))
def test_any_order_gives_the_rows_of_a_dictionary(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "JOINED_TOGETHER", 7)  # several parts of keys
    generator = random.Random(seed)
    rows = [row(str(generator.randrange(12)), f"caption {number}", number) for number in range(40)]
    expected: dict[str, list[str]] = {}
    for one in rows:
        expected.setdefault(one.name, []).extend(one.captions)
    found = written(tmp_path, rows)
    assert {one["image_id"]: one["captions"] for one in found} == expected
    assert [one["image_id"] for one in found] == list(expected)


def test_rows_without_a_key_stay_apart(tmp_path: Path) -> None:
    rows = [Row("same", b"x", ["one"]), Row("same", b"y", ["two"]), Row("same", b"z", ["three"])]
    assert [one["captions"] for one in written(tmp_path, rows)] == [["one"], ["two"], ["three"]]
    images = open_table(tmp_path).data.column("image").to_pylist()
    assert [image["bytes"] for image in images] == [b"x", b"y", b"z"]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("between", [[], [row("b", "x", 3)]], ids=["neighbours", "scattered"])
def test_image_in_two_splits_is_reported_with_its_row(tmp_path: Path, between: list[Row]) -> None:
    rows = [row("a", "x", 2, split="train"), *between, row("a", "y", 4, split="test")]
    with pytest.raises(DataError, match=r"c.csv, row 4, column 'image': image 'a' is in the split 'test' here"):
        write_table(rows, tmp_path, _raise)


def test_only_columns_with_values_are_named(tmp_path: Path) -> None:
    about = write_table([row("a", "x", 2), row("b", "y", 3, group="g")], tmp_path, _raise)
    about.warnings = ["odd é"]
    about.save(tmp_path)
    assert About.load(tmp_path) == about == About([("c.csv", "image")], ["group"], ["odd é"])


def test_plain_datasets_decodes_the_images_of_a_table(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_table([Row("a", str(tmp_path / "a.png"), ["x"])], tmp_path, _raise)
        assert open_table(tmp_path)[0]["image"].size == (7, 5)


def test_large_images_are_written_in_smaller_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LARGEST_BLOCK", 10)
    rows = [Row(f"{i}.png", bytes(4), [f"a{i}"], key=str(i % 5)) for i in range(7)]
    for name in ("joined", "unique"):
        (tmp_path / name).mkdir()
    found = written(tmp_path / "joined", rows)
    assert [one["captions"] for one in found] == [["a0", "a5"], ["a1", "a6"], ["a2"], ["a3"], ["a4"]]
    written(tmp_path / "unique", rows[:5])
    assert [len(batch) for batch in open_table(tmp_path / "unique").data.table.to_batches()] == [3, 2]
