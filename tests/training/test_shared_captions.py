"""Captions that belong to several images: in training batches, and in the recall of a validation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from modeling_miniclip.data.loading.pair_keys import NO_KEY
from modeling_miniclip.training import setup
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.reports.shared_captions import recall_with_shared
from modeling_miniclip.training.towers.features import FrozenFeatures
from tests.helpers.runs import flags
from tests.helpers.shards import picture
from tests.helpers.towers import tiny_processor

# Similarities of three images (rows) and five texts, of images 0, 0, 1, 2 and 2.
SIMILARITY = torch.tensor([[0.9, 0.2, 0.6, 0.1, 0.4], [0.3, 0.8, 0.5, 0.4, 0.2], [0.0, 0.3, 0.1, 0.7, 0.1]])
EMBEDDINGS = SIMILARITY, torch.eye(5), torch.tensor([0, 0, 1, 2, 2])


def run_with(captions: list[list[str]], groups: list[str | None] | None = None) -> Any:
    """A run with four validation images, the second of which cannot be decoded."""
    columns: dict[str, Any] = {"captions": [captions[0], ["a cat", "a boat"], *captions[1:]]}
    if groups is not None:
        columns["group"] = [groups[0], "mug", *groups[1:]]
    lines: list[str] = []
    bad_images = SimpleNamespace(good_rows=lambda split: [0, 2, 3])
    return SimpleNamespace(
        validation_split=Dataset.from_dict(columns), bad_images=bad_images, say=lines.append, lines=lines
    )


@pytest.mark.parametrize(
    ("third", "groups", "texts", "found"),
    [
        ("A  cat.", None, 2, 3),  # texts 0 and 2 belong to images 0 and 1: ranks 1, 3, 1, 1, 3
        ("a bird", [None, "mug", "mug"], 3, 2),  # texts 2, 3 and 4 belong to images 1 and 2: ranks 1, 3, 2, 1, 2
    ],
)
def test_shared_captions_of_a_validation(third: str, groups: list[str | None] | None, texts: int, found: int) -> None:
    run = run_with([["a cat", "a dog"], [third], ["a boat", "a ship"]], groups)
    shared = recall_with_shared(run, EMBEDDINGS)
    assert shared is not None and shared["texts"] == texts
    assert shared["metrics"]["text_to_image_R@1"] == pytest.approx(20 * found)
    assert shared["metrics"]["image_to_text_median_rank"] == 1
    (line,) = run.lines
    assert f"the {texts} captions" in line and line.endswith(f"rsum {shared['metrics']['rsum']:.1f}")


def test_validation_without_shared_captions_has_no_second_recall() -> None:
    run = run_with([["a cat", "a dog"], ["a bird"], ["a boat", "a ship"]], [None, "mug", "cup"])
    assert recall_with_shared(run, EMBEDDINGS) is None and run.lines == []


# --- training batches -----------------------------------------------------------------------------------------------


def first_batch(folder: Path, lines: list[str], images: list[bytes], frozen: bool = False, **given: Any) -> Any:
    """The first training batch of a CSV of images `0.png`, `1.png`, ..., through the set-up of a run."""
    (folder / "data").mkdir()
    for i, content in enumerate(images):
        (folder / "data" / f"{i}.png").write_bytes(content)
    (folder / "data" / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    argv = flags(folder, dataset=folder / "data" / "captions.csv", augmentation="[]", batch_size=8, seed=1, **given)
    arguments = parse_arguments(argv)
    accelerator: Any = SimpleNamespace(
        process_index=0, num_processes=1, is_main_process=True, device=torch.device("cpu"), print=lambda *_: None
    )
    splits = setup.load_splits(arguments)
    shared = setup.find_shared(splits, arguments, accelerator)
    vision = [torch.rand(len(splits["train"]), 4)] if frozen else None
    features = {"train": FrozenFeatures(vision=vision), "validation": FrozenFeatures()}
    loader, _ = setup.build_loaders(splits, features, tiny_processor(), arguments, accelerator, shared)
    names = splits["train"]["image_id"]
    batch = next(iter(loader))
    return batch, [names[i] for i in batch["image_id"].tolist()], [names[i] for i in batch["text_image_id"].tolist()]


def shared_keys(batch: Any, image: int, text: int) -> bool:
    return bool(set(batch["image_keys"][image].tolist()) & set(batch["text_keys"][text].tolist()) - {NO_KEY})


def test_wrong_caption_is_right_for_the_image_that_it_describes(tmp_path: Path) -> None:
    """Nothing else in this data is shared: no caption, no group, no image."""
    lines = ["image,caption,split,negative_captions", '0.png,a cat,train,"[""A  dog.""]"', "1.png,a dog,train,",
             "2.png,a boat,train,", "3.png,a ship,validation,"]  # fmt: skip
    given = {"hard_negatives": "column"}
    batch, images, owners = first_batch(tmp_path, lines, [picture(i) for i in range(4)], **given)
    (wrong,) = batch["is_negative"].nonzero().flatten().tolist()
    assert owners[wrong] == "0.png"
    found = {name: shared_keys(batch, i, wrong) for i, name in enumerate(images)}
    assert found == {"0.png": False, "1.png": True, "2.png": False}


@pytest.mark.parametrize("frozen", [False, True])
def test_copies_of_an_image_are_not_negatives(frozen: bool, tmp_path: Path) -> None:
    """Also of a frozen image tower, which opens no image in training."""
    lines = ["image,caption,split", "0.png,a cat,train", "1.png,a dog,train", "2.png,a boat,train",
             "3.png,a ship,validation"]  # fmt: skip
    contents = [picture(0), picture(1), picture(0), picture(3)]
    given = {"freeze": "vision"} if frozen else {}
    batch, images, owners = first_batch(tmp_path, lines, contents, frozen, **given)
    found = {(i, t): shared_keys(batch, images.index(i), owners.index(t)) for i in images for t in owners if i != t}
    assert {pair for pair, same in found.items() if same} == {("0.png", "2.png"), ("2.png", "0.png")}
    assert len(found) == 6


def test_data_in_which_nothing_is_shared_has_no_keys(tmp_path: Path) -> None:
    lines = ["image,caption,split", "0.png,a cat,train", "1.png,a dog,train", "2.png,a ship,validation"]
    batch, *_ = first_batch(tmp_path, lines, [picture(i) for i in range(3)])
    assert "image_keys" not in batch
