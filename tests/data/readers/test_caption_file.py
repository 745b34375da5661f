"""Caption files of every format: the right rows, and a problem at the right row for each bad one."""

import json
import unicodedata
from pathlib import Path

import pytest

from modeling_miniclip import DataError
from modeling_miniclip.data.columns import ColumnNames
from modeling_miniclip.data.problems import raise_problem
from modeling_miniclip.data.readers import text_files
from modeling_miniclip.data.readers.caption_file import inputs_caption_file, read_caption_file, split_lines
from modeling_miniclip.data.readers.image_files import BLOCK
from modeling_miniclip.data.rows import ReadOptions, Row
from modeling_miniclip.errors import Problem
from tests.data.test_captions import BAD_FILES, save_images, write


def read(source: Path, **options) -> list[Row]:
    return list(read_caption_file(str(source), ReadOptions(**options), raise_problem))


def captions(rows: list[Row]) -> list[tuple[str, list[str]]]:
    return [(row.name, row.captions) for row in rows]


def problems(source: Path, **options) -> tuple[list[str], list[tuple[str, int | None]]]:
    """Captions of the rows that are read, and kind and row of each problem."""
    found: list[Problem] = []
    rows = list(read_caption_file(str(source), ReadOptions(**options), found.append))
    return [caption for row in rows for caption in row.captions], [(each.kind, each.row) for each in found]


@pytest.fixture
def two(tmp_path: Path):
    """A folder with the images a.png and b.png: a function that writes a caption file next to them."""
    for name in ("a.png", "b.png"):
        write(tmp_path / "Images" / name, "x")
    return lambda text, name="own.csv": write(tmp_path / name, text)


def test_a_row_says_all_that_its_line_says(two, tmp_path):
    path = two("ID,id,image,Split,caption,group\n_,7, ./a.png ,VAL, one ,g\n_,8,b.png,,two,\n")
    first, second = read(path)
    image = str(tmp_path / "Images" / "a.png")
    assert first == Row("a.png", image, ["one"], "a.png", "validation", "g", ["7"], str(path), 2, "image")
    assert (second.split, second.group, second.ids, second.number) == (None, None, ["8"], 3)


def test_json_lines_hold_lists_numbers_and_nothing(two):
    lines = [
        {"image": "a.png", "captions": ["one", "two"], "group": 5, "SPLIT": "Dev", "id": 3},
        {"image": "b.png", "caption": "three", "group": None, "split": None},
    ]
    first, second = read(two("\n".join(map(json.dumps, lines)), "own.jsonl"))
    assert (first.captions, first.group, first.split, first.ids) == (["one", "two"], "5", "validation", ["3", "3"])
    assert (second.captions, second.group, second.split, second.ids) == (["three"], None, None, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("excel.csv", "sep=,\nimage,caption\na.png,one\nb.png,two\n"),
        ("excel.csv", '\ufeff"sep=;"\r\nimage;caption\r\na.png;one\r\nb.png;two\r\n'),
        ("excel.csv", "sep=\t\r\nimage\tcaption\r\na.png\tone\r\nb.png\ttwo\r\n"),
        ("old_mac.csv", "image,caption\ra.png,one\rb.png,two"),
        ("spaces.csv", ' id , image , caption \n0 , a.png , one \n1 ,b.png,"two"\n\n   \n'),
        ("numbered.csv", "image,caption_1,caption_0\na.png,,one\nb.png,,two\n"),
        ("stem.csv", "image,text0\na.png,one\nb.png,two\n"),
        ("usual.csv", "filepath,sentences\na.png,one\nb.png,two\n"),
        ("Flickr8k.token.txt", "a.png#0\tone\n\nb.png#0\ttwo\n"),
        ("list.json", '\ufeff[{"image": "a.png", "caption": "one"},\n{"image": "b.png", "caption": ["two"]}]'),
        ("list.jsonl", '{"file_name": "a.png", "sentences": ["one"]}\n{"file_name": "b.png", "text": "two"}'),
    ],
)
def test_every_form_of_a_caption_file_is_read(two, name, text):
    wanted = ColumnNames(caption="text" if name == "stem.csv" else "caption")
    assert captions(read(two(text, name), columns=wanted)) == [("a.png", ["one"]), ("b.png", ["two"])]


def test_a_column_that_was_named_is_not_replaced(two):
    path = two("image,caption,text\na.png,one,two\n")
    for wanted in (ColumnNames(image="picture"), ColumnNames(caption="title")):
        with pytest.raises(DataError, match="row 1: no .*(picture|title)"):
            read(path, columns=wanted)


@pytest.mark.parametrize("case", BAD_FILES)
def test_errors_name_row_and_column(two, case):
    text, expected = BAD_FILES[case]
    path = two(text)
    with pytest.raises(DataError) as error:
        read(path)
    for part in [str(path), *expected]:
        assert part in str(error.value), f"{part!r} is not in {error.value}"


def test_rows_after_a_bad_one_are_read(two):
    lines = [
        "image,caption,more",  # row 1
        'a.png,"open,x',
        "a.png,two,x",
        'a.png,"red" or blue,x',
        "a.png,four",
        "a.png,,x",
        ",five,x",
        "a.png,caf\udce9,x",
        "a.png,six,\udce9",
        'a.png,"of two',  # row 10
        'lines",x',
        'b.png,"last" ,x',
        'b.png,"last",x',
    ]
    path = two("\n".join(lines).encode("utf-8", "surrogateescape"))
    texts, found = problems(path)
    assert texts == ["two", "of two\nlines", "last"]
    assert sorted(found) == sorted(
        [
            ("quotes", 2), ("quotes", 4), ("fields", 5), ("empty-caption", 6), ("no-name", 7),
            ("encoding", 8), ("encoding", 9), ("quotes", 12),
        ]
    )  # fmt: skip


def test_the_byte_that_is_not_utf8_is_counted(two):
    path = two("\ufeffimage,caption\r\nä.png,é\r\n".encode() + b"b.png,\xc3\xa4\xe9\n")
    with pytest.raises(DataError, match=r"row 3: byte 37 \(0xe9\) is not UTF-8"):
        read(path)


def test_wide_columns_and_captions_are_read(two):
    path = two(f'image,caption,embedding\na.png,one,"{"0.12 " * 60_000}"\nb.png,{"word " * 50_000},0\n')
    assert [len(row.captions[0]) for row in read(path)] == [3, 249_999]


def test_an_index_takes_rows_without_captions(two):
    assert captions(read(two("image\na.png\n\nb.png\n"), all_images=True)) == [("a.png", []), ("b.png", [])]
    with pytest.raises(DataError, match="no captions: expected a column 'caption'"):
        read(two("image\na.png\n"))


def test_a_json_list_is_read_piece_by_piece(two, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 7)
    rows = [{"image": "a.png", "caption": f"é{'[{' * i}", "split": "val"} for i in range(9)]
    path = two(json.dumps(rows, indent=2, ensure_ascii=False), "own.json")
    assert [(row.captions[0], row.number, row.split) for row in read(path)] == [
        (f"é{'[{' * i}", 2 + 5 * i, "validation") for i in range(9)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"image": "a.png", "caption": "one"},\n{"image": "b.png", "caption"}]', "row 3: not valid JSON"),
        ('[{"image": "a.png", "caption": "one"}\n', "row 2: the end of the list is missing"),
        ('[{"image": "a.png", "caption": "one"},\n5]', "row 2: expected an object .*got 5"),
        ('[{"image": "a.png"}]', "row 1: no captions: expected a column 'caption'"),
        ('[{"image": "a.png", "caption": "\\ud800"}]', "row 1: not valid JSON"),
        (b'[{"image": "a.png",\n"caption": "\xe9"}]', "row 2: a byte .0xe9. is not UTF-8"),
        (f'[{{"a": {"[" * 100_000}', "row 1: not valid JSON"),
    ],
)
def test_an_error_in_a_json_list_names_its_row(two, text, message):
    with pytest.raises(DataError, match=message):
        read(two(text, "own.json"))


# --- images ---------------------------------------------------------------------------------------------------------


def test_bad_images_are_counted_and_left_out(two, tmp_path):
    write(tmp_path / "Images" / "empty.png", "")
    write(tmp_path / "x.png", "x")
    path = two("image,caption\na.png,1\nno.png,2\nempty.png,3\n../x.png,4\nno.png,5\nb.png,6\n")
    texts, found = problems(path)
    assert texts == ["1", "6"] and sorted(found) == [("empty", 4), ("missing", 3), ("outside", 5)]
    texts, found = problems(path, columns=ColumnNames(allow_outside_images=True))
    assert texts == ["1", "4", "6"]
    with pytest.raises(DataError, match=r"row 3, column 'image': .*'no.png' .*\(1 of 5 images are missing\)"):
        read(two("image,caption\na.png,1\nno.png,2\nb.png,3\n./b.png,3\nempty.png,3\n../x.png,3\n"))


def test_images_of_every_block_are_looked_for(two):
    lines = ["a.png,x"] * (BLOCK + 1) + ["no.png,y"] * 2
    texts, found = problems(two("\n".join(["image,caption", *lines])))
    assert len(texts) == BLOCK + 1 and found == [("missing", BLOCK + 3)]


@pytest.mark.parametrize("change", [lambda name: unicodedata.normalize("NFD", name), str.upper])
def test_names_may_differ_in_form_or_case(tmp_path, change):
    names = [f"Sub/caf\u00e9 {i}.jpg" for i in range(3)]
    for name in names:
        write(tmp_path / "Images" / change(name), "x")
    path = write(
        tmp_path / "captions.csv", "image,caption\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names))
    )
    with pytest.warns(UserWarning, match=r"row 2, column 'image': .* is the file .*as do those of 2 other images"):
        rows = read(path)
    assert captions(rows) == [(change(name), [str(i)]) for i, name in enumerate(names)]
    assert all(Path(row.image).is_file() for row in rows)


def test_a_name_that_fits_two_files_is_missing(two, tmp_path):
    for name in ("C.png", "c.PNG", "e\u0301.png", "E\u0301.png"):
        write(tmp_path / "Images" / name, "x")
    texts, found = problems(two("image,caption\nc.png,1\n\u00e9.png,2\n"))
    assert texts == ["2"] and found == [("missing", 2), ("spelling", 3)]


def test_images_are_next_to_the_file_or_named(tmp_path):
    for place in ("Images", "images", ".", "Flicker8k_Dataset"):
        folder = tmp_path / place.replace(".", "here")
        write(folder / place / "a.png", "x")
        path = write(folder / "own.csv", "image,caption\na.png,one\n")
        assert [row.image for row in read(path)] == [str(folder / place / "a.png")]
        elsewhere = write(folder / "elsewhere" / "own.csv", "image,caption\na.png,one\n")
        assert captions(read(elsewhere, image_dir=folder / place)) == [("a.png", ["one"])]
    with pytest.raises(DataError, match="nothere: no such folder of images.*image_dir"):
        read(path, image_dir=tmp_path / "nothere")


# --- folders --------------------------------------------------------------------------------------------------------


def test_files_named_after_splits_are_splits(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / "Images" / name, "x")
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        write(tmp_path / f"coco_{split}2017.csv", f"image,caption\n{name}.png,{split}\n")
    write(tmp_path / "test_results.csv", "image,score\na.png,7\n")
    rows = read(tmp_path)
    assert [(row.name, row.split) for row in rows] == [("a.png", "train"), ("b.png", "validation"), ("c.png", "test")]


def test_each_split_may_have_its_folder(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / split / "a.png", "x")
        write(tmp_path / f"{split}.tsv", f"image\tcaption\na.png\t{split}\n")
    rows = read(tmp_path)
    assert [(row.name, row.split, row.captions) for row in rows] == [
        ("train/a.png", "train", ["train"]), ("val/a.png", "validation", ["val"])
    ]  # fmt: skip


def test_lines_of_split_files_name_images_by_their_files(tmp_path):
    for name in ("a.png", "B.png", "c.png"):
        write(tmp_path / "Images" / name, "x")
    path = write(tmp_path / "captions.csv", "image,caption\na.png,1\nb.PNG,2\nc.png,3\n")
    assert split_lines(str(tmp_path), ReadOptions(), raise_problem) is None
    write(tmp_path / "train.txt", "\ufeff./a.png \r\n\r\nb.png\r\n")
    write(tmp_path / "val.txt", "no.png\n")
    lines = [
        ("train", "a.png", "train.txt", 1),
        ("train", "B.png", "train.txt", 3),
        ("validation", "no.png", "val.txt", 1),
    ]
    for source in (tmp_path, path):
        found = split_lines(str(source), ReadOptions(), raise_problem)
        assert [(line.split, line.name, Path(line.file).name, line.number) for line in found] == lines


def test_edited_files_are_read_again(tmp_path):
    write(tmp_path / "captions.csv", "image,caption\na.png,1\n")
    write(tmp_path / "train.txt", "a.png\n")
    keys = [list(inputs_caption_file(str(tmp_path), ReadOptions()))]
    for name in ("captions.csv", "train.txt"):
        write(tmp_path / name, (tmp_path / name).read_text().replace("a", "b"))
        keys.append(list(inputs_caption_file(str(tmp_path), ReadOptions())))
    assert keys[0] != keys[1] != keys[2]


def test_stray_rows_of_flickr8k_are_dropped(tmp_path):
    save_images(tmp_path / "Flicker8k_Dataset", "1_a.jpg")
    stray = "2258277193_586949ec62.jpg.1"
    write(tmp_path / "Flickr8k.token.txt", f"1_a.jpg#0\tone\n{stray}#0\tx\n{stray}#1\tx\n1_a.jpg#1\ttwo\n")
    with pytest.warns(UserWarning, match=f"dropped 2 rows of {stray}"):
        assert captions(read(tmp_path)) == [("1_a.jpg", ["one"]), ("1_a.jpg", ["two"])]
