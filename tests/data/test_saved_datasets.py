"""Datasets that `datasets` saved, with one row per caption or per image."""

import io

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from modeling_miniclip import DataError, load_captions
from modeling_miniclip.data.problems import raise_problem
from modeling_miniclip.data.readers.saved import read_saved
from modeling_miniclip.data.rows import ReadOptions
from modeling_miniclip.data.shards.shard_url import place_of, read_place


def dataset(shades: list[int | None], *more_images: str, **columns: list) -> Dataset:
    """One-colour images, or no image for None; more image columns have the same images.

    Further columns are text or lists of texts. Without them, each image has the caption "x".
    """
    images = [None if shade is None else Pillow.new("RGB", (4, 4), (shade, 0, 0)) for shade in shades]
    columns = columns or {"caption": ["x"] * len(shades)}
    text = {k: [Value("string")] if isinstance(v[0], list) else Value("string") for k, v in columns.items()}
    pictures = ("image", *more_images)
    features = Features({**text, **dict.fromkeys(pictures, Image())})
    return Dataset.from_dict({**columns, **dict.fromkeys(pictures, images)}, features=features)


def contents(splits: DatasetDict) -> dict[str, list[list]]:
    """(shade of red, image_id, captions) of each row of each split."""
    return {split: [[row["image"].getpixel((0, 0))[0], row["image_id"], row["captions"]] for row in rows]
            for split, rows in splits.items()}  # fmt: skip


@pytest.fixture
def load(tmp_path):
    """Function that saves splits in the folder `set` and loads them."""

    def load(splits, fraction=0.34, **how) -> DatasetDict:
        splits.save_to_disk(tmp_path / "set")
        return load_captions(tmp_path / "set", validation_fraction=fraction, cache_dir=tmp_path / "cache", **how)

    return load


def test_lists_of_captions_and_a_split_column(load):
    shades = list(range(6))
    rows = dataset(
        shades,
        caption=[[f"a{i}", f"b{i}"] for i in shades],
        sentids=[[str(i)] for i in shades],
        split=["train", "train", "val", "test", "restval", "val"],
        img_id=[str(i) for i in shades],
        filename=[f"{i}.jpg" for i in shades],
    )
    assert contents(load(DatasetDict(test=rows), 0.34)) == {
        "train": [[i, f"{i}.jpg", [f"a{i}", f"b{i}"]] for i in (0, 1, 4)],
        "validation": [[i, f"{i}.jpg", [f"a{i}", f"b{i}"]] for i in (2, 5)],
        "test": [[3, "3.jpg", ["a3", "b3"]]],
    }


def test_rows_with_the_same_picture_are_grouped(load):
    rows = dataset([1, 2, 1, 3, 2], caption=["one", "two", "one more", "three", "two more"])
    found = contents(load(DatasetDict(train=rows), 0.34))
    grouped = [row for rows in found.values() for row in rows]
    assert {shade: captions for shade, _, captions in grouped} == {
        1: ["one", "one more"], 2: ["two", "two more"], 3: ["three"]
    }  # fmt: skip
    assert len(grouped) == 3 and len(found["validation"]) == 1


@pytest.mark.parametrize(
    ("splits", "how", "message"),
    [
        (
            {"train": dataset([1, 2]), "test": dataset([3, 2])},
            {},
            "set, split test, row 1.*in the split 'test' here, and in 'train'.*one split",
        ),
        ({"train": dataset([1, 2], label=["x", "y"])}, {}, "'caption'.*label.*caption_column"),
        (
            {"train": dataset([1], "crop")},
            {"image_column": "photo"},
            r"'photo', found image columns \['image', 'crop'\]",
        ),
    ],
)
def test_unusable_datasets_are_errors(load, splits, how, message):
    with pytest.raises(DataError, match=message) as caught:
        load(DatasetDict(splits), **how)
    assert caught.value.problem is not None


def test_a_dataset_without_a_split_for_training(tmp_path):
    DatasetDict(a=dataset([1]), b=dataset([2])).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="set: no train split among a, b"):
        load_captions(tmp_path / "set", cache_dir=tmp_path / "cache")


def test_rows_without_image_or_caption_are_left_out(load):
    rows = dataset([1, 2, None, 4], caption=["a", " ", "c", "d"])
    with pytest.warns(
        UserWarning, match=r"of 4 rows, left out 1 without a caption \(first: row 1\), 1 without an image"
    ):
        found = contents(load(DatasetDict(train=rows)))
    assert {row[0]: row[2] for rows in found.values() for row in rows} == {1: ["a"], 4: ["d"]}


def test_other_splits_are_left_out(load):
    splits = DatasetDict(train=dataset([1, 2]), dev=dataset([3]), extra=dataset([4, 5, 6]))
    with pytest.warns(UserWarning, match="set: left out 3 images that are in none of train, validation, test"):
        result = load(splits)
    assert {name: len(rows) for name, rows in result.items()} == {"train": 2, "validation": 1}


def test_a_single_split_is_divided(load):
    result = load(DatasetDict(test=dataset([1, 2, 3, 4])), 0.25)
    assert {name: len(rows) for name, rows in result.items()} == {"train": 3, "validation": 1}


def test_rows_stay_in_the_files_of_the_dataset(tmp_path):
    rows = dataset(list(range(7)), caption=[f"c{i}" for i in range(7)]).select([6, 0, 1, 2, 3, 4, 5])
    rows.save_to_disk(tmp_path / "set", num_shards=3)
    found = list(read_saved(str(tmp_path / "set"), ReadOptions(), raise_problem))
    assert [(row.name, row.captions, row.number) for row in found] == [
        (f"{i:06d}", [f"c{shade}"], i) for i, shade in enumerate([6, 0, 1, 2, 3, 4, 5])
    ]
    shards = {str(row.image).rpartition("::")[2] for row in found}
    assert shards == {str(file) for file in (tmp_path / "set").glob("data-*.arrow")} and len(shards) == 3
    image = Pillow.open(io.BytesIO(read_place(place_of(str(found[0].image)))))
    assert image.getpixel((0, 0))[0] == 6


@pytest.mark.parametrize("damage", ["cut", "missing", "json"])
def test_a_damaged_dataset_is_one_sentence(tmp_path, damage):
    dataset([1, 2]).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("data-*.arrow")
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        (tmp_path / "set" / "state.json").write_text("{")
    with pytest.raises(DataError, match="set: cannot be read as a saved dataset: .*; save it again") as caught:
        load_captions(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
