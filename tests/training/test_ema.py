"""The moving average of the weights: its values, what it leaves alone, and that runs export and resume it."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from modeling_miniclip import UsageError
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.ema import AveragedWeights
from tests.helpers.runs import assert_same_log, flags, launch
from train_miniclip import main, prepare

pytestmark = pytest.mark.usefixtures("without_figures")


def test_averages_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    averages = AveragedWeights(model, 0.5)
    for value in (11.0, 0.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0):
        model.weight.data.fill_(value)
        averages.update()
    # decays 2/11, 3/12, 4/13, 5/14, ... until step 8, where 9/18 reaches the bound
    expected = 0.0
    for decay, value in zip((2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5),
                            (11.0, 0.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0), strict=True):  # fmt: skip
        expected = decay * expected + (1 - decay) * value
    with averages.in_place():
        assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 8.0


def test_averages_of_a_training_equal_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    averages = AveragedWeights(model, 0.9)
    by_hand = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 121):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        averages.update()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                by_hand[name] = decay * by_hand[name] + (1 - decay) * tensor
    current = copy.deepcopy(model.state_dict())
    with averages.in_place():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, by_hand[name])
    assert all(torch.equal(tensor, current[name]) for name, tensor in model.state_dict().items())
    assert not torch.allclose(by_hand["2.weight"], current["2.weight"], atol=1e-3)
    assert not any(name.startswith("0.") for name in averages.averages), "what does not change is not copied"


def test_the_weights_come_back_after_an_error() -> None:
    model = nn.Linear(1, 1)
    averages = AveragedWeights(model, 0.5)
    model.weight.data.fill_(3.0)
    with pytest.raises(RuntimeError), averages.in_place():
        raise RuntimeError
    assert model.weight.item() == 3.0


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def test_run_trains_as_usual_but_exports_the_average(tmp_path: Path) -> None:
    values = {"num_train_epochs": 1, "max_steps": 2}
    main(flags(tmp_path, "plain", **values))
    main(flags(tmp_path, "averaged", ema_decay=0.9, **values))
    states = [load_file(next((tmp_path / name / "checkpoints").glob("step-*")) / "model.safetensors")
              for name in ("plain", "averaged")]  # fmt: skip
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    plain, averaged = exported(tmp_path / "plain"), exported(tmp_path / "averaged")
    assert not torch.equal(plain["visual_projection.linear.weight"], averaged["visual_projection.linear.weight"])


def test_decay_of_zero_is_off(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert prepare(parse_arguments(flags(tmp_path, ema_decay=0.0))).ema is None


def test_resumed_run_exports_the_same_average(tmp_path: Path) -> None:
    values = {"ema_decay": 0.9, "checkpointing_steps": 2, "save_total_limit": 9, "lr_scheduler_type": "cosine"}
    main(flags(tmp_path, "whole", **values))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    checkpoint = sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))[0]
    before = exported(tmp_path / "parts")
    resumed = {"resume_from_checkpoint": checkpoint, "discard_later_checkpoints": True}
    main(flags(tmp_path, "parts", **values, **resumed))
    whole, parts = exported(tmp_path / "whole"), exported(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert before.keys() == parts.keys()
    assert_same_log(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_average_as_one_does(tmp_path: Path) -> None:
    exact = {"dropout": 0, "freeze_batch_norm": True, "ema_decay": 0.9}
    one = launch(flags(tmp_path, "one", **exact))
    two = launch(flags(tmp_path, "two", **exact), processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert_same_log(tmp_path / "one", tmp_path / "two")


def test_decays_out_of_range_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ema_decay must be in"):
        main(flags(tmp_path, ema_decay=1.0))
