"""Captioned images from datasets on a loopback Hub."""

import json
import os
import re
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from modeling_miniclip import DataError
from modeling_miniclip.data.columns import ColumnNames
from modeling_miniclip.data.hub_datasets import one_row_per_image
from tests.helpers.hubs import local_hub
from tests.helpers.runs import ROOT

CLIENT = """
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
api = huggingface_hub.HfApi()
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

import json, os, time
from modeling_miniclip.data.captions import load_captions  # not from the package, which loads torch
from modeling_miniclip.errors import DataError
time.sleep = lambda seconds: None  # waiting before a retry would change nothing
result = {}
def load(name, title, token="hf_test", **how):
    os.environ["HF_TOKEN"] = token
    try:
        splits = load_captions("test-user/" + name, validation_fraction=0.34, **how)
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
for name in ["flickr8k", "nothere", "script", "folder", "unavailable", "broken"]:
    load(name, name)
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
        client = subprocess.Popen([sys.executable, "-c", CLIENT], env=env, cwd=root, **pipes)
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


# --- without a Hub --------------------------------------------------------------------------------------------------


def dataset(shades: list[int | None], *more_images: str, **columns: list) -> Dataset:
    """One-colour images, or no image for None; more image columns have the same images.

    Further columns are text or lists of texts. Without them, each image has the caption "x".
    """
    images = [None if shade is None else Pillow.new("RGB", (4, 4), (shade, 0, 0)) for shade in shades]
    columns = columns or {"caption": ["x"] * len(shades)}
    text = {k: [Value("string")] if isinstance(v[0], list) else Value("string") for k, v in columns.items()}
    pictures = ("image", *more_images)
    features = Features({**text, **dict.fromkeys(pictures, Image())})
    return Dataset.from_dict({**columns, **dict.fromkeys(pictures, images)}, features=features)


def contents(splits: DatasetDict) -> dict[str, list[list]]:
    """(shade of red, image_id, captions) of each row of each split."""
    return {split: [[row["image"].getpixel((0, 0))[0], row["image_id"], row["captions"]] for row in rows]
            for split, rows in splits.items()}  # fmt: skip


def test_lists_of_captions_and_a_split_column():
    shades = list(range(6))
    rows = dataset(
        shades,
        caption=[[f"a{i}", f"b{i}"] for i in shades],
        sentids=[[str(i)] for i in shades],
        split=["train", "train", "val", "test", "restval", "val"],
        img_id=[str(i) for i in shades],
        filename=[f"{i}.jpg" for i in shades],
    )
    assert contents(one_row_per_image(DatasetDict(test=rows), "set", ColumnNames(), 0.34, 0)) == {
        "train": [[i, f"{i}.jpg", [f"a{i}", f"b{i}"]] for i in (0, 1, 4)],
        "validation": [[i, f"{i}.jpg", [f"a{i}", f"b{i}"]] for i in (2, 5)],
        "test": [[3, "3.jpg", ["a3", "b3"]]],
    }


def test_rows_with_the_same_picture_are_grouped():
    rows = dataset([1, 2, 1, 3, 2], caption=["one", "two", "one more", "three", "two more"])
    found = contents(one_row_per_image(DatasetDict(train=rows), "set", ColumnNames(), 0.34, 0))
    grouped = [row for rows in found.values() for row in rows]
    assert {shade: captions for shade, _, captions in grouped} == {
        1: ["one", "one more"], 2: ["two", "two more"], 3: ["three"]
    }  # fmt: skip
    assert len(grouped) == 3 and len(found["validation"]) == 1


@pytest.mark.parametrize(
    ("splits", "columns", "message"),
    [
        ({"a": dataset([1]), "b": dataset([2])}, ColumnNames(), "^set: no train split among a, b"),
        (
            {"train": dataset([1, 2]), "test": dataset([3, 2])},
            ColumnNames(),
            "^set, split test, row 1.*split train.*one split",
        ),
        ({"train": dataset([1, 2], caption=["x", " "])}, ColumnNames(), "^set, split train, row 1.*'caption'.*empty"),
        ({"train": dataset([1, 2], label=["x", "y"])}, ColumnNames(), "'caption'.*label.*caption_column"),
        ({"train": dataset([1, 2, None])}, ColumnNames(), "^set, split train, row 2, column 'image': no image"),
        (
            {"train": dataset([1], "crop")},
            ColumnNames(image="photo"),
            r"'photo', found image columns \['image', 'crop'\]",
        ),
    ],
)
def test_unusable_hub_datasets_are_errors(splits, columns, message):
    with pytest.raises(DataError, match=message) as caught:
        one_row_per_image(DatasetDict(splits), "set", columns, 0.5, 0)
    assert caught.value.problem is not None


def test_other_splits_of_the_hub_are_left_out():
    splits = DatasetDict(train=dataset([1, 2]), dev=dataset([3]), extra=dataset([4, 5, 6]))
    with pytest.warns(UserWarning, match="set: left out 3 images that are in none of train, validation, test"):
        result = one_row_per_image(splits, "set", ColumnNames(), 0.5, 0)
    assert {name: len(rows) for name, rows in result.items()} == {"train": 2, "validation": 1}


def test_a_single_split_of_the_hub_is_divided():
    result = one_row_per_image(DatasetDict(test=dataset([1, 2, 3, 4])), "set", ColumnNames(), 0.25, 0)
    assert {name: len(rows) for name, rows in result.items()} == {"train": 3, "validation": 1}
