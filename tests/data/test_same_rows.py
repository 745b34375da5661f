"""Training, `check`, `eval` and `index` read the same images, captions and splits from every layout."""

import itertools
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_miniclip.data.checking.entries import read_entries
from modeling_miniclip.data.columns import ColumnNames
from modeling_miniclip.data.load_rows import load_datasets, load_rows
from modeling_miniclip.data.picture_formats import decode_row
from modeling_miniclip.data.rows import ReadOptions
from modeling_miniclip.evaluation.eval_sets import load_eval_set
from tests.helpers.captioned_sources import SPLITS, WRITERS, Shown, Written
from tests.helpers.fuzzing import cases, fuzz
from tests.helpers.listings import images_of
from tests.helpers.shards import picture

pytestmark = pytest.mark.filterwarnings("ignore:.*left out", "ignore:.*the names differ only")

PLAIN = [Shown(i, tuple(f"caption {i} {k}" for k in range(1 + i % 2))) for i in range(1, 7)]
IN_SPLITS = [Shown(row.number, row.captions, SPLITS[i % 3]) for i, row in enumerate(PLAIN)]

# Layouts with one oddity each: the writer, its choices, and the images.
ODDITIES: dict[str, tuple[str, dict[str, Any], Sequence[Shown]]] = {
    "split column": ("caption file", {"names of the splits": ("Training", "VAL", "testing")}, IN_SPLITS),
    "split column in capitals": ("caption file", {"split column": "SPLIT", "format": "tsv"}, IN_SPLITS),
    "split in objects": ("caption file", {"format": "jsonl"}, IN_SPLITS),
    "split in a list of objects": ("caption file", {"format": "json", "split column": "Split"}, IN_SPLITS),
    "wide column": ("caption file", {"other column": "7" * 150_000}, PLAIN),
    "stem of columns": ("caption file", {"captions": "columns"}, PLAIN),
    "named stem of columns": ("caption file", {"captions": "columns", "caption column": "text"}, PLAIN),
    "stem of keys": ("caption file", {"captions": "columns", "format": "jsonl"}, PLAIN),
    "decomposed names": ("caption file", {"names of the files": "decomposed"}, PLAIN),
    "names in capitals": ("caption file", {"names of the files": "upper case"}, PLAIN),
    "declared comma": ("caption file", {"separator line": ","}, PLAIN),
    "declared semicolon": ("caption file", {"separator line": ";"}, PLAIN),
    "files of splits": ("split files", {}, IN_SPLITS),
    "file of one split": ("split files", {}, [row for row in IN_SPLITS if row.split == "test"]),
    "a subject called train": ("image folder", {"subjects": ["boat", "train"]}, PLAIN),
    "folders of splits": ("image folder", {}, IN_SPLITS),
    "texts next to images": ("texts", {}, PLAIN),
    "objects next to images": ("texts", {"texts": "json"}, PLAIN),
    "captions twice": ("archives", {"texts": "both"}, PLAIN),
    "files of a Mac": ("archives", {"files of a Mac": True}, PLAIN),
    "names with two dots": ("archives", {"names": (".image", ".caption")}, PLAIN),
    "texts in another order": ("archives", {"order": "texts reversed"}, PLAIN),
    "base names": ("saved dataset", {"name column": "filename"}, PLAIN),
    "numbers in each split": ("saved dataset", {"name column": "image_id"}, IN_SPLITS),
    "null captions": ("saved dataset", {"rows without captions": True}, PLAIN),
    "nested captions": ("saved dataset", {"captions": "objects"}, PLAIN),
    "base names in rows": ("parquet", {"name column": "filename", "captions": "rows"}, IN_SPLITS),
    "nested captions in Parquet": ("parquet", {"captions": "objects", "rows without captions": True}, PLAIN),
}


def number_of(content: Any, name: str = "") -> int:
    """The number of the picture in a cell of a table."""
    cell = content if isinstance(content, dict) else {"bytes": None, "path": str(content)}
    if isinstance(content, bytes):
        cell = {"bytes": content, "path": None}
    return int(decode_row(cell, name).getpixel((0, 0))[0])


def by_training(written: Written, cache: Path) -> list[Shown]:
    options = ReadOptions(ColumnNames(caption=written.caption))
    splits = load_rows(written.path, options, None, cache)
    rows = [(row, split) for split, rows in splits.items() for row in rows]
    assert len({row["image_id"] for row, _ in rows}) == len(rows)
    return [Shown(row["image"].getpixel((0, 0))[0], tuple(row["captions"]), split) for row, split in rows]


def by_check(written: Written, problems: list[Any]) -> list[Shown]:
    options = ReadOptions(ColumnNames(caption=written.caption))
    entries = read_entries(str(written.path), options, None, problems.append).entries
    return [Shown(number_of(entry.content), tuple(entry.captions), entry.split) for entry in entries]


def by_evaluation(written: Written, split: str, cache: Path) -> list[Shown]:
    data = load_eval_set(str(written.path), split, caption_column=written.caption, cache_dir=cache)
    captions: list[list[str]] = [[] for _ in data.image_ids]
    for text, group in zip(data.texts, data.text_group.tolist(), strict=True):
        captions[group].append(text)
    return [Shown(data.open(i).getpixel((0, 0))[0], tuple(texts), split) for i, texts in enumerate(captions)]


def by_index(written: Written, problems: list[Any]) -> list[Shown]:
    images, found = images_of(written.path, columns=ColumnNames(caption=written.caption))
    problems += found
    rows = [Shown(number_of(content), tuple(captions), split or None) for _, captions, split, content in images]
    return [row for row in rows if row.captions]


def assert_same_rows(written: Written, rows: Sequence[Shown], cache: Path) -> None:
    """Every command reads exactly these images."""
    in_train = sorted(row._replace(split=row.split or "train") for row in rows)
    assert sorted(by_training(written, cache)) == in_train
    problems: list[Any] = []
    assert sorted(by_check(written, problems)) == in_train
    indexed = [each._replace(split=each.split or "train") for each in by_index(written, problems)]
    assert sorted(indexed) == in_train
    assert sorted(by_evaluation(written, "all", cache)) == sorted(row._replace(split="all") for row in rows)
    splits = {row.split for row in in_train}
    for split in splits if "validation" in splits or "train" not in splits else ():
        assert sorted(by_evaluation(written, split, cache)) == [row for row in in_train if row.split == split]
    assert {problem.kind for problem in problems} <= {"left-out", "spelling"}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_every_command_reads_the_same_rows(tmp_path: Path, oddity: str) -> None:
    layout, choices, rows = ODDITIES[oddity]
    unused = dict(choices)

    def pick(name: str, options: Sequence[Any]) -> Any:
        unused.pop(name, None)
        return choices.get(name, options[0])

    written = WRITERS[layout](tmp_path, rows, pick)
    assert not unused
    assert_same_rows(written, rows, tmp_path / "cache")


def test_one_or_several_validation_files_are_used_whole(tmp_path: Path) -> None:
    pick: Any = lambda name, options: options[0]  # noqa: E731
    parts: Mapping[str, Sequence[Shown]] = {"a": PLAIN[:4], "b": PLAIN[4:]}
    paths = {}
    for name, rows in parts.items():
        (tmp_path / name).mkdir()
        paths[name] = str(WRITERS["caption file"](tmp_path / name, rows, pick).path)
    for train, validation in (
        ([paths["a"]], [paths["b"]]),
        (paths["a"], paths["b"]),
        (Path(paths["a"]), Path(paths["b"])),
    ):
        splits = load_datasets(train, cache_dir=tmp_path / "cache", validation=validation)
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 4, "validation": 2}
        entries = read_entries(paths["a"], ReadOptions(), None, print, validation).entries
        assert [entry.split for entry in entries] == ["train"] * 4 + ["validation"] * 2


def test_equal_groups_of_different_datasets_stay_apart(tmp_path: Path) -> None:
    """The rows are in order in one dataset and selected in the other, which are stored differently."""
    paths = []
    for name, groups in (("a", ["1", "1", "", "1"]), ("b", ["1", "", "2", "1"])):
        (tmp_path / name).mkdir()
        splits = ["train", "validation", "train", "train"] if name == "a" else ["train"] * 3 + ["validation"]
        lines = ["image,caption,split,group"]
        for i, (group, split) in enumerate(zip(groups, splits, strict=True)):
            (tmp_path / name / f"{i}.png").write_bytes(picture(i))
            lines.append(f"{i}.png,{name}{i},{split},{group}")
        (tmp_path / name / "captions.csv").write_text("\n".join(lines))
        paths.append(str(tmp_path / name / "captions.csv"))
    splits = load_datasets(paths, cache_dir=tmp_path / "cache")
    assert splits["train"]["captions"] == [["a0"], ["a2"], ["a3"], ["b0"], ["b1"], ["b2"]]
    for rows in (splits["train"], pickle.loads(pickle.dumps(splits["train"]))):
        groups = rows["group"]
        assert [group is None for group in groups] == [False, True, False, False, True, False]
        assert groups[0] == groups[2] and len({groups[0], groups[3], groups[5]}) == 3
    assert splits["validation"]["group"][0] == splits["train"]["group"][0]
    assert load_datasets(paths[0], cache_dir=tmp_path / "cache")["train"]["group"] == ["1", None, "1"]


LAYOUTS = [*WRITERS, *["caption file", "archives"] * 2, "caption file"]  # some have more oddities than others
TEXTS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=12)
IMAGES = st.lists(
    st.tuples(st.lists(TEXTS, min_size=1, max_size=3, unique=True), st.sampled_from(SPLITS)), min_size=2, max_size=6
)


@cases(16, 1500)
def test_any_layout_is_read_alike_by_every_command(tmp_path: Path, record_property: Any, count: int) -> None:
    numbers = itertools.count()

    @fuzz(count, record_property)
    @given(layout=st.sampled_from(LAYOUTS), images=IMAGES, has_splits=st.booleans(), data=st.data())
    def check(layout: str, images: Any, has_splits: bool, data: Any) -> None:
        has_splits = has_splits and "train" in [split for _, split in images]
        rows = [Shown(i, tuple(texts), split if has_splits else None) for i, (texts, split) in enumerate(images, 1)]
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        written = WRITERS[layout](folder, rows, lambda name, options: data.draw(st.sampled_from(options), label=name))
        assert_same_rows(written, rows, tmp_path / "cache")

    check()
