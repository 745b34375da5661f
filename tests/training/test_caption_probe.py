"""Captions that do not belong to their images are found before training; captions that do never cause a warning."""

import csv
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from torch import Tensor
from torch.nn.functional import normalize

from modeling_miniclip import load_captions
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.reports import caption_probe
from modeling_miniclip.training.reports.caption_probe import CaptionEvidence, describe_words, probe_captions, relation
from modeling_miniclip.training.reports.diagnostics import Diagnosis
from modeling_miniclip.training.towers.create_model import create_model
from tests.helpers.runs import flags, write_preset, write_scene_folder
from tests.helpers.towers import tiny_model, tiny_processor
from train_miniclip import main, prepare

CPU = torch.device("cpu")


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffle_captions(table: Path) -> None:
    """Give the captions of each image to another one."""
    header, *rows = csv.reader(table.read_text(encoding="utf-8").splitlines())
    images = sorted({row[1] for row in rows})
    other = dict(zip(images, random.Random(0).sample(images, len(images)), strict=True))
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *([number, other[image], text] for number, image, text in rows)])


def test_relation_is_a_standard_score() -> None:
    scores = [relation([noise(40, 8, seed=i)], [noise(40, 8, seed=i + 500)]) for i in range(60)]
    found = torch.tensor([float(z) for z in scores if z is not None])
    assert len(found) == 60 and abs(found.mean()) < 0.4 and found.std().item() == pytest.approx(1, abs=0.25)


def test_relation_is_found_in_one_pair_of_descriptions() -> None:
    images = noise(100, 8, seed=0)
    turned = images @ torch.linalg.qr(noise(8, 8, seed=1))[0] + 0.5 * noise(100, 8, seed=2)
    alone = relation([images], [turned])
    assert alone is not None and alone > 20
    assert relation([noise(100, 4, seed=3), images], [turned, noise(100, 4, seed=4)]) == pytest.approx(alone, rel=0.01)
    assert relation([images], [turned[torch.randperm(100)]]) < 5  # type: ignore[operator]


def test_relation_worked_by_hand_for_two_groups() -> None:
    # Similarities within a group are equal, so that a shuffled sum depends on the overlap of the groups alone.
    group = torch.tensor([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 8)
    z = relation([group], [group])
    # Overlaps k of 8 have hypergeometric weights; the sum is proportional to (k - 4)^2, less the constant diagonal.
    overlap = torch.arange(9).double()
    weight = torch.tensor([math.comb(8, k) ** 2 for k in range(9)]).double()
    weight /= weight.sum()
    value = (overlap - 4) ** 2
    mean = (weight * value).sum()
    sd = (weight * (value - mean) ** 2).sum().sqrt()
    assert z == pytest.approx(((16 - mean) / sd).item(), rel=0.25)  # the null is estimated from 200 shuffles


def test_descriptions_that_distinguish_nothing_show_nothing() -> None:
    images = noise(50, 8, seed=0)
    assert relation([images[:10]], [images[:10]]) is None, "too few"
    assert relation([images], [describe_words([["a photo"]] * 50)]) is None, "equal captions"
    assert relation([images], [describe_words([[f"code{i}"] for i in range(50)])]) is None, "no word in common"


def test_rare_words_count_more_in_any_script() -> None:
    words = describe_words([["a dog, a Dog"], ["a cat"], ["\u72ac\u304c"], ["a dog"]])
    shared = [float(normalize(words, dim=-1)[0] @ normalize(words, dim=-1)[i]) for i in (1, 2, 3)]
    assert shared[2] > shared[0] > shared[1] == 0
    assert int((words[2] > 0).sum()) == 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> DatasetDict:
    folder = tmp_path_factory.mktemp("scenes")
    return load_captions(write_scene_folder(folder / "scenes", 100), validation_fraction=0.2)


@pytest.mark.parametrize(("shuffled", "images"), [(False, 64), (True, 80)])
def test_probe_finds_shuffled_captions_of_scenes(
    scenes: DatasetDict, monkeypatch: pytest.MonkeyPatch, shuffled: bool, images: int
) -> None:
    monkeypatch.setattr(caption_probe, "ENOUGH", 80)
    splits = DatasetDict(scenes)
    if shuffled:
        order = torch.randperm(80, generator=torch.Generator().manual_seed(0)).tolist()
        captions = splits["train"].select(order)["captions"][:]
        splits["train"] = splits["train"].remove_columns("captions").add_column("captions", captions)
        splits["validation"] = splits["validation"].select([])
    torch.manual_seed(0)
    found = probe_captions(splits, tiny_model(), tiny_processor(), CPU, is_pretrained=False)
    if shuffled:
        assert not found.related and found.images == images and found.warning() is not None
    else:
        assert found.related and found.images == images and found.warning() is None


def test_few_images_are_no_evidence() -> None:
    assert CaptionEvidence(0.1, 40, False).warning() is None
    assert "500 images fit their own captions no better" in str(CaptionEvidence(0.1, 500, True).warning())
    assert CaptionEvidence(7.0, 500, True).warning() is None
    lines: list[str] = []
    diagnosis = Diagnosis(lines.append, 0, 100.0, evidence=CaptionEvidence(0.1, 40, False))
    assert diagnosis.doubt() == (
        "40 images are too few to see whether captions belong to their images: look at retrieval.png"
    )
    images = normalize(noise(40, 16, seed=0), dim=-1)
    diagnosis.after_validation(1, images, images, torch.arange(40))
    assert diagnosis.doubt() is None, "the model finds them"
    assert Diagnosis(lines.append, 0, 100.0, evidence=CaptionEvidence(9.0, 40, False)).doubt() is None
    assert Diagnosis(lines.append, 0, 100.0, evidence=CaptionEvidence(0.0, 400, True)).doubt() is None


@pytest.mark.usefixtures("without_finish")
def test_run_of_one_step_reports_shuffled_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_probe, "ENOUGH", 60)
    table = write_scene_folder(tmp_path / "scenes", 64)
    write_preset(tmp_path)
    (tmp_path / "right").mkdir()
    prepare(parse_arguments(flags(tmp_path, "right")))
    assert "unrelated" not in capsys.readouterr().out
    shuffle_captions(table)
    main(flags(tmp_path, "wrong", max_steps=1))
    assert capsys.readouterr().out.count("likely captions are unrelated to their images") == 1


@pytest.mark.long
@pytest.mark.parametrize(("source", "images"), [("pretrained", 50), ("pretrained", 400), ("scratch", 400)])
def test_photographs_cause_neither_false_alarms_nor_misses(shared: Path, source: str, images: int) -> None:
    captions: dict[str, list[str]] = {}
    with (shared / "flickr8k" / "captions.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    weights = shared / "weights"
    towers = [f"--vision_model={weights / 'tf_efficientnet_lite0'}", f"--text_model={weights / 'all-MiniLM-L6-v2'}"]
    arguments = parse_arguments(
        ["--dataset=any.csv", *(towers if source == "pretrained" else ["--preset=scenes_tiny"])]
    )
    features = Features({"image": Image(), "image_id": Value("string"), "captions": [Value("string")]})
    for seed in range(10):
        rng = random.Random(seed)
        names = rng.sample(sorted(captions), images)
        own = [captions[name] for name in names]
        model, processor = create_model(arguments, own)
        for texts in (own, rng.sample(own, images)):
            columns: dict[str, list[Any]] = {
                "image": [str(shared / "flickr8k" / "Images" / name) for name in names],
                "image_id": names,
                "captions": texts,
            }
            rows = Dataset.from_dict(columns, features=features)
            splits = DatasetDict(train=rows.select(range(20, images)), validation=rows.select(range(20)))
            found = probe_captions(splits, model, processor, CPU, source == "pretrained")
            assert (found.warning() is None) == found.related == (texts is own), (seed, found)
