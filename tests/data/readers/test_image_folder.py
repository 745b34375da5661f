"""Folders of images: metadata files, text files next to images, class folders, and all images for an index."""

import json
import os
from pathlib import Path

import pytest

from modeling_miniclip import DataError, load_captions
from modeling_miniclip.data.listing import walk_folders
from modeling_miniclip.data.problems import raise_problem
from modeling_miniclip.data.readers import image_folder
from modeling_miniclip.data.readers.image_folder import Layout, inputs_image_folder, read_image_folder
from modeling_miniclip.data.rows import ReadOptions, Row
from modeling_miniclip.errors import Problem
from tests.data.test_captions import write
from tests.helpers.listings import images_of


def read(folder: Path, **options) -> list[Row]:
    return list(read_image_folder(str(folder), ReadOptions(**options), raise_problem))


def problems(folder: Path, **options) -> tuple[list[str], list[tuple[str, str, int | None]]]:
    """Names of the rows that are read; kind, file and row of each problem."""
    found: list[Problem] = []
    rows = list(read_image_folder(str(folder), ReadOptions(**options), found.append))
    return [row.name for row in rows], [(each.kind, os.path.basename(each.file), each.row) for each in found]


def everything(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Captions and split of each image that an index finds, by its name in the folder."""
    images, left_out = images_of(folder)
    assert not left_out
    return {os.path.relpath(name, folder): (captions, split) for name, captions, split, _ in images}


def files(folder: Path, names: str, content: str = "x") -> None:
    for name in names.split():
        write(folder / name, content)


# --- metadata files -------------------------------------------------------------------------------------------------


def test_metadata_may_be_in_one_or_in_several_folders(tmp_path):
    files(tmp_path, "train/a.png val/sub/b.png")
    for path, text in {
        "all/metadata.csv": "file_name,text\ntrain/a.png,one\nval/sub/b.png,two\n",
        "each/train/metadata.jsonl": '{"file_name": "a.png", "text": "one"}',
        "each/val/metadata.csv": "file_name,text\nsub/b.png,two\n",
    }.items():
        write(tmp_path / path, text)
    for form in ("all", "each"):
        files(tmp_path / form, "train/a.png val/sub/b.png")
        rows = read(tmp_path / form)
        assert [(row.name, row.captions, row.split) for row in rows] == [
            ("train/a.png", ["one"], "train"), ("val/sub/b.png", ["two"], "validation")
        ]  # fmt: skip
        assert all(row.key == row.name and row.image == str(tmp_path / form / row.name) for row in rows)


def test_bad_images_of_metadata_are_named_by_their_folder(tmp_path):
    files(tmp_path, "train/a.png x.png")
    write(tmp_path / "train/metadata.csv", "file_name,text\na.png,1\nno.png,2\n../x.png,3\n../../y.png,4\n")
    found: list[Problem] = []
    names = [row.name for row in read_image_folder(str(tmp_path), ReadOptions(), found.append)]
    assert names == ["train/a.png", "x.png"]
    assert [(each.kind, each.row, each.image) for each in found] == [
        ("missing", 3, "train/no.png"), ("outside", 5, "../y.png")
    ]  # fmt: skip


def test_an_image_in_two_metadata_files_is_reported(tmp_path):
    files(tmp_path, "a.png sub/b.png")
    write(tmp_path / "metadata.csv", "file_name,text\na.png,1\nsub/b.png,2\n")
    write(tmp_path / "sub/metadata.csv", "file_name,text\nb.png,3\n")
    with pytest.raises(DataError, match=r"sub/metadata.csv, row 2.*'sub/b.png' is already in .*metadata.csv, row 3"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ("train test", ["test", "train"]),
        ("Train2017 VAL2017", ["train", "validation"]),
        ("train boat", [None, None]),  # vehicles
        ("photos/train photos/val", ["train", "validation"]),
        ("cats/train cats/test", ["test", "train"]),
        ("cats/train cats/paws dogs/val", [None, None, "validation"]),
        ("train/boat train/val", ["train", "train"]),
    ],
)
def test_folders_are_splits_if_their_siblings_are(tmp_path, folders, splits):
    names = sorted(f"{folder}/a.png" for folder in folders.split())
    files(tmp_path, " ".join(names))
    files(tmp_path, "docs/readme.md labels/train/a.xml")
    write(tmp_path / "metadata.csv", "file_name,text\n" + "".join(f"{name},x\n" for name in names))
    assert [row.split for row in read(tmp_path)] == splits


def test_a_split_column_counts_more_than_a_folder(tmp_path):
    files(tmp_path, "train/a.png train/b.png")
    write(tmp_path / "metadata.csv", "file_name,text,Split\ntrain/a.png,1,TEST\ntrain/b.png,2,\n")
    assert [row.split for row in read(tmp_path)] == ["test", "train"]


# --- texts ----------------------------------------------------------------------------------------------------------


def test_text_files_hold_the_captions_of_the_image_next_to_them(tmp_path):
    files(tmp_path, "train/1.jpg train/2.jpg val/1.jpg train/.hidden.jpg")
    write(tmp_path / "train/1.txt", "\ufeffa dog\r\n\r\n a wet dog \r\na dog\n")
    write(tmp_path / "train/2.txt", "a cat\nin two lines\n")
    write(tmp_path / "train/2.json", json.dumps({"caption": "a cat\nin two lines", "group": 7}))
    write(tmp_path / "val/1.json", json.dumps({"caption": ["soup", "hot soup"], "key": "1"}))
    rows = read(tmp_path)
    assert [(row.name, row.captions, row.split, row.group) for row in rows] == [
        ("train/1.jpg", ["a dog", "a wet dog"], "train", None),
        ("train/2.jpg", ["a cat\nin two lines"], "train", "7"),
        ("val/1.jpg", ["soup", "hot soup"], "validation", None),
    ]
    assert not Layout.of(tmp_path).classes


def test_images_without_text_are_left_out_and_counted(tmp_path):
    files(tmp_path, "1.jpg 2.jpg 3.jpg 4.jpg 5.jpg")
    write(tmp_path / "1.txt", "a dog")
    write(tmp_path / "2.txt", " \n")
    write(tmp_path / "3.txt", b"caf\xe9")
    write(tmp_path / "5.txt", b"caf\xe9\na cup")
    assert problems(tmp_path) == (
        ["1.jpg", "5.jpg"],
        [
            ("empty-caption", "2.txt", None), ("encoding", "3.txt", 1), ("empty-caption", "3.txt", None),
            ("encoding", "5.txt", 1), ("left-out", tmp_path.name, None),
        ],
    )  # fmt: skip
    (tmp_path / "2.txt").unlink(), (tmp_path / "3.txt").unlink(), (tmp_path / "5.txt").unlink()
    with pytest.warns(UserWarning, match="left out 4 images without a text file next to them .first: '2.jpg'."):
        assert [row.captions for row in read(tmp_path)] == [["a dog"]]


# --- class folders --------------------------------------------------------------------------------------------------


def test_class_folders_give_captions_and_groups(tmp_path):
    files(tmp_path, "sea_lion/1.jpg sea_lion/old/2.jpg train/1.jpg train/1.json docs/readme.md", "{}")
    rows = read(tmp_path, caption_template="the {} .")
    assert [(row.name, row.captions, row.group, row.split) for row in rows] == [
        ("sea_lion/1.jpg", ["the sea lion ."], "sea_lion", None),
        ("sea_lion/old/2.jpg", ["the sea lion ."], "sea_lion", None),
        ("train/1.jpg", ["the train ."], "train", None),
    ]
    assert Layout.of(tmp_path).classes == ["sea_lion", "train"]


def test_a_stray_text_file_leaves_class_folders_alone(tmp_path):
    files(tmp_path, "cat/1.jpg cat/2.jpg dog/3.jpg cat/1.txt")
    assert Layout.of(tmp_path).classes
    files(tmp_path, "cat/2.txt")  # now two of three images have one
    assert not Layout.of(tmp_path).classes


def test_a_text_file_that_is_a_picture_is_no_caption(tmp_path):
    for name in ("cat/1.jpg", "cat/1.txt", "dog/1.jpg", "dog/1.txt"):
        write(tmp_path / name, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert Layout.of(tmp_path).classes == ["cat", "dog"]
    write(tmp_path / "cat/1.txt", "a cat".encode("utf-16"))
    write(tmp_path / "dog/1.txt", "a dog")
    assert Layout.of(tmp_path).has_texts


def test_class_folders_may_be_in_splits(tmp_path):
    files(tmp_path, "train/cat/1.jpg train/dog/1.jpg train/2.jpg val/cat/1.jpg")
    with pytest.warns(UserWarning, match="left out 1 images outside the class folders .first: 'train/2.jpg'."):
        rows = read(tmp_path)
    assert [(row.name, row.captions[0], row.group, row.split) for row in rows] == [
        ("train/cat/1.jpg", "a photo of a cat", "cat", "train"),
        ("train/dog/1.jpg", "a photo of a dog", "dog", "train"),
        ("val/cat/1.jpg", "a photo of a cat", "cat", "validation"),
    ]


@pytest.mark.parametrize("names", ["", "a.jpg", "images/a.jpg", "train/a.jpg test/a.jpg"])
def test_a_folder_without_captions_and_classes_is_an_error(tmp_path, names):
    files(tmp_path, names)
    with pytest.raises(DataError, match=r"no captions found.*captions.csv.*metadata.*\.txt.*two folders"):
        read(tmp_path)


def test_a_name_that_is_not_utf8_is_left_out(tmp_path):
    files(tmp_path, "cat/1.jpg dog/1.jpg")
    os.rename(tmp_path / "cat/1.jpg", os.fsencode(tmp_path / "cat") + b"/caf\xe9.jpg")
    assert problems(tmp_path) == (["dog/1.jpg"], [("left-out", tmp_path.name, None)])
    assert everything(tmp_path) == {r"cat/caf\xe9.jpg": ([], ""), "dog/1.jpg": ([], "")}


# --- all images -----------------------------------------------------------------------------------------------------


def test_an_index_gets_all_images_with_known_captions(tmp_path):
    files(tmp_path, "Images/b.png Images/a.png other/c.png")
    write(tmp_path / "captions.csv", "image,caption,Split\na.png,one,test\nno.png,x,test\na.png,two,test\n")
    assert everything(tmp_path) == {
        "Images/a.png": (["one", "two"], "test"), "Images/b.png": ([], ""), "other/c.png": ([], "")
    }  # fmt: skip
    write(tmp_path / "train.txt", "a.png")
    assert [split for _, split in everything(tmp_path).values()] == ["train", "", ""]


def test_an_index_gets_texts_and_metadata(tmp_path):
    files(tmp_path, "t/a.png t/b.png m/a.png m/b.png")
    write(tmp_path / "t/a.txt", "one")
    write(tmp_path / "m/metadata.csv", "file_name,text\na.png,one\n")
    for folder in ("t", "m"):
        assert everything(tmp_path / folder) == {"a.png": (["one"], ""), "b.png": ([], "")}


def test_changes_of_a_folder_are_noticed(tmp_path):
    files(tmp_path, "cat/1.jpg dog/1.jpg")
    keys = [list(inputs_image_folder(str(tmp_path), ReadOptions()))]
    for name in ("dog/2.jpg", "dog/1.txt", "metadata.csv"):
        write(tmp_path / name, name)
        keys.append(list(inputs_image_folder(str(tmp_path), ReadOptions())))
    assert all(one != other for i, one in enumerate(keys) for other in keys[:i])


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    files(tmp_path, "set/cat/1.jpg set/cat/2.jpg set/dog/1.jpg set/dog/2.jpg")
    listed: list[str] = []

    def counting(root, *rest):
        listed.append(root)
        return walk_folders(root, *rest)

    monkeypatch.setattr(image_folder, "walk_folders", counting)
    for most, times in ((100, 1), (3, 2)):  # a large folder is listed again to read it
        monkeypatch.setattr(image_folder, "MOST_NAMES", most)
        rows = load_captions(tmp_path / "set", validation_fraction=0.5, cache_dir=tmp_path / f"cache-{most}")
        assert len(rows["train"]) == len(rows["validation"]) == 2 and len(listed) == times
        listed.clear()
