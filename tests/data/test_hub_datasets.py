"""Captioned images from datasets on a loopback Hub."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.hubs import local_hub
from tests.helpers.runs import ROOT
from tests.helpers.shards import pairs, write_tar

CLIENT = """
import sys
import datasets, huggingface_hub, numpy
from PIL import Image
from datasets import Dataset, DatasetDict, Features, Value
datasets.disable_progress_bars()
def table(shades, **columns):
    images = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in shades]
    kind = dict.fromkeys(columns, Value("string"))
    return Dataset.from_dict({"image": images, **columns}, features=Features({"image": datasets.Image(), **kind}))
def numbered(split, shades):
    return table(shades, **{f"caption_{k}": [f"{split} {i} {k}" for i in shades] for k in range(5)})
flickr8k = DatasetDict(train=numbered("train", range(4)), validation=numbered("validation", [10, 11]),
                       test=numbered("test", [20]))
flickr8k.push_to_hub("test-user/flickr8k", private=True)
table(range(30, 38), caption=["x"] * 8).push_to_hub("test-user/shards", num_shards=4)
table([50, 51], caption=["x", "x"]).push_to_hub("test-user/unavailable")
table([60, 61], caption=["x", "x"]).push_to_hub("test-user/broken")
for name in ("en", "de"):
    table([70, 71], caption=[f"{name} 0", f"{name} 1"]).push_to_hub("test-user/two", config_name=name)
table([80, 81, 82, 83], caption=[None, "b", "c", "d"]).push_to_hub("test-user/null")
nested = Features({"image": datasets.Image(), "sentences": [{"raw": Value("string"), "tokens": [Value("string")]}]})
sentences = [[{"raw": text, "tokens": [text]} for text in texts] for texts in ("ab", "c")]
images = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (90, 91)]
Dataset.from_dict({"image": images, "sentences": sentences}, features=nested).push_to_hub("test-user/dicts")
names = ["0.jpg", "0.jpg", "0.jpg", "1.jpg"]
table([100, 100, 101, 102], filename=names, caption=list("0123")).push_to_hub("test-user/basenames")
DatasetDict(train=table([1, 2], image_id=["0", "1"], caption=["a", "b"]),
            validation=table([3, 4], image_id=["0", "1"], caption=["c", "d"])).push_to_hub("test-user/counted")
api = huggingface_hub.HfApi()
api.create_repo("test-user/tars", repo_type="dataset")
api.upload_file(path_or_fileobj=sys.argv[1], path_in_repo="train-0.tar", repo_id="test-user/tars", repo_type="dataset")
api.create_repo("test-user/folder", repo_type="dataset")
rows = "".join(f"{shade}.png,x{shade}\\n" for shade in range(3))
contents = {"metadata.csv": f"file_name,text\\n{rows}".encode()}
for shade in range(3):
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(f"{shade}.png")
    contents[f"{shade}.png"] = open(f"{shade}.png", "rb").read()
adding = [huggingface_hub.CommitOperationAdd(f"train/{name}", content) for name, content in contents.items()]
api.create_commit("test-user/folder", adding, commit_message="add", repo_type="dataset")
api.create_repo("test-user/script", repo_type="dataset")
api.upload_file(path_or_fileobj=b"import datasets", path_in_repo="script.py", repo_id="test-user/script",
                repo_type="dataset")
print("PUSHED", flush=True)
input()  # until the Hub is made to fail

import json, os, time, warnings
from modeling_miniclip.data.captions import load_captions  # not from the package, which loads torch
from modeling_miniclip.errors import DataError
time.sleep = lambda seconds: None  # waiting before a retry would change nothing
result = {}
def load(name, title, token="hf_test", **how):
    os.environ["HF_TOKEN"] = token
    try:
        name = name if "://" in name else "test-user/" + name
        splits = load_captions(name, validation_fraction=0.34, **how)
        result[title] = {split: [[row["image"].getpixel((0, 0))[0], row["image_id"], row["captions"]] for row in rows]
                         for split, rows in splits.items()}
    except DataError as error:
        result[title] = str(error)
# First those who may not read: later, the data would come from the cache.
for how, options in [("", {}), (" streamed", {"stream_first_rows": 2})]:
    load("flickr8k", "stranger" + how, token="hf_other", **options)
    load("flickr8k", "unknown token" + how, token="hf_wrong", **options)
for name in ["shards", "flickr8k", "folder", "unavailable", "broken"]:
    load(name, name + " streamed", stream_first_rows=2)
for name in ["flickr8k", "nothere", "script", "folder", "unavailable", "broken", "two", "two:de", "two:en", "two:fr",
             "dicts", "basenames", "counted", "tars"]:
    load(name, name)
load("dicts", "dicts streamed", stream_first_rows=2)
load("hf://datasets/test-user/tars/*.tar", "files")
load("hf://datasets/test-user/counted/data/*.parquet", "tables")
load("hf://datasets/test-user/nothere/{0..1}.tar", "missing files")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    load("null", "null")
    result["null warnings"] = [str(each.message) for each in caught if "left out" in str(each.message)]
from modeling_miniclip.data.checking.check import check
from tests.helpers.listings import images_of
report = check("test-user/null", num_workers=0, batch_size=2)
result["check"] = [[[each.kind, each.text] for each in report.problems if each.kind == "left-out"], report.figures]
loads, load_dataset = 0, datasets.load_dataset
def counting(*args, **more):
    global loads
    loads += 1
    return load_dataset(*args, **more)
datasets.load_dataset = counting
for name in ("basenames", "null", "two:de", "tars"):
    images, _ = images_of("test-user/" + name)
    result["index " + name] = [[*about, len(content) > 0] for *about, content in images]
result["index splits"] = [split for _, _, split, _ in images_of("test-user/flickr8k")[0]]
result["index loads"] = loads
datasets.load_dataset = load_dataset
huggingface_hub.constants.HF_HUB_OFFLINE = True
huggingface_hub.HfFileSystem.clear_instance_cache()
load("hf://datasets/test-user/tars/*.tar", "files offline")
load("hf://datasets/test-user/counted/data/*.parquet", "tables offline")
load("hf://datasets/test-user/tars/train-[1-9].tar", "other files offline")
print("RESULT", json.dumps(result))
"""


def shards_of(hub, name):
    """Storage keys of the Parquet files of a dataset."""
    repository = hub.store.repo("dataset", f"test-user/{name}")
    files = hub.store.at(repository, repository["refs"]["refs/heads/main"])["files"]
    return [entry["sha256"] for path, entry in files.items() if path.endswith(".parquet")]


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory):
    """Results of `load_captions`, in its own process, for datasets on a loopback Hub."""
    root = tmp_path_factory.mktemp("hub")
    with local_hub(root / "server", tokens=("hf_test=test-user", "hf_other=other")) as hub:
        env = {**os.environ, **hub.client_env(root / "home"), "PYTHONPATH": str(ROOT)}
        env["USE_TORCH"] = "0"  # datasets would import it to stream
        env.pop("HF_HUB_OFFLINE")
        errors = (root / "errors").open("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        tar = write_tar(root / "train-0.tar", pairs("012"))
        client = subprocess.Popen([sys.executable, "-c", CLIENT, tar], env=env, cwd=root, **pipes)
        try:
            assert client.stdout.readline() == "PUSHED\n", (root / "errors").read_text()[-3000:]
            hub.fault(path="/test-user/unavailable/resolve/.*parquet", status=503, times=-1)
            hub.fault(path=shards_of(hub, "broken")[0], method="GET", drop=100, times=-1)
            output, _ = client.communicate("go on\n", timeout=120)
        finally:
            client.kill()
            errors.close()
        assert client.returncode == 0, (root / "errors").read_text()[-3000:]
        result = json.loads(output.partition("RESULT ")[2])
        result["shards read"] = [bool(hub.requests(key, "GET")) for key in shards_of(hub, "shards")]
    return result


def test_numbered_caption_columns_are_joined(from_hub):
    found = from_hub["flickr8k"]
    assert {split: [row[0] for row in rows] for split, rows in found.items()} == {
        "train": [0, 1, 2, 3], "validation": [10, 11], "test": [20]
    }  # fmt: skip
    assert found["validation"][1][2] == [f"validation 11 {k}" for k in range(5)]
    ids = [row[1] for rows in found.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_streaming_gives_the_first_rows_of_each_split(from_hub):
    whole = from_hub["flickr8k"]
    assert from_hub["flickr8k streamed"] == {split: rows[:2] for split, rows in whole.items()}
    assert len(whole["train"]) == 4
    assert [len(rows) for rows in from_hub["shards streamed"].values()] == [1, 1]
    assert True in from_hub["shards read"] and False in from_hub["shards read"]


def test_an_imagefolder_on_the_hub_is_loaded_and_streamed(from_hub):
    images = {row[0]: row[2] for rows in from_hub["folder"].values() for row in rows}
    assert images == {shade: [f"x{shade}"] for shade in range(3)}
    streamed = {row[0]: row[2] for rows in from_hub["folder streamed"].values() for row in rows}
    assert len(streamed) == 2 and streamed.items() <= images.items()


@pytest.mark.parametrize("how", ["", " streamed"])
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("unavailable", "503|locate the file on the Hub"),
        ("broken", "peer closed connection"),
        ("stranger", "doesn't exist on the Hub or cannot be accessed"),
        ("unknown token", "the Hub rejected this token"),
    ],
)
def test_a_failing_hub_is_explained_in_one_line(from_hub, case, reason, how):
    message = from_hub[case + how]
    assert re.search(f"^'test-user/.*dataset on the Hub: .*({reason})", message) and "\n" not in message
    assert "hf_" not in message and "Signature" not in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothere", ["neither a local file or folder", "test-user/nothere"]),
        ("script", ["script", "refs/convert/parquet"]),
    ],
)
def test_a_name_without_a_dataset_is_explained(from_hub, name, expected):
    for part in expected:
        assert part in from_hub[name], f"{part!r} is not in {from_hub[name]}"


def test_a_configuration_is_part_of_the_name(from_hub):
    assert rows_of(from_hub["two:de"]) == {70: ["de 0"], 71: ["de 1"]}
    assert rows_of(from_hub["two:en"]) == {70: ["en 0"], 71: ["en 1"]}
    assert from_hub["two"].startswith("'test-user/two' has several configurations: name one of them, test-user/two:")
    assert "test-user/two:de" in from_hub["two"] and "test-user/two:en" in from_hub["two"]
    assert from_hub["two:fr"].startswith("'test-user/two' has no configuration 'fr': name one of them, test-user/two:")


def test_null_captions_are_left_out(from_hub):
    assert rows_of(from_hub["null"]) == {81: ["b"], 82: ["c"], 83: ["d"]}
    (warning,) = from_hub["null warnings"]
    assert "test-user/null, split train: of 4 rows, left out 1 without a caption (first: row 0)" in warning


def test_nested_captions_are_found(from_hub):
    assert rows_of(from_hub["dicts"]) == {90: ["a", "b"], 91: ["c"]}
    assert rows_of(from_hub["dicts streamed"]) == rows_of(from_hub["dicts"])


def test_names_that_repeat_are_not_taken_for_the_image(from_hub):
    found = from_hub["basenames"]
    assert rows_of(found) == {100: ["0", "1"], 101: ["2"], 102: ["3"]}
    assert {row[1] for rows in found.values() for row in rows} == {"train/0.jpg#0", "train/0.jpg#2", "1.jpg"}
    counted = from_hub["counted"]
    assert {split: [row[1] for row in rows] for split, rows in counted.items()} == {
        "train": ["train/0", "train/1"], "validation": ["validation/0", "validation/1"]
    }  # fmt: skip


def test_tars_on_the_hub(from_hub):
    assert rows_of(from_hub["tars"]) == {0: ["caption of 0"], 1: ["caption of 1"], 2: ["caption of 2"]}
    assert rows_of(from_hub["files"]) == rows_of(from_hub["tars"])
    assert from_hub["files"]["train"][0][1].startswith("train-0.tar/")
    assert from_hub["tables"] == from_hub["counted"]
    assert from_hub["files offline"] == from_hub["files"] and from_hub["tables offline"] == from_hub["tables"]
    assert "train-[1-9].tar: cannot be listed: " in from_hub["other files offline"]
    message = from_hub["missing files"]
    assert message.startswith("hf://datasets/test-user/nothere/0.tar: cannot be fetched: ") and "\n" not in message


def test_check_and_index_read_the_same_rows(from_hub):
    (left_out,), figures = from_hub["check"]
    assert left_out == ["left-out", "of 4 rows, left out 1 without a caption (first: row 0)"]
    assert figures["captions"] == 3 and figures["images_in_train"] + figures["images_in_validation"] == 3
    assert from_hub["index basenames"] == [
        ["test-user/basenames/train/0.jpg#0", ["0", "1"], "train", True],
        ["test-user/basenames/train/0.jpg#2", ["2"], "train", True],
        ["test-user/basenames/1.jpg", ["3"], "train", True],
    ]
    assert [captions for _, captions, *_ in from_hub["index null"]] == [[], ["b"], ["c"], ["d"]]
    start = "hf://datasets/test-user"  # shards are read one by one, and `datasets` keeps no copy of them
    assert [name for name, *_ in from_hub["index two:de"]] == [
        f"{start}/two/de/train-00000-of-00001.parquet/00000{i}" for i in range(2)
    ]
    assert from_hub["index tars"] == [
        [f"{start}/tars/train-0.tar/{i}.png", [f"caption of {i}"], "train", True] for i in range(3)
    ]
    assert from_hub["index splits"] == ["train"] * 4 + ["validation"] * 2 + ["test"]
    assert from_hub["index loads"] == 0


def rows_of(splits: dict) -> dict[int, list[str]]:
    """Captions by shade, over all splits."""
    return {row[0]: row[2] for rows in splits.values() for row in rows}
