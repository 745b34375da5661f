"""Data of a Python program: DataFrames, lists of dictionaries and datasets, with images of every kind."""

import csv
import io
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from datasets import Image as ImageColumn
from PIL import Image

from modeling_miniclip import DataError, load_captions
from modeling_miniclip.data.columns import ColumnNames
from modeling_miniclip.data.load_rows import SeededSplit, load_rows, public_rows
from modeling_miniclip.data.readers.memory import held
from modeling_miniclip.data.rows import ReadOptions
from modeling_miniclip.data.source_kinds import hub_id

SHADES = (10, 60, 110, 160)


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (shade, 0, 0))


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    picture(shade).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture `SHADE.png` of each shade, and the working folder of the test."""
    for shade in SHADES:
        picture(shade).save(tmp_path / f"{shade}.png")
    with chdir(tmp_path):
        yield tmp_path


def load(data: Any, split: SeededSplit | None = None, **options: Any) -> DatasetDict:
    with held(data) as name:
        return public_rows(load_rows(name, ReadOptions(**options), split, "cache"))


def contents(splits: DatasetDict) -> dict[str, list[tuple[int, list[str]]]]:
    """Shade and captions of each row of each split."""
    return {split: [(row["image"].convert("RGB").getpixel((0, 0))[0], row["captions"]) for row in rows]
            for split, rows in splits.items()}  # fmt: skip


KINDS: dict[str, Callable[[int], Any]] = {
    "path": lambda shade: Path(f"{shade}.png"),
    "text": lambda shade: f"{shade}.png",
    "absolute": lambda shade: str(Path.cwd() / f"{shade}.png"),
    "PIL image": picture,
    "opened file": lambda shade: Image.open(f"{shade}.png"),
    "bytes": encoded,
    "bytes and path": lambda shade: {"bytes": encoded(shade), "path": "any.png"},
    "path in a dictionary": lambda shade: {"bytes": None, "path": f"{shade}.png"},
    "array": lambda shade: np.asarray(picture(shade)),
    "tensor": lambda shade: torch.from_numpy(np.array(picture(shade))).permute(2, 0, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", ["frame", "list"])
def test_images_of_every_kind(folder: Path, kind: str, container: str) -> None:
    images = [KINDS[kind](shade) for shade in SHADES]
    rows: Any = [{"image": image, "caption": f"a{i}"} for i, image in enumerate(images)]
    if container == "frame":
        rows = pandas.DataFrame({"image": pandas.Series(images, dtype=object), "caption": [f"a{i}" for i in range(4)]})
    found = contents(load(rows))
    assert sorted(found["train"]) == [(shade, [f"a{i}"]) for i, shade in enumerate(SHADES)]


def test_rows_of_one_image_are_joined(folder: Path) -> None:
    image = picture(10)
    for images in ([image, image, picture(60)], ["10.png", "10.png", "60.png"], [encoded(10), encoded(10), "60.png"]):
        found = load([{"image": one, "caption": text} for one, text in zip(images, "abc", strict=True)])
        assert contents(found) == {"train": [(10, ["a", "b"]), (60, ["c"])]}


def test_a_frame_gives_the_rows_of_its_csv_file(folder: Path) -> None:
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("id", "image", "caption"), *((i, f"{shade}.png", f"a{i}{k}") for i, shade in enumerate(SHADES[::-1])
             for k in range(2))]
        )  # fmt: skip
    expected = load_captions("captions.csv", validation_fraction=0.3, seed=4, cache_dir="cache")
    found = load(pandas.read_csv("captions.csv"), SeededSplit(0.3, 4))
    assert {split: rows.to_list() for split, rows in found.items()} == {
        split: rows.to_list() for split, rows in expected.items()
    }


def test_splits_by_column_by_key_and_of_datasets(folder: Path) -> None:
    rows = [{"image": f"{shade}.png", "caption": "x"} for shade in SHADES]
    marked = [row | {"split": split} for row, split in zip(rows, ("train", "val", "train", "test"), strict=True)]
    by_column = {"train": [(10, ["x"]), (110, ["x"])], "validation": [(60, ["x"])], "test": [(160, ["x"])]}
    assert contents(load(marked)) == by_column
    parts = {"train": [rows[0], rows[2]], "val": pandas.DataFrame([rows[1]]), "test": [rows[3]]}
    assert contents(load(parts)) == by_column
    whole = Dataset.from_list(rows).cast_column("image", ImageColumn())
    splits = DatasetDict(train=whole.select([0, 2]), validation=whole.select([1]), test=whole.select([3]))
    assert contents(load(splits)) == by_column


def test_datasets_on_disk_are_read_in_place_unless_changed(folder: Path) -> None:
    features = Features({"image": ImageColumn(), "text": Value("string")})
    made = Dataset.from_dict({"image": [picture(shade) for shade in SHADES], "text": list("abcd")}, features=features)
    made.save_to_disk("set")
    saved = Dataset.load_from_disk("set")
    expected = [(shade, [text]) for shade, text in zip(SHADES, "abcd", strict=True)]
    with held(saved) as name:
        rows = load_rows(name, split=None, cache_dir="cache")["train"].cast_column("image", ImageColumn(decode=False))
        assert rows[0]["image"]["path"].startswith("row://"), "not copied"
    for changed in (saved, saved.rename_column("text", "caption"), saved.select_columns(["image", "text"])):
        assert contents(load(changed))["train"] == expected
    assert contents(load(saved.select([3, 0])))["train"] == [expected[3], expected[0]]


def test_lists_of_captions_missing_cells_and_further_columns(folder: Path) -> None:
    frame = pandas.DataFrame(
        {
            "image": ["10.png", "60.png", "110.png", None],
            "captions": [["a", "b"], "c", float("nan"), "d"],
            "negative_captions": [["not a"], None, None, None],
            "boxes": [np.zeros((2, 4)), {1, 2}, object(), None],  # which Arrow cannot store
        }
    )
    with pytest.warns(UserWarning, match="1 without a caption .first: row 2., 1 without an image .first: row 3."):
        found = load(frame)
    assert contents(found) == {"train": [(10, ["a", "b"]), (60, ["c"])]}
    assert found["train"]["negative_captions"][0] == ["not a"]


class Frame:
    """What a DataFrame of polars has, which is not installed."""

    columns = ["image", "caption"]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, name: str) -> Any:
        values = {"image": ["10.png"], "caption": ["a"]}[name]
        return type("Series", (), {"to_list": lambda _: values})()


class LazyFrame(Frame):
    def collect(self) -> Frame:
        return Frame()


@pytest.mark.parametrize("frame", [Frame(), LazyFrame(), pa.table({"image": ["10.png"], "caption": ["a"]})])
def test_frames_of_other_libraries(folder: Path, frame: Any) -> None:
    assert contents(load(frame)) == {"train": [(10, ["a"])]}


def test_names_follow_from_the_content(folder: Path) -> None:
    rows = [{"image": picture(shade), "caption": "x"} for shade in SHADES]
    names = []
    changed = [*rows[:3], rows[3] | {"caption": "y"}]
    for data in (rows, list(map(dict, rows)), pandas.DataFrame(rows), rows[:3], changed):
        with held(data) as name:
            names.append(name)
            assert hub_id(name) is None
    assert names[0] == names[1] == names[2] and len({*names}) == 3


def test_a_table_outlives_its_data_but_nothing_else(folder: Path) -> None:
    with held([{"image": f"{shade}.png", "caption": "x"} for shade in SHADES]) as name:
        first = load_rows(name, cache_dir="cache")
    assert contents(load_rows(name, cache_dir="cache")) == contents(first)
    with pytest.raises(DataError, match=f"{name}: data that a Python program passed to train.*pass it again"):
        load_rows(name, cache_dir="another")


WRONG: dict[str, tuple[Any, str]] = {
    "no rows": ([], "list: it has no rows; pass some with an image and a caption"),
    "list of texts": (["a.jpg"], "list, row 0: expected a dictionary with an image and a caption, found str"),
    "columns": ({"image": ["a.jpg"]}, "dict: a dictionary needs the splits of a dataset .* it has 'image'"),
    "number": (5, "int: expected a DataFrame, a Dataset, a DatasetDict or a list of dictionaries"),
    "iterable": (IterableDataset.from_generator(lambda: iter([])), "IterableDataset: expected a DataFrame"),
    "no caption": ([{"image": "10.png", "title": "a"}], "no captions: expected a column 'caption'"),
    "missing file": ([{"image": "n.png", "caption": "a"}], "list, row 0, column 'image': image file 'n.png' is not"),
    "not an image": (
        [{"image": picture(1), "caption": "a"}, {"image": [1], "caption": "b"}],
        "list, row 1, column 'image': expected an image .a path, PIL image, bytes or an array., found list",
    ),
    "caption": (
        [{"image": "10.png", "caption": "a"}, {"image": "60.png", "caption": 5}],
        "list, row 1, column 'caption': expected a text, a list of texts or an image, found int",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_named_with_its_row(folder: Path, case: str) -> None:
    data, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        load(data)


def test_named_columns_and_an_image_folder(folder: Path) -> None:
    (folder / "sub").mkdir()
    picture(200).save(folder / "sub" / "a.png")
    rows = [{"file": "a.png", "title": "a"}]
    options = {"columns": ColumnNames("file", "title"), "image_dir": "sub"}
    assert contents(load(rows, **options)) == {"train": [(200, ["a"])]}
