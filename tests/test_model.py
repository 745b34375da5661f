"""The model with every family of towers: building, loading, saving, embedding, comparing, learning."""

import inspect
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BartConfig,
    CLIPConfig,
    FunnelConfig,
    GPT2Model,
    TimmWrapperConfig,
    ViTConfig,
)

from modeling_miniclip import MiniClipConfig, MiniClipModel, MiniClipOutput, symmetric_contrastive_loss
from modeling_miniclip import configuration_miniclip as module
from modeling_miniclip.configuration_miniclip import text_tower_class, timm_config
from modeling_miniclip.modeling_miniclip import pool_text
from tests.helpers.hubs import run
from tests.helpers.towers import (
    EVERY_PAIR,
    PIXELS,
    TEXT,
    VISION,
    save_towers,
    text_config,
    tiny_config,
    tiny_model,
    vision_config,
)

ROOT = Path(__file__).resolve().parents[1]
every_pair = pytest.mark.parametrize(("vision", "text"), EVERY_PAIR)


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    torch.manual_seed(0)


def tiny_inputs(model: MiniClipModel, images: int = 3, texts: int = 3, length: int = 9, seed: int = 0) -> dict:
    """Random pixels, and random texts of different lengths, the first being `length` tokens long."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 200, (texts, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, texts):
        input_ids[row, length - 2 * row :] = model.config.text_config.pad_token_id
        attention_mask[row, length - 2 * row :] = 0
    pixel_values = torch.randn(images, 3, PIXELS, PIXELS, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}


def embed(model: MiniClipModel, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return output.image_embeds, output.text_embeds


def shake(model: nn.Module, seed: int = 0) -> None:
    """Move everything that is saved off its initial value, so that no equality holds by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))


# --- forward ---


@every_pair
def test_logits_are_scaled_cosines_of_unit_embeddings(vision, text):
    model = tiny_model(vision, text)
    with torch.no_grad():
        output = model(**tiny_inputs(model, images=2, texts=3))
    assert output.image_embeds.shape == (2, 16) and output.text_embeds.shape == (3, 16)
    assert output.vision_model_output.pooler_output.shape == (2, model.vision_model.pooled_size)
    assert output.text_model_output.pooler_output.shape == (3, 32)
    for embeds in (output.image_embeds, output.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))
    for i in range(2):
        for j in range(3):
            cosine = torch.cosine_similarity(output.image_embeds[i], output.text_embeds[j], dim=0)
            torch.testing.assert_close(output.logits_per_image[i, j], cosine / 0.07, rtol=1e-4, atol=1e-4)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    assert output.loss is None
    torch.testing.assert_close(output.logit_scale, torch.tensor([1 / 0.07]))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@every_pair
def test_embedding_does_not_depend_on_the_batch(vision, text, pooling):
    model = tiny_model(vision, text, text_pooling=pooling)
    shake(model)
    inputs = tiny_inputs(model)
    images, texts = embed(model, inputs)
    for row in range(3):
        image, text_embed = embed(model, {name: value[row : row + 1] for name, value in inputs.items()})
        torch.testing.assert_close(image, images[row : row + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text_embed, texts[row : row + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "pooling"),
    [(text, pool) for text in TEXT for pool in ("cls", "mean", "last") if (text, pool) != ("gpt2", "cls")],
)
def test_padding_does_not_change_a_text(text, pooling):
    model = tiny_model("resnet", text, text_pooling=pooling)
    shake(model)
    ids = torch.randint(6, 200, (2, 6))
    padded = torch.cat([ids, torch.full((2, 5), model.config.text_config.pad_token_id)], dim=1)
    mask = (torch.arange(11) < 6).long().expand(2, -1)
    with torch.no_grad():
        short = model(input_ids=ids, attention_mask=torch.ones_like(ids)).text_embeds
        long = model(input_ids=padded, attention_mask=mask).text_embeds
        changed = model(input_ids=205 - ids, attention_mask=torch.ones_like(ids)).text_embeds
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, short, atol=1e-4)  # the tower does look at the tokens


def test_poolings_by_hand():
    states = torch.tensor([[[1.0, 10.0], [3.0, 20.0], [8.0, 90.0]], [[0.0, 0.0], [5.0, 5.0], [7.0, 7.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool_text(states, mask, "cls").tolist() == [[1, 10], [0, 0]]
    assert pool_text(states, mask, "mean").tolist() == [[2, 15], [4, 4]]
    assert pool_text(states, None, "mean").tolist() == [[4, 40], [4, 4]]
    assert (
        pool_text(states, mask, "last").tolist()
        == pool_text(states, mask.bool(), "last").tolist()
        == [[3, 20], [7, 7]]
    )
    assert (
        pool_text(states, mask.flip(1), "last").tolist()
        == pool_text(states, None, "last").tolist()
        == [[8, 90], [7, 7]]
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoder_feature_is_its_own_hidden_state(side, pooling):
    model = tiny_model(text="gpt2", text_pooling=pooling)
    texts = [torch.randint(4, 200, (length,)) for length in (9, 1, 5)]
    rows = [torch.cat([torch.zeros(9 - len(t), dtype=torch.long), t][:: 1 if side == "left" else -1]) for t in texts]
    mask = torch.stack([row > 0 for row in rows]).long()
    with torch.no_grad():
        found = model.pool_texts(torch.stack(rows), mask).pooler_output
        states = [GPT2Model.forward(model.text_model, text[None]).last_hidden_state[0] for text in texts]
    expected = [state[-1] if pooling == "last" else state.mean(dim=0) for state in states]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_default_pooling_of_decoders_is_the_last_token():
    def default(name, **values):
        return MiniClipConfig(text_config=AutoConfig.for_model(name, **values)).text_pooling

    causal = "gpt2 opt llama qwen2 qwen3 gemma3_text mistral bloom mamba modernbert-decoder clip_text_model".split()
    others = "bert distilbert roberta modernbert xlm-roberta deberta-v2 electra mpnet xlnet bert-generation t5".split()
    assert {name: default(name) for name in causal} == dict.fromkeys(causal, "last")
    assert {name: default(name) for name in others} == dict.fromkeys(others, "cls")
    assert default("gemma3_text", use_bidirectional_attention=True) == "cls"  # EmbeddingGemma
    with pytest.raises(ValueError, match="'cls' takes the first token, .* no other one in gpt2; choose last"):
        tiny_config(text="gpt2", text_pooling="cls")
    assert not tiny_config(text="gpt2").text_config.use_cache


def test_model_uses_the_configured_pooling():
    cls, mean = tiny_model(text_pooling="cls"), tiny_model(text_pooling="mean")
    mean.load_state_dict(cls.state_dict())
    inputs = tiny_inputs(cls)
    with torch.no_grad():
        states = cls.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        inputs.pop("pixel_values")
        assert torch.equal(cls.pool_texts(**inputs).pooler_output, states[:, 0])
        torch.testing.assert_close(mean.pool_texts(**inputs).pooler_output[1], states[1, :7].mean(dim=0))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_head_equals_its_formula(depth):
    head = tiny_model(projection_depth=depth).visual_projection
    x = torch.randn(5, 96)
    expected = x @ head.linear.weight.T + (0 if depth == 1 else head.linear.bias)
    assert (head.linear.bias is None) == (depth == 1) and len(head.blocks) == depth - 1
    for block in head.blocks:
        gelu = 0.5 * expected * (1 + torch.erf(expected / math.sqrt(2)))
        hidden = expected + gelu @ block.linear.weight.T + block.linear.bias
        centred = hidden - hidden.mean(dim=1, keepdim=True)
        expected = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


def test_head_dropout_is_configured_and_off_in_evaluation():
    head = tiny_model(projection_dropout=0.5, projection_depth=3).text_projection
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    x = torch.randn(4, 32)
    assert torch.equal(head(x), head(x))
    head.train()
    assert not torch.equal(head(x), head(x))


# --- what comes out of which call ---


@pytest.mark.parametrize("name", ["pixel_values", "input_ids"])
def test_single_modality_gives_embeddings_and_no_loss(name):
    model = tiny_model()
    inputs = tiny_inputs(model)
    wanted = "image_embeds" if name == "pixel_values" else "text_embeds"
    other = "text_embeds" if name == "pixel_values" else "image_embeds"
    with torch.no_grad():
        output = model(**{name: inputs[name]})
        as_tuple = model(**{name: inputs[name]}, return_dict=False)
    assert output[0] is output[wanted]
    assert torch.equal(as_tuple[0], output[wanted])
    for absent in ("loss", "logits_per_image", "logits_per_text", "logit_scale", other):
        assert output[absent] is None if absent in output else getattr(output, absent) is None
    assert isinstance(output, MiniClipOutput) and isinstance(as_tuple, tuple)


def test_the_tuple_has_clips_order():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        output = model(**inputs, return_loss=True)
        as_tuple = model(**inputs, return_loss=True, return_dict=False)
    assert list(output.keys()) == [
        "loss",
        "logits_per_image",
        "logits_per_text",
        "text_embeds",
        "image_embeds",
        "text_model_output",
        "vision_model_output",
        "logit_scale",
    ]
    assert as_tuple[0] == output.loss and torch.equal(as_tuple[1], output.logits_per_image)
    assert isinstance(as_tuple[5], tuple) and isinstance(as_tuple[6], tuple)


def test_embeddings_without_comparing_them_all():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        output, whole = model(**inputs, return_logits=False), model(**inputs)
    assert output.logits_per_image is None is output.logits_per_text
    for name in ("image_embeds", "text_embeds", "logit_scale"):
        assert torch.equal(output[name], whole[name])


def test_a_missing_modality_is_named():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with pytest.raises(ValueError, match="input_ids.*pixel_values"):
        model()
    with pytest.raises(ValueError, match="pixel_values"):
        model(input_ids=inputs["input_ids"], return_loss=True)
    with pytest.raises(ValueError, match="input_ids"):
        model(pixel_values=inputs["pixel_values"], return_loss=True)
    with pytest.raises(ValueError, match="3 images and 2 texts.*image_id"):
        model(**tiny_inputs(model, texts=2), return_loss=True)


def test_forward_loss_equals_the_loss_function():
    model = tiny_model()
    inputs = tiny_inputs(model, images=2, texts=3)
    ids = {"image_id": torch.tensor([4, 9]), "text_image_id": torch.tensor([9, 4, 9])}
    with torch.no_grad():
        output = model(**inputs, **ids, return_loss=True)
        scale = torch.tensor(1 / 0.07)
        expected = symmetric_contrastive_loss(output.image_embeds, output.text_embeds, scale, *ids.values())
        torch.testing.assert_close(output.loss, expected)
        assert model(**inputs, **ids).loss is None
        square = tiny_inputs(model)
        pairs = {"image_id": torch.arange(3), "text_image_id": torch.arange(3)}
        assert model(**square, return_loss=True).loss == model(**square, **pairs, return_loss=True).loss


@pytest.mark.parametrize(
    ("image_id", "text_image_id", "message"),
    [
        ([0, 1], None, "both or neither"),
        ([0, 1], [0, 0, 0], "vice versa"),  # image 1 has no text
        ([0, 1], [0, 1, 2], "vice versa"),  # text 2 has no image
        ([0], [0, 0, 0], "1 and 3 entries for 2 images and 3 texts"),
    ],
)
def test_mismatched_ids_raise(image_id, text_image_id, message):
    model = tiny_model()
    ids = {"image_id": torch.tensor(image_id), "text_image_id": text_image_id and torch.tensor(text_image_id)}
    with pytest.raises(ValueError, match=message):
        model(**tiny_inputs(model, images=2, texts=3), **ids, return_loss=True)


@every_pair
def test_features_are_the_embeddings_before_normalisation(vision, text):
    model = tiny_model(vision, text)
    inputs = tiny_inputs(model)
    pixels, texts = inputs.pop("pixel_values"), inputs
    with torch.no_grad():
        output = model(**texts, pixel_values=pixels)
        features = {"image": model.get_image_features(pixels), "text": model.get_text_features(**texts)}
        as_tuple = model.get_image_features(pixels, return_dict=False)
    for name, feature in features.items():
        assert feature.pooler_output.shape == (3, 16)
        unit = nn.functional.normalize(feature.pooler_output, dim=-1)
        assert torch.equal(unit, output[f"{name}_embeds"])
        assert feature.last_hidden_state.shape[0] == 3
    assert torch.equal(as_tuple[1], features["image"].pooler_output)
    for method in (model.get_image_features, model.get_text_features):
        assert "BaseModelOutputWithPooling" in str(inspect.signature(method).return_annotation)


@every_pair
def test_hidden_states_and_attentions_pass_through(vision, text):
    model = tiny_model(vision, text)
    model.set_attn_implementation({"text_config": "eager"})
    inputs = tiny_inputs(model)
    with torch.no_grad():
        plain = model(**inputs)
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        image = model.get_image_features(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert len(output.text_model_output.hidden_states) == 3 and len(output.text_model_output.attentions) == 2
    assert output.text_model_output.attentions[0].shape == (3, 4, 9, 9)
    assert len(output.vision_model_output.hidden_states) == len(image.hidden_states) > 1
    assert plain.text_model_output.hidden_states is None and plain.vision_model_output.hidden_states is None
    torch.testing.assert_close(output.image_embeds, plain.image_embeds)
    torch.testing.assert_close(output.text_embeds, plain.text_embeds)


@every_pair
def test_hidden_states_can_be_selected_by_index(vision, text):
    model = tiny_model(vision, text)
    inputs = tiny_inputs(model)
    for asked in ([0, -1], -1, [1, 99]):  # no tower has a hundred layers
        with torch.no_grad():
            whole = model(**inputs, output_hidden_states=True).vision_model_output
            chosen = model(**inputs, output_hidden_states=asked).vision_model_output
        count = len(whole.hidden_states)
        indices = {i % count for i in ([asked] if isinstance(asked, int) else asked) if i < count}
        assert {i for i, state in enumerate(chosen.hidden_states) if state is not None} == indices
        assert all(torch.equal(chosen.hidden_states[i], whole.hidden_states[i]) for i in indices)
        assert torch.equal(chosen.pooler_output, whole.pooler_output)


def test_arguments_reach_only_their_tower():
    model = tiny_model("resnet", "bert")
    shake(model)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        plain = model(**inputs)
        types = torch.ones_like(inputs["input_ids"])
        other = model(**inputs, token_type_ids=types, num_items_in_batch=torch.tensor(3))
    assert torch.equal(other.image_embeds, plain.image_embeds)
    assert not torch.allclose(other.text_embeds, plain.text_embeds, atol=1e-4)  # the text tower got them


def test_features_computed_before_replace_a_tower():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        output = model(**inputs, return_loss=True)
        stored = {
            "vision_pooler_output": output.vision_model_output.pooler_output,
            "text_pooler_output": output.text_model_output.pooler_output,
        }
        again = model(**stored, return_loss=True)
        mixed = model(**inputs | {"pixel_values": None}, vision_pooler_output=stored["vision_pooler_output"])
    assert again.loss == output.loss
    assert torch.equal(mixed.logits_per_image, output.logits_per_image)
    assert again.vision_model_output is None and again.text_model_output is None


# --- temperature ---


def test_only_sigmoid_loss_has_a_learned_bias(tmp_path):
    assert tiny_model().logit_bias is None and "logit_bias" not in tiny_model().state_dict()
    model = tiny_model(loss_type="sigmoid")
    assert (model.logit_bias.tolist(), model.logit_scale.tolist()) == ([-10.0], pytest.approx([math.log(10)]))
    inputs = tiny_inputs(model)
    output = model(**inputs, return_loss=True)
    torch.testing.assert_close(output.logits_per_image, 10 * output.image_embeds @ output.text_embeds.T - 10)
    pairs = torch.arange(3)
    expected = symmetric_contrastive_loss(
        output.image_embeds, output.text_embeds, 10.0, pairs, pairs, "sigmoid", -10.0
    )
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.logit_bias.grad.abs() > 0 and model.logit_scale.grad.abs() > 0
    with torch.no_grad():
        model.logit_bias.fill_(-4.0)
    model.save_pretrained(tmp_path)
    loaded, info = MiniClipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and loaded.logit_bias.item() == -4.0
    weights = load_file(tmp_path / "model.safetensors")
    del weights["logit_bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = MiniClipModel.from_pretrained(tmp_path, output_loading_info=True, allow_missing=True)
    assert list(info["missing_keys"]) == ["logit_bias"] and loaded.logit_bias.item() == -10.0


def test_temperature_is_learnable_and_clamped():
    model = tiny_model()
    inputs = tiny_inputs(model)
    model(**inputs, return_loss=True).loss.backward()
    assert model.logit_scale.requires_grad and model.logit_scale.grad.abs() > 0
    with torch.no_grad():
        model.logit_scale.fill_(10.0)  # e**10 = 22026
        output = model(**inputs)
    torch.testing.assert_close(output.logit_scale, torch.tensor([100.0]))
    torch.testing.assert_close(output.logits_per_image, 100 * output.image_embeds @ output.text_embeds.T)
    assert tiny_model(logit_scale_init_value=0.5).inverse_temperature().item() == pytest.approx(math.exp(0.5))
    assert tiny_model(logit_scale_max=20).inverse_temperature().item() == pytest.approx(1 / 0.07)


# --- learning ---


@every_pair
def test_every_parameter_gets_a_gradient(vision, text):
    model = tiny_model(vision, text).train()
    shake(model)
    model(**tiny_inputs(model), return_loss=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.ndim > 0, name  # FSDP refuses 0-d parameters
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for part in (model.vision_model, model.text_model, model.visual_projection, model.text_projection):
        first, *_, last = [p for p in part.parameters() if p.ndim > 1]
        assert first.grad.abs().sum() > 0 and last.grad.abs().sum() > 0


@pytest.mark.parametrize("frozen", ["vision_model", "text_model"])
def test_only_frozen_tower_gets_no_gradient(frozen):
    model = tiny_model().train()
    getattr(model, frozen).requires_grad_(False)
    model(**tiny_inputs(model), return_loss=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


def test_gradient_of_the_whole_model_equals_finite_differences():
    model = tiny_model().double()
    inputs = tiny_inputs(model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    names = [
        "visual_projection.linear.bias",
        "text_projection.blocks.0.linear.bias",
        "text_model.embeddings.LayerNorm.bias",
        "vision_model.timm_model.bn1.bias",
        "logit_scale",
    ]
    parameters = dict(model.named_parameters())

    def loss(*values):
        changed = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, changed, kwargs=inputs | {"return_loss": True}).loss

    values = [parameters[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, values, atol=1e-7, fast_mode=True)  # along random directions


def test_a_few_steps_tell_the_pairs_apart():
    torch.manual_seed(0)
    model = tiny_model().train()
    inputs = tiny_inputs(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**inputs, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# --- initial weights ---


@pytest.mark.parametrize("vision", VISION)
def test_from_scratch_keeps_the_initial_weights_of_timm(vision):
    spec = VISION[vision]
    torch.manual_seed(0)
    bare = timm.create_model(spec["architecture"], num_classes=0, **spec.get("model_args", {})).state_dict()
    torch.manual_seed(1)
    ours = tiny_model(vision).vision_model.timm_model.state_dict()
    assert ours.keys() == bare.keys()
    for name, tensor in bare.items():
        if tensor.unique().numel() == 1:  # norms, biases, running statistics
            assert torch.equal(ours[name], tensor), name
        elif tensor.numel() >= 500 and tensor.is_floating_point():
            error = 5 / math.sqrt(tensor.numel())  # five standard errors of the statistics of this many samples
            assert ours[name].std().item() == pytest.approx(tensor.std().item(), rel=error), name
            assert abs(ours[name].mean() - tensor.mean()) < error * tensor.std(), name


def test_from_scratch_keeps_timms_initial_scales():
    timm_model = MiniClipModel(
        MiniClipConfig(vision_config={"architecture": "resnet10t"}, text_config=text_config())
    ).vision_model.timm_model
    assert timm_model.layer1[0].bn2.weight.abs().sum() == 0  # the last of its block
    assert timm_model.layer1[0].bn1.weight.eq(1).all()
    conv = timm_model.layer2[0].conv2.weight  # Kaiming by fan-out: sqrt(2 / (128 * 9)) = 0.0417
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (conv.shape[0] * 9)), rel=0.02)


def test_each_part_has_its_own_initialisation():
    model = tiny_model(projection_dim=200, projection_depth=3)
    for head in (model.visual_projection, model.text_projection):
        for linear in (m for m in head.modules() if isinstance(m, nn.Linear)):
            bound = 1 / math.sqrt(linear.in_features)  # uniform, as torch.nn.Linear itself
            assert linear.weight.abs().max() <= bound
            assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert 0 < linear.bias.abs().max() <= bound
        for norm in (m for m in head.modules() if isinstance(m, nn.LayerNorm)):
            assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
    text_linear = model.text_model.transformer.layer[0].ffn.lin1
    assert text_linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert text_linear.bias.abs().sum() == 0
    assert model.logit_scale.tolist() == pytest.approx([math.log(1 / 0.07)])


# --- pretrained towers ---


@every_pair
def test_from_towers_has_the_features_of_the_towers(vision, text, tmp_path):
    vision_folder, text_folder = save_towers(tmp_path, vision, text)
    model = MiniClipModel.from_towers(vision_folder, str(text_folder), projection_dim=24, text_pooling="mean")
    spec = VISION[vision]
    bare_vision = timm.create_model(spec["architecture"], num_classes=10, **spec.get("model_args", {}))
    bare_vision.load_state_dict(load_file(vision_folder / "model.safetensors"))
    bare_vision.eval().reset_classifier(0)
    bare_text = text_tower_class(text_config(text)).from_pretrained(text_folder).eval()
    inputs = tiny_inputs(model)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        assert torch.equal(model.pool_images(pixels).pooler_output, bare_vision(pixels))
        states = bare_text(**inputs).last_hidden_state
        assert torch.equal(model.pool_texts(**inputs).last_hidden_state, states)
    assert not model.training
    assert (model.config.projection_dim, model.config.text_pooling) == (24, "mean")
    assert model.config.text_config.name_or_path == str(text_folder)
    assert model.config.vision_config.name_or_path == str(vision_folder)


@every_pair
def test_saved_model_is_self_contained_and_bit_equal(vision, text, tmp_path):
    towers = tmp_path / "towers"
    model = MiniClipModel.from_towers(*save_towers(towers, vision, text))
    shake(model)
    inputs = tiny_inputs(model)
    expected = embed(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(towers)
    saved = (tmp_path / "saved").rename(tmp_path / "moved")
    assert (saved / "model.safetensors").is_file() and not list(saved.glob("*.bin"))
    loaded, info = MiniClipModel.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    for one, other in zip(embed(loaded, inputs), expected, strict=True):
        assert torch.equal(one, other)
    for tensors in ("state_dict", "named_buffers"):  # non-persistent buffers too
        ours, theirs = dict(getattr(model, tensors)()), dict(getattr(loaded, tensors)())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.config.name_or_path == str(saved) and loaded.loaded_revision is None  # no repository
    assert loaded.config.text_config.name_or_path == str(towers / f"text-{text}")
    for each in (model, loaded):
        assert each.text_model.config is each.config.text_config
        assert each.vision_model.config is each.config.vision_config


CHILD = """
import sys, torch, warnings
warnings.simplefilter("always")
from modeling_miniclip import MiniClipModel
for folder in sys.argv[1:]:
    model, info = MiniClipModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model(**torch.load(folder + "/inputs.pt")).logits_per_image, folder + "/logits.pt")
"""


def test_another_process_gets_the_same_bits(tmp_path):
    expected = {}
    for vision, text in (("resnet", "t5"), ("vit", "modernbert")):
        model = tiny_model(vision, text)
        shake(model)
        folder = tmp_path / f"{vision}-{text}"
        model.save_pretrained(folder)
        inputs = tiny_inputs(model)
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            expected[folder] = model(**inputs).logits_per_image
    result = run(CHILD, tmp_path, *map(str, expected), PYTHONPATH=str(ROOT), HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert result.returncode == 0, result.stderr
    assert not [line for line in result.stderr.splitlines() if "miniclip" in line.lower()], result.stderr
    assert "deprecat" not in result.stderr.lower() and "newly initialized" not in result.stderr, result.stderr
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "logits.pt"), logits), folder.name


def test_missing_weights_are_an_error_unless_allowed(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = ["logit_scale", "text_projection.linear.weight", "vision_model.timm_model.layer1.0.conv1.weight"]
    for name in lost:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lacks = rf"{re.escape(str(tmp_path))} lacks weights: {', '.join(sorted(lost))}$"
    for load in (MiniClipModel, AutoModel):
        with pytest.raises(ValueError, match=lacks):
            load.from_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path, allow_missing=True)) is MiniClipModel
    model, info = MiniClipModel.from_pretrained(tmp_path, output_loading_info=True, allow_missing=True)
    assert sorted(info["missing_keys"]) == sorted(lost)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert 0 < model.text_projection.linear.weight.abs().max() <= 1 / math.sqrt(32)
    assert 0 < model.vision_model.timm_model.layer1[0].conv1.weight.std() < 1


def test_incomplete_tower_raises(tmp_path):
    vision_folder, text_folder = save_towers(tmp_path)
    weights = load_file(vision_folder / "model.safetensors")
    del weights["layer1.0.conv1.weight"]
    save_file(weights, vision_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights.*layer1\.0\.conv1\.weight"):
        MiniClipModel.from_towers(vision_folder, text_folder)


def test_towers_in_half_precision_become_float32(tmp_path):
    vision_folder, text_folder = save_towers(tmp_path)
    full = AutoModel.from_pretrained(text_folder)
    full.half().save_pretrained(text_folder)
    model = MiniClipModel.from_towers(vision_folder, text_folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    word = "embeddings.word_embeddings.weight"
    assert torch.equal(model.text_model.get_parameter(word), full.get_parameter(word).float())
    model(**tiny_inputs(model), return_loss=True).loss.backward()
    half = MiniClipConfig(vision_config=vision_config(), text_config=text_config().to_dict() | {"dtype": "float16"})
    assert {p.dtype for p in MiniClipModel(half).parameters()} == {torch.float32}


def test_keywords_of_from_towers(tmp_path):
    towers = save_towers(tmp_path)
    fields = "vision_pooling, text_pooling, text_length, projection_dim, projection_depth, projection_bias"
    with pytest.raises(ValueError, match=f"projection_dims.*{fields}"):
        MiniClipModel.from_towers(*towers, projection_dims=128)
    with pytest.raises(ValueError, match="unknown fields text_config"):
        MiniClipModel.from_towers(*towers, text_config=text_config())
    with pytest.raises(ValueError, match="text_pooling must be one of cls, mean, last, eos, pooler, not 'max'"):
        MiniClipModel.from_towers(*towers, text_pooling="max")
    linear = MiniClipModel.from_towers(*towers, projection_depth=1)
    assert [name for name, _ in linear.visual_projection.named_parameters()] == ["linear.weight"]


# --- names of towers ---


@pytest.mark.parametrize(
    ("name", "repository", "architecture"),
    [
        ("resnet50", "timm/resnet50.a1_in1k", "resnet50"),
        ("resnet50.a1_in1k", "timm/resnet50.a1_in1k", "resnet50"),
        ("resnet50.tv_in1k", "timm/resnet50.tv_in1k", "resnet50"),
        ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k", None),
        # these weights are in another account, and under the name of the architecture without quick GELU
        ("rdnet_tiny.nv_in1k", "naver-ai/rdnet_tiny.nv_in1k", "rdnet_tiny"),
        (
            "vit_base_patch16_clip_quickgelu_224.openai",
            "timm/vit_base_patch16_clip_224.openai",
            "vit_base_patch16_clip_quickgelu_224",
        ),
    ],
)
def test_timm_name_gives_its_weights_repository(name, repository, architecture, monkeypatch):
    asked = []

    class Recorder:
        @staticmethod
        def get_config_dict(source):
            return {"architecture": "there"}, {}

        @staticmethod
        def from_pretrained(source, **changes):
            asked.append((source, changes.get("architecture")))
            return TimmWrapperConfig(**changes)

    monkeypatch.setattr(module, "TimmWrapperConfig", Recorder)
    assert timm_config(name).name_or_path == repository
    assert asked == [(repository, architecture)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "similar names: .*resnet50"),
        ("resnet50.a1_in2k", "similar names: .*resnet50.a1_in1k"),
        ("vit_huge_patch14_gap_224.in1k_ijepa", "neither a folder nor a timm model with weights on the Hub"),
        ("no model at all", "neither a folder nor a timm model with weights on the Hub$"),
    ],
)
def test_unknown_timm_name_error_suggests_names(name, message):
    with pytest.raises(ValueError, match=message):
        timm_config(name)


def test_folder_without_timm_model_raises(tmp_path):
    vision_folder, text_folder = save_towers(tmp_path)
    with pytest.raises(ValueError, match=r"no image encoder for a DistilBertConfig \(model_type 'distilbert'\)"):
        MiniClipModel.from_towers(text_folder, text_folder)
    with pytest.raises(OSError, match="nowhere"):
        MiniClipModel.from_towers(tmp_path / "nowhere", text_folder)
    with pytest.raises(OSError, match="nowhere"):
        MiniClipModel.from_towers(vision_folder, tmp_path / "nowhere")


@pytest.mark.parametrize("config", [ViTConfig(), BartConfig(), CLIPConfig(), TimmWrapperConfig()])
def test_model_without_text_encoder_raises(config):
    with pytest.raises(ValueError, match=f"no text encoder for a {type(config).__name__}"):
        text_tower_class(config)


def test_encoders_alone_are_taken_of_larger_models():
    assert text_tower_class(text_config("t5")).__name__ == "T5EncoderModel"
    assert text_tower_class(FunnelConfig()).__name__ == "FunnelModel"


def test_real_towers_give_timms_and_transformers_features(shared):
    folders = shared / "weights" / "tf_efficientnet_lite0", shared / "weights" / "all-MiniLM-L6-v2"
    model = MiniClipModel.from_towers(*folders, text_pooling="mean")
    architecture = json.loads((folders[0] / "config.json").read_text())["architecture"]
    bare = timm.create_model(architecture, pretrained=False)
    bare.load_state_dict(load_file(folders[0] / "model.safetensors"))
    bare.eval().reset_classifier(0)
    bert = AutoModel.from_pretrained(folders[1]).eval()
    ids = torch.tensor([[101, 2048, 6077, 102]])
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.pool_images(pixels).pooler_output, bare(pixels))
        expected = bert(ids).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(model.pool_texts(ids, torch.ones_like(ids)).pooler_output, expected)
    assert model.visual_projection.linear.in_features == 1280 and model.text_projection.linear.in_features == 384


# --- conventions of transformers ---


def test_conventions_of_transformers_models():
    model = tiny_model()
    assert list(inspect.signature(MiniClipModel.forward).parameters)[1] == model.main_input_name == "input_ids"
    assert model.get_input_embeddings() is model.text_model.embeddings.word_embeddings
    model.resize_token_embeddings(210)
    assert model.config.text_config.vocab_size == 210 == len(model.get_input_embeddings().weight)
    assert model.config.get_text_config() is model.config.text_config


def test_model_uses_nothing_deprecated(tmp_path):
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("error", category)
        model = MiniClipModel.from_towers(*save_towers(tmp_path))
        model.train()(**tiny_inputs(model), return_loss=True).loss.backward()
        model.save_pretrained(tmp_path / "saved")
        MiniClipModel.from_pretrained(tmp_path / "saved").get_image_features(torch.zeros(1, 3, PIXELS, PIXELS))
        MiniClipModel(tiny_config("vit", "t5"))
