"""What transformers, accelerate, torch.compile and PEFT do with any model, done with this one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, PreTrainedModel, TimmWrapperConfig, Trainer, TrainingArguments

from modeling_miniclip import MiniClipConfig, MiniClipModel, export, retrieval_metrics
from modeling_miniclip import modeling_miniclip as module
from tests.helpers.towers import (
    CAPTIONS,
    PIXELS,
    text_config,
    tiny_config,
    tiny_model,
    tiny_processor,
    with_slow,
)
from tests.test_model import shake, tiny_inputs

FAMILIES = with_slow(
    [("resnet", "distilbert"), ("vit", "modernbert")],
    [("efficientnet", "bert"), ("convnext", "roberta"), ("swin", "t5"), ("resnet", "mpnet")],
)
every_family = pytest.mark.parametrize(("vision", "text"), FAMILIES)
PARTS = ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale")


def make(vision: str = "resnet", text: str = "distilbert", **fields: Any) -> MiniClipModel:
    """A tiny model all of whose weights are off their initial values."""
    torch.manual_seed(0)
    model = tiny_model(vision, text, **fields)
    shake(model)
    return model


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits_per_image


def recorded_warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of the model's logger, from now on."""
    lines: list[str] = []
    monkeypatch.setattr(module.logger, "warning", lines.append)
    return lines


# --- loading ---


def test_missing_weight_is_initialised_by_its_towers_rule() -> None:
    model, lost = make("resnet", "modernbert"), "text_model.layers.0.mlp.Wo.weight"
    state = {name: tensor for name, tensor in model.state_dict().items() if name != lost}
    loaded = MiniClipModel.from_pretrained(None, config=model.config, state_dict=state)
    std = 0.02 / (2 * 2) ** 0.5  # ModernBERT's: two layers; cut off at two standard deviations
    assert 0.5 * std < loaded.state_dict()[lost].std() < std
    assert loaded.state_dict()[lost].abs().max() <= 2 * std


@pytest.mark.parametrize(("vision", "text"), with_slow(FAMILIES[1:2], [FAMILIES[0]]) + FAMILIES[2:])
def test_model_loads_onto_the_meta_device(vision: str, text: str, tmp_path: Path) -> None:
    model = make(vision, text)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = MiniClipModel(model.config)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert {p.device.type for p in MiniClipModel.from_pretrained(tmp_path, device_map="meta").parameters()} == {"meta"}
    inputs = tiny_inputs(model)
    for device_map in ("auto", "cpu", {"": "cpu"}, dict.fromkeys(PARTS, "cpu")):
        loaded, info = MiniClipModel.from_pretrained(tmp_path, device_map=device_map, output_loading_info=True)
        assert not any(info.values()), (device_map, info)
        assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
        assert torch.equal(logits(loaded, inputs), logits(model, inputs)), device_map


@every_family
def test_a_sharded_checkpoint_is_the_same_model(vision: str, text: str, tmp_path: Path) -> None:
    model = make(vision, text)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and not (tmp_path / "model.safetensors").exists()
    loaded, info = MiniClipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_unexpected_and_mismatched_keys_are_reported(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "third_model.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = MiniClipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"third_model.weight"} and not info["missing_keys"]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MiniClipModel.from_pretrained(tmp_path, projection_dim=8)
    loaded, info = MiniClipModel.from_pretrained(
        tmp_path, projection_dim=8, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert ("visual_projection.linear.weight", (16, 96), (8, 96)) in {
        (name, tuple(saved), tuple(built)) for name, saved, built in info["mismatched_keys"]
    }
    assert logits(loaded, tiny_inputs(loaded)).isfinite().all()


@pytest.mark.parametrize("dtype", with_slow(["float16"], [torch.bfloat16, {"": "bfloat16"}]))
def test_dtype_applies_to_all_parameters(dtype: Any, tmp_path: Path) -> None:
    name = (dtype[""] if isinstance(dtype, dict) else str(dtype)).removeprefix("torch.")
    model = make()
    model.save_pretrained(tmp_path / "full")
    half = MiniClipModel.from_pretrained(tmp_path / "full", dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {getattr(torch, name)} == {half.logit_scale.dtype}
    half.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == name
    for arguments in ({"dtype": "auto"}, {}):
        again = MiniClipModel.from_pretrained(tmp_path / "half", **arguments)
        assert {p.dtype for p in again.parameters()} == {getattr(torch, name)}
    full = MiniClipModel.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert MiniClipModel.from_pretrained(tmp_path / "full", dtype="auto").logit_scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_family
def test_half_precision_gives_the_embeddings_of_single_precision(vision: str, text: str, dtype: torch.dtype) -> None:
    tolerance = 16 * torch.finfo(dtype).eps  # 0.016 and 0.125 of a unit vector
    model = make(vision, text, text_pooling="mean")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        full, half = model(**inputs, return_loss=True), model.to(dtype)(**inputs, return_loss=True)
    for name in ("image_embeds", "text_embeds", "logit_scale", "logits_per_image"):
        assert half[name].dtype == dtype, name
    for name in ("image_embeds", "text_embeds"):  # unit vectors
        distance = (half[name].float() - full[name]).norm(dim=1).max()
        assert distance < tolerance, (name, distance)
    # Two unit vectors that are each off by so much have a product that is off by twice as much, times 14.3.
    assert (half.logits_per_image.float() - full.logits_per_image).abs().max() < 2 * 14.3 * tolerance
    assert half.loss.item() == pytest.approx(full.loss.item(), abs=4 * 14.3 * tolerance)


# --- offloading: accelerate keeps weights in memory or on disk until they are needed, and leaves them on `meta` ---

IN_PLACE = dict.fromkeys(PARTS, "cpu")
VISION_ON_DISK = IN_PLACE | {"vision_model": "disk", "visual_projection": "disk"}
TEXT_ON_DISK = IN_PLACE | {"text_model": "disk", "text_projection": "disk"}
CPU = torch.device("cpu")


def into_empty(folder: Path, device_map: Any, **options: Any) -> nn.Module:
    """As accelerate's documentation loads a model that is too large."""
    config = MiniClipConfig.from_pretrained(folder)
    with init_empty_weights():
        model = MiniClipModel(config)
    model.tie_weights()
    return load_checkpoint_and_dispatch(model, str(folder), device_map=device_map, **options).eval()


# What loads an export, given its folder and one for offloaded weights, and the towers whose weights are elsewhere.
OFFLOADING: dict[str, tuple[Callable[[Path, Path], Any], set[str]]] = {
    "from_pretrained, image tower on disk": (
        lambda folder, disk: MiniClipModel.from_pretrained(folder, device_map=VISION_ON_DISK, offload_folder=disk),
        {"vision_model"},
    ),
    "from_pretrained, text tower on disk": (
        lambda folder, disk: MiniClipModel.from_pretrained(folder, device_map=TEXT_ON_DISK, offload_folder=disk),
        {"text_model"},
    ),
    "from_pretrained, too large for the memory": (
        lambda folder, disk: MiniClipModel.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": 30_000}, offload_folder=disk
        ),
        {"vision_model", "text_model"},
    ),
    "cpu_offload": (
        lambda folder, disk: cpu_offload(MiniClipModel.from_pretrained(folder), execution_device=CPU),
        {"vision_model", "text_model"},
    ),
    "disk_offload": (
        lambda folder, disk: disk_offload(MiniClipModel.from_pretrained(folder), disk, execution_device=CPU),
        {"vision_model", "text_model"},
    ),
    "dispatch_model": (
        lambda folder, disk: dispatch_model(
            MiniClipModel.from_pretrained(folder), VISION_ON_DISK, main_device="cpu", offload_dir=disk
        ),
        {"vision_model"},
    ),
    "load_checkpoint_and_dispatch, in place": (lambda folder, disk: into_empty(folder, "auto"), set()),
    "load_checkpoint_and_dispatch, image tower on disk": (
        # Without offload_buffers accelerate 1.15 leaves the batch norms' statistics out.
        lambda folder, disk: into_empty(folder, VISION_ON_DISK, offload_folder=str(disk), offload_buffers=True),
        {"vision_model"},
    ),
}


FAST_OFFLOADING = ["from_pretrained, too large for the memory", "dispatch_model"]


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
@pytest.mark.parametrize("way", with_slow(FAST_OFFLOADING, [way for way in OFFLOADING if way not in FAST_OFFLOADING]))
@pytest.mark.parametrize(("vision", "text"), with_slow([("vit", "modernbert")], [("resnet", "t5")]))
def test_an_offloaded_export_gives_the_same_logits(way: str, vision: str, text: str, tmp_path: Path) -> None:
    if "too large" in way:
        pytest.importorskip("accelerate", minversion="1.13", reason="older releases leave no whole model on the disk")
    load, offloaded = OFFLOADING[way]
    model = make(vision, text)
    folder = export(model, tiny_processor(), tmp_path / "export")
    loaded = load(folder, tmp_path / "disk")
    inputs = tiny_inputs(model)
    for _ in range(2):  # the weights are fetched again each time
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
        for tower in ("vision_model", "text_model"):
            devices = {p.device.type for p in getattr(loaded, tower).parameters()}
            assert devices == {"meta" if tower in offloaded else "cpu"}, tower
    with torch.no_grad():
        features = loaded.get_image_features(inputs["pixel_values"]).pooler_output
        assert torch.equal(features, model.get_image_features(inputs["pixel_values"]).pooler_output)


def test_offloaded_tower_reads_weights_of_uncalled_parts() -> None:
    small = {"img_size": PIXELS, "depth": 2, "embed_dim": 32, "num_heads": 2}
    beit = TimmWrapperConfig(architecture="beit_base_patch16_224", model_args=small)
    model = MiniClipModel(MiniClipConfig(vision_config=beit, text_config=text_config())).eval()
    shake(model)
    inputs = tiny_inputs(model)
    calls: list[nn.Module] = []
    qkv = model.vision_model.timm_model.blocks[0].attn.qkv
    qkv.register_forward_hook(lambda *args: calls.append(qkv))
    expected = logits(model, inputs)
    assert not calls  # its weight is passed to a function
    assert torch.equal(logits(cpu_offload(model, execution_device=CPU), inputs), expected)
    assert qkv.weight.is_meta and model.vision_model.timm_model.patch_embed.proj.weight.is_meta


# --- attention ---


def implementations(model: MiniClipModel) -> tuple[str, str]:
    return model.vision_model.config._attn_implementation, model.text_model.config._attn_implementation


@pytest.mark.parametrize(
    ("asked", "found"),
    with_slow(
        [(None, ("sdpa", "sdpa")), ({"text_config": "eager"}, ("sdpa", "eager"))],
        [
            ("sdpa", ("sdpa", "sdpa")),
            ("eager", ("eager", "eager")),
            ({"vision_config": "eager"}, ("eager", "sdpa")),
        ],
    ),
)
def test_attention_can_be_chosen_per_tower(asked: Any, found: tuple[str, str], tmp_path: Path) -> None:
    model = make("vit", "bert")
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs(model)
    loaded = MiniClipModel.from_pretrained(tmp_path, attn_implementation=asked)
    switched = MiniClipModel.from_pretrained(tmp_path)
    if asked is not None:
        switched.set_attn_implementation(asked)
    for each in (loaded, switched):
        assert implementations(each) == found
        with torch.no_grad():
            output = each(**inputs, output_attentions=True)
            image = each.get_image_features(inputs["pixel_values"])
            # A timm tower chooses among PyTorch's kernels by itself, whatever is asked of it.
            assert torch.equal(image.pooler_output, model.get_image_features(inputs["pixel_values"]).pooler_output)
        assert len(output.text_model_output.attentions) == (2 if found[1] == "eager" else 0)  # SDPA keeps none
        torch.testing.assert_close(output.logits_per_image, logits(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nonsense", "nonsense.* is not supported"),
        ({"text_config": "nonsense"}, "nonsense.* is not supported"),
        ("flex_attention", "MiniClipModel does not support"),
        ({"vision_config": "flex_attention"}, "MiniClipVisionModel does not support"),
    ],
)
def test_unsupported_attention_raises(asked: Any, message: str, tmp_path: Path) -> None:
    make("vit", "bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MiniClipModel.from_pretrained(tmp_path, attn_implementation=asked)


# --- gradient checkpointing ---

BLOCKS = {
    "resnet": r"layer\d\.\d", "efficientnet": r"blocks\.\d\.\d", "convnext": r"stages\.\d\.blocks\.\d",
    "vit": r"blocks\.\d", "swin": r"layers\.\d\.blocks\.\d", "distilbert": r"transformer\.layer\.\d",
    "bert": r"encoder\.layer\.\d", "roberta": r"encoder\.layer\.\d", "modernbert": r"layers\.\d",
    "t5": r"encoder\.block\.\d", "mpnet": r"encoder\.layer\.\d",
}  # fmt: skip


class Watched:
    """A model in training whose blocks count how often each is entered in a step."""

    def __init__(self, vision: str, text: str):
        self.model = make(vision, text).train()
        self.inputs = tiny_inputs(self.model)
        self.calls: dict[str, dict[str, int]] = {}
        towers = {vision: self.model.vision_model.timm_model, text: self.model.text_model}
        for family, tower in towers.items():
            for name, block in tower.named_modules():
                if re.fullmatch(BLOCKS[family], name):
                    # Its first leaf, for what is checkpointed may be called past the block's own hooks.
                    leaf = next(part for part in block.modules() if not list(part.children()))
                    leaf.register_forward_pre_hook(lambda *_, f=family, n=name: self.count(f, n))

    def count(self, family: str, name: str) -> None:
        counted = self.calls.setdefault(family, {})
        counted[name] = counted.get(name, 0) + 1

    def step(self) -> list[torch.Tensor]:
        """Gradients of a step that draws the same dropout each time."""
        self.calls.clear()
        self.model.zero_grad()
        torch.manual_seed(0)
        self.model(**self.inputs, return_loss=True).loss.backward()
        return [p.grad.clone() for p in self.model.parameters()]

    def entered(self, family: str) -> set[int]:
        return set(self.calls[family].values())


checkpointing_has_its_name = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="named so since transformers 5.23"
)


@checkpointing_has_its_name
@pytest.mark.parametrize(("vision", "text"), FAMILIES[:5])
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_recomputes_blocks_and_keeps_gradients(
    vision: str, text: str, options: dict[str, bool] | None
) -> None:
    watched = Watched(vision, text)
    plain = watched.step()
    assert watched.entered(vision) == watched.entered(text) == {1}
    assert len(watched.calls[vision]) >= 2 and len(watched.calls[text]) == 2
    watched.model.activation_checkpointing_enable(options)
    assert watched.model.is_activation_checkpointing
    for one, other in zip(plain, watched.step(), strict=True):
        torch.testing.assert_close(one, other)
    assert watched.entered(vision) == watched.entered(text) == {2}
    watched.model.activation_checkpointing_disable()
    assert not watched.model.is_activation_checkpointing
    watched.step()
    assert watched.entered(vision) == watched.entered(text) == {1}


@checkpointing_has_its_name
def test_every_n_layers_concerns_the_text_tower() -> None:
    watched = Watched("vit", "bert")
    watched.model.activation_checkpointing_enable(every_n_layers=2)
    watched.step()
    assert watched.entered("vit") == {2}
    assert watched.calls["bert"] == {"encoder.layer.0": 2, "encoder.layer.1": 1}


@checkpointing_has_its_name
def test_tower_without_checkpointing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = recorded_warnings(monkeypatch)
    watched = Watched("vit", "mpnet")
    watched.model.activation_checkpointing_enable()
    assert watched.model.is_activation_checkpointing
    watched.step()
    assert watched.entered("vit") == {2} and watched.entered("mpnet") == {1}
    assert lines == ["MPNetModel does not support gradient checkpointing and keeps all its activations"]
    model = MiniClipModel(MiniClipConfig(vision_config={"architecture": "dla46_c"}, text_config=text_config()))
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing and model.text_model.is_activation_checkpointing
    assert lines[1:] == ["dla46_c does not support gradient checkpointing and keeps all its activations"]
    model = MiniClipModel(MiniClipConfig(vision_config={"architecture": "dla46_c"}, text_config=text_config("mpnet")))
    with pytest.raises(ValueError, match="neither tower supports gradient checkpointing: dla46_c, MPNetModel"):
        model.activation_checkpointing_enable()


def test_frozen_batch_norms_keep_their_statistics_in_training() -> None:
    model = make()
    norms = [part for part in model.vision_model.modules() if isinstance(part, nn.BatchNorm2d)]
    model.train()
    assert norms and all(norm.training for norm in norms)
    norms[0].requires_grad_(False)
    model.train()
    assert [norm.training for norm in norms] == [False] + [True] * (len(norms) - 1)
    model.vision_model.requires_grad_(False)
    model.train()
    before = [norm.running_mean.clone() for norm in norms]
    logits(model, tiny_inputs(model))
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert model.vision_model.training and model.text_model.training


# --- outputs ---


@every_family
def test_feature_methods_return_hidden_states_and_tuples(vision: str, text: str) -> None:
    model = make(vision, text)
    model.set_attn_implementation({"text_config": "eager"})
    inputs = tiny_inputs(model)
    pixels = inputs.pop("pixel_values")
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        whole = model(**inputs, pixel_values=pixels, **asked, return_dict=False)
        texts, images = model.get_text_features(**inputs, **asked), model.get_image_features(pixels, **asked)
        text_tuple = model.get_text_features(**inputs, **asked, return_dict=False)
        image_tuple = model.get_image_features(pixels, **asked, return_dict=False)
    assert len(texts.hidden_states) == 3 and len(texts.attentions) == 2 and len(images.hidden_states) > 1
    assert torch.equal(texts.hidden_states[-1], texts.last_hidden_state) or text in ("modernbert", "t5")
    for output, as_tuple in ((texts, text_tuple), (images, image_tuple)):
        assert type(as_tuple) is tuple and len(as_tuple) == len(output.to_tuple())
        assert torch.equal(as_tuple[0], output.last_hidden_state) and torch.equal(as_tuple[1], output.pooler_output)
    # logits, their transpose, texts, images, text tower, image tower, temperature
    assert type(whole) is tuple and len(whole) == 7 and type(whole[4]) is tuple and type(whole[5]) is tuple
    assert len(whole[4][2]) == 3 and len(whole[4][3]) == 2 and len(whole[5][2]) == len(images.hidden_states)


def test_tower_configuration_can_request_hidden_states() -> None:
    model = make()
    inputs = tiny_inputs(model)
    for config in (model.config.text_config, model.config.vision_config):
        config.output_hidden_states = True
    with torch.no_grad():
        output = model(**inputs)
    assert output.text_model_output.hidden_states and output.vision_model_output.hidden_states


@pytest.mark.parametrize("text", with_slow(["distilbert", "t5"], ["bert", "roberta", "mpnet", "modernbert"]))
def test_resized_embeddings_are_saved_and_loaded(text: str, tmp_path: Path) -> None:
    model = make("resnet", text)
    inputs = tiny_inputs(model)
    expected = logits(model, inputs)
    model.resize_token_embeddings(230, mean_resizing=False)
    assert torch.equal(logits(model, inputs), expected)  # none of the new tokens is in the texts
    inputs["input_ids"][0, 1] = 229
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded, info = MiniClipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.text_config.vocab_size == 230 == len(loaded.get_input_embeddings().weight)
    assert torch.equal(logits(loaded, inputs), expected)


@every_family
def test_the_same_input_gives_the_same_bits(vision: str, text: str) -> None:
    model, twin = make(vision, text), make(vision, text)
    inputs = tiny_inputs(model)
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    assert torch.equal(logits(model, inputs), logits(twin, inputs))
    gradients = []
    for each in (model, twin):
        torch.manual_seed(3)  # dropout
        each.train()(**inputs, return_loss=True).loss.backward()
        gradients.append([p.grad for p in each.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# --- torch.compile ---

# Images, texts, tokens; none alike or like a size in the model, which torch.compile would take for the same at first.
SIZES = [(4, 6, 9), (5, 8, 7), (7, 10, 11), (2, 4, 5)]


def check_compiled(vision: str, text: str, backend: str, tolerance: float) -> None:
    """One graph without a break, compiled for the first sizes, gives the model's values for all of them."""
    torch._dynamo.reset()
    model = make(vision, text, text_pooling="mean")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    compilations = set()
    for images, texts, length in SIZES:
        inputs = tiny_inputs(model, images, texts, length)
        difference = (logits(compiled, inputs) - logits(model, inputs)).abs().max()
        assert difference <= tolerance, (images, texts, length, difference)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1 and compilations != {0}, compilations
    torch._dynamo.reset()


@pytest.mark.slow
def test_one_graph_serves_all_input_sizes() -> None:
    check_compiled("resnet", "distilbert", "eager", 0)


@pytest.mark.slow
@every_family
def test_every_family_of_towers_compiles_without_a_break(vision: str, text: str) -> None:
    check_compiled(vision, text, "aot_eager", 1e-4)


@pytest.mark.slow
def test_compiled_code_gives_the_same_values() -> None:
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler for torch.compile's inductor")
    check_compiled("vit", "bert", "inductor", 1e-3)


@pytest.mark.slow
def test_loss_compiles_with_gradients_once() -> None:
    torch._dynamo.reset()
    model = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, dynamic=True, backend=counter)
    graphs = set()
    for size, with_ids in [(4, False), (6, False), (5, False), (4, True), (6, True), (5, True)]:
        inputs = tiny_inputs(model, size, size)
        if with_ids:
            inputs |= {"image_id": torch.arange(size), "text_image_id": torch.arange(size)}
        gradients = []
        for each in (compiled, model):
            model.zero_grad()
            each(**inputs, return_loss=True).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        graphs.add((with_ids, counter.frame_count))
    assert len(graphs) == 2, graphs  # no more of them for another size
    torch._dynamo.reset()


# --- transformers' Trainer ---


def pairs() -> list[dict[str, Any]]:
    """Eight images with a caption each."""
    captions = [caption for row in CAPTIONS for caption in row[:2]]
    pixels = np.random.default_rng(0).integers(0, 256, (len(captions), 36, 40, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(p), "caption": caption} for p, caption in zip(pixels, captions, strict=True)]


def make_trainer(model: nn.Module, output_dir: Path, **options: Any) -> Trainer:
    processor = tiny_processor()
    metrics = options.pop("compute_metrics", None)
    options = {"max_steps": 3, **options}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts, images = [row["caption"] for row in rows], [row["image"] for row in rows]
        return {**processor(images=images, text=texts, return_tensors="pt"), "return_loss": True}

    arguments = TrainingArguments(
        str(output_dir), remove_unused_columns=False, per_device_train_batch_size=4, per_device_eval_batch_size=3,
        learning_rate=1e-3, logging_steps=1, save_steps=2, seed=1, use_cpu=True, report_to=[],
        disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(
        model, arguments, data_collator=collate, train_dataset=pairs(), eval_dataset=pairs(),
        processing_class=processor, compute_metrics=metrics,
    )  # fmt: skip


def fresh() -> MiniClipModel:
    torch.manual_seed(0)
    return MiniClipModel(tiny_config(text_pooling="mean"))


def test_trainer_resumes_as_if_uninterrupted(tmp_path: Path) -> None:
    whole = make_trainer(fresh(), tmp_path / "whole")
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    resumed = make_trainer(MiniClipModel(tiny_config(text_pooling="mean")), tmp_path / "resumed")  # other weights
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    start, ours, theirs = fresh().state_dict(), whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["text_projection.linear.weight"], start["text_projection.linear.weight"])
    saved = AutoModel.from_pretrained(tmp_path / "whole" / "checkpoint-3")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in saved.state_dict().items())
    config = json.loads((tmp_path / "whole" / "checkpoint-3" / "config.json").read_text())
    assert "AutoModelForZeroShotImageClassification" in config["auto_map"]


@pytest.mark.parametrize("loss_type", ["softmax_sum", "sigmoid"])
def test_trainer_evaluates_loss_and_returns_embeddings(tmp_path: Path, loss_type: str) -> None:
    seen: list[Any] = []

    def measure(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        texts, images = map(torch.from_numpy, prediction.predictions)
        return {"rsum": retrieval_metrics(images, texts, range(8))["rsum"]}

    torch.manual_seed(0)
    model = MiniClipModel(tiny_config(text_pooling="mean", loss_type=loss_type))
    trainer = make_trainer(model, tmp_path, compute_metrics=measure)
    found = trainer.evaluate()
    model.eval()
    expected, embeds = 0.0, []
    for start in (0, 3, 6):
        rows = pairs()[start : start + 3]
        with torch.no_grad():
            output = model(**trainer.data_collator(rows))
        expected += output.loss.item() * len(rows) / 8
        embeds.append((output.text_embeds, output.image_embeds))
    assert found["eval_loss"] == pytest.approx(expected, rel=0.02)  # Trainer counts the short last batch as whole
    for ours, theirs in zip(map(torch.cat, zip(*embeds, strict=True)), seen[0].predictions, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs))
    assert 0 < found["eval_rsum"] <= 600


@checkpointing_has_its_name
def test_trainer_switches_checkpointing_on_in_both_towers(tmp_path: Path) -> None:
    models = []
    for checkpointing in (False, True):
        options = {"activation_checkpointing": checkpointing, "max_steps": 1, "save_strategy": "no"}
        trainer = make_trainer(fresh(), tmp_path / str(checkpointing), **options)
        trainer.train()
        models.append(trainer.model)
        towers = trainer.model.vision_model.timm_model.grad_checkpointing, trainer.model.text_model
        assert towers[0] == towers[1].is_activation_checkpointing == checkpointing
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs)


# --- PEFT ---

LORA = {
    "image tower": ("resnet", "distilbert", r"vision_model\..*conv2", "vision_model"),
    "image tower, attention": ("vit", "bert", r"vision_model\..*qkv", "vision_model"),
    "text tower": ("resnet", "bert", r"text_model\..*(query|value)", "text_model"),
    "text tower, MPNet": ("vit", "mpnet", r"text_model\..*attn\.(q|v)", "text_model"),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's
@pytest.mark.parametrize("case", with_slow(list(LORA)[1:2], [list(LORA)[0], *list(LORA)[2:]]))
def test_lora_trains_saves_loads_and_merges(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT comes with the dev extra")
    vision, text, targets, tower = LORA[case]
    base = make(vision, text)
    base.save_pretrained(tmp_path / "base")
    before, inputs = logits(base, tiny_inputs(base)), tiny_inputs(base)
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["visual_projection", "text_projection"])
    model = peft.get_peft_model(MiniClipModel.from_pretrained(tmp_path / "base"), config)
    assert torch.equal(logits(model.eval(), inputs), before)  # an adapter starts as nothing
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {f"{tower}." in name for name in trained if "lora_" in name} == {True}
    make_trainer(model, tmp_path / "run").train()
    expected = logits(model.eval(), inputs)
    assert not torch.allclose(expected, before, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(MiniClipModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval(), inputs), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is MiniClipModel and not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again, info = MiniClipModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()) and torch.equal(logits(again, inputs), logits(merged, inputs))
