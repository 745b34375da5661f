"""`--lora_rank`: which layers get an adapter, what is trained, saved and resumed, and the plain export."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from modeling_miniclip import MiniClipModel, MiniClipProcessor, ModelError, UsageError, export
from modeling_miniclip.errors import MiniClipError
from modeling_miniclip.training.command_line.check_arguments import lora_details
from modeling_miniclip.training.command_line.derived import Facts, derive
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.finetune.lora import (
    _called,
    adapted_layers,
    add_adapters,
    can_be_adapted,
    layers_to_adapt,
    merged_weights,
    only_trained_weights,
)
from modeling_miniclip.training.optimizer import parameter_groups
from modeling_miniclip.training.towers.layers import freeze_layers
from tests.helpers.forks import train_in_processes
from tests.helpers.runs import assert_same_log, assert_same_weights, flags, metrics_of, plain_arguments
from tests.helpers.towers import CLIP, SIGLIP, tiny_model, tiny_processor, with_slow
from tests.test_model import shake, tiny_inputs
from train_miniclip import main

pytest.importorskip("peft", reason="PEFT comes with the extra lora")

# Convolutions, CLIP's towers, and GPT-2's transposed matrices; then towers whose layers are built in other ways.
PAIRS = with_slow(
    [("resnet", "distilbert", {}), CLIP, ("vit", "gpt2", {"text_pooling": "last"})],
    [("efficientnet", "bert", {}), ("convnext", "mpnet", {}), ("swin", "t5", {}), ("vit", "modernbert", {}), SIGLIP],
)


def make(vision: str = "resnet", text: str = "distilbert", **fields: Any) -> MiniClipModel:
    torch.manual_seed(0)
    model = tiny_model(vision, text, **fields)
    shake(model)
    return model


def adapt(model: MiniClipModel, **values: Any) -> str:
    """Freeze what the flags freeze, and add adapters of rank 2."""
    arguments = plain_arguments(**{"lora_rank": 2, **values})
    freeze_layers(model, arguments)
    line = add_adapters(model, tiny_processor(), arguments)
    model.eval()
    return line


def train_adapters(model: nn.Module) -> None:
    """Give each adapter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits_per_image


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vision", "text", "fields"), PAIRS)
def test_merged_model_computes_what_the_adapted_one_does(vision: str, text: str, fields: dict[str, Any]) -> None:
    model = make(vision, text, **fields)
    inputs, names = tiny_inputs(model), set(model.state_dict())
    before, towers = logits(model, inputs), ("vision_model.", "text_model.")
    heads = {name for name in trained(model) if not name.startswith(towers)}
    adapt(model)
    assert (logits(model, inputs) - before).abs().max() <= 1e-6 * before.abs().max(), "the second matrices are zero"
    assert trained(model) == heads | {name for name, _ in model.named_parameters() if ".lora_" in name}

    train_adapters(model)
    after = logits(model, inputs)
    assert (after - before).abs().max() > 1e-3
    plain = MiniClipModel(model.config)
    weights = merged_weights(model.state_dict(), model)
    assert set(weights) == names
    plain.load_state_dict(weights)
    assert (logits(plain.eval(), inputs) - after).abs().max() <= 1e-5 * after.abs().max()

    model(**inputs).logits_per_image.sum().backward()  # each adapter is reached: DDP waits for every gradient
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters()} - trained(model)


def test_default_layers_are_those_with_most_weights() -> None:
    model = make("resnet", "distilbert")
    line = adapt(model)
    layers = adapted_layers(model)
    kinds = {name.partition(".")[0]: set() for name in layers}
    for name, layer in layers.items():
        kinds[name.partition(".")[0]].add(type(layer.base_layer))
    assert kinds == {"vision_model": {nn.Conv2d}, "text_model": {nn.Linear}}
    text = sum(name.startswith("text_model") for name in layers)
    assert text == 2 * 6  # two layers: four of the attention, two of the feed-forward part
    images = len(layers) - text
    assert line == f"adapters of rank 2 in {images} layers of the image tower and 12 layers of the text tower"


def test_frozen_towers_and_layers_get_no_adapter() -> None:
    only_text = make("vit", "distilbert")
    adapt(only_text, freeze="vision")
    assert {name.partition(".")[0] for name in adapted_layers(only_text)} == {"text_model"}
    half = make("vit", "distilbert")
    adapt(half, frozen_text_fraction=0.5)  # embeddings and two layers: rounded to two of three
    texts = [name for name in adapted_layers(half) if name.startswith("text_model")]
    assert texts and all(".layer.1." in name for name in texts)


def test_targets_choose_layers_by_the_ends_of_their_names() -> None:
    model = make("vit", "distilbert")
    adapt(model, lora_kwargs="{alpha: 6, targets: [q_lin, attn.qkv]}")
    layers = adapted_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == {"q_lin", "qkv"}
    assert {layer.scaling["default"] for layer in layers.values()} == {3.0}
    one_tower = make("vit", "distilbert")
    adapt(one_tower, lora_kwargs="{targets: [q_lin]}")
    assert not any(name.startswith("vision_model") for name in trained(one_tower))
    with pytest.raises(UsageError, match="targets: no layer is called 'q_line'; the towers have .*q_lin, qkv, v_lin"):
        layers_to_adapt(make("vit", "distilbert"), tiny_processor(), ["q_line"])


def test_layers_that_adapters_would_not_reach_are_left_out() -> None:
    layers = {"called": nn.Linear(2, 2), "read": nn.Linear(2, 2)}
    value = torch.ones(1, 2)
    assert _called(layers, lambda: layers["called"](value) @ layers["read"].weight) == {"called"}
    assert not layers["called"]._forward_hooks
    model = make("vit", "distilbert")
    model.vision_model.unused = nn.Linear(4, 4)
    names = layers_to_adapt(model, tiny_processor(), None)
    assert names and not any(name.endswith(".unused") for name in names)
    grouped, dilated = nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2)
    padded, plain = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, stride=2, padding=1)
    assert [can_be_adapted(layer) for layer in (grouped, dilated, padded, plain)] == [False, False, False, True]
    assert not can_be_adapted(nn.MultiheadAttention(4, 2).out_proj)
    assert not can_be_adapted(plain.requires_grad_(False))


def test_tower_without_layers_for_adapters_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "modeling_miniclip.training.finetune.lora.can_be_adapted", lambda layer: type(layer) is nn.Linear
    )
    with pytest.raises(UsageError, match="--lora_rank: test_resnet has no layer .* --freeze vision"):
        adapt(make("resnet", "distilbert"))


def test_adapters_learn_at_the_rates_of_their_towers() -> None:
    model = make("vit", "distilbert")
    adapt(model)
    arguments = plain_arguments(lora_rank=2, vision_learning_rate=3e-4, text_learning_rate=2e-4)
    groups = {group["name"]: group for group in parameter_groups(model, arguments)}
    assert {"head", "vision", "text"} <= groups.keys()
    assert (groups["vision"]["lr"], groups["text"]["lr"]) == (3e-4, 2e-4)
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    assert sum(p.numel() for part in ("vision", "text") for p in groups[part]["params"]) == adapters


def test_state_within_the_block_is_what_is_trained() -> None:
    model, wrapper = make("vit", "distilbert"), nn.Module()
    adapt(model)
    wrapper.module = model  # as DistributedDataParallel does
    train_adapters(model)
    whole, names = {name: tensor.clone() for name, tensor in model.state_dict().items()}, trained(model)
    with only_trained_weights(model):
        saved = {name: tensor.clone() for name, tensor in wrapper.state_dict().items()}
        assert {name.removeprefix("module.") for name in saved} == names
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).zero_()
        wrapper.load_state_dict(saved)  # strict
    assert model.state_dict().keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    plain = make("vit", "distilbert")
    names = set(plain.state_dict())
    with only_trained_weights(plain):
        assert set(plain.state_dict()) == names


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rank=0"], "--lora_rank must be at least 1, not 0"),
        (["--lora_kwargs={alpha: 1}"], "--lora_kwargs needs --lora_rank"),
        (["--lora_rank=2", "--freeze=both"], "--lora_rank and --freeze both: no tower is left"),
        (["--lora_rank=2", "--preset=scenes_tiny"], "those of a --preset are random"),
        (["--lora_rank=2", "--lora_kwargs=[1]"], "must be a mapping such as {alpha: 16}"),
        (["--lora_rank=2", "--lora_kwargs={rank: 1}"], "unknown key 'rank'; an adapter takes alpha, dropout, targets"),
        (["--lora_rank=2", "--lora_kwargs={alpha: 0}"], "alpha must be a positive number, not 0"),
        (["--lora_rank=2", "--lora_kwargs={alpha: true}"], "alpha must be a positive number, not True"),
        (["--lora_rank=2", "--lora_kwargs={dropout: 1}"], r"dropout must be a number in \[0, 1\), not 1"),
        (["--lora_rank=2", "--lora_kwargs={targets: q_proj}"], "targets must be a list of names such as"),
        (["--lora_rank=2", "--lora_kwargs={targets: []}"], "targets must be a list of names such as"),
    ],
)
def test_wrong_flags_of_adapters_are_rejected(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_arguments(["--dataset=a.csv", *argv])


def test_missing_peft_is_found_early(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(MiniClipError, match="--lora_rank: PEFT is not installed; pip install peft"):
        parse_arguments(["--dataset=a.csv", "--lora_rank=2"])


def test_recipe_has_the_details_as_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("dataset: a.csv\nlora_rank: 4\nlora_kwargs: {alpha: 3, targets: [q_lin]}\n", encoding="utf-8")
    details = lora_details(parse_arguments([f"--recipe={path}"]))
    assert details == {"alpha": 3, "dropout": 0.0, "targets": ["q_lin"]}
    assert lora_details(parse_arguments(["--dataset=a.csv", "--lora_rank=4"]))["alpha"] == 8


def test_adapters_have_rates_of_their_own_by_default() -> None:
    def rates(**facts: Any) -> tuple[Any, ...]:
        argv = ["--dataset=a.csv", "--model_name_or_path=any", "--lora_rank=4"]
        found, lines = derive(parse_arguments(argv), Facts(6000, **facts))
        assert "from a" in lines[0] and "with adapters" in lines[0]
        return (
            found.head_learning_rate, found.vision_learning_rate, found.text_learning_rate, found.layer_decay,
            found.frozen_vision_fraction,
        )  # fmt: skip

    assert rates() == (2e-4, 2e-4, 2e-4, 1.0, 0.0)
    assert rates(is_clip=True) == (1e-5, 2e-4, 2e-4, 1.0, 0.0)
    few, _ = derive(parse_arguments(["--dataset=a.csv", "--lora_rank=4"]), Facts(100))
    assert few.freeze == "none", "there is something to adapt"


def test_rank_replaces_the_rates_of_a_recipe_for_weights(tmp_path: Path) -> None:
    found = parse_arguments(["--recipe=finetune", "--dataset=a.csv", "--lora_rank=4"])
    rates = (found.head_learning_rate, found.vision_learning_rate, found.text_learning_rate)
    assert rates == (1e-5, None, None), "those of the towers are derived"
    given = parse_arguments(["--recipe=finetune", "--dataset=a.csv", "--lora_rank=4", "--learning_rate=1e-3"])
    assert given.vision_learning_rate == given.text_learning_rate == 1e-3
    path = tmp_path / "my.yaml"
    path.write_text("dataset: a.csv\nlora_rank: 4\nvision_learning_rate: 5e-4\n", encoding="utf-8")
    assert parse_arguments([f"--recipe={path}", "--lora_rank=8"]).vision_learning_rate == 5e-4


# --- runs ------------------------------------------------------------------------------------------------------------

LORA: dict[str, Any] = {"preset": None, "lora_rank": 2, "lora_kwargs": "{dropout: 0.1}", "learning_rate": 0.02}


def saved_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_run_saves_what_is_trained_and_exports_a_plain_model(
    tiny_run: Path, tmp_path: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    values = LORA | {"model_name_or_path": tiny_run / "export", "ema_decay": 0.5}
    main(flags(tmp_path, "whole", **values))
    assert "adapters of rank 2 in " in capsys.readouterr().out
    checkpoint, exported = tmp_path / "whole" / "checkpoints" / "step-00000006", tmp_path / "whole" / "export"
    names = saved_names(checkpoint)
    assert {name for name in names if ".lora_" not in name} == {
        name for name in saved_names(exported) if not name.startswith(("vision_model", "text_model"))
    }
    assert any(name.startswith("vision_model") for name in names)
    assert saved_names(exported) == saved_names(tiny_run / "export")
    start, tuned = (load_file(folder / "model.safetensors") for folder in (tiny_run / "export", exported))
    changed = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert any("conv" in name for name in changed) and any("q_lin.weight" in name for name in changed)
    assert not any(name.endswith(("embeddings.weight", "running_mean", "q_lin.bias")) for name in changed)
    arguments = yaml.safe_load((tmp_path / "whole" / "arguments.yaml").read_text())
    assert (arguments["lora_rank"], arguments["lora_kwargs"]) == (2, {"dropout": 0.1})

    main(flags(tmp_path, "parts", max_steps=4, **values))
    main(flags(tmp_path, "parts", resume_from_checkpoint="latest", **values))
    assert_same_log(tmp_path / "whole", tmp_path / "parts")
    for part in ("export", "checkpoints/step-00000006"):
        assert_same_weights(tmp_path / "whole" / part, tmp_path / "parts" / part, 0)
    with pytest.raises(UsageError, match="cannot change --lora_rank 2 -> 3"):
        main(flags(tmp_path, "parts", resume_from_checkpoint="latest", **values | {"lora_rank": 3}))


@pytest.mark.slow
def test_resumed_run_needs_the_same_weights_below_its_adapters(
    tiny_run: Path, tiny_export: Path, tmp_path: Path, without_finish: None
) -> None:
    main(flags(tmp_path, max_steps=1, **LORA, model_name_or_path=tiny_export))
    other = tmp_path / "other"
    model = MiniClipModel.from_pretrained(tiny_export)
    shake(model)
    export(model, MiniClipProcessor.from_pretrained(tiny_export), other)
    with pytest.raises(ModelError, match="frozen vision tower.weights was .* is "):
        main(flags(tmp_path, resume_from_checkpoint="latest", **LORA, model_name_or_path=other))


@pytest.mark.slow
def test_two_processes_train_adapters_as_one_does(tiny_run: Path, tmp_path: Path, without_figures: None) -> None:
    values = LORA | {
        "model_name_or_path": tiny_run / "export", "dropout": 0, "lora_kwargs": None, "num_train_epochs": 1,
        "blend": "auto", "chunk_size": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    main(flags(tmp_path, "one", **values))
    train_in_processes(flags(tmp_path, "two", **values), 2, tmp_path / "log")
    assert_same_log(tmp_path / "one", tmp_path / "two")
    assert len([line for line in metrics_of(tmp_path / "two") if line["split"] == "blend"]) == 11
    assert_same_weights(tmp_path / "one" / "export", tmp_path / "two" / "export", 1e-3)
