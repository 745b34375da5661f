"""Any caption files and split files: the right rows, or an error that names the file."""

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_miniclip import load_captions
from modeling_miniclip.data.checking.check import check as check_dataset
from modeling_miniclip.data.checking.check import quick_check
from modeling_miniclip.data.problems import KINDS, raise_problem
from modeling_miniclip.data.readers.caption_file import read_table
from modeling_miniclip.data.rows import ReadOptions
from modeling_miniclip.evaluation.eval_sets import ReadableImages, load_eval_set
from modeling_miniclip.utils.names import path_of
from tests.data.test_recognise import OTHERS
from tests.helpers.fuzzing import CAPTIONS, NASTY, TEXT, cases, damaged, fuzz, result_or_error
from tests.helpers.listings import listing_of
from tests.helpers.trees import HEIC, Tree, picture, trees

# File names that are not changed when they are read: no separators, no white space around them, not "." or "..".
NAMES = TEXT.filter(
    lambda name: name.strip() == name and name not in ("", ".", "..") and not set("/\\") & set(name)
)  # fmt: skip
ROWS = st.lists(st.tuples(NAMES, CAPTIONS), min_size=1, max_size=12)
SPLIT_FILES = ("train.txt", "validation.txt")

SEEDS: dict[str, bytes] = {
    "captions.csv": b'id,image,caption\r\n0,a.png,two dogs\r\n1,a.png,"dogs, wet ""and"" happy"\r\n2,b.png,soup\r\n',
    "marked.csv": "\ufeffimage,caption\nä.png,ein Hund\n./sub/c.png,\u05e9\u05dc\u05d5\u05dd\n".encode(),
    "tabs.tsv": b"image\tcaption\na.png\tone\nb.png\ttwo, three\n",
    "captions.txt": b"image,caption\na.png,one\nb.png,two\n",
    "Flickr8k.token.txt": b"a.png#0\tone\na.png#1\ttwo\nb.png#0\tthree .\n",
    "metadata.jsonl": b'{"image": "a.png", "caption": ["one"]}\n{"image": "b.png", "caption": "\\ud83d\\ude00"}',
    "train.txt": b"a.png\nb.png\n",
    "validation.txt": b"sub/c.png\n",
}
IMAGES = ("a.png", "b.png", "ä.png", "sub/c.png")


def captions_of(path: Path) -> dict[str, list[str]]:
    return grouped([(row.name, row.captions[0]) for row in read_table(path, ReadOptions(), raise_problem)])


def grouped(rows: list[tuple[str, str]]) -> dict[str, list[str]]:
    expected: dict[str, list[str]] = {}
    for name, caption in rows:
        expected.setdefault(name, []).append(caption.strip())
    return expected


@cases(40, 3000)
def test_csv_of_any_dialect_is_read_as_written(tmp_path: Path, record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(
        rows=ROWS,
        columns=st.permutations(["image", "caption", "more"]),
        line_end=st.sampled_from(["\n", "\r\n", "\r"]),
        suffix=st.sampled_from([(",", ".csv"), (",", ".txt"), ("\t", ".tsv"), ("\t", ".csv"), ("\t", ".txt")]),
        mark=st.booleans(),
        declared=st.booleans(),
        width=st.sampled_from([1, 150_000]),
    )
    def check(
        rows: Any, columns: Any, line_end: str, suffix: tuple[str, str], mark: bool, declared: bool, width: int
    ) -> None:
        lines = io.StringIO(newline="")
        lines.write(f"sep={suffix[0]}{line_end}" * declared)
        # Quote everything: Python before 3.13 does not quote "\r" if lines end in "\n".
        writer = csv.writer(lines, delimiter=suffix[0], lineterminator=line_end, quoting=csv.QUOTE_ALL)
        lines.write(suffix[0].join(columns) + line_end)
        for name, caption in rows:
            cells = {"image": name, "caption": caption, "more": "7" * width}
            writer.writerow([cells[column] for column in columns])
        path = tmp_path / f"captions{suffix[1]}"
        path.write_bytes(lines.getvalue().encode("utf-8-sig" if mark else "utf-8"))
        assert captions_of(path) == grouped(rows)

    check()


@cases(40, 3000)
def test_json_lines_are_read_as_written(tmp_path: Path, record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(rows=ROWS, ascii_only=st.booleans(), line_end=st.sampled_from(["\n", "\r\n", "\n\n"]))
    def check(rows: Any, ascii_only: bool, line_end: str) -> None:
        lines = [json.dumps({"image": n, "caption": c}, ensure_ascii=ascii_only) + line_end for n, c in rows]
        path = tmp_path / "metadata.jsonl"
        path.write_bytes("".join(lines).encode())
        assert captions_of(path) == grouped(rows)

    check()


WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=12)
# Captions, and whether they are data in place of a text.
MAYBE_DATA = st.one_of(
    st.tuples(WORDS.map(lambda word: f"a {word}"), st.just(False)),
    st.tuples(st.lists(WORDS, max_size=3).map(str), st.just(True)),
    st.tuples(st.lists(WORDS, max_size=3).map(json.dumps), st.just(True)),
    st.tuples(WORDS.map(lambda word: json.dumps({"raw": word})), st.just(True)),
    st.tuples(st.sampled_from(["nan", "NaN", "None", "null", "N/A", "<NA>"]), st.just(True)),
)


@cases(24, 2000)
def test_captions_that_are_data_are_reported(tmp_path: Path, record_property: Any, count: int) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))

    @fuzz(count, record_property)
    @given(captions=st.lists(MAYBE_DATA, min_size=1, max_size=6, unique_by=lambda each: each[0]))
    def check(captions: list[tuple[str, bool]]) -> None:
        lines = [json.dumps({"image": "a.png", "caption": caption}) for caption, _ in captions]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        expected = [row for row, (_, is_data) in enumerate(captions, 1) if is_data]
        problems = check_dataset(str(tmp_path / "rows.jsonl"), decode=False).problems
        assert [problem.row for problem in problems if problem.kind == "data-caption"] == expected
        splits = load_captions(tmp_path / "rows.jsonl", validation_fraction=None)
        warned = [line for line in quick_check(splits, "rows", 1) if KINDS["data-caption"] in line]
        assert [line.split()[0] for line in warned] == [str(len(expected))] * bool(expected)

    check()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with the images that the seeds name."""
    for i, name in enumerate(IMAGES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4 + i, 4)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in SEEDS if name not in SPLIT_FILES])
def test_undamaged_seeds_are_read(source: Path, name: str) -> None:
    (source / name).write_bytes(SEEDS[name])
    assert sum(map(len, load_captions(source / name).values())) == 2


@cases(60, 4000)
def test_damaged_caption_files_give_valid_rows_or_an_error(source: Path, record_property: Any, count: int) -> None:
    captions = [name for name in SEEDS if name not in SPLIT_FILES]

    @fuzz(count, record_property)
    @given(name=st.sampled_from(captions), data=st.data())
    def check(name: str, data: Any) -> None:
        (source / name).write_bytes(data.draw(damaged(st.just(SEEDS[name])), label="content"))
        splits, message = result_or_error(load_captions, source / name)
        assert_valid(splits, message, source)

    check()


@pytest.mark.filterwarnings("ignore:.*left out")
@cases(25, 1500)
def test_damaged_split_files_give_disjoint_splits_or_an_error(source: Path, record_property: Any, count: int) -> None:
    rows = "".join(f"{name},one\n" for name in IMAGES)
    (source / "captions.csv").write_text(f"image,caption\n{rows}", encoding="utf-8")

    @fuzz(count, record_property)
    @given(name=st.sampled_from(SPLIT_FILES), data=st.data())
    def check(name: str, data: Any) -> None:
        for file in SPLIT_FILES:
            (source / file).write_bytes(SEEDS[file])
        (source / name).write_bytes(data.draw(damaged(st.just(SEEDS[name])), label="content"))
        splits, message = result_or_error(load_captions, source)
        assert_valid(splits, message, source)

    check()


def assert_valid(splits: Any, message: str, folder: Path) -> None:
    """Each row has an existing image and captions that are not empty, or the error names a file or the reason."""
    if splits is None:
        assert str(folder) in message or "cannot be split" in message
        return
    assert list(splits)[:2] == ["train", "validation"] and all(len(split) for split in splits.values())
    rows = [row for split in splits.values() for row in split.remove_columns("image")]
    assert len({row["image_id"] for row in rows}) == len(rows)
    assert all((folder / row["image_id"]).is_file() for row in rows)
    assert all(row["captions"] and all(c and c == c.strip() for c in row["captions"]) for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("long.csv", f"image,caption\n{'a' * 300},x\nb.png,y\n", "row 2, column 'image'"),
        ("null.csv", "image,caption\na\0.png,x\nb.png,y\n", "row 2, column 'image'"),
        ("twice.csv", "image,caption,image\na.png,x,b.png\n", "row 1: two columns are named 'image'"),
        ("deep.jsonl", "[" * 100_000, "row 1: not valid JSON"),
        ("digits.jsonl", '{"image": "a.png", "caption": ' + "1" * 5000 + "}", "row 1: not valid JSON"),
        ("half.jsonl", '{"image": "a.png", "caption": "\\ud800"}', "row 1: not valid JSON"),
        ("escape.csv", "im\x1b[31mage,caption\na.png,x\n", "the header has im\\x1b[31mage"),
    ],
)
def test_files_found_by_fuzzing_are_rejected(source: Path, name: str, content: str, expected: str) -> None:
    (source / name).write_text(content, encoding="utf-8", newline="")
    splits, message = result_or_error(load_captions, source / name)
    assert splits is None and expected in message


@pytest.mark.parametrize("name", ["\0", "a" * 5000, *NASTY])
def test_any_source_name_is_rejected_cleanly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert result_or_error(load_captions, name)[1]


# --- layouts of sources ---------------------------------------------------------------------------------------------

CLASSES = st.lists(st.sampled_from([b"red", b"blue", b"green"]), min_size=2, max_size=3, unique=True)


@cases(60, 3000)
def test_class_folders_hold_exactly_their_pictures(tmp_path: Path, record_property: Any, count: int) -> None:
    numbers = iter(range(10**9))

    @fuzz(count, record_property)
    @given(tree=trees(CLASSES))
    def check(tree: Tree) -> None:
        root = tmp_path / str(next(numbers))
        tree.write(root)
        data, message = result_or_error(load_eval_set, str(root))
        assert data is not None, message
        readable = ReadableImages(data.images)
        opened = len(list(readable))
        names = [
            os.fsencode(path_of(data.image_ids[row])) for row in range(len(readable)) if row not in readable.unreadable
        ]
        real = {
            os.path.relpath(os.path.realpath(os.path.join(os.fsencode(root), name)), os.fsencode(root))
            for name in names
        }
        assert real == tree.readable(root) and opened == len(names)
        shutil.rmtree(root)

    check()


@cases(60, 3000)
def test_any_kind_of_file_is_read_or_named(tmp_path: Path, record_property: Any, count: int) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    contents = [
        SEEDS["captions.csv"].replace(b"b.png", b"a.png"),
        picture(0),
        HEIC,
        *(make() for make, _ in OTHERS.values()),
    ]

    @fuzz(count, record_property)
    @given(
        content=st.sampled_from(contents),
        cut=st.integers(0, 400),
        name=st.sampled_from(
            ["captions.csv", "captions.tsv", "captions.txt", "rows.jsonl", "rows.parquet", "rows.tar", "rows"]
        ),
    )
    def check(content: bytes, cut: int, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(content[: max(16, len(content) - cut)])  # a shorter beginning may be that of anything
        for read in (load_captions, listing_of):
            rows, message = result_or_error(read, path)
            assert rows or str(path) in message or "cannot be split" in message
            binary = not content.startswith((b"id,", b"[", b"{", b"version"))
            assert not (binary and "UTF-8 (it" in message), "a binary file is taken for text"
        path.unlink()

    check()
