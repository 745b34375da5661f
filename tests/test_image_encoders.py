"""Image towers of transformers, and what CLIP's towers need: pooling of the end token, fixed lengths, other heads."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    DetrConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    ViTMAEConfig,
    VivitConfig,
)

from modeling_miniclip import MiniClipConfig, MiniClipModel, MiniClipProcessor, export
from modeling_miniclip.configuration_miniclip import UNLISTED, text_tower_class, vision_tower_class
from modeling_miniclip.errors import UsageError
from modeling_miniclip.hub.onnx_export import export_onnx
from modeling_miniclip.processing_miniclip import image_processor_of, stock_image_processor
from modeling_miniclip.training.reports.reporting import describe_model
from modeling_miniclip.training.towers.create_model import create_model
from modeling_miniclip.training.towers.fold_batch_norm import folded_batch_norms
from modeling_miniclip.training.towers.layers import freeze_layers, vision_layers
from tests.helpers.runs import plain_arguments, write_scene_folder
from tests.helpers.towers import (
    CAPTIONS,
    CLIP,
    ENCODERS,
    PIXELS,
    SIGLIP,
    encoder_config,
    save_towers,
    text_config,
    tiny_config,
    tiny_model,
    tiny_processor,
    with_slow,
)

CHECKPOINTED = ["clip_vision_model", "vit", "dinov2", "beit", "swin", "chinese_clip_vision_model"]
every_encoder = pytest.mark.parametrize("family", ENCODERS)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CLIP_TEXT = {**SMALL, "vocab_size": 200, "max_position_embeddings": 12, "bos_token_id": 198, "eos_token_id": 199}
PICTURES = {"clip_vision_model": "CLIPImageProcessor", "siglip_vision_model": "SiglipImageProcessor",
            "vit": "ViTImageProcessor", "deit": "DeiTImageProcessor", "dinov2": "BitImageProcessor",
            "beit": "BeitImageProcessor", "convnext": "ConvNextImageProcessor"}  # fmt: skip


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    torch.manual_seed(0)


def build(family: str = "clip_vision_model", text: str = "distilbert", **fields: Any) -> MiniClipModel:
    fields.setdefault("projection_dim", 16)
    config = MiniClipConfig(vision_config=encoder_config(family), text_config=text_config(text), **fields)
    return shaken(MiniClipModel(config).eval())


def shaken(model: nn.Module) -> Any:
    """The model with everything that is saved off its initial value, so that no equality holds by accident."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def inputs_of(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 190, (rows, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(rows, 3, 32, 32)}


# --- any image encoder ---


@every_encoder
def test_feature_is_the_towers_own(family):
    model, pixels = build(family), torch.randn(2, 3, PIXELS, PIXELS)
    own = AutoModel.from_config(encoder_config(family), **({} if family not in ("vit", "deit") else
                                                           {"add_pooling_layer": False})).eval()  # fmt: skip
    own.load_state_dict(model.vision_model.state_dict())
    with torch.no_grad():
        output = own(pixels)
        expected = output.last_hidden_state[:, 0] if family in ("vit", "deit") else output.pooler_output.flatten(1)
        found = model.pool_images(pixels, output_hidden_states=True)
    assert torch.equal(found.pooler_output, expected) and expected.shape == (2, model.vision_width)
    assert model.visual_projection.linear.in_features == model.vision_width
    assert len(found.hidden_states) > 1
    assert type(model.vision_model) is type(own)


@every_encoder
def test_every_weight_learns_or_is_frozen(family):
    model = build(family).train()
    freeze_layers(model, Flags())
    model(**inputs_of(), return_loss=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad) == name.endswith("mask_token"), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


class Flags:
    freeze, frozen_vision_fraction, frozen_text_fraction = "none", 0.0, 0.0


@every_encoder
def test_saved_model_is_bit_equal(family, tmp_path):
    model, inputs = build(family), inputs_of()
    export(model, tiny_processor(), tmp_path / "export")
    loaded, info = MiniClipModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info
    assert (loaded.config.vision_pooling, loaded.vision_width) == (model.config.vision_pooling, model.vision_width)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
    loaded.save_pretrained(tmp_path / "again")
    again = MiniClipModel.from_pretrained(tmp_path / "again")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("family", "text"), [("clip_vision_model", "clip_text_model"), ("vit", "distilbert")])
def test_exported_names_are_those_of_transformers_4(family, text, tmp_path):
    from safetensors import safe_open

    texts = CLIPTextConfig(**CLIP_TEXT) if text == "clip_text_model" else text_config(text)
    model = MiniClipModel(MiniClipConfig(vision_config=encoder_config(family), text_config=texts))
    export(model, tiny_processor(), tmp_path / "export")
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    vision = "vision_model.embeddings" if family == "vit" else "vision_model.vision_model.pre_layrnorm"
    assert any(name.startswith(vision) for name in names)
    assert ("text_model.text_model.final_layer_norm.bias" in names) == (text == "clip_text_model")
    _, info = MiniClipModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "no image encoder for a BertConfig .*; choose one such as that of CLIP"),
        (CLIPConfig(), "no image encoder for a CLIPConfig"),
        (DetrConfig(), "no image encoder for a DetrConfig"),
        (VivitConfig(), "no image encoder for a VivitConfig"),
        (Siglip2VisionConfig(), "Siglip2VisionModel also needs pixel_attention_mask, spatial_shapes"),
        (ViTMAEConfig(), "ViTMAEModel hides most of an image at random"),
    ],
)
def test_other_models_are_no_image_towers(config, message):
    with pytest.raises(ValueError, match=message):
        MiniClipConfig(vision_config=config)


def test_tower_without_the_asked_feature_raises():
    with pytest.raises(ValueError, match="vision_pooling 'cls' is not possible with clip_vision_model"):
        build("clip_vision_model", vision_pooling="cls")
    swin = {**ENCODERS["swin"], "model_type": "swin"}
    with pytest.raises(ValueError, match="'cls': swin has no class token"):
        MiniClipModel(MiniClipConfig(vision_config=swin, vision_pooling="cls"))
    headless = {**ENCODERS["siglip_vision_model"], "model_type": "siglip_vision_model", "vision_use_head": False}
    model = MiniClipModel(MiniClipConfig(vision_config=headless, text_config=text_config()))
    with pytest.raises(ValueError, match="returns no pooled feature"):
        model(pixel_values=torch.zeros(1, 3, PIXELS, PIXELS))


def test_pooler_is_built_only_if_used():
    with_pooler, without = build("vit", vision_pooling="pooler"), build("vit")
    assert without.vision_model.pooler is None and without.config.vision_pooling == "cls"
    pixels = torch.randn(1, 3, PIXELS, PIXELS)
    with torch.no_grad():
        state = with_pooler.vision_model(pixels).last_hidden_state[:, 0]
        expected = torch.tanh(with_pooler.vision_model.pooler.dense(state))
        torch.testing.assert_close(with_pooler.pool_images(pixels).pooler_output, expected)


@pytest.mark.parametrize("family", PICTURES)
def test_pretrained_encoder_keeps_features_and_preprocessing(family, tmp_path):
    tower = shaken(AutoModel.from_config(encoder_config(family)))
    tower.save_pretrained(tmp_path / "vision")
    pil = getattr(transformers, f"{PICTURES[family]}Pil")
    square, edge = {"height": PIXELS, "width": PIXELS}, {"shortest_edge": 40 if family == "dinov2" else PIXELS}
    own = pil(size=edge if family in ("clip_vision_model", "dinov2", "convnext") else square, crop_size=square)
    own.save_pretrained(tmp_path / "vision")
    _, text = save_towers(tmp_path / "other")
    model = MiniClipModel.from_towers(tmp_path / "vision", text, projection_dim=16)
    processor = MiniClipProcessor.from_towers(tmp_path / "vision", text)
    photo = Image.fromarray(np.random.RandomState(1).randint(0, 256, (90, 61, 3), dtype=np.uint8))
    pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
    expected = own(photo, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    assert pixels.shape == (1, 3, PIXELS, PIXELS)
    with torch.no_grad():
        output = tower.eval()(expected)
        feature = output.last_hidden_state[:, 0] if family in ("vit", "deit") else output.pooler_output.flatten(1)
        assert torch.equal(model.pool_images(expected).pooler_output, feature)
    assert model.config.vision_config.name_or_path == str(tmp_path / "vision")


def test_other_sizes_of_a_stock_image_processor():
    own = transformers.BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=224, resample=2)
    found = stock_image_processor(own, image_size=112)
    assert (dict(found.size), dict(found.crop_size)) == ({"shortest_edge": 128}, {"height": 112, "width": 112})
    assert (found.resample, stock_image_processor(own, crop_pct=0.5).size["shortest_edge"]) == (2, 448)
    squash = stock_image_processor(transformers.ViTImageProcessorPil(), image_size=64)
    assert dict(squash.size) == dict(squash.crop_size) == {"height": 64, "width": 64}
    scratch = image_processor_of(encoder_config("clip_vision_model"))
    assert dict(scratch.size) == {"shortest_edge": PIXELS} and scratch.crop_size["height"] == PIXELS
    with pytest.raises(ValueError, match="MobileViTImageProcessorPil does something else than resize"):
        stock_image_processor(transformers.MobileViTImageProcessorPil())


# --- training ---


@every_encoder
def test_layers_of_an_encoder_go_from_the_embeddings_to_the_norm(family):
    tower = build(family).vision_model
    layers = vision_layers(tower)
    assert len(layers) == 3 or family == "efficientnet" and len(layers) > 3
    assert {id(p) for layer in layers for p in layer} == {id(p) for p in tower.parameters()}
    assert next(iter(tower.parameters())) is layers[0][0] and list(tower.parameters())[-1] is layers[-1][-1]


@pytest.mark.parametrize("family", with_slow(["siglip_vision_model"], CHECKPOINTED))
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, inputs = build(family).train(), inputs_of()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(**inputs, return_loss=True).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.disable_input_require_grads()
    assert not model.text_model.get_input_embeddings()._forward_hooks
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.vision_model.modules())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_batch_norms_of_an_encoder_fold_and_stay_frozen():
    model = build("resnet")
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    with torch.no_grad():
        plain = model.pool_images(pixels).pooler_output
        with folded_batch_norms(model.vision_model, (PIXELS, PIXELS)) as count:
            folded = model.pool_images(pixels).pooler_output
    norms = [m for m in model.vision_model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert count == len(norms) > 2
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4)
    model.vision_model.requires_grad_(False)
    assert not any(norm.training for norm in norms) and not any(n.training for n in norms if model.train())


# SigLIP's pooling reads weights of a part that it does not call.
OFFLOADED = with_slow([SIGLIP], [CLIP, ("dinov2", "t5", {}), ("swin", "distilbert", {})])


@pytest.mark.parametrize(("vision", "text", "fields"), OFFLOADED)
def test_offloaded_towers_give_the_same_logits(vision, text, fields, tmp_path):
    model, inputs = shaken(tiny_model(vision, text, **fields)), inputs_of()
    export(model, tiny_processor(), tmp_path / "export")
    options = {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": tmp_path / "disk"}
    loaded = MiniClipModel.from_pretrained(tmp_path / "export", **options)
    assert {parameter.device.type for parameter in loaded.vision_model.parameters()} == {"meta"}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxscript") is None, reason="pip install onnx onnxscript onnxruntime")
def test_onnx_files_equal_a_siglip_whatever_the_padding(tmp_path):
    vision, text, fields = SIGLIP
    config = tiny_config(vision, text, **fields)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 0, 1
    processor = MiniClipProcessor(
        image_processor_of(config.vision_config), tiny_processor().tokenizer, text_padding="max_length"
    )
    export(MiniClipModel(config).eval(), processor, tmp_path / "export")
    csv = write_scene_folder(tmp_path / "scenes", 20)
    report = export_onnx(str(tmp_path / "export"), tmp_path / "onnx", csv, 20, 1e-4)  # pads to the longest text
    assert max(report["largest_difference"].values()) < 1e-5


def save_tower(folder: Path, family: str, edge: int) -> str:
    """A pretrained image encoder and its image processor, as on the Hub."""
    AutoModel.from_config(encoder_config(family)).save_pretrained(folder)
    processor = getattr(transformers, f"{PICTURES[family]}Pil")
    processor(size={"shortest_edge": edge}, crop_size={"height": PIXELS, "width": PIXELS}).save_pretrained(folder)
    return str(folder)


def test_an_encoder_is_chosen_with_the_training_flags(tmp_path):
    towers = {"vision_model": save_tower(tmp_path / "dinov2", "dinov2", 36)}
    towers["text_model"] = str(save_towers(tmp_path)[1])
    model, processor = create_model(plain_arguments(dataset=["any"], **towers, projection_dim=8), CAPTIONS)
    assert (model.vision_width, processor.image_processor.size["shortest_edge"]) == (32, 36)
    folder = export(model, processor, tmp_path / "export")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| image tower | `dinov2` |" in card and "- timm" not in card
    flags = {"model_name_or_path": str(folder), "image_size": 64}
    larger, processor = create_model(plain_arguments(dataset=["any"], **flags), CAPTIONS)
    sizes = processor.image_processor.crop_size["height"], processor.image_processor.size["shortest_edge"]
    assert sizes == (64, 72)
    assert describe_model(larger).startswith("dinov2 + distilbert (cls), 8-d")
    towers["vision_model"] = save_tower(tmp_path / "clip", "clip_vision_model", 32)
    with pytest.raises(UsageError, match="--image_size 48: clip_vision_model takes no images of 48x48 .* takes: 32"):
        create_model(plain_arguments(dataset=["any"], **towers, image_size=48), CAPTIONS)


# --- what CLIP's towers need ---


@pytest.mark.parametrize(("eos", "end"), [(2, 199), (150, 150)])  # the largest token by an old rule, or the first
def test_end_token_is_found_as_clip_finds_it(eos, end):
    config = CLIPTextConfig(**{**CLIP_TEXT, "eos_token_id": eos})
    model = MiniClipModel(MiniClipConfig(vision_config=encoder_config("vit"), text_config=config, text_pooling="eos"))
    own = CLIPTextModel(config).eval()
    own.load_state_dict(shaken(model).eval().text_model.state_dict())
    ids = torch.tensor([[198, 7, 8, end, end, end], [198, 9, 11, 13, 17, end], [198, 5, end, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        found = model.pool_texts(ids, mask).pooler_output
        expected = own(ids, attention_mask=mask)
    assert torch.equal(found, expected.pooler_output)
    ends = torch.tensor([3, 5, 2])  # by hand
    assert torch.equal(found, expected.last_hidden_state[torch.arange(3), ends])


def test_a_clip_in_parts_gives_its_logits():
    clip = shaken(CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=ENCODERS["clip_vision_model"],
                                       projection_dim=24))).eval()  # fmt: skip
    model = MiniClipModel(MiniClipConfig(
        vision_config=clip.config.vision_config, text_config=clip.config.text_config, text_pooling="eos",
        projection_dim=24, projection_depth=1,
    )).eval()  # fmt: skip
    for part in ("vision_model", "text_model"):
        getattr(model, part).load_state_dict(getattr(clip, part).state_dict())
    for head in ("visual_projection", "text_projection"):
        getattr(model, head).linear.load_state_dict(getattr(clip, head).state_dict())
    model.logit_scale.data.fill_(clip.logit_scale.item())
    inputs = inputs_of()
    inputs["input_ids"][:, -1] = 199
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits_per_image, clip(**inputs).logits_per_image)


def test_a_siglip_in_parts_gives_its_logits():
    texts = {**SMALL, "vocab_size": 200, "max_position_embeddings": 12, "projection_size": 32, "pad_token_id": 1}
    siglip = shaken(SiglipModel(SiglipConfig(text_config=texts, vision_config=ENCODERS["siglip_vision_model"])))
    config = MiniClipConfig(
        vision_config=siglip.config.vision_config, text_config=siglip.config.text_config, projection_dim=32,
        projection_depth=0, text_length=12, loss_type="sigmoid", logit_scale_max=1000.0,
    )  # fmt: skip
    model = MiniClipModel(config).eval()
    assert config.text_pooling == "pooler" and type(model.text_model) is SiglipTextModel
    assert not list(model.visual_projection.parameters()) and not list(model.text_projection.parameters())
    for part in ("vision_model", "text_model"):
        getattr(model, part).load_state_dict(getattr(siglip.eval(), part).state_dict())
    model.logit_scale.data.fill_(siglip.logit_scale.item())
    model.logit_bias.data.fill_(siglip.logit_bias.item())
    padded = torch.ones(3, 12, dtype=torch.long)
    padded[:, :5] = torch.randint(5, 190, (3, 5))
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    longest = padded[:, :7].clone()
    longest[:, 5:] = 0  # another tokenizer's padding
    with torch.no_grad():
        expected = siglip(input_ids=padded, pixel_values=pixels).logits_per_image
        for ids, mask in (
            (padded, None), (padded, (torch.arange(12) < 5).long().expand(3, 12)), (padded[:, :5], None),
            (longest, (torch.arange(7) < 5).long().expand(3, 7)),
        ):  # fmt: skip
            found = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits_per_image
            torch.testing.assert_close(found, expected)


def test_text_towers_that_no_mapping_lists():
    for name in ("SiglipText", "Siglip2Text", "AltCLIPText", "ChineseCLIPText", "MetaClip2Text", "CLIPText"):
        config = getattr(transformers, f"{name}Config")()
        assert text_tower_class(config).__name__ == f"{name}Model"
    assert vision_tower_class(CLIPVisionConfig()).__name__ == "CLIPVisionModel"
    with pytest.raises(ValueError, match="text_pooling must be pooler for siglip_text_model"):
        MiniClipConfig(text_config=SiglipTextConfig(bos_token_id=1, eos_token_id=2), text_pooling="last")
    with pytest.raises(ValueError, match=r"text_pooling 'eos' needs a number as text_config.eos_token_id, not None"):
        MiniClipConfig(text_config={"model_type": "distilbert"}, text_pooling="eos")


def test_configurations_that_older_releases_do_not_list(monkeypatch):
    for model_type, name in UNLISTED.items():
        assert getattr(transformers, name).model_type == model_type
    values = {**SMALL, "model_type": "siglip_text_model", "bos_token_id": 1, "eos_token_id": 2}
    listed = MiniClipConfig(text_config=values)
    monkeypatch.setattr(transformers, "CONFIG_MAPPING", {})
    assert MiniClipConfig(text_config=values).text_config.to_dict() == listed.text_config.to_dict()
    assert type(listed.text_config) is SiglipTextConfig


def test_own_pooled_text():
    model = build(text="bert", text_pooling="pooler")
    ids = torch.randint(5, 190, (2, 6))
    with torch.no_grad():
        found = model.pool_texts(ids, torch.ones_like(ids))
        expected = torch.tanh(model.text_model.pooler.dense(found.last_hidden_state[:, 0]))
    torch.testing.assert_close(found.pooler_output, expected)
    assert build(text="bert").text_model.pooler is None


@pytest.mark.parametrize(
    ("depth", "bias", "names"),
    [
        (1, None, (["linear.weight"], ["linear.weight"])),
        (1, [True, False], (["linear.weight", "linear.bias"], ["linear.weight"])),
        ([0, 1], True, ([], ["linear.weight", "linear.bias"])),
        ([1, 2], False, (["linear.weight"], ["linear.weight", *(f"blocks.0.{name}" for name in (
            "linear.weight", "linear.bias", "layer_norm.weight", "layer_norm.bias"))])),
    ],
)  # fmt: skip
def test_heads_differ_in_depth_and_bias(depth, bias, names, tmp_path):
    model = build(projection_depth=depth, projection_bias=bias, projection_dim=32)
    heads = model.visual_projection, model.text_projection
    assert tuple([name for name, _ in head.named_parameters()] for head in heads) == names
    model.save_pretrained(tmp_path)
    loaded = MiniClipModel.from_pretrained(tmp_path)
    assert (loaded.config.projection_depth, loaded.config.projection_bias) == (depth, bias)
    with torch.no_grad():
        feature = model.pool_images(torch.zeros(1, 3, PIXELS, PIXELS)).pooler_output
        expected = feature if heads[0].linear is None or not names[0] else feature @ heads[0].linear.weight.T
        if "linear.bias" in names[0]:
            expected = expected + heads[0].linear.bias
        torch.testing.assert_close(heads[0](feature), expected)


def test_hidden_layer_of_a_head(tmp_path):
    model = build(projection_depth=1, projection_hidden=[None, 12], projection_hidden_bias=[None, False])
    heads = model.visual_projection, model.text_projection
    names = [[name for name, _ in head.named_parameters()] for head in heads]
    assert names == [["linear.weight"], ["hidden.weight", "linear.weight"]]
    model.save_pretrained(tmp_path)
    loaded = MiniClipModel.from_pretrained(tmp_path)
    assert (loaded.config.projection_hidden, loaded.config.projection_hidden_bias) == ([None, 12], [None, False])
    feature = torch.randn(2, model.text_width)
    expected = nn.functional.gelu(feature @ heads[1].hidden.weight.T) @ heads[1].linear.weight.T
    torch.testing.assert_close(loaded.text_projection(feature), expected)
    with_bias = build(projection_depth=1, projection_hidden=12).visual_projection
    assert [name for name, _ in with_bias.named_parameters()] == ["hidden.weight", "hidden.bias", "linear.weight"]
    with pytest.raises(ValueError, match="projection_hidden needs a head: set projection_depth to 1"):
        build(projection_depth=0, projection_dim=32, projection_hidden=12)


def test_identity_needs_the_towers_width():
    with pytest.raises(
        ValueError, match="projection_depth 0 leaves a tower's 32 features .* projection_dim 32 instead"
    ):
        build(projection_depth=0, projection_dim=16)


def test_processor_pads_to_a_fixed_length(tmp_path):
    plain = tiny_processor()
    processor = MiniClipProcessor(plain.image_processor, plain.tokenizer, text_padding="max_length")
    processor.save_pretrained(tmp_path)
    for each in (processor, MiniClipProcessor.from_pretrained(tmp_path)):
        inputs = each(text=["a dog", "two children play"], return_tensors="pt")
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 24)
        assert each(text="a dog", padding=True, return_tensors="pt")["input_ids"].shape[1] < 8
    plain.save_pretrained(tmp_path / "plain")
    assert "text_padding" not in (tmp_path / "plain" / "processor_config.json").read_text()
    with pytest.raises(ValueError, match="padding must be 'longest' or 'max_length', not 'fixed'"):
        MiniClipProcessor(plain.image_processor, plain.tokenizer, text_padding="fixed")
