"""Runs on several datasets: the share of each, its own validation, and how often it was used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from modeling_miniclip.data.load_rows import Splits
from modeling_miniclip.data.loading.mixing import Mixture
from modeling_miniclip.data.loading.order import Shuffled, ShuffledInWindows
from modeling_miniclip.data.shards import split_shards
from modeling_miniclip.errors import UsageError
from modeling_miniclip.evaluation.metrics import validation_metrics
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.reports.several_datasets import part_of_embeddings, validation_parts
from modeling_miniclip.training.row_order import order_checksum, training_order
from tests.helpers.runs import assert_same_log, flags, metrics_of, write_scene_folder
from train_miniclip import main

pytestmark = pytest.mark.usefixtures("without_figures")


def splits_of(train: list[int], validation: list[int]) -> Splits:
    splits = Splits()
    splits.sizes = {"train": train, "validation": validation}
    for name, sizes in splits.sizes.items():
        splits[name] = Dataset.from_dict({"image": [{"bytes": b"x", "path": None}] * sum(sizes)})
    return splits


def two_sets(*argv: str) -> Any:
    return parse_arguments(["--dataset", "a.csv", "b.csv", "--batch_size=32", *argv])


def test_order_of_several_sets_follows_their_weights() -> None:
    splits = splits_of([6, 10], [2, 2])
    plain = training_order(splits, two_sets("--shuffle", "full"))
    assert isinstance(plain, Shuffled) and plain.num_rows == 16
    mixed = training_order(splits, two_sets("--dataset_weights", "3", "1"))
    assert isinstance(mixed, Mixture) and mixed.shares == [12, 4] and mixed.times_used(2) == [4.0, 0.8]
    window = training_order(splits, two_sets("--dataset_weights", "3", "1", "--shuffle", "window"))
    assert isinstance(window, Mixture) and all(isinstance(order, ShuffledInWindows) for order in window.orders)


def test_checksum_of_the_order_depends_on_shards_and_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = splits_of([6, 10], [2, 2])
    full, window = two_sets("--shuffle", "full"), two_sets("--shuffle", "window")
    before = order_checksum(splits, full), order_checksum(splits, window)
    monkeypatch.setattr(split_shards, "LOOSE", 4)  # other shards
    assert order_checksum(splits, full) == before[0] and order_checksum(splits, window) != before[1]
    assert order_checksum(splits_of([10, 6], [2, 2]), full) != before[0]


def test_validation_parts_are_those_of_sets_with_validation_rows() -> None:
    assert validation_parts(splits_of([6, 10], [2, 3]), two_sets()) == {"a.csv": range(2), "b.csv": range(2, 5)}
    assert validation_parts(splits_of([6, 10], [5, 0]), two_sets()) == {}


def test_part_of_embeddings_is_that_of_its_images_alone() -> None:
    images, texts = torch.eye(5), torch.arange(7.0).unsqueeze(1).repeat(1, 5)
    found = part_of_embeddings(
        images, texts, torch.tensor([0, 1, 1, 2, 3, 4, 4]), torch.tensor([False, True, False, True, True])
    )
    assert torch.equal(found[0], images[[1, 3, 4]])
    assert found[1][:, 0].tolist() == [1, 2, 4, 5, 6] and found[2].tolist() == [0, 0, 1, 2, 2]
    assert validation_metrics(*found, 1.0)["loss"] > 0


def test_each_validation_set_is_reported_alone_and_with_the_others(tmp_path: Path) -> None:
    sets = [str(write_scene_folder(tmp_path / name, count)) for name, count in (("one", 3), ("two", 5))]
    main([*flags(tmp_path, max_steps=1, eval_steps=1), "--validation_dataset", *sets])
    together, *alone = metrics_of(tmp_path / "run")[1:]
    assert together["split"] == "validation" and [line["split"] for line in alone] == [
        f"validation of {name}" for name in sets
    ]
    assert all(line["loss"] < together["loss"] for line in alone), "there are fewer wrong answers"
    saved = (tmp_path / "run" / "arguments.yaml").read_text()
    assert f"validation_dataset:\n- {sets[0]}\n- {sets[1]}\n" in saved
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "--validation_dataset captions.csv captions.csv" in card and "| validation | 8 | 40 |" in card
    with pytest.raises(UsageError, match="--validation_dataset names a.csv twice"):
        two_sets("--validation_dataset", "a.csv", "a.csv")


@pytest.mark.slow
def test_weighted_run_resumes_within_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = {"freeze_batch_norm": True, "checkpointing_steps": 3, "num_train_epochs": 2, "dataset": None}
    flags(tmp_path)
    small = write_scene_folder(tmp_path / "small", 12)
    sets = [str(tmp_path / "scenes" / "captions.csv"), str(small)]
    argv = ["--dataset", *sets, "--dataset_weights", "1", "3"]
    main([*flags(tmp_path, "whole", **same), *argv])
    printed = capsys.readouterr().out
    # 21 + 10 training images: 8 uses of the first set, 23 of the second
    assert f"uses of each image so far: {sets[0]} 0.381, {sets[1]} 2.3" in printed
    assert f"{sets[0]} 0.762, {sets[1]} 4.6" in printed
    assert [line["split"] for line in metrics_of(tmp_path / "whole")] == [
        *["train"] * 4, "validation", *(f"validation of {name}" for name in sets)
    ] * 2  # fmt: skip
    main([*flags(tmp_path, "parts", max_steps=6, **same), *argv])
    main([*flags(tmp_path, "parts", resume_from_checkpoint="latest", **same), *argv])
    assert_same_log(tmp_path / "whole", tmp_path / "parts")
