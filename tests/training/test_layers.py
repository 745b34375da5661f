"""Layers of towers: their order, those that keep their weights, and the rate of each."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_miniclip.errors import UsageError
from modeling_miniclip.training.optimizer import parameter_groups
from modeling_miniclip.training.towers.layers import (
    freeze_first_layers,
    freeze_layers,
    knows_layers,
    rate_multipliers,
    text_layers,
    vision_layers,
)
from tests.helpers.runs import plain_arguments
from tests.helpers.towers import PIXELS, TEXT, VISION, tiny_model

IDS, PIXEL_VALUES = torch.tensor([[3, 7, 6]]), torch.randn(2, 3, PIXELS, PIXELS)


def names_of(module: nn.Module, layer: list[nn.Parameter]) -> set[str]:
    ids = {id(parameter) for parameter in layer}
    return {name for name, parameter in module.named_parameters() if id(parameter) in ids}


@pytest.mark.parametrize("family", VISION)
def test_each_image_tower_parameter_is_in_one_layer(family: str) -> None:
    tower = tiny_model(vision=family).vision_model
    layers = vision_layers(tower)
    assert len(layers) > 2
    assert sorted(id(p) for layer in layers for p in layer) == sorted(id(p) for p in tower.parameters())


@pytest.mark.parametrize("family", TEXT)
def test_each_text_tower_parameter_is_in_one_layer(family: str) -> None:
    tower = tiny_model(text=family).text_model
    layers = text_layers(tower)
    assert len(layers) == 3, "embeddings and the two layers that tests.helpers.towers asks for"
    assert sorted(id(p) for layer in layers for p in layer) == sorted(id(p) for p in tower.parameters())
    assert tower.get_input_embeddings().weight.data_ptr() in {p.data_ptr() for p in layers[0]}


def test_layers_go_from_the_stem_to_the_pooled_feature() -> None:
    layers = [names_of(m, layer) for m in (tiny_model().vision_model.timm_model,) for layer in vision_layers_of(m)]
    stages = [{name.split(".")[0] for name in layer} for layer in layers]
    assert stages == [{"conv1", "bn1"}, {"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}]


def vision_layers_of(timm_model: nn.Module) -> list[list[nn.Parameter]]:
    return vision_layers(SimpleNamespace(timm_model=timm_model))


def test_a_last_norm_belongs_to_the_last_layer() -> None:
    tower = tiny_model(text="modernbert").text_model
    assert any("final_norm" in name for name in names_of(tower, text_layers(tower)[-1]))


def test_text_tower_without_a_stack_is_one_layer() -> None:
    tower = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    assert [len(layer) for layer in text_layers(tower)] == [3]


def test_image_tower_with_unknown_layers_is_rejected() -> None:
    with pytest.raises(UsageError, match="Linear.*--layer_decay"):
        vision_layers_of(nn.Linear(2, 2))
    assert not knows_layers(SimpleNamespace(timm_model=nn.Linear(2, 2)))
    assert knows_layers(tiny_model().vision_model)


def test_multipliers_by_hand() -> None:
    layers = [[nn.Parameter(torch.zeros(1)) for _ in range(2)] for _ in range(4)]
    multipliers = rate_multipliers(layers, 0.5)
    assert [[multipliers[p] for p in layer] for layer in layers] == [[0.125] * 2, [0.25] * 2, [0.5] * 2, [1.0] * 2]


@pytest.mark.parametrize(("share", "frozen"), [(0.0, 0), (0.1, 0), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_frozen_share_is_rounded_and_leaves_the_last_layer(share: float, frozen: int) -> None:
    layers = [[nn.Parameter(torch.zeros(1))] for _ in range(4)]
    freeze_first_layers(layers, share)
    assert [layer[0].requires_grad for layer in layers] == [False] * frozen + [True] * (4 - frozen)


def test_rates_fall_from_the_top_of_each_tower() -> None:
    model = tiny_model()  # five layers of the resnet, three of DistilBERT
    arguments = plain_arguments(
        head_learning_rate=1.0, vision_learning_rate=0.16, text_learning_rate=0.04, layer_decay=0.5
    )
    groups = parameter_groups(model, arguments)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    vision = [{rates[id(p)] for p in layer} for layer in vision_layers(model.vision_model)]
    text = [{rates[id(p)] for p in layer} for layer in text_layers(model.text_model)]
    assert vision == [{0.01}, {0.02}, {0.04}, {0.08}, {0.16}]
    assert text == [{0.01}, {0.02}, {0.04}]
    assert {rates[id(p)] for p in model.visual_projection.parameters()} == {1.0}
    assert sorted(rates) == sorted(id(p) for p in model.parameters())
    assert len({group["name"] for group in groups}) == len(groups)
    assert all(p.ndim > 1 for group in groups if group["weight_decay"] for p in group["params"])


def test_frozen_layers_do_not_change() -> None:
    model = tiny_model()
    arguments = plain_arguments(frozen_vision_fraction=0.6, frozen_text_fraction=0.34, layer_decay=0.9)
    freeze_layers(model, arguments)
    optimizer = torch.optim.AdamW(parameter_groups(model, arguments))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    loss = model(IDS.repeat(2, 1), PIXEL_VALUES, return_loss=True).loss
    loss.backward()
    optimizer.step()
    frozen = [p for layer in vision_layers(model.vision_model)[:3] + text_layers(model.text_model)[:1] for p in layer]
    assert all(p.grad is None and p not in optimizer.state for p in frozen)
    ids = {id(p) for p in frozen}
    assert all(p.grad is not None and p in optimizer.state for p in model.parameters() if id(p) not in ids)
    after = model.state_dict()
    stem = [name for name in after if "timm_model.bn1" in name or "timm_model.layer2" in name]
    assert any("running_mean" in name for name in stem)
    assert all(torch.equal(before[name], after[name]) for name in stem)
    assert not torch.equal(before["vision_model.timm_model.layer4.0.bn1.running_mean"],
                           after["vision_model.timm_model.layer4.0.bn1.running_mean"])  # fmt: skip


def test_no_gradient_is_computed_below_the_trained_layers() -> None:
    model = tiny_model()
    freeze_layers(model, plain_arguments(frozen_vision_fraction=0.4, frozen_text_fraction=0.34))
    seen = {}
    tower = model.vision_model.timm_model
    for name, module in (("below", tower.layer1), ("above", tower.layer2)):
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.requires_grad}))
    model.pool_images(PIXEL_VALUES)
    assert seen == {"below": False, "above": True}


def test_frozen_layers_go_with_a_frozen_tower() -> None:
    model = tiny_model()
    freeze_layers(model, plain_arguments(freeze="vision", frozen_text_fraction=0.7))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("vision_model") for name in trained)
    assert {name.split(".")[3] for name in trained if name.startswith("text_model")} == {"1"}
