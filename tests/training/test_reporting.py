"""What a run tells: numbers worked by hand, and nothing of the machine in a card."""

import math
import shlex
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling_miniclip import MiniClipError
from modeling_miniclip.data.load_rows import Sample, Splits
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.publish import (
    LOCAL_ARGUMENTS,
    arguments_for_card,
    command_for_card,
    data_for_card,
    without_path,
)
from modeling_miniclip.training.reports import reporting
from modeling_miniclip.training.reports.reporting import (
    StepMeter,
    describe_model,
    describe_splits,
    describe_validation,
)
from tests.helpers.runs import plain_arguments
from tests.helpers.towers import tiny_model


class Processes:
    """An accelerator whose other processes have sent `others`, tensors like this process's own."""

    mixed_precision, device, is_main_process = "no", "cpu", True

    def __init__(self, *others: list[float]):
        self.others = others

    def reduce(self, own: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return own + sum(own.new_tensor(other) for other in self.others)


OPTIMIZER = SimpleNamespace(
    param_groups=[
        {"name": "vision", "lr": 1e-4},
        {"name": "vision_no_decay", "lr": 7.0},
        {"name": "head", "lr": 1e-3},
        {"name": "head_no_decay", "lr": 7.0},
    ]
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that `perf_counter` gives, in seconds."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: now.time)
    return now


def test_the_meter_gives_the_means_since_its_last_reading(clock: SimpleNamespace) -> None:
    meter = StepMeter(Processes(), OPTIMIZER)
    for loss, norm, pairs in ((1.0, 9.0, 64), (2.0, 9.0, 64), (4.5, 0.5, 32)):
        meter.update(torch.tensor(loss, requires_grad=True), torch.tensor(norm), pairs, chance=loss + 2)
    clock.time = 104.0
    expected = {"vision_learning_rate": 1e-4, "head_learning_rate": 1e-3, "gradient_norm": 0.5}
    assert meter.read() == expected | {"loss": 2.5, "pairs_per_second": 40.0}  # 7.5 / 3 and 160 / 4
    assert (meter.steps, meter.chance) == (3, 4.5)

    meter.update(torch.tensor(8.0), 0.25, 10, 9.0)
    clock.time = 109.0
    assert meter.read() == expected | {"gradient_norm": 0.25, "loss": 8.0, "pairs_per_second": 2.0}


def test_the_meter_adds_the_shares_of_all_processes(clock: SimpleNamespace) -> None:
    # Each process holds its share of the global loss: mean 1.5 here, 2 and 0.5 there; 20 pairs here, 30 and 50 there.
    meter = StepMeter(Processes([2.0, 30.0], [0.5, 50.0]), OPTIMIZER)
    meter.update(torch.tensor(1.0), 1.0, 10, 3.0)
    meter.update(torch.tensor(2.0), 1.0, 10, 3.0)
    clock.time = 102.0
    values = meter.read()
    assert (values["loss"], values["pairs_per_second"]) == (4.0, 50.0)


def test_meter_keeps_unread_values_within_an_epoch() -> None:
    meter = StepMeter(Processes([2.0, 3.0]), OPTIMIZER)
    meter.update(torch.tensor(1.0), 1.0, 10, 4.0)
    meter.update(torch.tensor(2.0), 1.0, 10, 6.0, 0.5)
    state = meter.state_dict()
    assert state == {"losses": [3.0, 5.0], "divergences": [], "chances": [4.0, 6.0], "floors": [0.0, 0.5]}
    resumed = StepMeter(Processes(), OPTIMIZER)
    resumed.load_state_dict(state)
    resumed.start_epoch(step_in_epoch=2)
    resumed.update(torch.tensor(7.0), 1.0, 10, 8.0, 1.0)
    assert (resumed.read()["loss"], resumed.steps, resumed.chance, resumed.floor) == (5.0, 3, 6.0, 0.5)
    meter.start_epoch(step_in_epoch=0)
    empty = dict.fromkeys(("losses", "divergences", "chances", "floors"), [])
    assert StepMeter(Processes(), OPTIMIZER).state_dict() == empty
    assert meter.losses == []


def test_meter_keeps_the_divergence_from_a_teacher_apart() -> None:
    meter = StepMeter(Processes([0.5, 0.0, 0.25]), OPTIMIZER)
    for loss, divergence in ((1.0, 0.5), (2.0, 1.0)):
        meter.update(torch.tensor(loss), 1.0, 10, 4.0, 0.0, torch.tensor(divergence))
    values = meter.read()
    assert (values["loss"], values["teacher_divergence"]) == (2.0, 1.0)  # 1.5 + 0.5 and 0.75 + 0.25
    meter.accelerator = Processes([0.5])
    meter.update(torch.tensor(1.0), 1.0, 10, 4.0, 0.0, torch.tensor(0.5))
    state = meter.state_dict()
    assert (state["losses"], state["divergences"]) == ([1.5], [1.0])
    resumed = StepMeter(Processes(), OPTIMIZER)
    resumed.load_state_dict(state)
    assert resumed.read()["teacher_divergence"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["here", "in another process"])
def test_loss_of_nan_in_any_process_ends_the_run(bad: float, where: str) -> None:
    meter = StepMeter(Processes([bad if where != "here" else 1.0, 1.0]), OPTIMIZER)
    meter.update(torch.tensor(bad if where == "here" else 1.0), 1.0, 1, 3.0)
    with pytest.raises(
        MiniClipError, match=f"the training loss became {bad}, likely because .*: lower --head_learning_rate"
    ):
        meter.read()


def test_card_lists_relevant_arguments_without_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for folder in ("me/bert", "towers/lite0", "alice/birds", "mean"):
        Path(folder).mkdir(parents=True)
    Path("captions.csv").touch()
    Path("tiny.json").touch()
    arguments = plain_arguments(
        recipe=str(tmp_path / "my.yaml"),
        dataset=str(tmp_path / "captions.csv"),
        image_dir=str(tmp_path / "towers"),
        output_dir=str(tmp_path / "out"),
        vision_model="towers/lite0",
        text_model="~/bert",
        preset="./tiny.json",
        text_pooling="mean",
        hub_model_id="alice/birds",
        resume_from_checkpoint=str(tmp_path),
        push_to_hub=True,
    )
    shown = arguments_for_card(arguments)
    names = ("dataset", "image_dir", "vision_model", "text_model", "preset", "text_pooling")
    assert [shown[name] for name in names] == ["captions.csv", "towers", "lite0", "bert", "tiny.json", "mean"]
    assert not any(str(tmp_path.name) in str(value) for value in shown.values())
    hidden = {"recipe", "output_dir", "hub_model_id", "resume_from_checkpoint", "push_to_hub"}
    assert hidden.isdisjoint(shown)
    assert None not in shown.values()
    assert {"batch_size", "head_learning_rate", "seed", "weight_decay", "best_metric"} <= set(shown)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--recipe", "heads", "--dataset", "flickr8k", "--vision_model=a/b", "--text_model=c", "--seed", "3"],
        ["--dataset", "captions.csv", "--image_dir", "my pictures", "--freeze_batch_norm", "--learning_rate", "1e-5"],
        ["--dataset", "bob/birds", "--stream_first_rows=9", "--augmentation=[{name: Blur}]", "--hub_license=mit"],
    ],
)
def test_command_of_a_card_omits_local_arguments(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    python, script, *flags = shlex.split(command_for_card(arguments))
    assert (python, script) == ("python", "train_miniclip.py")
    again, wanted = asdict(parse_arguments(flags)), asdict(arguments)
    for name in LOCAL_ARGUMENTS:
        assert name not in " ".join(flags)
        wanted[name] = again[name]
    assert again == wanted


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("alice/birds", "alice/birds"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("here/there", "there"),
        ("here/there/", "there"),
        ("here/../here", "here"),
        ("here", "here"),
    ],
)
def test_only_existing_paths_are_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here/there").mkdir(parents=True)
    assert without_path(value) == expected
    assert without_path(str(tmp_path / "here")) == "here"


@pytest.fixture
def splits() -> dict[str, Any]:
    from datasets import Dataset

    return {
        "train": Dataset.from_dict({"captions": [["a", "b"], ["c"], ["d", "e", "f"]]}),
        "validation": Dataset.from_dict({"captions": [["a"]]}),
    }


def test_card_has_name_and_size_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    sizes = {"train": {"images": 3, "captions": 6}, "validation": {"images": 1, "captions": 1}}
    for dataset, expected in {
        "mine": {"name": "mine"},
        str(tmp_path / "mine"): {"name": "mine"},
        "scenes": {"name": "scenes"},
        "bob/pictures": {"name": "bob/pictures", "hub_ids": ["bob/pictures"]},
    }.items():
        assert data_for_card(TrainingArguments(dataset=[dataset]), splits) == {"hub_ids": []} | expected | {
            "splits": sizes
        }


def test_lines_for_the_terminal(splits: dict[str, Any]) -> None:
    assert describe_splits(splits) == "train: 3 images, 6 captions; validation: 1 images, 1 captions"
    sampled = Splits(splits)
    sampled.samples = {"validation": Sample(7, 3)}
    assert describe_splits(sampled).endswith("; validation: 1 of 7 images, drawn with seed 3, 1 captions")
    drawn = {"images": 1, "captions": 1, "drawn_from": 7, "seed": 3}
    assert data_for_card(TrainingArguments(dataset=["scenes"]), sampled)["splits"]["validation"] == drawn
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    model.vision_model.requires_grad_(False)
    trained = total - sum(p.numel() for p in model.vision_model.parameters())
    counts = f"{total / 1e6:.1f} M parameters ({trained / 1e6:.1f} M trained)"
    assert describe_model(model) == f"test_resnet + distilbert (cls), 16-d, {counts}"
    metrics = {f"{d}_R@{k}": 10.04 * k for d in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    recalls = "text to image 10.0 / 50.2 / 100.4, image to text 10.0 / 50.2 / 100.4"
    line = f"epoch 1.5: loss 0.5000, R@1/5/10 {recalls}, rsum 9.0"
    assert describe_validation("epoch 1.5", metrics | {"loss": 0.5, "rsum": 9.0}) == line
    assert describe_validation("epoch 1.5", metrics | {"loss": 0.5, "rsum": 9.0}, True) == line + " *"
