"""Training rows whose images are in shards: decoded as from files, and what a damaged or lost shard costs."""

import io
import os
import pickle
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

from modeling_miniclip import DataError, MiniClipError
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.picture_formats import read_encoded
from modeling_miniclip.data.shards import shard_url
from modeling_miniclip.data.shards.shard_url import member_url, place_of, table_url, version_of
from modeling_miniclip.errors import Problem
from tests.helpers.towers import tiny_processor

FEATURES = Features({"image": Image(), "image_id": Value("string"), "captions": List(Value("string"))})
COUNT = 5


def pictures() -> list[bytes]:
    """Encoded pictures of different sizes, of about 5 kB."""
    encoded = []
    for i in range(COUNT):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)
        Picture.fromarray(pixels).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def rows_named(paths: list[str]) -> CaptionRows:
    """Training rows with the paths of their images."""
    columns = {
        "image": [{"bytes": None, "path": path} for path in paths],
        "image_id": [f"{i}.png" for i in range(len(paths))],
        "captions": [[f"a picture {i}"] for i in range(len(paths))],
    }
    return CaptionRows(Dataset.from_dict(columns, features=FEATURES), tiny_processor())


def write_tar(path: Path) -> list[str]:
    """Write the pictures to an archive; the names of its rows."""
    with tarfile.open(path, "w") as archive:
        for i, content in enumerate(pictures()):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as archive:
        return [member_url(str(path), member.offset_data, member.size, member.name) for member in archive]


def write_parquet(path: Path) -> list[str]:
    """Write the pictures to a Parquet file in row groups of two; the names of its rows."""
    table = pa.table({"image": [{"bytes": content, "path": None} for content in pictures()]})
    pq.write_table(table, path, row_group_size=2)
    return [table_url(str(path), row, "image") for row in range(COUNT)]


WRITERS: dict[str, Any] = {"a.tar": write_tar, "a.parquet": write_parquet}
KEYS = [(0, 3), (0, 0), (0, 4), (0, 1), (0, 2)]


@pytest.mark.parametrize("name", WRITERS)
def test_images_in_shards_are_decoded_like_files(name: str, tmp_path: Path) -> None:
    files = [str(tmp_path / f"{i}.png") for i in range(COUNT)]
    for path, content in zip(files, pictures(), strict=True):
        Path(path).write_bytes(content)
    expected = rows_named(files).__getitems__(KEYS)
    found = rows_named(WRITERS[name](tmp_path / name)).__getitems__(KEYS)
    for one, other in zip(found, expected, strict=True):
        assert one["image_id"] == other["image_id"] and one["captions"] == other["captions"]
        assert np.array_equal(one["pixels"], other["pixels"])


def test_truncated_archive_costs_only_its_last_images(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    names = write_tar(path)
    rows, place = rows_named(names), place_of(names[3])
    assert place is not None
    with path.open("r+b") as file:
        file.truncate(place.start + 100)
    found = {row["image_id"]: row.get("undecodable", "") for row in rows.__getitems__(KEYS)}
    assert [found[i] for i in range(3)] == [""] * 3
    assert f"image '3.png' cannot be decoded: {path}: ends within 3.png" in found[3]
    assert f"image '4.png' cannot be decoded: {path}: 4.png is not where it was" in found[4]


def test_damaged_parquet_file_costs_only_its_own_images(tmp_path: Path) -> None:
    names = write_parquet(tmp_path / "a.parquet")
    other = write_parquet(tmp_path / "b.parquet")[:2]
    with (tmp_path / "a.parquet").open("r+b") as file:
        file.truncate(3000)
    found = [
        row.get("undecodable", "") for row in rows_named(names[:2] + other).__getitems__([(0, i) for i in range(4)])
    ]
    assert all("cannot be decoded" in reason for reason in found[:2]) and found[2:] == ["", ""]


def write_arrow(path: Path) -> list[str]:
    """Write the pictures to an Arrow file; the names of its rows."""
    table = pa.table({"image": [{"bytes": content, "path": None} for content in pictures()]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return [table_url(str(path), row, "image") for row in range(COUNT)]


@pytest.mark.parametrize("change", ["cut", "other rows", "other file", "other time"])
@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_table_that_changes_during_a_run(write: Any, change: str, tmp_path: Path, monkeypatch: Any) -> None:
    path, encoded = tmp_path / "table", pictures()
    write(path)
    names = [table_url(str(path), row, "image", version_of(str(path))) for row in range(COUNT)]
    rows = rows_named(names)
    assert "pixels" in rows.__getitems__([(0, 0)])[0]
    if change == "cut":
        os.truncate(path, 5_000)
    elif change == "other time":
        os.utime(path, ns=(1, 1))
    else:
        if change == "other file":
            path.unlink()
        monkeypatch.setattr(sys.modules[__name__], "pictures", lambda: encoded[::-1])
        write(path)
    if change == "other time":
        assert all("pixels" in row for row in rows.__getitems__([(0, 0), (0, 4)]))
        return
    with pytest.raises(DataError, match=f"none of 5 images .*{path}: has changed since its rows were listed: start"):
        rows.__getitems__([(0, 0), (0, 4)])


@pytest.mark.parametrize("name", WRITERS)
def test_lost_shard_ends_the_run_with_its_name(name: str, tmp_path: Path) -> None:
    rows = rows_named(WRITERS[name](tmp_path / name))
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"'2\.png' cannot be read: .*{name}.*resume the run"):
        rows.__getitems__([(0, 2)])


@pytest.mark.parametrize(
    "error", [DataError(Problem("shard", "cannot be fetched", "s3://a.tar")), MiniClipError("full")]
)
def test_shard_that_cannot_be_fetched_ends_the_run(
    error: MiniClipError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise error

    rows = rows_named(write_tar(tmp_path / "a.tar"))
    monkeypatch.setattr(shard_url, "read_place", fail)
    with pytest.raises(type(error), match=re.escape(str(error))):
        rows.__getitems__([(0, 2)])


def test_rows_are_sent_to_a_process_without_their_table(tmp_path: Path) -> None:
    sizes = []
    for count in (10, 10_000):
        columns = {
            "image": [{"bytes": None, "path": f"/images/{i}.png"} for i in range(count)],
            "image_id": [f"{i}.png" for i in range(count)],
            "captions": [[f"a picture {i}"] for i in range(count)],
        }
        path = tmp_path / f"{count}.arrow"
        table = Dataset.from_dict(columns, features=FEATURES).data.table
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        rows = CaptionRows(Dataset.from_file(str(path)), tiny_processor())
        pickled = pickle.dumps(rows)
        assert pickle.loads(pickled).captions_of([count - 1]) == [[f"a picture {count - 1}"]]
        sizes.append(len(pickled))
    assert sizes[1] - sizes[0] < 1000


def test_row_groups_stay_in_memory_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_parquet(tmp_path / "a.parquet") + write_parquet(tmp_path / "b.parquet")
    size = sum(map(len, pictures()[:2]))
    monkeypatch.setattr(shard_url, "HELD_BYTES", int(2.5 * size))
    monkeypatch.setattr(shard_url._ParquetTable, "held", shard_url.OrderedDict())
    monkeypatch.setattr(shard_url._ParquetTable, "held_bytes", 0)
    groups = []
    for row in (0, 1, 2, 0, 5, 0, 2):
        assert read_encoded({"bytes": None, "path": names[row]}) == pictures()[row % COUNT]
        groups.append([(Path(path).name[0], group) for path, _, group, _ in shard_url._ParquetTable.held])
    a0, a1, b0 = ("a", 0), ("a", 1), ("b", 0)
    assert groups == [[a0], [a0], [a0, a1], [a1, a0], [a0, b0], [b0, a0], [a0, a1]]
    assert shard_url._ParquetTable.held_bytes <= 2.5 * size
