"""Shards behind URLs: fetched once, kept within a limit, explained when they fail."""

import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tqdm import tqdm

from modeling_miniclip import DataError, MiniClipError, load_captions
from modeling_miniclip.data.loading import order
from modeling_miniclip.data.problems import raise_problem
from modeling_miniclip.data.readers import tars
from modeling_miniclip.data.readers.parquet import read_parquet
from modeling_miniclip.data.readers.tars import read_tar
from modeling_miniclip.data.rows import ReadOptions
from modeling_miniclip.data.shards import remote_files, remote_shards
from modeling_miniclip.data.shards.remote_shards import ShardCache, current_cache, local_shard, use_cache
from modeling_miniclip.data.shards.shard_url import place_of, read_place
from modeling_miniclip.data.shards.split_shards import find_shards
from modeling_miniclip.data.tables.image_places import image_parts
from modeling_miniclip.errors import Problem
from tests.helpers.servers import web_server
from tests.helpers.shards import as_json, pairs, write_tar
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
    names = [file.name for file in cache.folder.iterdir() if file.suffix in (".tar", ".parquet", ".part")]
    return sorted(name.partition("-")[2] for name in names)


class InThisThread:
    """A pool of threads without threads."""

    def __init__(self, _: int):
        self.map = map

    def __enter__(self) -> "InThisThread":
        return self

    def __exit__(self, *_: object) -> None:
        pass


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
    assert server.gets == dict.fromkeys(NAMES, 1) | {"0.parquet": 2}  # is a table next to the archive?


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


@pytest.fixture
def images(server):
    """The images of the Parquet files `0.parquet` and `1.parquet` on the server, four in each."""
    big = [os.urandom(300_000) for _ in range(8)]
    for i in range(2):
        rows = slice(4 * i, 4 * i + 4)
        table = pa.table({"caption": list("abcdefgh"[rows]), "filename": list("ABCDEFGH"[rows]), "jpg": big[rows]})
        pq.write_table(table, server.folder / f"{i}.parquet", compression="none", row_group_size=2)
    return big


def test_only_the_texts_of_parquet_files_are_fetched(server, images, options):
    rows = list(read_parquet(f"{server.url}/{{0..1}}.parquet", options, raise_problem))
    assert [row.captions for row in rows] == [[caption] for caption in "abcdefgh"]
    assert [row.file for row in rows] == [f"{server.url}/{i}.parquet" for i in (0, 0, 0, 0, 1, 1, 1, 1)]
    assert sum(server.sent.values()) < 6.1 * 65_536  # the end of each file, three times
    assert not current_cache().folder.exists() or not fetched(current_cache())
    assert [read_place(place_of(row.image)) for row in rows] == images


def test_a_damaged_remote_parquet_file(server, images, options):
    problems: list[Problem] = []
    (server.folder / "1.parquet").write_bytes(b"PAR1 and nothing else")
    assert len(list(read_parquet(f"{server.url}/{{0..1}}.parquet", options, problems.append))) == 4
    assert [(each.kind, each.file) for each in problems] == [("damaged-shard", f"{server.url}/1.parquet")]


def test_parquet_files_of_a_server_without_ranges(server, images, options):
    server.has_ranges = False
    rows = list(read_parquet(f"{server.url}/{{0..1}}.parquet", options, raise_problem))
    assert [read_place(place_of(row.image)) for row in rows] == images
    assert fetched(current_cache()) == ["0.parquet", "1.parquet"]


def test_remote_parquet_files_with_different_columns(server, options):
    for number, column in enumerate(["caption", "text", "caption"]):
        table = pa.table({column: [f"{number}"], "jpg": [picture(number)]})
        pq.write_table(table, server.folder / f"{number}.parquet")
    rows = list(read_parquet(f"{server.url}/{{0..2}}.parquet", options, raise_problem))
    assert [(row.name, row.captions) for row in rows] == [(f"{i}.parquet/000000", [f"{i}"]) for i in range(3)]


def test_a_parquet_file_that_cannot_be_fetched(server, images, options):
    problems: list[Problem] = []
    server.get_status["1.parquet"] = 503
    assert len(list(read_parquet(f"{server.url}/{{0..1}}.parquet", options, problems.append))) == 4
    assert [(each.kind, each.file) for each in problems] == [("shard", f"{server.url}/1.parquet")]
    assert "cannot be fetched: 503" in problems[0].text


def test_compressed_archives_behind_urls(server, options):
    with pytest.raises(DataError, match="a compressed tar archive.*gzip -d"):
        list(read_tar(f"{server.url}/0.tar.gz", options, raise_problem))


def test_the_pass_over_all_shards_is_announced(server, options, monkeypatch):
    shown = []
    monkeypatch.setattr(tars, "tqdm", lambda **about: shown.append(about) or tqdm(**about))
    for _ in range(2):
        list(read_tar(f"{server.url}/{{0..2}}.tar", options, raise_problem))
    (about,) = shown
    assert about["desc"] == "fetching shards once (0.0 GB), to find their images" and about["total"] == 3
    assert "disable" not in about  # which TQDM_DISABLE decides


# --- tables next to archives ----------------------------------------------------------------------------------------


def write_like_img2dataset(folder: Path, number: int, rows: list[tuple[str, str | None, str]], **more: list) -> None:
    """`00000.tar` and `00000.parquet` of keys, captions and statuses; pictures are numbered from 10 * `number`."""
    members = []
    for i, (key, caption, status) in enumerate(rows):
        if status == "success":
            record = {"caption": caption, "key": key, "status": status} | {
                name: each[i] for name, each in more.items()
            }
            members += [(f"{key}.png", picture(10 * number + i)), (f"{key}.txt", (caption or "").encode())]
            members.append((f"{key}.json", as_json(record)))
    write_tar(folder / f"{number:05d}.tar", members)
    keys, captions, statuses = zip(*rows, strict=True)
    table = pa.table({"key": keys, "status": statuses, "caption": captions, "url": keys} | more)
    pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=2)


@pytest.fixture
def sidecars(server):
    """Source of two archives with tables next to them."""
    first = [("000000002", "a dog \n runs", "success"), ("000000000", "a cat", "success"), ("000000001", "", "failed")]
    write_like_img2dataset(server.folder, 0, first, group=["g", None, None], split=["train", "test", "train"])
    second = [("000010000", None, "success"), ("000010001", "a cow", "success")]
    write_like_img2dataset(server.folder, 1, second, split=["train", "train"])
    return f"{server.url}/{{00000..00001}}.tar"


def test_rows_are_read_from_tables_next_to_archives(server, sidecars, options):
    with pytest.warns(UserWarning, match="left out 1 of 2 images without a caption .first: '000010000'"):
        rows = list(read_tar(sidecars, options, raise_problem))
    assert server.gets == {"00000.parquet": 2, "00001.parquet": 1}
    assert [(row.name, row.captions, row.group, row.split) for row in rows] == [
        ("00000.tar/000000002", ["a dog \n runs"], "g", "train"),
        ("00000.tar/000000000", ["a cat"], None, "test"),
        ("00001.tar/000010001", ["a cow"], None, "train"),
    ]
    assert [read_place(place_of(row.image)) for row in rows] == [picture(0), picture(1), picture(11)]


def test_a_table_whose_wrong_captions_are_no_list_is_reported(server, options):
    rows = [("000000000", "a cat", "success"), ("000000001", "a dog", "success")]
    write_like_img2dataset(server.folder, 0, rows, negative_captions=["['a dog', 'a cow']", "['a cow"])
    problems = []
    read = list(read_tar(f"{server.url}/00000.tar", options, problems.append))
    assert [row.negatives for row in read] == [["a dog", "a cow"], []]
    assert [problem.kind for problem in problems] == ["negatives"] and "first: '000000001'" in problems[0].text
    assert not server.gets["00000.tar"]


def test_rows_from_tables_are_those_of_the_archives(server, sidecars, tmp_path):
    def load(cache: str) -> list[dict]:
        use_cache(tmp_path / cache)
        splits = load_captions(sidecars, cache_dir=tmp_path / cache, validation_fraction=None)
        return [row for rows in splits.values() for row in rows]

    with pytest.warns(UserWarning, match="left out"):
        from_tables = load("one")
        for file in server.folder.glob("*.parquet"):
            file.unlink()
        assert load("two") == from_tables and len(from_tables) == 3
    assert server.gets["00000.tar"] == 2  # for its images, and for its rows


def test_images_that_only_a_table_names(server, sidecars, options):
    write_tar(server.folder / "00001.tar", pairs(["other"]))
    with pytest.warns(UserWarning, match="left out"):
        *_, row = read_tar(sidecars, options, raise_problem)
    with pytest.raises(DataError, match="00001.tar: has no picture '000010001', which the table next to it names"):
        read_place(place_of(row.image))


@pytest.mark.parametrize("columns", [("key", "caption"), ("key", "status"), ("key", "status", "caption", "jpg")])
def test_other_tables_next_to_archives_are_ignored(server, options, columns):
    table = pa.table({"key": ["0a", "0b"], "status": ["success"] * 2, "caption": ["x", "y"], "jpg": [b"", b""]})
    pq.write_table(table.select(columns), server.folder / "0.parquet")
    rows = list(read_tar(f"{server.url}/0.tar", options, raise_problem))
    assert [row.captions for row in rows] == [["caption of 0a"], ["caption of 0b"]]


def test_places_that_are_not_known_tell_images_apart(server, sidecars, tmp_path):
    with pytest.warns(UserWarning, match="left out"):
        rows = load_captions(sidecars, cache_dir=tmp_path / "tables", validation_fraction=None)
    before = {split: list(image_parts(each)) for split, each in rows.items()}
    assert {split: [len(part) for part, _ in each] for split, each in before.items()} == {"train": [2], "test": [1]}
    assert len({part for each in before.values() for _, part in each}) == 2


# --- without a connection -------------------------------------------------------------------------------------------


def test_fetched_shards_are_used_offline(server, tmp_path):
    with web_server(server.folder) as other:
        source = f"{other.url}/{{0..2}}.tar"
        first = load_captions(source, cache_dir=tmp_path / "tables", validation_fraction=None)["train"]
    with pytest.warns(
        UserWarning, match="^3 of 3 shards cannot be asked for .*[Cc]onnect.*used as they were"
    ) as caught:
        again = load_captions(source, cache_dir=tmp_path / "tables", validation_fraction=None)["train"]
    assert len(caught) == 1
    assert [(row["image_id"], row["image"]) for row in again] == [(row["image_id"], row["image"]) for row in first]


def test_offline_a_shard_that_was_removed_is_an_error(server, tmp_path):
    with web_server(server.folder) as other:
        source = f"{other.url}/{{0..2}}.tar"
        load_captions(source, cache_dir=tmp_path / "tables")
    next(current_cache().folder.glob("*-1.tar")).unlink()
    expected = pytest.raises(DataError, match=f"^{re.escape(other.url)}/1.tar: cannot be fetched: .*[Cc]onnect")
    with expected, pytest.warns(UserWarning, match="^2 of 3 shards cannot be asked for"):
        load_captions(source, cache_dir=tmp_path / "tables")


def test_one_silent_server_is_waited_for_once(server, tmp_path, monkeypatch):
    asked = []

    def info(url):
        asked.append(url)
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(remote_files.file_system(server.url)[0], "info", info)
    monkeypatch.setattr(remote_shards, "ThreadPoolExecutor", InThisThread)
    urls = [f"{server.url}/{name}" for name in NAMES]
    errors = ShardCache(tmp_path / "c").versions(urls)
    assert asked == urls[:1]
    assert [str(error).partition(";")[0] for error in errors] == [
        f"{url}: cannot be fetched: nobody answers" for url in urls
    ]


def test_patterns_stand_for_the_same_shards_offline(tmp_path, monkeypatch):
    memory, _ = fsspec.url_to_fs("memory://shards")
    for name in ("1.tar", "0.tar"):
        memory.pipe(f"/shards/{name}", b"")
    cache, urls = ShardCache(tmp_path / "c"), ["memory:///shards/0.tar", "memory:///shards/1.tar"]
    assert cache.matches("memory://shards/*.tar") == urls
    assert cache.matches("memory://shards/*.parquet") == cache.matches("memory://nowhere/*.tar") == []

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(memory, "ls", fail)
    assert cache.matches("memory://shards/*.tar") == urls
    with pytest.raises(DataError, match=r"^memory://shards/\*.zip: cannot be listed: no network"):
        cache.matches("memory://shards/*.zip")


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
    shards = find_shards(rows)
    monkeypatch.setattr(order, "WINDOW_ROWS", 1)
    monkeypatch.setattr(order, "WINDOW_SHARDS", 1)
    plain = order.ShuffledInWindows(shards.boundaries)
    ahead = order.ShuffledInWindows(shards.boundaries, on_next=shards.fetch_ahead)
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


def test_a_shard_that_changes_before_it_is_fetched_again(server, tmp_path):
    cache, url = ShardCache(tmp_path / "c"), f"{server.url}/0.tar"
    cache.versions([url])
    os.remove(cache.local(url))
    write_tar(server.folder / "0.tar", pairs(["longer", "than", "before"]) * 4)
    with pytest.raises(DataError, match="0.tar: has changed since the dataset was read; repeat the command"):
        ShardCache(tmp_path / "c").local(url)


def test_a_shard_that_another_run_fetched_after_a_change(server, tmp_path):
    cache, url = ShardCache(tmp_path / "c"), f"{server.url}/0.tar"
    cache.versions([url])
    write_tar(server.folder / "0.tar", pairs(["longer", "than", "before"]) * 4)
    other = ShardCache(tmp_path / "c")
    other.versions([url])
    other.local(url)
    with pytest.raises(DataError, match="0.tar: has changed since the dataset was read"):
        cache.local(url)


@pytest.mark.parametrize(
    ("size", "tag", "time", "differs"), [("3", "b", "1", False), ("3", "b", "2", True), ("4", "a", "1", True)]
)
def test_when_a_shard_counts_as_changed(size, tag, time, differs):
    before = json.dumps({"size": "3", "ETag": "a", "Last-Modified": "1"})
    assert remote_shards._differ(before, json.dumps({"size": size, "ETag": tag, "Last-Modified": time})) is differs
    assert not remote_shards._differ('{"size": "3"}', '{"size": "3"}') and not remote_shards._differ("{}", "{}")


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": {"0.tar": 404}}, "404"),
        ({"get_status": {"0.tar": 404}}, "no such file .404."),
        ({"status": {"0.tar": 503}}, "503"),
        ({"drop": {"0.tar": 700}}, "received 700 of 10240 bytes"),
        ({"seconds": {"0.tar": 9}}, "Timeout on reading data"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_nothing(server, tmp_path, monkeypatch, fault, reason):
    vars(server).update(fault)
    monkeypatch.setattr(remote_files, "SILENCE", 0.2)
    cache, url = ShardCache(tmp_path / "c"), f"{server.url}/0.tar"
    pattern = f"^{re.escape(url)}: cannot be fetched: .*{reason}.*repeat the command"
    with pytest.raises(DataError, match=pattern) as caught:
        cache.local(url)
    assert "\n" not in str(caught.value) and "0.tar" not in fetched(cache)
    vars(server).update({name: {} for name in fault})
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
    def full(_, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote_files.file_system(server.url)[0], "get_file", full)
    with pytest.raises(MiniClipError, match="shards cannot be stored in .*No space left.*lower --shard_cache_gb"):
        ShardCache(tmp_path / "c").local(f"{server.url}/0.tar")
    assert not fetched(ShardCache(tmp_path / "c"))


def test_a_disk_that_is_full_before_the_first_shard(server, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MiniClipError, match="shards cannot be stored in .*No space left.*lower --shard_cache_gb"):
        ShardCache(tmp_path / "c").versions([f"{server.url}/0.tar"])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(DataError, match="^s3://bucket/0.tar: cannot be read without a package: .*s3fs"):
        ShardCache(tmp_path / "c").local("s3://bucket/0.tar")


def test_http_ends_no_download_that_goes_on(monkeypatch):
    timeout = remote_files.file_system("https://host/0.tar")[0].client_kwargs["timeout"]
    assert (timeout.total, timeout.sock_connect, timeout.sock_read) == (None, 30, 30)
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"timeout": 9}})
    assert remote_files.file_system("http://host/0.tar")[0].client_kwargs == {"timeout": 9, "trust_env": True}
