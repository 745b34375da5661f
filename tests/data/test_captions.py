"""Captioned images from files: caption files, Flickr8k folders and imagefolders."""

import csv
import json
import warnings
from pathlib import Path

import pytest
from PIL import Image

from modeling_miniclip import DataError, load_captions
from modeling_miniclip.data.columns import caption_columns
from modeling_miniclip.data.load_rows import load_datasets
from modeling_miniclip.data.scenes import build_scenes
from tests.helpers.towers import CAPTIONS


def save_images(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + i, 9), (20 * i, 0, 0)).save(folder / name, format="PNG")


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def captions_by_id(splits) -> dict[str, list[str]]:
    """Captions of every image of all splits; fails if an image is in two of them."""
    rows = [(row["image_id"], row["captions"]) for split in splits.values() for row in split.remove_columns("image")]
    assert len(dict(rows)) == len(rows), "an image is in two rows"
    return dict(rows)


def names(split) -> set[str]:
    return set(split["image_id"])


@pytest.fixture
def two(tmp_path):
    """A folder with the images a.png and b.png: a function that writes a caption file next to them."""
    save_images(tmp_path / "Images", "a.png", "b.png")
    return lambda text, name="own.csv": write(tmp_path / name, text)


# --- caption files --------------------------------------------------------------------------------------------------


def test_csv_gives_one_row_per_image(captioned_folder):
    splits = load_captions(captioned_folder / "captions.csv", validation_fraction=0.25)
    assert list(splits) == ["train", "validation"] and [len(s) for s in splits.values()] == [3, 1]
    assert captions_by_id(splits) == {f"{i}.png": captions for i, captions in enumerate(CAPTIONS)}
    row = splits["train"][0]
    assert row["image"].size == (40 + 4 * int(row["image_id"][0]), 36)


def test_id_is_kept_but_neither_groups_nor_splits(two):
    # the ids would group the rows of different images together
    splits = load_captions(two("id,image,caption\n1,a.png,one\n1,b.png,two\n2,a.png,three\n2,b.png,four\n"))
    rows = {row["image_id"]: row for split in splits.values() for row in split}
    assert rows["a.png"]["captions"] == ["one", "three"] and rows["a.png"]["caption_ids"] == ["1", "2"]
    assert rows["b.png"]["captions"] == ["two", "four"]


def test_csv_without_id_and_with_other_column_names(two):
    path = two("text,file,number\none,a.png,7\ntwo,b.png,8\n")
    splits = load_captions(path, image_column="file", caption_column="text")
    assert captions_by_id(splits) == {"a.png": ["one"], "b.png": ["two"]}
    assert "caption_ids" not in splits["train"].column_names
    with_id = load_captions(path, image_column="file", caption_column="text", id_column="number")
    assert sorted(i for split in with_id.values() for ids in split["caption_ids"] for i in ids) == ["7", "8"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("windows.csv", "\ufeffid,image,caption\r\n0,a.png,one\r\n1,b.png,two\r\n"),
        ("tabs.tsv", "id\timage\tcaption\n0\ta.png\tone\n1\tb.png\ttwo\n"),
        ("tabs.txt", "image\tcaption\na.png\tone\nb.png\ttwo\n"),
        ("spaces.csv", ' id , image , caption \n0 , a.png , one \n1 ,b.png,"two"\n\n   \n'),
        ("old_mac.csv", "image,caption\ra.png,one\rb.png,two\r"),
        ("no_last_line_end.csv", "image,caption\na.png,one\nb.png,two"),
        ("blank_lines.csv", "image,caption\n\na.png,one\n\nb.png,two\n"),
    ],
)
def test_line_ends_tabs_and_whitespace_do_not_matter(two, name, text):
    assert captions_by_id(load_captions(two(text, name))) == {"a.png": ["one"], "b.png": ["two"]}


def test_quoted_captions_keep_their_punctuation(two):
    text = 'image,caption\na.png,"red, green\nand ""blue"""\nb.png,a 5" disc\n'
    assert captions_by_id(load_captions(two(text))) == {"a.png": ['red, green\nand "blue"'], "b.png": ['a 5" disc']}


def test_spellings_of_a_path_are_one_image(tmp_path):
    save_images(tmp_path / "Images", "x/a.png", "y/a.png")
    path = write(tmp_path / "c.csv", "image,caption\nx/a.png,one\nx\\a.png,two\n./x//a.png,three\ny/a.png,four\n")
    assert captions_by_id(load_captions(path)) == {"x/a.png": ["one", "two", "three"], "y/a.png": ["four"]}


@pytest.mark.parametrize("place", ["Images", "images", ".", "Flicker8k_Dataset"])
def test_images_are_found_near_the_caption_file(tmp_path, place):
    text = "image,caption\na.png,one\nb.png,two\n"
    save_images(tmp_path / place, "a.png", "b.png")
    assert len(captions_by_id(load_captions(write(tmp_path / "c.csv", text)))) == 2
    elsewhere = write(tmp_path / "elsewhere" / "c.csv", text)
    assert len(captions_by_id(load_captions(elsewhere, image_dir=tmp_path / place))) == 2


def test_images_stay_files_until_they_are_read(two):
    from datasets import Image as ImageFeature

    train = load_captions(two("image,caption\na.png,one\nb.png,two\n"))["train"]
    stored = train.cast_column("image", ImageFeature(decode=False))[0]["image"]
    assert stored["bytes"] is None and Path(stored["path"]).name == train[0]["image_id"]


# Each case: text of the file, and parts of the message. Rows are counted as in an editor.
BAD_FILES = {
    "missing_image_column": ("id,picture,caption\n0,a.png,one\n", ["row 1", "'image'", "picture", "image_column"]),
    "missing_caption_column": ("id,image,captoin\n0,a.png,one\n", ["row 1", "'caption'", "captoin", "caption_column"]),
    "empty_file": ("", ["no captions", "header"]),
    "blank_first_line": ("\nimage,caption\na.png,one\n", ["row 1", "'image'", "nothing"]),
    "only_a_header": ("image,caption\n", ["no captions"]),
    "missing_image_file": ("image,caption\na.png,one\nc.png,two\n", ["row 3", "'image'", "c.png", "1 of 2"]),
    "empty_caption": ("id,image,caption\n0,a.png,one\n1,b.png,  \n", ["row 3", "'caption'", "empty"]),
    "empty_image_name": ("id,image,caption\n0,a.png,one\n1, ,two\n", ["row 3", "'image'"]),
    "too_many_fields": ("image,caption\na.png,one\nb.png,red, green\n", ["row 3", "3 fields", "quotation marks"]),
    "too_few_fields": ("id,image,caption\n0,a.png,one\n1,b.png\n", ["row 3", "2 fields", "id, image, caption"]),
    "after_a_quoted_line_end": ('image,caption\na.png,"one\nor\r\nmore"\n\nb.png,\n', ["row 6", "'caption'"]),
    "row_of_several_lines": ('image,caption\na.png,one\nc.png,"two\nthree"\n', ["row 3", "c.png"]),
    "open_quotation_mark": ('image,caption\na.png,"one\nb.png,two\n', ["row 2", "quotation mark"]),
    "windows_line_ends": ("image,caption\r\na.png,one\r\nb.png,\r\n", ["row 3", "'caption'"]),
    "not_utf8": ("image,caption\r\na.png,one\r\nb.png,caf\u00e9\n".encode("latin-1"), ["row 3", "0xe9", "UTF-8"]),
    "token_without_tab": ("a.png#0\tone\n\nb.png two\n", ["row 3", "name#number", "b.png two"]),
    "utf16": ("image,caption\na.png,one\n".encode("utf-16"), ["row 1", "UTF-8"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_caption_file_errors_name_row_and_column(two, case):
    text, expected = BAD_FILES[case]
    path = two(text)
    with pytest.raises(DataError) as error:
        load_captions(path)
    for part in [str(path), *expected]:
        assert part in str(error.value), f"{part!r} is not in {error.value}"


@pytest.mark.parametrize(
    "source", ["nowhere/captions.csv", "captions.tsv", "/nowhere", "./nowhere", "~/nowhere", "a/b/c"]
)
def test_a_wrong_path_is_not_searched_on_the_hub(source):
    with pytest.raises(DataError, match="no such file or folder"):
        load_captions(source)


def test_a_wrong_image_folder_is_named(two, tmp_path):
    path = two("image,caption\na.png,one\nb.png,two\n")
    with pytest.raises(DataError, match="nothere.*image_dir"):
        load_captions(path, image_dir=tmp_path / "nothere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a.png.*empty.*2 of 2"):
        load_captions(path, image_dir=tmp_path / "empty")
    with pytest.raises(DataError, match="no captions found.*captions.csv.*metadata"):
        load_captions(tmp_path / "empty")


# --- Flickr8k and splits --------------------------------------------------------------------------------------------

STRAY = "2258277193_586949ec62.jpg.1"
FOUR = ("1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg")


def flickr_folder(folder: Path, form: str) -> Path:
    """Four images with two captions each, in one of the usual forms of Flickr8k."""
    rows = [(name, k, f"{name} is , number {k} .") for name in FOUR for k in range(2)]
    if form == "token":
        save_images(folder / "Flicker8k_Dataset", *FOUR)
        stray = [f"{STRAY}#{k}\tno image {k}" for k in range(5)]
        lines = [f"{name}#{k}\t{text}" for name, k, text in rows]
        write(folder / "Flickr8k.token.txt", "\n".join(lines[:4] + stray + lines[4:]) + "\n")
        return folder
    save_images(folder / "Images", *FOUR)
    kaggle = form == "kaggle"
    with (folder / ("captions.txt" if kaggle else "captions.csv")).open("w", newline="") as file:
        csv.writer(file).writerow(["image", "caption"] if kaggle else ["id", "image", "caption"])
        csv.writer(file).writerows([row[0], row[2]] if kaggle else [i, row[0], row[2]] for i, row in enumerate(rows))
    return folder


@pytest.mark.parametrize("form", ["csv", "kaggle", "token"])
def test_flickr8k_folder_in_each_form(tmp_path, form):
    flickr_folder(tmp_path, form)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        splits = load_captions(tmp_path)
    assert captions_by_id(splits) == {name: [f"{name} is , number {k} ." for k in range(2)] for name in FOUR}
    messages = [str(w.message) for w in caught]
    if form == "token":
        assert len(messages) == 1 and "dropped 5 rows" in messages[0] and STRAY in messages[0]
    else:
        assert messages == []


@pytest.mark.parametrize(
    "files",
    [
        ("train.txt", "validation.txt", "test.txt"),
        ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt"),
    ],
)
def test_split_files_are_used_and_other_images_left_out(tmp_path, files):
    folder = flickr_folder(tmp_path, "kaggle")
    for file, name in zip(files, FOUR[1:], strict=True):
        write(folder / file, f"\ufeff{name} \r\n\r\n")
    with pytest.warns(UserWarning, match="left out 1 images"):
        splits = load_captions(folder)
    assert {split: names(rows) for split, rows in splits.items()} == {
        "train": {"2_b.jpg"}, "validation": {"3_c.jpg"}, "test": {"4_d.jpg"}
    }  # fmt: skip


def test_validation_is_split_from_train_if_missing(tmp_path):
    folder = flickr_folder(tmp_path, "csv")
    write(folder / "train.txt", "\n".join(FOUR[:3]))
    write(folder / "test.txt", FOUR[3])
    splits = load_captions(folder, validation_fraction=0.34)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2, "validation": 1, "test": 1}
    assert names(splits["train"]) | names(splits["validation"]) == set(FOUR[:3])


@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [
        ("1_a.jpg\n2_b.jpg\n", "3_c.jpg\n\n2_b.jpg\n", ["validation.txt, row 3", "2_b.jpg", "train.txt, row 2"]),
        ("1_a.jpg\n2_b.jpg\n1_a.jpg\n", "3_c.jpg\n", ["train.txt, row 3", "1_a.jpg", "train.txt, row 1"]),
        ("1_a.jpg\n", "no.jpg\n", ["validation.txt, row 1", "no.jpg", "no caption"]),
        ("1_a.jpg\n", "\n", ["validation.txt", "no image names"]),
        (None, "1_a.jpg\n", ["validation.txt", "train.txt"]),
    ],
)
def test_an_error_in_a_split_file_names_its_row(tmp_path, train, validation, expected):
    folder = flickr_folder(tmp_path, "csv")
    for name, text in (("train.txt", train), ("validation.txt", validation)):
        if text is not None:
            write(folder / name, text)
    with pytest.raises(DataError) as error:
        load_captions(folder)
    for part in expected:
        assert part in str(error.value), f"{part!r} is not in {error.value}"


def test_the_seeded_split_is_by_image_and_repeatable(tmp_path):
    many = [f"{i}.png" for i in range(20)]
    save_images(tmp_path, *many)
    one = write(tmp_path / "one.csv", "image,caption\n" + "".join(f"{name},x\n" * 3 for name in many))
    other = write(tmp_path / "other.csv", "image,caption\n" + "".join(f"{name},x\n" for name in reversed(many)))
    splits = load_captions(one, validation_fraction=0.2)
    assert len(splits["validation"]) == 4 and len(captions_by_id(splits)) == 20
    assert names(load_captions(one, validation_fraction=0.2)["validation"]) == names(splits["validation"])
    assert names(load_captions(other, validation_fraction=0.2)["validation"]) == names(splits["validation"])
    assert names(load_captions(one, validation_fraction=0.2, seed=1)["validation"]) != names(splits["validation"])


def test_scenes_are_built_in(monkeypatch):
    assert build_scenes.__defaults__ == (6000, 1000, 64, 0)
    monkeypatch.setattr(build_scenes, "__defaults__", (30, 10, 32, 0))
    splits = load_captions("scenes")
    assert {"image", "image_id", "captions"} == set(splits["train"].column_names)
    assert len(splits["train"]) == 30 and not names(splits["train"]) & names(splits["validation"])


def test_flickr8k_has_its_official_splits(shared):
    with pytest.warns(UserWarning, match="left out 91 images"):
        splits = load_captions(shared / "flickr8k")
    assert [len(rows) for rows in splits.values()] == [6000, 1000]
    assert all(len(captions) == 5 for rows in splits.values() for captions in rows["captions"])
    assert not names(splits["train"]) & names(splits["validation"])
    assert splits["validation"][0]["image"].size == (224, 224)


# --- imagefolder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_imagefolder_with_one_metadata_file(tmp_path, kind):
    save_images(tmp_path, "a.png", "sub/b.png")
    if kind == "csv":
        write(tmp_path / "metadata.csv", "file_name,text\na.png,one\nsub/b.png,two\na.png,three\n")
    else:
        lines = [{"file_name": "a.png", "captions": ["one", "three"]}, {"file_name": "sub/b.png", "captions": ["two"]}]
        write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    splits = load_captions(tmp_path)
    assert list(splits) == ["train", "validation"]
    assert captions_by_id(splits) == {"a.png": ["one", "three"], "sub/b.png": ["two"]}


@pytest.mark.parametrize("one_file", [True, False])
def test_imagefolder_with_a_folder_per_split(tmp_path, one_file):
    images = ("train/a.png", "val/a.png", "test/b.png")
    save_images(tmp_path, *images)
    if one_file:
        write(tmp_path / "metadata.csv", "file_name,caption\n" + "".join(f"{name},{name}\n" for name in images))
    else:
        for name in images:
            folder, file = name.split("/")
            write(tmp_path / folder / "metadata.jsonl", json.dumps({"file_name": file, "caption": name}))
    splits = load_captions(tmp_path)
    assert {split: names(rows) for split, rows in splits.items()} == {
        "train": {"train/a.png"}, "validation": {"val/a.png"}, "test": {"test/b.png"}
    }  # fmt: skip
    assert captions_by_id(splits) == {name: [name] for name in images}


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("metadata.csv", "name,caption\na.png,one\n", ["metadata.csv, row 1", "'file_name'", "image_column"]),
        ("metadata.csv", "file_name,label\na.png,one\n", ["metadata.csv, row 1", "'caption'", "caption_column"]),
        ("metadata.csv", "file_name,text\na.png,one\nno.png,two\n", ["metadata.csv, row 3", "'file_name'", "no.png"]),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": ""}', ["row 2"]),
        ("metadata.jsonl", '{"file_name": "a.png", "captions": []}', ["row 1", "'captions'"]),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": [5]}', ["row 1", "'caption'", "5"]),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}\n{"caption": "x"}', ["row 2", "'file_name'"]),
        ("metadata.jsonl", '{"file_name": 3, "caption": "x"}', ["row 1", "'file_name'", "3"]),
        ("metadata.jsonl", '\n{"file_name": "a.png"', ["row 2", "not valid JSON"]),
        ("metadata.jsonl", '["a.png"]', ["row 1", "object"]),
    ],
)  # fmt: skip
def test_an_error_in_metadata_names_row_and_column(tmp_path, file, text, expected):
    save_images(tmp_path, "a.png", "b.png")
    write(tmp_path / file, text)
    with pytest.raises(DataError) as error:
        load_captions(tmp_path)
    for part in expected:
        assert part in str(error.value), f"{part!r} is not in {error.value}"


def test_training_needs_training_images(tmp_path):
    save_images(tmp_path, "val/a.png", "test/b.png")
    write(tmp_path / "metadata.csv", "file_name,text\nval/a.png,one\ntest/b.png,two\n")
    assert {split: names(rows) for split, rows in load_captions(tmp_path).items()} == {
        "validation": {"val/a.png"}, "test": {"test/b.png"}
    }  # fmt: skip
    with pytest.raises(DataError, match="no train split among validation, test"):
        load_datasets([str(tmp_path)])


def test_class_folders_are_split_within_each_class(tmp_path):
    save_images(tmp_path, *(f"{name}/{i}.png" for name in ("red_cat", "train", "dog") for i in range(4)))
    splits = load_captions(tmp_path, validation_fraction=0.25, caption_template="the {}")
    assert sorted(splits["validation"]["group"]) == ["dog", "red_cat", "train"] and len(splits["train"]) == 9
    assert {tuple(several) for several in splits["train"]["captions"]} == {
        ("the dog",),
        ("the red cat",),
        ("the train",),
    }


def test_texts_next_to_images_are_captions(tmp_path):
    save_images(tmp_path, *(f"000{i}.png" for i in range(3)))
    for i in range(3):
        write(tmp_path / f"000{i}.txt", f"picture {i}\n" * (i > 0) + f"again {i}")
    assert captions_by_id(load_captions(tmp_path)) == {
        "0000.png": ["again 0"], "0001.png": ["picture 1", "again 1"], "0002.png": ["picture 2", "again 2"]
    }  # fmt: skip


def test_an_image_in_two_metadata_files_is_an_error(tmp_path):
    save_images(tmp_path, "a.png", "b.png")
    write(tmp_path / "metadata.csv", "file_name,text\na.png,one\nb.png,two\n")
    write(tmp_path / "metadata.jsonl", '{"file_name": "b.png", "text": "x"}')
    with pytest.raises(DataError, match="metadata.jsonl, row 1.*b.png.*metadata.csv, row 3"):
        load_captions(tmp_path)


def test_numbered_caption_columns_are_sorted_by_number():
    columns = ["image", *(f"caption_{i}" for i in (10, 2, 1)), "caption_source"]
    assert caption_columns(columns, "", None, "caption") == ["caption_1", "caption_2", "caption_10"]
    assert caption_columns(["caption", "caption_0"], "", None, "caption") == ["caption"]
    with pytest.raises(DataError, match="x, y"):
        caption_columns(["x", "y"], "here", None, "caption")
