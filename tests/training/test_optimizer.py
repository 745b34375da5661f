"""Parameter groups, schedules, modes and the temperature's bound."""

import math
from typing import Any

import pytest
import torch

from modeling_miniclip.data.loading.collation import model_inputs
from modeling_miniclip.training.optimizer import build_scheduler, clamp_logit_scale, parameter_groups
from modeling_miniclip.training.towers.layers import set_training_mode
from tests.helpers.runs import plain_arguments
from tests.helpers.towers import PIXELS, tiny_model, tiny_processor


def test_groups_hold_each_trainable_parameter_once() -> None:
    model = tiny_model()
    arguments = plain_arguments(
        head_learning_rate=1.0, vision_learning_rate=0.1, text_learning_rate=0.01, weight_decay=0.5
    )
    groups = {group["name"]: group for group in parameter_groups(model, arguments)}
    assert set(groups) == {"head", "head_no_decay", "vision", "vision_no_decay", "text", "text_no_decay"}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates["head"] == (1.0, 0.5) and rates["vision_no_decay"] == (0.1, 0.0) and rates["text"] == (0.01, 0.5)
    assert any(p is model.logit_scale for p in groups["head_no_decay"]["params"])
    assert all(p.ndim > 1 for name in ("head", "vision", "text") for p in groups[name]["params"])


def test_frozen_tower_has_no_group() -> None:
    model = tiny_model()
    model.vision_model.requires_grad_(False)
    names = {group["name"] for group in parameter_groups(model, plain_arguments())}
    assert names == {"head", "head_no_decay", "text", "text_no_decay"}


def optimizer_at(rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def test_cosine_warms_up_linearly_and_ends_near_zero() -> None:
    optimizer = optimizer_at(1.0)
    scheduler = build_scheduler(optimizer, plain_arguments(lr_scheduler_type="cosine", warmup_steps=4), 12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[8] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_plateau_lowers_the_rate_after_patience_epochs() -> None:
    optimizer = optimizer_at(1.0)
    arguments = plain_arguments(lr_scheduler_kwargs="{patience: 1, factor: 0.5}")
    scheduler: Any = build_scheduler(optimizer, arguments, 100)
    rates = []
    for loss in (3.0, 2.0, 2.1, 2.2, 1.0):
        scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(("freeze", "training"), [("none", (True, True)), ("vision", (False, True)),
                                                  ("text", (True, False)), ("both", (False, False))])  # fmt: skip
def test_frozen_towers_stay_in_evaluation_mode(freeze: str, training: tuple[bool, bool]) -> None:
    model = tiny_model()
    set_training_mode(model, freeze, freeze_batch_norm=False)
    assert (model.vision_model.training, model.text_model.training) == training
    assert model.visual_projection.training and model.text_projection.training


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_keeps_its_statistics(frozen: bool) -> None:
    model = tiny_model()
    set_training_mode(model, "none", freeze_batch_norm=frozen)
    before = {name: value.clone() for name, value in model.named_buffers() if "running_mean" in name}
    model(pixel_values=torch.randn(4, 3, PIXELS, PIXELS))
    same = [torch.equal(before[name], value) for name, value in model.named_buffers() if name in before]
    assert same and all(value == frozen for value in same)


def test_temperature_is_clamped_only_at_its_bound() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    clamp_logit_scale(model)
    assert model.logit_scale.item() == 1.5


def test_model_inputs_match_the_processor() -> None:
    processor = tiny_processor()
    pixels = torch.randint(0, 256, (2, 3, PIXELS, PIXELS), dtype=torch.uint8)
    batch = {"pixel_values": pixels, "image_id": torch.tensor([0, 1]), "text_image_id": torch.tensor([0, 1])}
    inputs = model_inputs(batch, processor, torch.device("cpu"))
    as_it_is = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    expected = processor.image_processor(list(pixels.numpy()), **as_it_is)
    assert set(inputs) == {"pixel_values"}
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert inputs["pixel_values"].is_contiguous(memory_format=torch.channels_last)
