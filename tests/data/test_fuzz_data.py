"""Whatever is in caption files, split files and recipes: right rows and values, or an error that names the file."""

import csv
import io
import json
import string
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from modeling_miniclip import load_captions
from modeling_miniclip.data.caption_files import ResolvedColumns, read_caption_file
from modeling_miniclip.training.arguments import TrainingArguments
from modeling_miniclip.training.parsing import parse_arguments
from modeling_miniclip.training.recipes import read_recipe
from tests.helpers.fuzzing import CAPTIONS, NASTY, TEXT, VALUES, cases, damaged, fuzz, result_or_error
from tests.helpers.runs import ROOT

# A name that means itself: no separators, no white space around it, none of the two that mean folders.
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


def exactly(names: Any, file: str, row: int) -> ResolvedColumns:
    return ResolvedColumns("image", ["caption"])


def grouped(rows: list[tuple[str, str]]) -> dict[str, list[str]]:
    expected: dict[str, list[str]] = {}
    for name, caption in rows:
        expected.setdefault(name, []).append(caption.strip())
    return expected


@cases(40, 3000)
def test_csv_of_any_dialect_gives_back_what_was_written(tmp_path: Path, record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(
        rows=ROWS,
        columns=st.permutations(["image", "caption", "more"]),
        line_end=st.sampled_from(["\n", "\r\n", "\r"]),
        suffix=st.sampled_from([(",", ".csv"), (",", ".txt"), ("\t", ".tsv"), ("\t", ".csv"), ("\t", ".txt")]),
        mark=st.booleans(),
    )
    def check(rows: Any, columns: Any, line_end: str, suffix: tuple[str, str], mark: bool) -> None:
        lines = io.StringIO(newline="")
        # everything quoted: Python before 3.13 leaves "\r" bare where lines end in "\n"
        writer = csv.writer(lines, delimiter=suffix[0], lineterminator=line_end, quoting=csv.QUOTE_ALL)
        lines.write(suffix[0].join(columns) + line_end)
        for name, caption in rows:
            cells = {"image": name, "caption": caption, "more": "7"}
            writer.writerow([cells[column] for column in columns])
        path = tmp_path / f"captions{suffix[1]}"
        path.write_bytes(lines.getvalue().encode("utf-8-sig" if mark else "utf-8"))
        found = read_caption_file(path, exactly)
        assert {name: image.captions for name, image in found.items()} == grouped(rows)

    check()


@cases(40, 3000)
def test_json_lines_give_back_what_was_written(tmp_path: Path, record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(rows=ROWS, ascii_only=st.booleans(), line_end=st.sampled_from(["\n", "\r\n", "\n\n"]))
    def check(rows: Any, ascii_only: bool, line_end: str) -> None:
        lines = [json.dumps({"image": n, "caption": c}, ensure_ascii=ascii_only) + line_end for n, c in rows]
        path = tmp_path / "metadata.jsonl"
        path.write_bytes("".join(lines).encode())
        found = read_caption_file(path, exactly)
        assert {name: image.captions for name, image in found.items()} == grouped(rows)

    check()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The seeds, with images of their names."""
    for i, name in enumerate(IMAGES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4 + i, 4)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in SEEDS if name not in SPLIT_FILES])
def test_seeds_are_right_as_they_are(source: Path, name: str) -> None:
    (source / name).write_bytes(SEEDS[name])
    assert sum(map(len, load_captions(source / name).values())) == 2


@cases(60, 4000)
def test_damaged_caption_files_give_whole_rows_or_an_error_with_their_name(
    source: Path, record_property: Any, count: int
) -> None:
    captions = [name for name in SEEDS if name not in SPLIT_FILES]

    @fuzz(count, record_property)
    @given(name=st.sampled_from(captions), data=st.data())
    def check(name: str, data: Any) -> None:
        (source / name).write_bytes(data.draw(damaged(st.just(SEEDS[name])), label="content"))
        splits, told = result_or_error(load_captions, source / name)
        assert_whole(splits, told, source)

    check()


@pytest.mark.filterwarnings("ignore:.*left out")
@cases(25, 1500)
def test_damaged_split_files_put_each_image_into_one_split_or_are_an_error(
    source: Path, record_property: Any, count: int
) -> None:
    rows = "".join(f"{name},one\n" for name in IMAGES)
    (source / "captions.csv").write_text(f"image,caption\n{rows}", encoding="utf-8")

    @fuzz(count, record_property)
    @given(name=st.sampled_from(SPLIT_FILES), data=st.data())
    def check(name: str, data: Any) -> None:
        for file in SPLIT_FILES:
            (source / file).write_bytes(SEEDS[file])
        (source / name).write_bytes(data.draw(damaged(st.just(SEEDS[name])), label="content"))
        splits, told = result_or_error(load_captions, source)
        assert_whole(splits, told, source)

    check()


def assert_whole(splits: Any, told: str, folder: Path) -> None:
    """Rows have an image that is there and captions that say something, or the error names a file or the reason."""
    if splits is None:
        assert str(folder) in told or "cannot be split" in told
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
def test_what_fuzzing_found_is_told(source: Path, name: str, content: str, expected: str) -> None:
    (source / name).write_text(content, encoding="utf-8", newline="")
    splits, told = result_or_error(load_captions, source / name)
    assert splits is None and expected in told


@pytest.mark.parametrize("name", ["\0", "a" * 5000, *NASTY])
def test_no_name_of_a_source_is_a_crash(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert result_or_error(load_captions, name)[1]


# --- recipes and flags ----------------------------------------------------------------------------------------------

HINTS = {name: hint for name, hint in get_type_hints(TrainingArguments).items() if name != "recipe"}
RECIPES = sorted((ROOT / "configuration" / "recipes").glob("*.yaml"))


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field takes, as one writes them in a recipe."""
    kinds = {int: st.integers(), float: st.floats(allow_nan=False), bool: st.booleans(), str: TEXT}
    options = []
    for kind in (hint, *get_args(hint)):
        if kind in kinds:
            options.append(kinds[kind])
        elif kind is type(None):
            options.append(st.none())
        elif get_args(kind) and all(isinstance(choice, str) for choice in get_args(kind)):
            options.append(st.sampled_from(get_args(kind)))
    return st.one_of(options)


@cases(40, 2000)
def test_a_recipe_gives_the_values_that_were_written(tmp_path: Path, record_property: Any, count: int) -> None:
    fields = {name: values_of(hint) for name, hint in HINTS.items() if name != "augmentation"}

    @fuzz(count, record_property)
    @given(values=st.fixed_dictionaries({}, optional=fields))
    def check(values: dict[str, Any]) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        assert read_recipe(path) == values

    check()


@cases(60, 3000)
def test_any_value_of_any_key_is_taken_or_told_with_file_and_key(
    tmp_path: Path, record_property: Any, count: int
) -> None:
    path = tmp_path / "recipe.yaml"

    @fuzz(count, record_property)
    @given(key=st.sampled_from(sorted(HINTS)) | st.text(string.ascii_lowercase + "_", max_size=12), value=VALUES)
    @example(key="augmentation", value=[{"name": "Blur", "when": date(2001, 1, 1)}])
    def check(key: str, value: Any) -> None:
        path.write_text(yaml.safe_dump({"dataset": "scenes"} | {key: value}), encoding="utf-8")
        arguments, told = result_or_error(parse_arguments, ["--recipe", str(path)])
        assert isinstance(arguments, TrainingArguments) or str(path) in told or f"--{key}" in told

    check()


@cases(40, 3000)
def test_damaged_recipes_are_read_or_told(tmp_path: Path, record_property: Any, count: int) -> None:
    seeds = [path.read_bytes() for path in RECIPES]
    assert len(seeds) >= 2
    path = tmp_path / "recipe.yaml"

    @fuzz(count, record_property)
    @given(content=damaged(st.sampled_from(seeds)))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        arguments, told = result_or_error(parse_arguments, ["--recipe", str(path), "--dataset", "scenes"])
        assert isinstance(arguments, TrainingArguments) or told

    check()


NESTED = "a: &a [x]\nb: &b [*a, *a]\nseed: [*b, *b]"  # each line doubles what is written out


@pytest.mark.parametrize(
    "content",
    [
        "seed: 2001-99-99", "seed: !!timestamp x", "seed: !!bool x", "seed: !!int x", "dataset: !!binary x",
        "[" * 5000, "{" * 20_000, "seed: " + "1" * 5000, "seed: 0x" + "f" * 6000, "&a [*a]", "? [a]\n: b", NESTED,
        "seed: !!python/object/apply:os.system [exit]", "\ufeff\0", "dataset: [a", "", "- seed",
        "augmentation: &a [*a]", "dataset: \"a\\0b\"",
    ],
)  # fmt: skip
def test_recipes_that_fuzzing_found_are_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    arguments, told = result_or_error(parse_arguments, ["--recipe", str(path)])
    assert arguments is None and (str(path) in told or "--dataset" in told)


def test_an_alias_may_stand_for_a_single_value(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("vision_learning_rate: &rate 1e-4\ntext_learning_rate: *rate\n", encoding="utf-8")
    assert read_recipe(path) == {"vision_learning_rate": 1e-4, "text_learning_rate": 1e-4}


@cases(40, 2000)
def test_any_flags_are_taken_or_told(record_property: Any, count: int) -> None:
    known = st.sampled_from(sorted(HINTS)).map(lambda name: f"--{name}")
    word = st.one_of(known, TEXT, st.tuples(known, TEXT).map("=".join)).filter(
        lambda w: not w.startswith(("-h", "--he"))
    )

    @fuzz(count, record_property)
    @given(words=st.lists(word, max_size=5))
    def check(words: list[str]) -> None:
        arguments, told = result_or_error(parse_arguments, ["--dataset", "scenes", *words])
        assert isinstance(arguments, TrainingArguments) or told

    check()
