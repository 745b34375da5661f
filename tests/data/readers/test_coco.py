"""COCO's caption annotations and Karpathy's splits."""

import json
from pathlib import Path
from typing import Any

import pytest

from modeling_miniclip import DataError, load_captions
from modeling_miniclip.data.problems import raise_problem
from modeling_miniclip.data.readers.coco import inputs_coco, read_coco, read_karpathy
from modeling_miniclip.data.rows import ReadOptions, Row
from modeling_miniclip.errors import Problem
from tests.data.test_captions import captions_by_id, names, save_images, write


def coco(names_of_images: dict[int, Any], captions: list[tuple[Any, Any]]) -> str:
    """COCO's JSON as its authors write it: images by id, captions with the ids of their images."""
    images = [{"license": 1, "file_name": name, "id": i, "height": 9} for i, name in names_of_images.items()]
    annotations = [{"image_id": i, "id": 70 + n, "caption": text} for n, (i, text) in enumerate(captions)]
    info = {"description": "COCO 2017 Dataset", "year": 2017}
    return json.dumps({"info": info, "licenses": [{"id": 1}], "images": images, "annotations": annotations})


def read(source: Path, read_kind=read_coco, **options) -> list[Row]:
    return list(read_kind(str(source), ReadOptions(**options), raise_problem))


def problems(source: Path, read_kind=read_coco, **options) -> list[tuple[str, str]]:
    found: list[Problem] = []
    list(read_kind(str(source), ReadOptions(**options), found.append))
    return [(problem.kind, problem.text) for problem in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """COCO as it is unpacked: two files in `annotations/`, and a folder of images for each."""
    save_images(tmp_path, "train2017/01.jpg", "train2017/03.jpg", "val2017/02.jpg")
    train = coco({3: "03.jpg", 1: "01.jpg"}, [(1, "one "), (3, "three"), (1, "first")])
    write(tmp_path / "annotations/captions_train2017.json", train)
    write(tmp_path / "annotations/captions_val2017.json", coco({2: "02.jpg"}, [(2, "two")]))
    return tmp_path


def test_coco_has_one_row_per_image_and_its_splits(folder):
    rows = read(folder)
    assert [(row.name, row.captions, row.split) for row in rows] == [
        ("train2017/03.jpg", ["three"], "train"),
        ("train2017/01.jpg", ["one", "first"], "train"),
        ("val2017/02.jpg", ["two"], "validation"),
    ]
    assert all(row.key == row.name and row.image == str(folder / row.name) for row in rows)
    assert read(folder / "annotations") == rows
    splits = load_captions(folder)
    assert names(splits["train"]) == {"train2017/01.jpg", "train2017/03.jpg"}
    assert captions_by_id(splits)["train2017/01.jpg"] == ["one", "first"]


def test_one_file_of_coco_is_a_source(folder, tmp_path):
    file = folder / "annotations/captions_train2017.json"
    names_of_rows = ["train2017/03.jpg", "train2017/01.jpg"]
    assert [(row.name, row.split) for row in read(file)] == [(name, None) for name in names_of_rows]
    assert {split: len(rows) for split, rows in load_captions(file).items()} == {"train": 1, "validation": 1}
    elsewhere = write(tmp_path / "elsewhere/mine.json", file.read_bytes())
    assert [row.name for row in read(elsewhere, image_dir=folder / "train2017")] == ["03.jpg", "01.jpg"]
    with pytest.raises(DataError, match="'03.jpg' is not in .*elsewhere; name the right folder with image_dir"):
        read(elsewhere)


def test_what_is_wrong_in_coco_is_named(tmp_path):
    save_images(tmp_path, "a.jpg", "b.jpg")
    images = {1: "a.jpg", 2: "b.jpg", 3: "no.jpg", 4: None}
    captions = [(1, "one"), (9, "lost"), (9, "lost"), (3, "x"), (1, ""), (1, None), (4, "\ud800")]
    path = write(tmp_path / "captions.json", coco(images, captions))
    assert problems(path) == [
        ("empty-caption", "the caption of annotation 74 is empty or not text, found ''; correct or delete it"),
        ("empty-caption", "the caption of annotation 75 is empty or not text, found None; correct or delete it"),
        ("empty-caption", "the caption of annotation 76 is empty or not text, found '\\ud800'; correct or delete it"),
        ("no-name", "image 4 has no name, found None; correct or delete it"),
        ("left-out", "left out 2 images without a caption and 2 captions without an image"),
        (
            "missing",
            f"image file 'no.jpg' is not in {tmp_path}; name the right folder with image_dir, or delete its rows "
            "(1 of 2 images are missing)",
        ),
    ]
    path = write(tmp_path / "captions.json", coco({1: "a.jpg", 2: "b.jpg"}, [(1, "one")]))
    assert [(row.name, row.captions) for row in read(path, all_images=True)] == [("a.jpg", ["one"]), ("b.jpg", [])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "annotations": [{"image_id": 1}]}', "no annotation has a 'caption'.*captions_train2017.json"),
        ('{"images": 5, "annotations": []}', "expected a list of objects called 'images'"),
        ('{"images": [], "annotations": [7]}', "expected a list of objects called 'annotations'"),
        ('{"images": [], "annotations": [', "not valid JSON.*download the file again"),
        (b'{"images": [], "annotations": [{"image_id": 1, "caption": "caf\xe9"}]}', "not valid JSON"),
    ],
)
def test_a_file_that_is_not_coco_is_an_error(tmp_path, text, message):
    path = write(tmp_path / "captions.json", text)
    with pytest.raises(DataError, match=message):
        read(path)


def test_edited_annotations_are_read_again(folder):
    keys = list(inputs_coco(str(folder), ReadOptions()))
    assert len(keys) == 2
    write(folder / "annotations/captions_val2017.json", coco({2: "02.jpg"}, [(2, "other")]))
    other = list(inputs_coco(str(folder), ReadOptions()))
    assert keys[0] == other[0] and keys[1] != other[1]


# --- Karpathy's splits ----------------------------------------------------------------------------------------------


def karpathy(images: list[tuple[str, str, list[Any]]], **more: str) -> str:
    entries = [
        {"sentids": [0], "sentences": [{"raw": raw, "tokens": ["x"]} for raw in several], "split": split, **more}
        | {"filename": name}
        for name, split, several in images
    ]
    return json.dumps({"images": entries, "dataset": "flickr8k"})


FOUR = [("a.jpg", "train", ["one", " two "]), ("b.jpg", "restval", ["three"]), ("c.jpg", "val", ["4"]),
        ("d.jpg", "test", ["5"])]  # fmt: skip


@pytest.mark.parametrize("place", ["Images", "Flicker8k_Dataset", "flickr30k-images", "."])
def test_karpathys_split_counts_restval_as_train(tmp_path, place):
    save_images(tmp_path / place, *(name for name, *_ in FOUR))
    path = write(tmp_path / "dataset_flickr8k.json", karpathy(FOUR))
    for source in (path, tmp_path):
        rows = read(source, read_karpathy)
        assert [(row.name, row.split, row.captions) for row in rows] == [
            ("a.jpg", "train", ["one", "two"]), ("b.jpg", "train", ["three"]), ("c.jpg", "validation", ["4"]),
            ("d.jpg", "test", ["5"]),
        ]  # fmt: skip
    assert {split: names(rows) for split, rows in load_captions(path).items()} == {
        "train": {"a.jpg", "b.jpg"}, "validation": {"c.jpg"}, "test": {"d.jpg"}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "prefix"), [("val2014", "val2014/"), ("images/val2014", "val2014/"), ("Images", "")]
)
def test_karpathys_coco_names_folders(tmp_path, place, prefix):
    save_images(tmp_path / place, "a.jpg", "b.jpg")
    path = write(tmp_path / "dataset_coco.json", karpathy(FOUR[:2], filepath="val2014", cocoid="7"))
    assert [row.name for row in read(path, read_karpathy)] == [f"{prefix}a.jpg", f"{prefix}b.jpg"]
    elsewhere = write(tmp_path / "x/dataset_coco.json", path.read_bytes())
    folder = tmp_path / place.removesuffix("val2014")
    assert [row.name for row in read(elsewhere, read_karpathy, image_dir=folder)] == [
        f"{prefix}a.jpg",
        f"{prefix}b.jpg",
    ]


def test_images_without_sentences_are_left_out(tmp_path):
    save_images(tmp_path, "a.jpg")
    path = write(tmp_path / "dataset.json", karpathy([FOUR[0], ("e.jpg", "train", []), ("no.jpg", "test", ["x", 5])]))
    kinds = [kind for kind, _ in problems(path, read_karpathy)]
    assert kinds == ["empty-caption", "left-out", "missing"]
