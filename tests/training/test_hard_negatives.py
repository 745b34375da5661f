"""`--hard_negatives`: where they come from, what is rejected, and a run with them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict

from modeling_miniclip.errors import DataError, UsageError
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.hard_negatives import choose_hard_negatives
from tests.helpers.runs import flags, metrics_of
from train_miniclip import main

ENGLISH = ["a red ball on a blue box", "a small dog chases an old man"]
GERMAN = ["ein roter Ball auf einer blauen Kiste", "ein Hund und ein Mann", "a red ball on a blue box"]


def chosen(captions: list[str], given: list[str] | None, **columns: Any) -> list[str] | None:
    splits = DatasetDict(train=Dataset.from_dict({"captions": [[text] for text in captions], **columns}))
    accelerator = SimpleNamespace(is_main_process=True, print=lambda *_: None)
    return choose_hard_negatives(splits, TrainingArguments(hard_negatives=given), accelerator).hard_negatives


def test_column_is_used_if_the_dataset_has_it() -> None:
    assert chosen(ENGLISH, None) == ["none"]
    assert chosen(ENGLISH, None, negative_captions=[["a cat"], []]) == ["column"]
    assert chosen(ENGLISH, ["none"], negative_captions=[["a cat"], []]) == ["none"]
    assert chosen(ENGLISH, ["swap"]) == ["swap"]
    with pytest.raises(DataError, match="--hard_negatives column: the dataset has no 'negative_captions'"):
        chosen(ENGLISH, ["column", "nouns"])


def test_captions_that_cannot_be_swapped_are_rejected() -> None:
    with pytest.raises(
        DataError, match="only 33 % of 3 sampled captions are English; it needs a column .*`miniclip mine`"
    ):
        chosen(GERMAN, ["swap"])
    with pytest.raises(DataError, match="no sampled caption has two words that can be swapped"):
        chosen(["a ball", "the dog"], ["adjectives"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["verbs"], "--hard_negatives verbs: choose from none, column, swap, adjectives"),
        (["none", "swap"], "excludes"),
    ],
)
def test_wrong_values_are_rejected(given: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_arguments(["--hard_negatives", *given])


def test_run_with_swaps(tmp_path: Path, without_figures: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in chunks and with a frozen text tower, which then runs in every step."""
    given = {"freeze": "text", "chunk_size": 4, "batch_size": 8, "captions_per_image": 2, "projection_dropout": 0}
    export = main([*flags(tmp_path, max_steps=3, **given), "--hard_negatives", "adjectives", "nouns"])
    printed = capsys.readouterr().out
    card = (export / "README.md").read_text()
    assert card.index("## Results") < card.index("### Word order") < card.index("\n## Training\n")
    assert "| adjectives | 5 |" in card
    assert "word order: true captions score above swapped ones in " in printed
    assert "hard negatives: words can be swapped in 100 % of the sampled captions" in printed
    assert yaml.safe_load((export.parent / "arguments.yaml").read_text())["hard_negatives"] == ["adjectives", "nouns"]
    lines = [line for line in metrics_of(export.parent) if line["split"] == "train"]
    assert len(lines) == 3
    # The first step of the same run without them. Wrong captions are candidates of each image and nothing else, and an
    # untrained model cannot tell them from true ones: with twice as many candidates the loss of that direction is
    # log(2) higher, and the mean of both directions half of that.
    main([*flags(tmp_path, max_steps=1, **given), "--output_dir", str(tmp_path / "plain")])
    plain = next(line for line in metrics_of(tmp_path / "plain") if line["split"] == "train")
    assert lines[0]["loss"] == pytest.approx(plain["loss"] + math.log(2) / 2, abs=0.05)
