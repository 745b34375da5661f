"""Shards behind URLs: fetched once, kept within a limit, explained when they fail."""

import multiprocessing
import os
import re
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_miniclip import DataError, MiniClipError, load_captions
from modeling_miniclip.data.loading import order
from modeling_miniclip.data.problems import raise_problem
from modeling_miniclip.data.readers.parquet import read_parquet
from modeling_miniclip.data.readers.tars import read_tar
from modeling_miniclip.data.rows import ReadOptions
from modeling_miniclip.data.shards import remote_shards
from modeling_miniclip.data.shards.remote_shards import ShardCache, current_cache, local_shard, use_cache
from modeling_miniclip.data.shards.shard_url import place_of, read_place
from modeling_miniclip.data.shards.split_shards import find_shards, shard_boundaries
from modeling_miniclip.errors import Problem
from tests.helpers.servers import web_server
from tests.helpers.shards import pairs, write_tar
from tests.helpers.trees import picture

NAMES = ("0.tar", "1.tar", "2.tar")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Server with three archives of two images each; fetched shards are kept in the folder `cache`."""
    (tmp_path / "www").mkdir()
    for i, name in enumerate(NAMES):
        write_tar(tmp_path / "www" / name, pairs([f"{i}a", f"{i}b"], 2 * i))
    monkeypatch.setenv(remote_shards.FOLDER, "")
    monkeypatch.setenv(remote_shards.GIGABYTES, "")
    use_cache(tmp_path / "cache")
    with web_server(tmp_path / "www") as server:
        yield server


@pytest.fixture
def options(tmp_path):
    return ReadOptions(shard_folder=tmp_path / "cache")


def fetched(cache: ShardCache) -> list[str]:
    """Names of the shards in a cache."""
    names = [file.name for file in cache.folder.iterdir() if file.suffix in (".tar", ".part")]
    return sorted(name.partition("-")[2] for name in names)


def wait_for(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within five seconds")


# --- reading --------------------------------------------------------------------------------------------------------


def test_archives_behind_urls(server, options):
    source = f"{server.url}/{{0..2}}.tar"
    rows = list(read_tar(source, options, raise_problem))
    assert [(row.name, row.captions) for row in rows] == [
        (f"{i}.tar/{i}{k}", [f"caption of {i}{k}"]) for i in range(3) for k in "ab"
    ]
    assert [read_place(place_of(row.image)) for row in rows] == [picture(i) for i in range(6)]
    assert list(read_tar(source, options, raise_problem)) == rows
    assert server.gets == dict.fromkeys(NAMES, 1)


def test_urls_are_datasets(server, tmp_path):
    splits = load_captions(f"{server.url}/{{0..2}}.tar", cache_dir=tmp_path / "tables", validation_fraction=0.5)
    shades = sorted(row["image"].getpixel((0, 0))[0] for rows in splits.values() for row in rows)
    assert shades == list(range(6))


def test_a_changed_archive_is_fetched_again(server, options):
    source = f"{server.url}/1.tar"
    before = list(read_tar(source, options, raise_problem))
    write_tar(server.folder / "1.tar", pairs(["new"], 9))
    (row,) = read_tar(source, options, raise_problem)
    assert len(before) == 2 and row.name == "1.tar/new"
    assert read_place(place_of(row.image)) == picture(9)


def test_a_missing_archive_costs_only_its_rows(server, options):
    problems: list[Problem] = []
    server.status["1.tar"] = 503
    rows = list(read_tar(f"{server.url}/{{0..3}}.tar", options, problems.append))
    assert [row.name for row in rows] == ["0.tar/0a", "0.tar/0b", "2.tar/2a", "2.tar/2b"]
    assert [(problem.kind, problem.file) for problem in problems] == [
        ("shard", f"{server.url}/1.tar"), ("shard", f"{server.url}/3.tar")
    ]  # fmt: skip
    assert "503" in problems[0].text and "404" in problems[1].text


def test_only_the_texts_of_a_parquet_file_are_fetched(server, options):
    big = [os.urandom(300_000) for _ in range(8)]
    table = pa.table({"caption": list("abcdefgh"), "filename": list("ABCDEFGH"), "jpg": big})
    pq.write_table(table, server.folder / "0.parquet", compression="none", row_group_size=4)
    url = f"{server.url}/0.parquet"
    rows = list(read_parquet(url, options, raise_problem))
    assert [row.captions for row in rows] == [[caption] for caption in "abcdefgh"]
    assert not current_cache().folder.exists() or not fetched(current_cache())
    assert [read_place(place_of(row.image)) for row in rows] == big


def test_compressed_archives_behind_urls(server, options):
    with pytest.raises(DataError, match="a compressed tar archive.*gzip -d"):
        list(read_tar(f"{server.url}/0.tar.gz", options, raise_problem))


# --- the cache ------------------------------------------------------------------------------------------------------


def test_paths_are_their_own_local_files(tmp_path):
    assert local_shard("/a/0.tar") == "/a/0.tar" and ShardCache(tmp_path).local("0.tar") == "0.tar"


def test_the_next_shard_is_fetched_ahead(server, tmp_path):
    cache = ShardCache(tmp_path / "c")
    urls = [f"{server.url}/{name}" for name in NAMES]
    cache.expect(urls)
    cache.local(urls[0])
    wait_for(lambda: fetched(cache) == ["0.tar", "1.tar"])
    cache.local(urls[0])
    assert server.gets == {"0.tar": 1, "1.tar": 1}
    cache.local(urls[1])
    wait_for(lambda: fetched(cache) == list(NAMES))
    assert server.gets == dict.fromkeys(NAMES, 1)


def test_an_order_fetches_the_shards_of_its_next_rows(server, tmp_path, monkeypatch):
    use_cache(tmp_path / "c")
    rows = load_captions(f"{server.url}/{{0..2}}.tar", cache_dir=tmp_path / "tables", validation_fraction=0.17)[
        "train"
    ]
    for file in current_cache().folder.glob("*.tar"):
        file.unlink()
    server.gets.clear()
    boundaries = shard_boundaries(rows)
    monkeypatch.setattr(order, "WINDOW_ROWS", 1)
    monkeypatch.setattr(order, "WINDOW_SHARDS", 1)
    plain = order.ShuffledInWindows(boundaries)
    ahead = order.ShuffledInWindows(boundaries, on_next=find_shards(rows).fetch_ahead)
    pieces = []
    for number, piece in enumerate(ahead.pieces(0), 1):
        wait_for(lambda: len(fetched(current_cache())) == min(number + 1, 3))  # noqa: B023
        pieces.append(piece.tolist())
    assert pieces == [piece.tolist() for piece in plain.pieces(0)] and len(pieces) == 3
    assert server.gets == dict.fromkeys(NAMES, 1)


def test_the_least_recently_used_shards_are_removed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_shards, "IN_USE", 0.0)
    size = (server.folder / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "c", 2.5 * size / 1e9)
    paths = {name: cache.local(f"{server.url}/{name}") for name in NAMES[:2]}
    os.utime(paths["0.tar"], (time.time() - 5, time.time() - 5))
    os.utime(paths["1.tar"], (time.time() - 9, time.time() - 9))
    cache.local(f"{server.url}/2.tar")
    assert fetched(cache) == ["0.tar", "2.tar"]
    assert Path(cache.local(f"{server.url}/1.tar")).is_file()  # it is fetched again
    assert fetched(cache) == ["1.tar", "2.tar"]


def test_shards_in_use_are_kept(server, tmp_path):
    cache = ShardCache(tmp_path / "c", 0)
    for name in NAMES:
        cache.local(f"{server.url}/{name}")
    assert fetched(cache) == list(NAMES)


def fetch_all(folder: Path, urls: list[str]) -> list[int]:
    cache = ShardCache(folder)
    return [os.path.getsize(cache.local(url)) for url in urls]


def test_several_processes_fetch_each_shard_once(server, tmp_path):
    server.seconds = dict.fromkeys(NAMES, 0.1)
    urls = [f"{server.url}/{name}" for name in NAMES]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sizes = pool.starmap(fetch_all, [(tmp_path / "c", urls)] * 3)
    assert sizes == [[(server.folder / name).stat().st_size for name in NAMES]] * 3
    assert server.gets == dict.fromkeys(NAMES, 1)


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [({"status": {"0.tar": 404}}, "404"), ({"status": {"0.tar": 503}}, "503"), ({"drop": {"0.tar": 700}}, "")],
)
def test_a_failure_is_one_sentence_and_leaves_nothing(server, tmp_path, fault, reason):
    vars(server).update(fault)
    cache, url = ShardCache(tmp_path / "c"), f"{server.url}/0.tar"
    pattern = f"^{re.escape(url)}: cannot be fetched: .*{reason}.*start the same command again"
    with pytest.raises(DataError, match=pattern) as caught:
        cache.local(url)
    assert "\n" not in str(caught.value) and "0.tar" not in fetched(cache)
    server.status, server.drop = {}, {}
    assert Path(cache.local(url)).read_bytes() == (server.folder / "0.tar").read_bytes()


def test_a_server_that_is_gone(tmp_path):
    with pytest.raises(DataError, match="^http://127.0.0.1:9/0.tar: cannot be fetched: .*[Cc]onnect"):
        ShardCache(tmp_path / "c").local("http://127.0.0.1:9/0.tar")


def test_a_part_that_a_killed_process_left_is_not_read(server, tmp_path):
    cache, url = ShardCache(tmp_path / "c"), f"{server.url}/0.tar"
    part = Path(f"{cache.local(url)}.part")
    os.remove(cache.local(url))
    part.write_bytes(b"half")
    assert Path(ShardCache(tmp_path / "c").local(url)).read_bytes() == (server.folder / "0.tar").read_bytes()
    assert not part.exists()


def test_a_full_disk_is_one_sentence(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsspec.url_to_fs(server.url)[0], "get_file", full)
    with pytest.raises(MiniClipError, match="shards cannot be stored in .*No space left.*lower --shard_cache_gb"):
        ShardCache(tmp_path / "c").local(f"{server.url}/0.tar")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(DataError, match="^s3://bucket/0.tar: cannot be read without a package: .*s3fs"):
        ShardCache(tmp_path / "c").local("s3://bucket/0.tar")
