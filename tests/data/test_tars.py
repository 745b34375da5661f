"""Reading tar archives: which members belong together, captions, damage, caches."""

import bz2
import gzip
import io
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_miniclip.data.problems import raise_problem
from modeling_miniclip.data.readers.tars import read_tar
from modeling_miniclip.data.rows import ReadOptions, Row
from modeling_miniclip.data.shards import tar_index
from modeling_miniclip.data.shards.shard_url import place_of, read_place
from modeling_miniclip.data.shards.tar_headers import DamagedArchive, find_members
from modeling_miniclip.data.shards.tar_index import PackedArchive, build_index, build_indexes, open_index
from modeling_miniclip.errors import DataError, Problem
from tests.helpers.shards import as_json, pairs, tar_bytes, write_tar
from tests.helpers.trees import picture

RED = picture(1)


@pytest.fixture
def read(tmp_path):
    """Function that reads an archive; returns its rows, and its problems if there are any."""

    def read(archive, options=None, with_problems=False):
        problems: list[Problem] = []
        path = archive if isinstance(archive, str) else write_tar(tmp_path / "a.tar", archive)
        options = replace(options or ReadOptions(), shard_folder=tmp_path / "cache")
        rows = list(read_tar(path, options, problems.append if with_problems else raise_problem))
        return (rows, problems) if with_problems else rows

    return read


def captions(rows: list[Row]) -> dict[str, list[str]]:
    """Captions by name, without the name of the archive."""
    return {row.name.partition("/")[2]: row.captions for row in rows}


def content(row: Row) -> bytes:
    """The image of a row."""
    place = place_of(row.image)
    assert place is not None
    return read_place(place)


# --- captions -------------------------------------------------------------------------------------------------------


def test_captions_of_img2dataset_count_once(read):
    members = []
    for key in ("000000000", "000000001"):
        record = as_json({"caption": f"picture {key}", "key": key, "status": "success", "width": 40})
        members += [(f"{key}.jpg", RED), (f"{key}.json", record), (f"{key}.txt", f"picture {key}".encode())]
    rows = read(members)
    assert captions(rows) == {key: [f"picture {key}"] for key in ("000000000", "000000001")}
    assert [row.name for row in rows] == ["a.tar/000000000", "a.tar/000000001"]
    assert content(rows[1]) == RED


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"0.txt": b"one\ntwo\r\n\n one \n"}, ["one", "two", "one"]),  # as in a CSV file
        (
            {"0.txt": b"one\ntwo\none", "0.json": as_json({"caption": ["two", "three"]})},
            ["one", "two", "one", "three"],
        ),
        ({"0.json": as_json({"caption": ["one", "", None, "two "]})}, ["one", "two"]),
        ({"0.json": as_json({"text": "one"})}, ["one"]),
        ({"0.json": as_json({"sentences": [{"raw": "one", "tokens": ["one"]}, {"raw": "two"}]})}, ["one", "two"]),
        ({"0.json": as_json({"caption_1": "two", "caption_0": "one"})}, ["one", "two"]),
        ({"0.json": as_json(["one", "two"])}, ["one", "two"]),
        ({"0.0.txt": b"one", "0.1.txt": b"two"}, ["one", "two"]),
        ({"0.json": as_json({"caption": "one\nline"}), "0.txt": b"one\nline"}, ["one\nline"]),
        ({"0.TXT": "\ufeffünî".encode()}, ["ünî"]),
    ],
)
def test_texts_of_an_image(read, texts, expected):
    assert captions(read([("0.png", RED), *texts.items()])) == {"0": expected}


def test_the_caption_column_names_the_json_key(read):
    options = ReadOptions(columns=replace(ReadOptions().columns, caption="alt"))
    members = [("0.png", RED), ("0.json", as_json({"alt": "one", "caption": "two"}))]
    assert captions(read(members, options)) == {"0": ["one"]}
    assert captions(read(members)) == {"0": ["two"]}  # not from the index of the other column


def test_json_names_group_and_split(read):
    members = [("0.png", RED), ("0.json", as_json({"caption": "x", "group": 7, "split": "VAL"}))]
    (row,) = read(members)
    assert (row.group, row.split) == ("7", "validation")


@pytest.mark.parametrize(
    ("name", "split"),
    [("train-00000.tar", "train"), ("coco_val2017-3.tar", "validation"), ("trains.tar", None), ("0.tar", None)],
)
def test_the_name_of_a_shard_says_its_split(read, tmp_path, name, split):
    assert [row.split for row in read(write_tar(tmp_path / name, pairs("0")))] == [split]


# --- which members belong together ----------------------------------------------------------------------------------


def test_texts_far_from_their_images_are_found(read):
    members = pairs(["0", "1", "2"])
    unsorted = [*members[::2], *members[:0:-2]]
    assert captions(read(unsorted)) == {key: [f"caption of {key}"] for key in "012"}
    assert captions(read(members[::-1])) == captions(read(unsorted))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["s0.image.png", "s0.caption.txt"], {"s0": ["s0.caption.txt"]}),
        (["s0.png", "s0.caption.txt", "s0.more.txt"], {"s0": ["s0.caption.txt", "s0.more.txt"]}),
        (["s0.left.png", "s0.right.png", "s0.txt"], {"s0.left": ["s0.txt"], "s0.right": ["s0.txt"]}),
        (["v.1.png", "v.2.png", "v.1.txt", "v.2.txt"], {"v.1": ["v.1.txt"], "v.2": ["v.2.txt"]}),
        (["v.1.png", "v.2.png", "v.2.txt"], {"v.2": ["v.2.txt"]}),
        (["v.1.png", "v.2.png", "v.3.txt", "v.2.txt"], {"v.2": ["v.2.txt"]}),
        (["v.1.png", "v.2.png", "v.1.cap.txt"], {"v.1": ["v.1.cap.txt"]}),
        (["a/0.png", "b/0.png", "a/0.txt", "b/0.txt"], {"a/0": ["a/0.txt"], "b/0": ["b/0.txt"]}),
        (["a.b/0.png", "a.c/0.txt", "a.b/0.txt"], {"a.b/0": ["a.b/0.txt"]}),
        (["0.png", "0.webp", "0.txt"], {"0.png": ["0.txt"], "0.webp": ["0.txt"]}),
        (["./0.png", "0.txt"], {"0": ["0.txt"]}),
        (["0.png", "00.png", "0.txt", "00.txt"], {"0": ["0.txt"], "00": ["00.txt"]}),
    ],
)
def test_which_texts_belong_to_which_image(read, names, expected):
    """A text's caption is its own name; images without captions are left out."""
    members = [(name, name.encode() if name.endswith(".txt") else RED) for name in names]
    assert captions(read(members, with_problems=True)[0]) == expected


def test_the_second_image_of_a_name_goes_with_the_second_text(read):
    """As in two archives that were joined, both numbered from 0."""
    first, second = pairs(["0", "1"]), [("0.png", picture(5)), ("0.txt", b"another")]
    rows = read([*first, *second])
    assert captions(rows) == {"0": ["caption of 0"], "1": ["caption of 1"], "0.png#2": ["another"]}
    assert [content(row) for row in rows] == [picture(0), picture(1), picture(5)]


def test_a_replaced_image_keeps_its_caption(read):
    rows = read([*pairs("0"), ("0.png", picture(9))])
    assert captions(rows) == {"0": ["caption of 0"], "0.png#2": ["caption of 0"]}


def test_hidden_members_are_left_out(read):
    hidden = [("._0.png", b"\0\5\x16\7"), ("./.cache/1.png", RED), ("__MACOSX/0.png", RED), ("._0.txt", b"no")]
    assert captions(read([*hidden, *pairs("0"), ("notes.md", b"no"), ("README", b"no")])) == {"0": ["caption of 0"]}


def test_joined_archives_are_read_to_their_end(tmp_path, read):
    (tmp_path / "a.tar").write_bytes(tar_bytes(pairs("01")) + tar_bytes(pairs("2")) + b"x" * 700)
    assert captions(read(str(tmp_path / "a.tar"))) == {key: [f"caption of {key}"] for key in "012"}


def test_hard_links_and_folders(tmp_path, read):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/0.png", tarfile.REGTYPE), ("d/1.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "d/0.png" if kind == tarfile.LNKTYPE else ""
            member.size = len(RED) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(RED))
        for name, text in pairs(["d/0", "d/1"])[1::2]:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    rows = read(str(path))
    assert captions(rows) == {"d/0": ["caption of d/0"], "d/1": ["caption of d/1"]}
    assert [content(row) for row in rows] == [RED, RED]


# --- what is left out -----------------------------------------------------------------------------------------------


def test_images_without_captions_are_counted(read):
    members = [*pairs("0"), ("1.png", RED), ("2.png", RED), ("3.txt", b"lost"), ("2.txt", b"caf\xe9")]
    rows, (problem,) = read(members, with_problems=True)
    assert [row.name for row in rows] == ["a.tar/0"]
    assert (problem.kind, problem.text) == (
        "left-out",
        "left out 2 of 3 images without a caption (first: '1.png'), 1 captions without an image (first: '3.txt'), "
        "1 texts that are not UTF-8, or not JSON (first: '2.txt')",
    )
    everything = read(members, ReadOptions(all_images=True), with_problems=True)[0]
    assert captions(everything) == {"0": ["caption of 0"], "1": [], "2": []}
    with pytest.warns(UserWarning, match="left out 2 of 3 images"):
        assert len(read(members)) == 1


def test_empty_images_and_formats_without_a_reader(read):
    members = [("0.png", b""), ("1.cr2", b"II*\0\x10\0\0\0CR\2\0"), ("2.cr2", RED), *pairs("012")[1::2]]
    rows, problems = read(members, with_problems=True)
    assert [row.name for row in rows] == ["a.tar/2"]  # a PNG under another name
    assert [(problem.kind, problem.image) for problem in problems] == [("empty", "0"), ("format", "1")]


def test_an_archive_without_images(read):
    assert read(tar_members := []) == [] and tar_members == []
    rows, (problem,) = read([("0.txt", b"one")], with_problems=True)
    assert rows == [] and "captions without an image" in problem.text


# --- names ----------------------------------------------------------------------------------------------------------

PARTS = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8
) | st.binary(min_size=1, max_size=8).map(
    lambda name: name.replace(b"/", b"-").replace(b"\0", b"-").decode("utf-8", "surrogateescape")
)


@settings(max_examples=60, deadline=None)
@example(
    names=["new\nline", "a::b", "caf\udce9", "\\xe9", "x" * 300, "p" * 90 + "/" + "q" * 99], kind=tarfile.PAX_FORMAT
)
@example(names=["x" * 300, "é" * 90, "caf\udce9" * 40], kind=tarfile.GNU_FORMAT)
@example(names=["p" * 90 + "/" + "q" * 90, "caf\udce9"], kind=tarfile.USTAR_FORMAT)
@given(names=st.lists(PARTS, max_size=5), kind=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_headers_are_read_as_by_tarfile(names, kind):
    content = tar_bytes([(f"{name}.png", bytes([i]) * (i * 300)) for i, name in enumerate(names)], kind)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert [tuple(member)[:3] for member in find_members(io.BytesIO(content))] == expected


def test_names_with_any_characters(read):
    keys = ["new\nline", "a::b", "caf\udce9", "x" * 300, "# %20 ?", "ünî"]
    members = [member for key in keys for member in ((f"{key}.png", RED), (f"{key}.txt", b"x"))]
    rows = read(members)
    assert [row.name for row in rows] == [f"a.tar/{key}".replace("\udce9", "\\xe9") for key in keys]
    assert all(content(row) == RED and row.image.encode() for row in rows)


@pytest.mark.parametrize("name", ["caf\udce9.tar", "a::b.tar"])
def test_a_shard_whose_name_cannot_be_part_of_a_url(read, tmp_path, name):
    with pytest.raises(DataError, match="rename the file or folder"):
        read(write_tar(tmp_path / name, pairs("0")))


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_truncated_archive_loses_only_its_end(tmp_path, read):
    whole = tar_bytes(pairs("0123"))
    ends = [member.start + member.size for member in find_members(io.BytesIO(whole))]
    for size in (100, ends[0] - 1, ends[1], ends[2] + 300, ends[5] - 1, ends[5], ends[6] + 700, ends[7]):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        complete = [i for i in range(4) if size >= ends[2 * i + 1]]
        rows, problems = read(str(tmp_path / "cut.tar"), with_problems=True)
        assert captions(rows) == {str(i): [f"caption of {i}"] for i in complete}
        assert [problem.kind for problem in problems if problem.kind != "left-out"] == ["damaged-shard"]


def test_a_damaged_header_is_reported(tmp_path, read):
    """`tarfile` would end there without a word."""
    damaged = bytearray(tar_bytes(pairs("012")))
    third = list(find_members(io.BytesIO(damaged)))[4].start - 512
    damaged[third + 10] ^= 1
    (tmp_path / "a.tar").write_bytes(damaged)
    rows, (problem,) = read(str(tmp_path / "a.tar"), with_problems=True)
    assert captions(rows) == {"0": ["caption of 0"], "1": ["caption of 1"]}
    assert (
        problem.kind == "damaged-shard"
        and f"damaged at byte {third:,}; copy or download it again to use more than the 2 images before"
        in problem.text
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_raises_another_error(data):
    content = bytearray(tar_bytes([("x" * 150, b"x" * 600), ("0.png", RED)]))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    try:
        for member in find_members(io.BytesIO(content)):
            assert 0 <= member.start and member.start + member.size <= len(content)
    except DamagedArchive:
        pass


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"no tar", "truncated at byte 6"), (b"x" * 2000, "not a tar archive"), (b"", "an empty file")],
)
def test_another_file_is_no_archive(tmp_path, read, content, reason):
    (tmp_path / "a.tar").write_bytes(content)
    rows, (problem,) = read(str(tmp_path / "a.tar"), with_problems=True)
    assert rows == [] and problem.kind == "damaged-shard" and re.match(reason, problem.text)


def test_a_missing_shard_is_reported(tmp_path, read):
    rows, (problem,) = read(str(tmp_path / "none.tar"), with_problems=True)
    assert rows == [] and problem.kind == "shard" and "No such file" in problem.text


def test_a_shard_that_changes_after_it_was_listed(tmp_path, read):
    rows = read(path := write_tar(tmp_path / "a.tar", pairs("01")))
    for members in (pairs("10"), pairs("01")[2:], [("longer.txt", b"x" * 900), *pairs("01")], pairs("01")[:1]):
        write_tar(tmp_path / "a.tar", members)
        with pytest.raises(DataError, match=f"{path}: 1.png is not where it was; the shard has changed"):
            content(rows[1])
    (tmp_path / "a.tar").write_bytes(tar_bytes(pairs("01"))[:-11_000])
    os.remove(path)
    with pytest.raises(FileNotFoundError):
        content(rows[1])


# --- the cache ------------------------------------------------------------------------------------------------------


def index_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "indexes").iterdir())


def test_an_index_is_built_once(tmp_path, read, monkeypatch):
    rows = read(path := write_tar(tmp_path / "a.tar", pairs("01")))
    monkeypatch.setattr(tar_index, "build_index", None)
    assert read(path) == rows
    assert len(index_files(tmp_path)) == 1


def test_a_changed_shard_is_indexed_again(tmp_path, read):
    path = write_tar(tmp_path / "a.tar", pairs("01"))
    read(path)
    write_tar(tmp_path / "a.tar", pairs("23"))
    os.utime(path, ns=(1, 1))
    assert captions(read(path)) == {"2": ["caption of 2"], "3": ["caption of 3"]}
    assert len(index_files(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "other"])
def test_a_damaged_index_is_not_read(tmp_path, read, damage):
    rows = read(path := write_tar(tmp_path / "a.tar", pairs("01")))
    (file,) = index_files(tmp_path)
    whole = file.read_bytes()
    flipped = whole[:-300] + bytes([whole[-300] ^ 1]) + whole[-299:]
    file.write_bytes({"cut": whole[:-100], "empty": b"", "flip": flipped, "other": b"x" * 99}[damage])
    assert read(path) == rows
    assert file.read_bytes() == whole


def test_indexes_are_built_in_processes(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{i}.tar", pairs(str(i))) for i in range(3)]
    (tmp_path / "3.tar").write_bytes(b"no tar")
    build_indexes([*paths, str(tmp_path / "3.tar"), str(tmp_path / "4.tar")], tmp_path / "cache", num_workers=2)
    monkeypatch.setattr(tar_index, "build_index", None)
    assert [len(open_index(path, tmp_path / "cache")) for path in paths] == [1, 1, 1]


def simple_member(name: str) -> bytes:
    """A member with the content "x", written faster than by `tarfile`."""
    fields = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"00000000001\0" + b"00000000000\0"
    checksum = sum(fields) + 8 * ord(" ") + ord("0")
    return (fields + b"%06o\0 0" % checksum).ljust(512, b"\0") + b"x".ljust(512, b"\0")


@pytest.mark.slow
def test_fifty_thousand_members(tmp_path, read):
    (tmp_path / "a.tar").write_bytes(
        b"".join(simple_member(f"{i:05d}.{suffix}") for i in range(25_000) for suffix in ("jpg", "txt")) + bytes(1024)
    )
    rows = read(str(tmp_path / "a.tar"))
    assert len(rows) == 25_000 and rows[-1].name == "a.tar/24999" and rows[-1].captions == ["x"]


# --- compressed archives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compress", "command"),
    [(gzip.compress, "gzip -d"), (bz2.compress, "bzip2 -d"), (lambda data: b"\x28\xb5\x2f\xfd" + data, "zstd -d")],
)
def test_a_compressed_archive_names_the_command_that_unpacks_it(tmp_path, read, compress, command):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(compress(tar_bytes(pairs("0"))))
    with pytest.raises(DataError, match=f"unpack it: {command} .*a.tar.gz"):
        read(str(path))


def test_an_index_reads_compressed_archives(tmp_path, read):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(pairs("01")[::-1])))
    rows = read(str(path), ReadOptions(all_images=True))
    assert captions(rows) == {"1": ["caption of 1"], "0": ["caption of 0"]}
    archive = PackedArchive()
    places = [place_of(row.image) for row in rows]
    found = [archive.read_now(str(path), "gzip", place.start, place.size)() for place in places]
    assert found == [picture(1), picture(0)]
    with pytest.raises(DataError, match="unpack it: zstd"):
        archive.read_now(str(path.rename(tmp_path / "b")), "zstd", 0, 1)()
    (tmp_path / "b").rename(path)
    path.write_bytes(path.read_bytes()[:150])
    rows, problems = read(str(path), ReadOptions(all_images=True), with_problems=True)
    assert [problem.kind for problem in problems] == ["damaged-shard", "left-out"]


def test_images_open_with_datasets(tmp_path, read):
    from datasets import Dataset, Features
    from datasets import Image as ImageColumn

    rows = read(write_tar(tmp_path / "a.tar", pairs(["0", "a.b/c d::e"])))
    data = Dataset.from_dict({"image": [row.image for row in rows]}, features=Features({"image": ImageColumn()}))
    found = [data[i]["image"].convert("RGB").getpixel((0, 0)) for i in range(2)]
    assert found == [Image.open(io.BytesIO(picture(i))).getpixel((0, 0)) for i in range(2)]


KEYS = st.lists(PARTS.map(lambda text: text.replace(".", "-")), min_size=1, max_size=4, unique=True)


@settings(max_examples=50, deadline=None)
@given(
    keys=KEYS,
    suffixes=st.lists(
        st.tuples(st.sampled_from(["jpg", "PNG", "webp"]), st.sampled_from(["txt", "json", "json+txt"]))
    ),
    dots=st.sampled_from([("", ""), (".v1", ".v1"), (".image", ".caption"), ("", ".caption"), (".a.b", ".a.b.c")]),
    order=st.lists(st.integers(0, 99)),
)
def test_members_in_any_order_belong_together(keys, suffixes, dots, order):
    """Pictures with text and JSON files, other files and Mac's, in any order."""
    members, expected = [("._x.jpg", b"\0\5\x16\7"), ("README", b"no"), ("x.cls", b"3")], {}
    for i, key in enumerate(key for key in keys if not key.startswith("-") and key != "\ufeff"):
        picture_suffix, texts = suffixes[i % len(suffixes)] if suffixes else ("jpg", "txt")
        members.append((f"{key}{dots[0]}.{picture_suffix}", bytes([i + 1]) * (i + 1)))
        for suffix in texts.split("+"):
            text = f"caption {i}"
            members.append(
                (f"{key}{dots[1]}.{suffix}", text.encode() if suffix == "txt" else as_json({"caption": text}))
            )
        expected[i + 1] = [f"caption {i}"]
    for place, new in enumerate(order):
        a, b = place % len(members), new % len(members)
        members[a], members[b] = members[b], members[a]
    archive = tar_bytes(members)
    rows = list(build_index(io.BytesIO(archive)))
    assert {archive[row.start]: row.captions for row in rows} == expected
    assert len({row.name for row in rows}) == len(rows)
