"""Wrong captions: read from every source, drawn for each row, and collated."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from modeling_miniclip import load_captions
from modeling_miniclip.data.checking.check import check
from modeling_miniclip.data.find_images import WARNINGS
from modeling_miniclip.data.loading.collation import Collator
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.loading.hard_negatives import HardNegatives
from modeling_miniclip.data.readers.record_captions import negatives_of
from modeling_miniclip.errors import DataError
from tests.helpers.shards import as_json, picture, write_tar
from tests.helpers.towers import tiny_processor

WRONG = {"a": ["not a", "nor a"], "b": [], "c": ["not c"]}
KIND_COLUMN = "negative_captions"


def write_csv(folder: Path) -> Path:
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", KIND_COLUMN])
        writer.writerows([["a.png", "a", '["not a"]'], ["b.png", "b", ""], ["c.png", "c", "not c"]])
        writer.writerow(["a.png", "an a", '["nor a"]'])
    return folder / "captions.csv"


def write_jsonl(folder: Path) -> Path:
    lines = [{"image": f"{key}.png", "caption": key, KIND_COLUMN: wrong or None} for key, wrong in WRONG.items()]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "captions.jsonl"


def write_coco(folder: Path) -> Path:
    images = [{"id": i, "file_name": f"{key}.png"} for i, key in enumerate(WRONG)]
    annotations = [
        {"id": i, "image_id": i, "caption": key, KIND_COLUMN: wrong} for i, (key, wrong) in enumerate(WRONG.items())
    ]
    (folder / "captions_train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions_train.json"


def write_karpathy(folder: Path) -> Path:
    images = [
        {"filename": f"{key}.png", "split": "train", "sentences": [{"raw": key}], KIND_COLUMN: wrong}
        for key, wrong in WRONG.items()
    ]
    (folder / "dataset_mine.json").write_text(json.dumps({"images": images}))
    return folder / "dataset_mine.json"


def write_shard(folder: Path) -> Path:
    members = []
    for i, (key, wrong) in enumerate(WRONG.items()):
        members += [(f"{key}.png", picture(i)), (f"{key}.json", as_json({"caption": key, KIND_COLUMN: wrong}))]
    return Path(write_tar(folder / "0.tar", members))


def write_folder(folder: Path) -> Path:
    (folder / "train").mkdir()
    for i, (key, wrong) in enumerate(WRONG.items()):
        (folder / "train" / f"{key}.png").write_bytes(picture(i))
        (folder / "train" / f"{key}.json").write_text(json.dumps({"caption": key, KIND_COLUMN: wrong}))
    return folder / "train"


def write_parquet(folder: Path) -> Path:
    columns = {"image": [{"bytes": picture(i), "path": None} for i in range(3)], "caption": list(WRONG)}
    pq.write_table(pa.table(columns | {KIND_COLUMN: list(WRONG.values())}), folder / "0.parquet")
    return folder / "0.parquet"


def write_saved(folder: Path) -> Path:
    rows = Dataset.from_dict(
        {"image_bytes": [picture(i) for i in range(3)], "caption": list(WRONG), KIND_COLUMN: list(WRONG.values())}
    )
    DatasetDict(train=rows).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(
    "write",
    [write_csv, write_jsonl, write_coco, write_karpathy, write_shard, write_folder, write_parquet, write_saved],
)
def test_every_source_has_negative_captions(write, tmp_path: Path) -> None:
    for i, key in enumerate(WRONG):
        (tmp_path / f"{key}.png").write_bytes(picture(i))
    rows = load_captions(write(tmp_path), validation_fraction=None)["train"]
    assert sorted(rows[KIND_COLUMN]) == sorted(WRONG.values())
    assert all(
        wrong == WRONG[captions[0]] for captions, wrong in zip(rows["captions"], rows[KIND_COLUMN], strict=True)
    )


def test_sources_without_the_column_have_none(captioned_folder: Path) -> None:
    rows = load_captions(captioned_folder)["train"]
    assert KIND_COLUMN not in rows.column_names


# --- lists in a cell ------------------------------------------------------------------------------------------------

# What a program other than `json` writes for a list, and texts that only begin like one.
CELLS: dict[str, list[str]] = {
    '["a cat", "two dogs"]': ["a cat", "two dogs"],
    "['a cat', 'two dogs']": ["a cat", "two dogs"],
    """["a cat's tail", 'b']""": ["a cat's tail", "b"],
    r"""['a "cat\'s" tail', None, '']""": ["""a "cat's" tail"""],
    r"['caf\xe9 \u732b\n', ]": ["caf\u00e9 \u732b"],
    "('a cat', 'two dogs')": ["a cat", "two dogs"],
    "['a cat' 'two dogs'\n 'a bird']": ["a cat", "two dogs", "a bird"],  # an array of numpy
    "[]": [],
    " [] ": [],
    "[None]": [],
    '[{"raw": "a cat"}, null]': ["a cat"],
    "[blurred] a man walks": ["[blurred] a man walks"],
    "[blurred] a man [a boy]": ["[blurred] a man [a boy]"],
    "[a man walks": ["[a man walks"],
    "a man's [sic] dog": ["a man's [sic] dog"],
    "(a man)": ["(a man)"],
}
NO_LISTS = [
    '["a cat", "two',
    '["a cat", "two dogs"',
    "['a cat'",
    "['it''s']",
    "[a cat, two dogs]",
    "['a cat', nan]",
    "['a cat', 3]",
    '["a cat", 3]',
    "[3]",
    "[b'a cat']",
    "['a' + 'b']",
    r"['\ud800']",
    r'["\ud800"]',
    r"['\U99999999']",
    "[" * 100_000 + "]",
    "['a', " * 100_000 + "]",
]


@pytest.mark.parametrize("cell", CELLS)
def test_a_list_in_a_cell_is_read_as_a_list(cell: str) -> None:
    assert negatives_of(cell) == CELLS[cell]


def test_texts_in_a_list_stay_as_they_are() -> None:
    assert negatives_of(["[no caption]", '["a']) == negatives_of('["[no caption]", "[\\"a"]')


@pytest.mark.parametrize("cell", NO_LISTS)
def test_a_list_that_cannot_be_read_is_rejected(cell: str) -> None:
    with pytest.raises(ValueError, match="expected a JSON list of texts"):
        negatives_of(cell)


def test_a_long_list_is_read_in_linear_time() -> None:
    assert len(negatives_of(str(["it's a \\ cat"] * 100_000))) == 100_000


def set_cells(folder: Path, write, cell: str) -> Path:
    """A source as `write` writes it, whose row `c` has this cell."""
    for i, key in enumerate(WRONG):
        (folder / f"{key}.png").write_bytes(picture(i))
    source = write(folder)
    if write is write_csv:
        source.write_text(source.read_text().replace("c.png,c,not c", 'c.png,c,"{}"'.format(cell.replace('"', '""'))))
    return source


WHERE = {
    write_csv: "captions.csv, row 4, column 'negative_captions'",
    write_jsonl: "captions.jsonl, row 3, column 'negative_captions'",
    write_coco: "captions_train.json, column 'negative_captions': the wrong captions of annotation 2",
    write_karpathy: "dataset_mine.json, column 'negative_captions': the wrong captions of image 3",
    write_shard: "0.tar: .*first: 'c.json'",
    write_folder: "c.json, column 'negative_captions'",
    write_parquet: "0.parquet, row 2, column 'negative_captions'",
    write_saved: "saved.*, row 2, column 'negative_captions'",
}


@pytest.mark.parametrize("write", WHERE)
def test_every_source_names_a_list_that_cannot_be_read(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading stops at it, `miniclip check` finds it, and an index only warns of it."""
    monkeypatch.setitem(WRONG, "c", "['a cat', 'two")  # type: ignore[arg-type]
    if write in (write_parquet, write_saved):  # whose columns have one type
        monkeypatch.setitem(WRONG, "a", "not a")  # type: ignore[arg-type]
        monkeypatch.setitem(WRONG, "b", "")  # type: ignore[arg-type]
    source = set_cells(tmp_path, write, "['a cat', 'two")
    with pytest.raises(DataError, match=WHERE[write]) as raised:
        load_captions(source, validation_fraction=None)
    assert "expected a JSON list of texts" in str(raised.value)
    found = [problem for problem in check(str(source), num_workers=0).problems if problem.kind == "negatives"]
    assert len(found) == 1 and str(found[0]) == str(raised.value)
    assert "negatives" in WARNINGS


# --- draws and batches ----------------------------------------------------------------------------------------------

CAPTIONS = ["a small red ball on a large blue box", "a red ball", "a ball on a box"]


def rows_of(hard_negatives: HardNegatives | None) -> CaptionRows:
    split = Dataset.from_dict(
        {
            "image": [{"bytes": picture(i), "path": None} for i in range(2)],
            "image_id": ["0", "1"],
            "captions": [CAPTIONS, ["a dog"]],
            KIND_COLUMN: [["a cat", "a red ball", "a cat", "two cats"], []],
        }
    )
    return CaptionRows(split, tiny_processor(), None, 2, 0, hard_negatives=hard_negatives)


def test_column_is_drawn_without_repetition_and_true_captions() -> None:
    rows = rows_of(HardNegatives.from_sources(["column"]))
    drawn = [rows[epoch, 0]["negatives"] for epoch in range(8)]
    assert all(sorted(wrong) == ["a cat", "two cats"] for wrong in drawn)
    assert rows[0, 1]["negatives"] == []


def test_swaps_are_of_the_drawn_captions() -> None:
    rows = rows_of(HardNegatives.from_sources(["adjectives", "nouns"]))
    seen = set()
    for epoch in range(40):
        row = rows[epoch, 0]
        assert row["negatives"] == rows[epoch, 0]["negatives"]
        assert len(row["negatives"]) == (CAPTIONS[0] in row["captions"])
        seen.update(row["negatives"])
    assert "a small blue ball on a large red box" in seen and "a small red box on a large blue ball" in seen
    assert "a large blue box on a small red ball" not in seen, "relations were not asked for"


def test_swaps_fill_up_the_column() -> None:
    rows = rows_of(HardNegatives(True, ("relations",)))
    assert all(len(rows[epoch, 0]["negatives"]) == 2 for epoch in range(4))
    assert HardNegatives.from_sources(["none"]) is None and HardNegatives.from_sources([]) is None
    assert HardNegatives.from_sources(["swap"], 3) == HardNegatives(False, ("adjectives", "nouns", "relations"), 3)


def test_collator_marks_negatives() -> None:
    rows = rows_of(HardNegatives.from_sources(["column"]))
    batch = Collator(rows.processor.tokenizer)(rows.__getitems__([(0, 0), (0, 1)]))
    assert batch["text_image_id"].tolist() == [0, 0, 0, 0, 1]
    assert batch["is_negative"].tolist() == [False, False, True, True, False]
    assert len(batch["input_ids"]) == 5
    texts = rows.processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert sorted(texts[2:4]) == ["a cat", "two cats"]
    assert "is_negative" not in Collator(rows.processor.tokenizer)(rows_of(None).__getitems__([(0, 0), (0, 1)]))
