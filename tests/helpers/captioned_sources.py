"""The same captioned images in every layout that is read, with the oddities that real ones have.

Each writer asks for its choices by name; the first option is the plain one.
"""

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.shards import as_json, write_tar
from tests.helpers.trees import APPLE_DOUBLE, picture

Pick = Callable[[str, Sequence[Any]], Any]
SPLITS = ("train", "validation", "test")
SPELLINGS: dict[str, Callable[[str], str]] = {
    "same": str,
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "upper case": str.upper,
}


class Shown(NamedTuple):
    """An image: the number of its picture, its captions, and its split, if it is in one."""

    number: int
    captions: tuple[str, ...]
    split: str | None = None


class Written(NamedTuple):
    """A source, the name of its caption column, and whether it can say which split an image is in."""

    path: Path
    caption: str = "caption"
    has_splits: bool = True


def _write_images(folder: Path, rows: Sequence[Shown], name_of: Callable[[Shown], str]) -> None:
    for row in rows:
        (folder / name_of(row)).parent.mkdir(parents=True, exist_ok=True)
        (folder / name_of(row)).write_bytes(picture(row.number))


def _table(records: list[dict[str, Any]], form: str, delimiter: str) -> str:
    """Records with the same keys as the text of a CSV, JSON Lines or JSON file."""
    if form == "json":
        return json.dumps(records)
    if form == "jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return lines.getvalue()


def write_caption_file(folder: Path, rows: Sequence[Shown], pick: Pick) -> Written:
    """A caption file next to its images."""
    form = pick("format", ["csv", "tsv", "jsonl", "json"])
    spelling = SPELLINGS[pick("names of the files", list(SPELLINGS))]
    column = pick("split column", ["split", "Split", "SPLIT"])
    words = dict(zip(SPLITS, pick("names of the splits", [SPLITS, ("Training", "VAL", "testing")]), strict=True))
    stem = pick("caption column", ["caption", "text"])
    in_columns = pick("captions", ["rows", "columns"]) == "columns"
    wide = pick("other column", ["", "7" * 150_000])
    declared = pick("separator line", [None, ",", ";", "\t"]) if form == "csv" else None
    _write_images(folder, rows, lambda row: spelling(f"bé {row.number}.png"))
    most = max(len(row.captions) for row in rows)
    records = []
    for row in rows:
        same = {"image": f"bé {row.number}.png"} | ({column: words[row.split]} if row.split else {})
        same |= {"embedding": wide} if wide else {}
        if in_columns:
            texts = [*row.captions, *[""] * (most - len(row.captions))]
            records.append(same | {f"{stem}_{i}": text for i, text in enumerate(texts)})
        else:
            records += [same | {stem: text} for text in row.captions]
    text = _table(records, form, declared or ("\t" if form == "tsv" else ","))
    path = folder / f"captions.{form}"
    path.write_text(f"sep={declared}\n{text}" if declared else text, encoding="utf-8")
    return Written(path, stem)


def write_split_files(folder: Path, rows: Sequence[Shown], pick: Pick) -> Written:
    """A folder with a caption file for each split."""
    form = pick("format", ["csv", "tsv", "jsonl"])
    splits = {row.split or "train" for row in rows}
    known = [("train", "val", "test"), ("c_train", "c_dev", "c_test")][: len(splits)]  # of one file, the name must be
    names = dict(zip(SPLITS, pick("names of the files", known), strict=True))
    _write_images(folder / "images", rows, lambda row: f"{row.number}.png")
    for split in splits:
        records = [
            {"image": f"{row.number}.png", "caption": text}
            for row in rows
            if (row.split or "train") == split
            for text in row.captions
        ]
        text = _table(records, form, "\t" if form == "tsv" else ",")
        (folder / f"{names[split]}.{form}").write_text(text, encoding="utf-8")
    return Written(folder)


def write_image_folder(folder: Path, rows: Sequence[Shown], pick: Pick) -> Written:
    """Folders of images with metadata; they are splits, or subjects, one of which has the name of a split."""
    if any(row.split for row in rows):
        place = {row: pick("folders of splits", [row.split, "val" if row.split == "validation" else row.split])
                 for row in rows}  # fmt: skip
    else:
        subjects = pick("subjects", [["boat", "lake"], ["boat", "train"], ["test", "train", "lake"]])
        place = {row: subjects[i % len(subjects)] for i, row in enumerate(rows)}
        if len(rows) < len(subjects):
            place = dict.fromkeys(rows, "lake")
    _write_images(folder, rows, lambda row: f"{place[row]}/{row.number}.png")
    records = [{"file_name": f"{place[row]}/{row.number}.png", "text": text} for row in rows for text in row.captions]
    (folder / "metadata.csv").write_text(_table(records, "csv", ","), encoding="utf-8")
    return Written(folder)


def write_texts(folder: Path, rows: Sequence[Shown], pick: Pick) -> Written:
    """Images with a text next to each."""
    form = pick("texts", ["txt", "json"])
    prefix = {row: f"{row.split}/" if row.split else "" for row in rows}
    _write_images(folder, rows, lambda row: f"{prefix[row]}{row.number}.png")
    for row in rows:
        text = "\n".join(row.captions) if form == "txt" else json.dumps({"caption": row.captions})
        (folder / f"{prefix[row]}{row.number}.{form}").write_text(text, encoding="utf-8")
    return Written(folder)


def write_archives(folder: Path, rows: Sequence[Shown], pick: Pick) -> Written:
    """An archive for each split, as img2dataset or WebDataset write them."""
    texts = pick("texts", ["txt", "json", "both", "parts"])
    dots = pick("names", [("", ""), (".image", ".caption")])
    has_mac_files = pick("files of a Mac", [False, True])
    order = pick("order", ["pairs", "texts last", "texts reversed", "texts first"])
    for split in {row.split for row in rows}:
        images, captions = [], []
        for row in (row for row in rows if row.split == split):
            name = f"./{row.number}" if has_mac_files else f"{row.number}"
            images.append((f"{name}{dots[0]}.png", picture(row.number)))
            record, lines = as_json({"caption": list(row.captions), "status": "success"}), "\n".join(row.captions)
            parts = {"txt": [("txt", lines.encode())], "json": [("json", record)]}
            parts["both"] = [*parts["json"], *parts["txt"]]
            parts["parts"] = [(f"{i}.txt", text.encode()) for i, text in enumerate(row.captions)]
            captions.append([(f"{name}{dots[1]}.{ending}", content) for ending, content in parts[texts]])
            if has_mac_files:
                images.append((f"./._{row.number}{dots[0]}.png", APPLE_DOUBLE))
                captions.append([])
        flat = [each for several in captions for each in several]
        members = {
            "pairs": [each for image, several in zip(images, captions, strict=True) for each in (image, *several)],
            "texts last": [*images, *flat],
            "texts reversed": [*images, *(each for several in captions[::-1] for each in several)],
            "texts first": [*flat, *images],
        }[order]
        write_tar(folder / f"{split or 'a'}-0.tar", members)
    return Written(folder)


class _Columns(NamedTuple):
    """The columns of a table: form of the captions, column that names images, and whether rows lack a caption."""

    form: str
    counted: str | None
    has_gaps: bool

    @classmethod
    def chosen(cls, pick: Pick) -> "_Columns":
        return cls(
            pick("captions", ["lists", "objects", "rows"]),
            pick("name column", [None, "filename", "image_id"]),
            pick("rows without captions", [False, True]),
        )


def _columns(rows: Sequence[Shown], columns: _Columns) -> dict[str, list[Any]]:
    """The values of these columns for some rows; images as bytes."""
    form, counted, has_gaps = columns
    table: dict[str, list[Any]] = {"image": [], "caption": []}
    for i, row in enumerate(rows):
        texts: list[Any] = list(row.captions)
        if form != "rows":
            texts = [[{"raw": text, "tokens": text.split()} for text in texts] if form == "objects" else texts]
        for text in texts:
            table["image"].append({"bytes": picture(row.number), "path": None})
            table["caption"].append(text)
            if counted is not None:  # the names of folders that were joined, or numbers that begin again in each split
                table.setdefault(counted, []).append(f"{i // 2:04d}.jpg" if counted == "filename" else str(i))
    if has_gaps:
        for name, values in table.items():
            values.insert(
                0, {"caption": None, "image": {"bytes": picture(100 + rows[0].number), "path": None}}.get(name, "none")
            )
    return table


def write_saved_dataset(folder: Path, rows: Sequence[Shown], pick: Pick) -> Written:
    """What `DatasetDict.save_to_disk` writes; a dataset on the Hub is the same table."""
    from datasets import Dataset, DatasetDict, Image

    splits, columns = sorted({row.split or "train" for row in rows}), _Columns.chosen(pick)
    DatasetDict(
        {
            split: Dataset.from_dict(
                _columns([row for row in rows if (row.split or "train") == split], columns)
            ).cast_column("image", Image())
            for split in splits
        }
    ).save_to_disk(folder / "saved")
    return Written(folder / "saved")


def write_parquet(folder: Path, rows: Sequence[Shown], pick: Pick) -> Written:
    """A Parquet file for each split."""
    columns = _Columns.chosen(pick)
    if columns.form == "rows" and columns.counted is None:  # found only if the first rows repeat an image
        columns = columns._replace(form="lists")
    for split in {row.split for row in rows}:
        table = pa.table(_columns([row for row in rows if row.split == split], columns))
        pq.write_table(table, folder / f"{split or 'a'}.parquet", row_group_size=2)
    return Written(folder)


WRITERS: dict[str, Callable[[Path, Sequence[Shown], Pick], Written]] = {
    "caption file": write_caption_file,
    "split files": write_split_files,
    "image folder": write_image_folder,
    "texts": write_texts,
    "archives": write_archives,
    "saved dataset": write_saved_dataset,
    "parquet": write_parquet,
}
