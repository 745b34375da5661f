"""Where images are, and hashes of parts of a split that change with their images and with nothing else."""

import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value

from modeling_miniclip import DataError
from modeling_miniclip.data.shards.remote_shards import ShardCache
from modeling_miniclip.data.shards.shard_url import member_url, table_url
from modeling_miniclip.data.tables import image_places as places
from modeling_miniclip.data.tables.image_places import IN_FILE, IN_ROW, image_parts

FEATURES = Features({"image": Image(), "image_id": Value("string")})


def split_of(images: list[str | bytes]) -> Dataset:
    values = [{"bytes": i, "path": None} if isinstance(i, bytes) else {"bytes": None, "path": i} for i in images]
    return Dataset.from_dict(
        {"image": values, "image_id": [f"{i}.png" for i in range(len(images))]}, features=FEATURES
    )


def shard(path: Path, count: int, letter: bytes = b"a") -> list[str]:
    """Write a shard of `count` images of ten bytes, and name them."""
    path.write_bytes(b"".join(b"%010d" % i for i in range(count)) + letter * 200_000)
    os.utime(path, ns=(1, 1))
    return [member_url(str(path), 10 * i, 10, f"{i}::é\n.png") for i in range(count)]


def parts(*images: str | bytes) -> list[tuple[int, int]]:
    """Edges of the parts of a split, with a short hash of each."""
    found = list(image_parts(split_of(list(images))))
    assert [part.start for part, _ in found] == [0, *(part.stop for part, _ in found[:-1])]
    return [(len(part), hash(identity)) for part, identity in found]


def test_places_of_images_in_rows_files_and_shards(tmp_path: Path) -> None:
    table = str(tmp_path / "a.parquet")
    names = [*shard(tmp_path / "a.tar", 2), table_url(table, 7, "photo"), b"abc", str(tmp_path / "x::y.png")]
    (found,) = places.image_places(split_of(names))
    assert found.shards.to_pylist() == [str(tmp_path / "a.tar")] * 2 + [table, IN_ROW, IN_FILE]
    assert found.starts.tolist() == [0, 10, 7, -1, -1] and found.sizes.tolist() == [10, 10, -1, -1, -1]
    assert found.columns.to_pylist()[:3] == ["0: :é\n.png", "1: :é\n.png", "photo"]
    (found,) = places.image_places(split_of(names).select([3, 1]))
    assert found.shards.to_pylist() == [IN_ROW, str(tmp_path / "a.tar")] and found.starts.tolist() == [-1, 10]


def test_parts_end_with_their_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "FEWEST", 2)
    monkeypatch.setattr(places, "MOST", 4)
    a, b, c = (shard(tmp_path / f"{name}.tar", 5, name.encode()) for name in "abc")
    whole = parts(*a, *b, *c)
    # The fifth image of a shard alone is too small a part, so the next shard begins in it.
    assert [size for size, _ in whole] == [4, 4, 2, 4, 1]
    assert [size for size, _ in parts(*a[:4], *b[:2], *c[:3])] == [4, 2, 3]
    assert parts(*a[:4], *c[:3])[1] == parts(*b[:2], *c[:3])[1] == parts(*c[:3])[0]
    assert [size for size, _ in parts(a[0], b[0], c[0], b[1], a[1])] == [2, 2, 1]
    assert len({identity for _, identity in whole}) == 5


def test_identity_does_not_depend_on_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [*shard(tmp_path / "a.tar", 40), *shard(tmp_path / "b.tar", 7, b"b"), *(f"{i}.png" for i in range(9))]
    whole = parts(*images)
    monkeypatch.setattr(places, "BLOCK", 3)
    assert parts(*images) == whole


def changed_member(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "time": (lambda path: os.utime(path, ns=(2, 2)), True),
    "end": (changed_member, True),
    "size": (lambda path: path.write_bytes(path.read_bytes() + b"a") and os.utime(path, ns=(1, 1)), True),
    "name": (lambda path: path.rename(path.with_name("moved.tar")), False),
    "nothing": (lambda path: None, False),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_hash_of_a_part_changes_with_its_shard(tmp_path: Path, kind: str) -> None:
    path, (change, differs) = tmp_path / "a.tar", CHANGES[kind]
    before = parts(*shard(path, 3))
    change(path)
    now = path.with_name("moved.tar") if kind == "name" else path
    assert (parts(*(member_url(str(now), 10 * i, 10, str(i)) for i in range(3))) != before) == differs
    assert parts(*(member_url(str(now), 10 * i, 9, str(i)) for i in range(3))) != before, "other places"


def test_hash_of_a_part_changes_with_rows_and_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [b"1", b"2"]}), tmp_path / "a.parquet")
    table = str(tmp_path / "a.parquet")
    rows = [table_url(table, i, "a") for i in (0, 1)]
    assert parts(*rows) == parts(*rows) != parts(*rows[::-1])
    assert parts(*rows) != parts(rows[0], table_url(table, 1, "b"))
    assert parts(b"one", b"two") == parts(b"one", b"two") != parts(b"one", b"too")
    file = tmp_path / "x.png"
    file.write_bytes(b"12")
    os.utime(file, ns=(1, 1))
    before = parts(str(file))
    assert parts(str(file.rename(tmp_path / "y.png"))) == before, "the name of the row counts"
    (tmp_path / "y.png").write_bytes(b"21")
    assert parts(str(tmp_path / "y.png")) != before, "another time"


def test_version_of_a_remote_shard_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "current_cache", lambda: ShardCache(tmp_path))
    url = "memory://image-places/a.tar"
    fsspec.filesystem("memory").pipe(url, b"a" * 2000)
    names = [member_url(url, 10 * i, 10, str(i)) for i in range(2)]
    before = parts(*names)
    assert parts(*names) == before and not list(tmp_path.rglob("*.tar")), "it is not fetched"
    fsspec.filesystem("memory").pipe(url, b"a" * 2001)
    assert parts(*names) != before
    fsspec.filesystem("memory").rm(url)
    with pytest.raises(DataError, match="cannot be fetched"):
        parts(*names)
