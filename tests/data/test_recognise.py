"""What a file is, by its content."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_miniclip import DataError, load_captions
from modeling_miniclip.data.readers.recognise import recognise_file, recognise_source
from tests.helpers.listings import images_of

CSV = b"image,caption\na.png,a red picture\n"


COCO = json.dumps(
    {
        "info": {"year": 2014},
        "licenses": [{"name": "any " * 2000}],
        "images": [{"id": 5, "file_name": "a.png"}],
        "annotations": [{"image_id": 5, "id": 1, "caption": "one"}],
    },
    indent=1,
).encode()
KARPATHY = (
    b'{"images": [{"sentids": [0], "imgid": 0, "sentences": [{"raw": "one"}], "split": "val", "filename": "a.png"}]}'
)


def picture(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, form)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member, content = tarfile.TarInfo("a.png"), picture("PNG")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": picture("PNG"), "path": "a.png"}]}), buffer)
    return buffer.getvalue()


def archive(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, "x")
    return buffer.getvalue()


KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "tar": (tar, "tar"),
    "tar.gz": (lambda: gzip.compress(tar()), "tar"),
    "tar.bz2": (lambda: bz2.compress(tar()), "tar"),
    "tar.xz": (lambda: lzma.compress(tar()), "tar"),
    "parquet": (parquet, "parquet"),
    "picture": (lambda: picture("JPEG"), "image"),
    "text": (lambda: CSV, "text"),
    "UTF-16": (lambda: CSV.decode().encode("utf-16"), "text"),
    "empty": (lambda: b"", "text"),
    "list": (lambda: json.dumps([{"image": "a.png", "caption": "one"}], indent=1).encode(), "text"),
    "COCO": (lambda: COCO, "coco"),
    "Karpathy": (lambda: KARPATHY, "karpathy"),
    "one null byte": (lambda: CSV.replace(b"red", b"r\0d"), "text"),
}


@pytest.mark.parametrize("name", ["data", "data.csv", "data.bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_known_by_its_content(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(KINDS[kind][0]())
    assert recognise_file(tmp_path / name) == KINDS[kind][1]


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE rows (image)")
        return connection.serialize()


OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "workbook": (lambda: archive("xl/workbook.xml"), "a workbook .* save it as CSV in UTF-8"),
    "zip": (lambda: archive("a.png"), "a ZIP archive.*unpack it and name the folder"),
    "gzip": (lambda: gzip.compress(CSV), "a compressed file.*gzip -d data"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(20), "a compressed file.*zstd -d data"),
    "pdf": (lambda: b"%PDF-1.4 notes", "a PDF"),
    "database": (database, "an SQLite database.*export the table as CSV"),
    "pickle": (lambda: pickle.dumps({"a": bytes(200)}), "a binary file"),
    "list": (lambda: json.dumps(["a.png"], indent=1).encode(), "a JSON list.*a list of objects .* \\.jsonl"),
    "object": (lambda: json.dumps({"images": []}, indent=1).encode(), "a JSON object.*neither COCO's .* \\.jsonl"),
    "lines": (lambda: b'{"image": "a.png"}\n{"image": "b.png"}\n', "JSON Lines under another name"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_rejected_with_advice(tmp_path: Path, kind: str) -> None:
    for name in ("data.csv", "data"):
        (tmp_path / name).write_bytes(OTHERS[kind][0]())
        for read in (recognise_file, load_captions, images_of):
            with pytest.raises(DataError, match=f"{name}: .*{OTHERS[kind][1]}"):
                read(tmp_path / name)


def test_training_names_sources_that_only_an_index_takes(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(picture("PNG"))
    with pytest.raises(DataError, match="train.csv: an image, not a caption file; `miniclip index` reads it"):
        load_captions(tmp_path / "train.csv")


def test_damaged_source_is_known_by_its_suffix(tmp_path: Path) -> None:
    for name, kind in {"a.tar": "tar", "b.parquet": "parquet", "c.jpg": "image"}.items():
        (tmp_path / name).write_bytes(bytes(600))
        assert recognise_file(tmp_path / name) == kind


FOLDERS = {
    "captions.csv Images/a.png": "text",
    "train.csv val.csv images/a.png": "text",
    "annotations/captions_train2017.json train2017/a.jpg": "coco",
    "dataset_flickr8k.json Images/a.jpg": "karpathy",
    "train.json val.json a.jpg": "folder",  # objects: not COCO's names
    "dataset_info.json data.arrow state.json": "saved",
    "README.md data/train-00000.parquet data/test-00000.parquet": "shards",
    "00000.tar 00000.parquet 00001.tar sample.jpg": "shards",
    "metadata.csv a.jpg extra.tar": "folder",
    "cats/a.jpg dogs/b.jpg": "folder",
    "": "folder",
}


@pytest.mark.parametrize("files", FOLDERS)
def test_a_folder_is_known_by_its_files(tmp_path: Path, files: str) -> None:
    for name in files.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'{"images": []}')
    assert recognise_source(tmp_path) == FOLDERS[files]
