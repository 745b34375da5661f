"""`miniclip mine`: which captions are hard negatives, and the dataset that is written."""

import csv
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict, concatenate_datasets
from PIL import Image
from torch.nn.functional import normalize

from modeling_miniclip import load_captions
from modeling_miniclip.cli import cli
from modeling_miniclip.errors import UsageError
from modeling_miniclip.search.mine import MiningRules, find_negatives, mine
from modeling_miniclip.training.command_line.parsing import parse_arguments
from tests.helpers.shards import pairs, write_tar

ALL = MiningRules(num_negatives=9, range_min=0, range_max=100, relative_margin=0)


def angles(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


CAPTIONS = [["a", "A."], ["b"], ["c"], ["d", "d2"]]
IMAGES = angles(0, 60, 90, 170)
TEXTS = angles(10, 20, 30, 40, 100, 110)  # of captions a, A., b, c, d, d2


def test_nearest_captions_of_other_images() -> None:
    # Similarities to image 0 are the cosines: own 10 and 20 degrees, b 30, c 40, d 100, d2 110.
    assert find_negatives(IMAGES, TEXTS, CAPTIONS, None, ALL)[0] == ["b", "c", "d"]
    few = MiningRules(num_negatives=1, range_min=1, range_max=100, relative_margin=0)
    assert find_negatives(IMAGES, TEXTS, CAPTIONS, None, few)[0] == ["c"]
    near = MiningRules(num_negatives=9, range_min=0, range_max=2, relative_margin=0)
    assert find_negatives(IMAGES, TEXTS, CAPTIONS, None, near)[0] == ["b", "c"]


@pytest.mark.parametrize(("margin", "expected"), [(0.09, ["b", "c", "d"]), (0.11, ["c", "d"]), (0.25, ["d"])])
def test_margin_is_relative_to_the_own_captions(margin: float, expected: list[str]) -> None:
    # The own captions are cos 10 = 0.985 and cos 20 = 0.940 similar, on average 0.962; b is 0.866, which is 0.900 of
    # that, and c 0.766, which is 0.796 of it.
    rules = MiningRules(num_negatives=9, range_min=0, range_max=100, relative_margin=margin)
    assert find_negatives(IMAGES, TEXTS, CAPTIONS, None, rules)[0] == expected


def test_groups_equal_captions_and_copies_are_left_out() -> None:
    assert find_negatives(IMAGES, TEXTS, CAPTIONS, ["g", None, "g", None], ALL)[0] == ["b", "d"]
    equal = [["a", "A."], ["B"], ["c", "a"], ["d"]]
    assert find_negatives(IMAGES, TEXTS, equal, None, ALL)[0] == ["B", "d"]
    copy = angles(0, 1, 90, 170)  # a cosine above 0.95
    assert find_negatives(copy, TEXTS, CAPTIONS, None, ALL)[0] == ["c", "d"]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(40, 8, generator=generator), dim=1)
    texts = normalize(images.repeat_interleave(2, dim=0) + 0.2 * torch.randn(80, 8, generator=generator), dim=1)
    captions = [[f"{i}", f"{i} again"] for i in range(40)]
    rules = MiningRules(num_negatives=3, range_min=2, range_max=30)
    whole = find_negatives(images, texts, captions, None, rules)
    monkeypatch.setattr("modeling_miniclip.search.mine.BLOCK", 7)
    assert find_negatives(images, texts, captions, None, rules) == whole
    assert sum(map(len, whole)) > 80
    assert all(len({text.split()[0] for text in some}) == len(some) for some in whole), "one of each image"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_negatives": 0}, "--num_negatives 0"),
        ({"range_min": 7, "range_max": 7}, "--range_min 7"),
        ({"relative_margin": 1}, "--relative_margin 1"),
    ],
)
def test_wrong_rules_are_rejected(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MiningRules(**values)


@pytest.fixture
def many_images(tmp_path: Path) -> Path:
    """Eight pictures of noise with two captions each, six of them for training."""
    folder = tmp_path / "data"
    (folder / "Images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / "Images" / f"{i}.png")
            for text in (f"a dog number {i}", f"two children, {i}"):
                writer.writerow([f"{i}.png", text, "train" if i < 6 else "validation"])
    return folder


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_written_dataset_is_the_same_with_negatives(
    tiny_export: Path,
    many_images: Path,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    negatives = [["a cat", 'two, "three"'], [], ["no dog"], [], [], []]
    monkeypatch.setattr("modeling_miniclip.search.mine.find_negatives", lambda *_: negatives)
    out = many_images / f"mined.{suffix}"
    argv = ["mine", str(tiny_export), str(many_images / "captions.csv"), "--output", str(out)]
    assert cli(argv) == 0
    assert "3 wrong captions of 2 of 6 training images" in capsys.readouterr().out
    before, after = load_captions(many_images / "captions.csv"), load_captions(out)
    for split in ("train", "validation"):
        pictures = {tuple(row["captions"]): row["image"].tobytes() for row in before[split]}
        assert {tuple(row["captions"]): row["image"].convert("RGB").tobytes() for row in after[split]} == pictures
    wrong = dict(zip(map(tuple, before["train"]["captions"]), negatives, strict=True))
    assert {tuple(row["captions"]): row["negative_captions"] for row in after["train"]} == wrong
    assert not any(after["validation"]["negative_captions"])
    assert cli(argv) == 2, "the output exists"


def test_mining_needs_images_that_a_csv_can_name(tiny_export: Path, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", pairs("abc"))
    with pytest.raises(UsageError, match="are no files; name a .parquet file"):
        mine(str(tiny_export), shard, str(tmp_path / "out.csv"), ALL, validation_fraction=None)


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative of each image is a caption of the next one, as a model without training finds none."""

    def find(images: torch.Tensor, texts: torch.Tensor, captions: list[list[str]], *_: object) -> list[list[str]]:
        assert len(images) == len(captions) and len(texts) == sum(map(len, captions))
        return [[captions[(i + 1) % len(captions)][0]] for i in range(len(captions))]

    monkeypatch.setattr("modeling_miniclip.search.mine.find_negatives", find)


def test_datasets_with_some_images_in_shards_need_parquet(
    tiny_export: Path, many_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the first image is looked at."""
    splits = load_captions(many_images / "captions.csv")
    shard = load_captions(write_tar(many_images / "0.tar", pairs("abc")), validation_fraction=None)["train"]
    columns = ["image", "image_id", "captions"]
    mixed = concatenate_datasets([splits["train"].select_columns(columns), shard.select_columns(columns)])
    monkeypatch.setattr("modeling_miniclip.search.mine.load_captions", lambda *_, **__: DatasetDict(train=mixed))
    with pytest.raises(UsageError, match="some images of .* are no files; name a .parquet file"):
        mine(str(tiny_export), "mixed", str(many_images / "out.csv"), ALL)


def test_printed_command_names_the_folder_of_the_images(
    tiny_export: Path, many_images: Path, tmp_path: Path, neighbours: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "else where" / "mined.csv"
    out.parent.mkdir()
    argv = ["mine", str(tiny_export), str(many_images / "captions.csv"), "--output", str(out)]
    assert cli(argv) == 0
    command = shlex.split(capsys.readouterr().out.rpartition("train with them: ")[2])
    assert command[0] == "train-miniclip"
    given = parse_arguments(command[1:])
    assert given.dataset is not None
    rows = load_captions(given.dataset[0], image_dir=given.image_dir)["train"]
    assert len(rows) == 6 and rows[0]["image"].size == (40, 40)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_image_that_cannot_be_read_has_no_negatives(
    tiny_export: Path, many_images: Path, suffix: str, neighbours: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (many_images / "Images" / "2.png").write_bytes(b"no image")
    out = many_images / f"mined.{suffix}"
    argv = ["mine", str(tiny_export), str(many_images / "captions.csv"), "--output", str(out)]
    assert cli(argv) == 0
    printed = capsys.readouterr()
    assert "skipped: " in printed.err and "2.png" in printed.err and " of 6 training images" in printed.out
    rows = load_captions(out)["train"].select_columns(["captions", "negative_captions"])
    found = {row["captions"][0]: row["negative_captions"] for row in rows}
    assert len(found) == 6 and found["a dog number 2"] == []
    others = [wrong for several in found.values() for wrong in several]
    assert others and not any("2" in wrong for wrong in others), "nobody knows whether they are wrong"


def test_finding_nothing_is_an_error_that_names_the_settings(
    tiny_export: Path, many_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = many_images / "mined.csv"
    argv = ["mine", str(tiny_export), str(many_images / "captions.csv"), "--output", str(out)]
    assert cli([*argv, "--range_min", "100"]) == 1
    error = capsys.readouterr().err
    assert "no caption of another image is a hard negative of one of the 6 training images" in error
    assert "lower --range_min (now 100) or --relative_margin (0.05), raise --range_max (200)" in error
    assert not out.exists()
