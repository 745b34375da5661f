"""Sources of an index: each image with its captions, whatever holds them; damaged shards keep what was indexed."""

import gzip
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_miniclip import DataError, ImageIndex, update_index
from modeling_miniclip.data.all_images import Item
from modeling_miniclip.data.columns import ColumnNames
from modeling_miniclip.data.find_images import ALONE, is_gone
from modeling_miniclip.search.building.shards import Encoding, Prepared
from modeling_miniclip.search.update import share_of
from tests.helpers.indexes import write_picture
from tests.helpers.listings import images_of, listing_of
from tests.helpers.shards import as_json, pairs, tar_bytes, write_tar
from tests.helpers.trees import picture


def listed(source: Path | str, *expected_problems: str) -> dict[str, tuple[list[str], str]]:
    """Captions and split of each image by its name below the folder of the source. Every image can be read."""
    images, problems = images_of(source)
    assert [problem.kind for problem in problems] == list(expected_problems), problems
    assert all(content[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0") for *_, content in images)
    assert len({name for name, *_ in images}) == len(images)
    top = os.path.dirname(os.path.abspath(source))
    return {os.path.relpath(name, top): (captions, split) for name, captions, split, _ in images}


def test_tars_of_other_tools_give_each_caption_once(tmp_path: Path) -> None:
    members = []
    for i in range(2):
        texts = ((f"{i}.json", as_json({"caption": f"picture {i}", "key": str(i)})), (f"{i}.txt", b"picture %d" % i))
        members += [(f"{i}.png", picture(i)), *texts]
    write_tar(tmp_path / "img2dataset.tar", members)
    assert listed(tmp_path / "img2dataset.tar") == {
        f"img2dataset.tar/{i}.png": ([f"picture {i}"], "") for i in range(2)
    }
    write_tar(tmp_path / "mac.tar", [("./._a.png", b"\0\5\x16\7"), ("./a.png", picture(0)), ("b.gif.txt", b"lost")])
    assert listed(tmp_path / "mac.tar", "left-out") == {"mac.tar/a.png": ([], "")}
    write_tar(tmp_path / "dots.tar", [("s.image.png", picture(0)), ("s.caption.txt", b"a cap")])
    assert listed(tmp_path / "dots.tar") == {"dots.tar/s.image.png": (["a cap"], "")}
    write_tar(tmp_path / "unsorted.tar", [*reversed(pairs("ab")), ("a.png", picture(5))])
    assert listed(tmp_path / "unsorted.tar") == {
        "unsorted.tar/b.png": (["caption of b"], ""), "unsorted.tar/a.png": (["caption of a"], ""),
        "unsorted.tar/a.png#2": (["caption of a"], ""),
    }  # fmt: skip


def test_text_files_and_loose_names_give_captions(tmp_path: Path) -> None:
    for name in ("0.png", "1.png", "2.png"):
        write_picture(tmp_path / "texts" / name, 0)
    (tmp_path / "texts" / "0.txt").write_text("first\nsecond\n")
    (tmp_path / "texts" / "1.json").write_text(json.dumps({"caption": "third"}))
    assert listed(tmp_path / "texts") == {
        "texts/0.png": (["first", "second"], ""), "texts/1.png": (["third"], ""), "texts/2.png": ([], ""),
    }  # fmt: skip
    (tmp_path / "texts" / "0.txt").unlink()
    (tmp_path / "texts" / "1.json").write_text(json.dumps({"title": "fourth"}))
    rows = listing_of(tmp_path / "texts", columns=ColumnNames(caption="title")).table.to_pylist()
    assert [row["captions"] for row in rows] == [[], ["fourth"], []]
    name = unicodedata.normalize("NFD", "café.png")
    write_picture(tmp_path / "set" / "Images" / name, 0)
    write_picture(tmp_path / "set" / "Images" / "B.PNG", 0)
    (tmp_path / "set" / "captions.csv").write_text("image,caption_0,caption_1\ncafé.png,one,two\nb.png,three,\n")
    expected = {"Images/B.PNG": (["three"], ""), f"Images/{name}": (["one", "two"], "")}
    assert listed(tmp_path / "set" / "captions.csv", "spelling") == dict(reversed(expected.items()))
    assert listed(tmp_path / "set", "spelling") == {f"set/{key}": value for key, value in expected.items()}


def test_splits_are_those_of_training(tmp_path: Path) -> None:
    for name in ("boat/0.png", "train/1.png"):
        write_picture(tmp_path / "subjects" / name, 0)
    assert {split for _, split in listed(tmp_path / "subjects").values()} == {""}  # a train is a vehicle here
    rows = "image,caption,Split,embedding\nboat/0.png,a,VAL,{0}\ntrain/1.png,b,,{0}\ntrain/1.png,c,,{0}\n"
    (tmp_path / "subjects" / "list.csv").write_text(rows.format("0.1 " * 40_000))  # a column nobody asked for
    assert listed(tmp_path / "subjects" / "list.csv") == {
        "boat/0.png": (["a"], "validation"),
        "train/1.png": (["b", "c"], ""),
    }


def test_patterns_and_folders_of_shards_are_sources(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        write_tar(folder / f"{i}.tar", pairs([f"{i}{k}" for k in range(2)]))
    expected = {f"{i}.tar/{i}{k}.png": ([f"caption of {i}{k}"], "") for i in range(3) for k in range(2)}
    for pattern in ("*.tar", "{0..2}.tar"):
        assert listed(folder / pattern) == expected
    assert listed(folder) == {f"shards/{name}": value for name, value in expected.items()}
    listing = listing_of(folder)
    assert listing.shards.paths == [str(folder / f"{i}.tar") for i in range(3)]
    assert not is_gone(str(folder / "{0..2}.tar")) and is_gone(str(folder / "{0..3}.tar")) and is_gone(f"{folder}/x*")
    item = next(listing.items(listing.rows))
    assert item.mtime == (folder / "0.tar").stat().st_mtime_ns and item.size == len(item.read())
    for i in range(2):
        pq.write_table(pa.table({"jpg": [picture(i)], "caption": [[f"cap {i}"]]}), tmp_path / f"test-{i}.parquet")
    assert listed(tmp_path / "test-*.parquet") == {
        f"test-{i}.parquet/000000": ([f"cap {i}"], "test") for i in range(2)
    }


def test_a_coco_folder_is_listed_with_its_captions(tmp_path: Path) -> None:
    for name in ("train2017/1.png", "train2017/2.png", "val2017/3.png"):
        write_picture(tmp_path / "coco" / name, 0)
    (tmp_path / "coco" / "annotations").mkdir()
    for split, image in (("train", 1), ("val", 3)):
        text = [{"id": i, "image_id": image, "caption": f"{split} {i}"} for i in range(2)]
        values = {"images": [{"id": image, "file_name": f"{image}.png"}], "annotations": text}
        (tmp_path / "coco" / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(values))
    assert listed(tmp_path / "coco") == {
        "coco/train2017/1.png": (["train 0", "train 1"], "train"), "coco/train2017/2.png": ([], "train"),
        "coco/val2017/3.png": (["val 0", "val 1"], "validation"),
    }  # fmt: skip


def test_class_folders_have_no_captions(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        write_picture(tmp_path / "pets" / name, 0)
    assert listed(tmp_path / "pets") == {"pets/cat/1.png": ([], ""), "pets/dog/1.png": ([], "")}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_processes_share_shards_and_miss_no_image(tmp_path: Path, kind: str) -> None:
    for i in range(5):
        if kind == "tar":
            write_tar(tmp_path / f"{i}.tar", pairs([f"{i}{k}" for k in range(i + 1)]))
        else:
            rows = {"jpg": [picture(k) for k in range(i + 1)], "caption": ["x"] * (i + 1)}
            pq.write_table(pa.table(rows), tmp_path / f"{i}.parquet")
    write_picture(tmp_path / "photos" / "a.png", 0)
    listing = listing_of(tmp_path / f"*.{kind}", tmp_path / "photos")
    for processes in (1, 2, 3, 5, 7):
        shares = [share_of(listing, listing.rows, i, processes) for i in range(processes)]
        assert sorted(np.concatenate(shares).tolist()) == list(range(16))
        if processes <= 5:  # otherwise, each gets an equal part
            shards = [set(listing.column("shard", share).tolist()) - {ALONE} for share in shares]
            assert sum(map(len, shards)) == 5 and all(shards)
        else:
            assert {len(share) for share in shares} == {2, 3}
    assert sorted(share_of(listing, listing.rows[:3], 1, 2).tolist()) == [1, 2]  # both new images of one shard


def test_images_of_a_damaged_shard_stay(tmp_path: Path, tiny_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = tar_bytes(pairs("abc"))
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "1.tar").write_bytes(content)
    write_tar(shards / "2.tar", pairs("de"))
    assert update_index(tmp_path / "index", [shards / "*.tar"], tiny_export, progress=False).images == 5
    (shards / "1.tar").write_bytes(content[:2800])
    report = update_index(tmp_path / "index", progress=False)
    assert list(report.unlisted) == [str(shards / "1.tar")] and (report.images, report.dropped) == (5, 0)
    assert report.kept == 1 and report.skipped == {}
    names = ImageIndex.open(tmp_path / "index").entries["id"].to_pylist()
    assert sorted(names) == [
        str(shards / name) for name in ("1.tar/a.png", "1.tar/b.png", "1.tar/c.png", "2.tar/d.png", "2.tar/e.png")
    ]
    assert f"skipped: {shards / '1.tar'}: " in capsys.readouterr().err
    (shards / "1.tar").write_bytes(b"")
    (shards / "2.tar").unlink()
    with pytest.raises(DataError, match=r"1.tar: .*no images found; .* are kept"):
        update_index(tmp_path / "index", [shards / "1.tar"], progress=False)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
def test_an_update_reads_only_shards_that_changed(
    tmp_path: Path, tiny_export: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(number: int, *seeds: int) -> Path:
        path = tmp_path / "shards" / f"{number}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"jpg": [picture(seed) for seed in seeds], "caption": ["x"] * len(seeds)}), path)
        else:
            content = tar_bytes([(f"{seed}.png", picture(seed)) for seed in seeds])
            path.write_bytes(gzip.compress(content) if kind == "tar.gz" else content)
        return path

    (tmp_path / "shards").mkdir()
    for number in range(3):
        write(number, 10 * number, 10 * number + 1)
    index = tmp_path / "index"
    assert update_index(index, [tmp_path / "shards"], tiny_export, progress=False).images == 6
    thumbnails = [ImageIndex.open(index).thumbnail(row) for row in range(6)]
    read: list[str] = []
    prepare = Encoding._prepare

    def recording(self: Encoding, item: Item) -> Prepared:
        read.append(os.path.basename(os.path.dirname(item.id)))
        return prepare(self, item)

    monkeypatch.setattr(Encoding, "_prepare", recording)
    with monkeypatch.context() as patch:
        patch.setattr("modeling_miniclip.data.load_rows.write_table", None)  # tables are not read again either
        assert update_index(index, progress=False).reused == 6 and read == []
    os.utime(write(1, 10, 11), (5, 5))
    report = update_index(index, progress=False)
    assert (report.reused, report.encoded) == (6, 0) and read == [f"1.{kind}"] * 2
    assert [ImageIndex.open(index).thumbnail(row) for row in range(6)] == thumbnails
    write(2, 20, 99)
    assert update_index(index, progress=False).encoded == 1
