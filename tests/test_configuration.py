"""The configuration: defaults, ranges and types, towers in any form, round trips."""

import json
import math

import pytest
import torch
from transformers import BertConfig, DistilBertConfig, TimmWrapperConfig

from modeling_miniclip import MiniClipConfig, MiniClipModel
from tests.helpers.towers import EVERY_PAIR, text_config, tiny_config, vision_config


def test_default_is_resnet50_and_distilbert_in_256_dimensions():
    with torch.device("meta"):
        model = MiniClipModel(MiniClipConfig())
    assert model.config.vision_config.architecture == "resnet50.a1_in1k"
    # distilbert-base-uncased: 66,362,880 parameters; ResNet-50 without its classifier: 23,508,032
    assert sum(p.numel() for p in model.text_model.parameters()) == 66_362_880
    assert sum(p.numel() for p in model.vision_model.parameters()) == 23_508_032
    for head, width in ((model.visual_projection, 2048), (model.text_projection, 768)):
        shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
        assert shapes == {
            "linear.weight": (256, width),
            "linear.bias": (256,),
            "blocks.0.linear.weight": (256, 256),
            "blocks.0.linear.bias": (256,),
            "blocks.0.layer_norm.weight": (256,),
            "blocks.0.layer_norm.bias": (256,),
        }
        assert head.blocks[0].dropout.p == 0.1
    assert model.config.text_pooling == "cls"
    assert math.exp(model.config.logit_scale_init_value) == pytest.approx(1 / 0.07)
    assert model.config.logit_scale_max == 100


@pytest.mark.parametrize(("vision", "text"), EVERY_PAIR)
def test_round_trip_through_json_keeps_every_value(vision, text, tmp_path):
    config = tiny_config(vision, text, text_pooling="mean", projection_depth=3, projection_dropout=0.25)
    config.save_pretrained(tmp_path)
    loaded = MiniClipConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.text_config) is type(config.text_config)
    assert type(loaded.vision_config) is TimmWrapperConfig
    again = MiniClipConfig.from_dict(json.loads(json.dumps(config.to_dict(), default=str)))
    assert again.to_diff_dict() == config.to_diff_dict()
    assert (loaded.text_pooling, loaded.projection_depth, loaded.projection_dropout) == ("mean", 3, 0.25)
    assert MiniClipConfig.from_pretrained(tmp_path, projection_dim=7).projection_dim == 7


def test_initial_temperature_is_that_of_the_paper():
    for loss_type, start in (("softmax_sum", 1 / 0.07), ("softmax_mean", 1 / 0.07), ("sigmoid", 10)):
        assert math.exp(MiniClipConfig(loss_type=loss_type).logit_scale_init_value) == pytest.approx(start)
    config = MiniClipConfig(loss_type="sigmoid", logit_scale_init_value=1.0, logit_bias_init_value=-3)
    loaded = MiniClipConfig.from_dict(json.loads(config.to_json_string()))
    assert (loaded.loss_type, loaded.logit_scale_init_value, loaded.logit_bias_init_value) == ("sigmoid", 1.0, -3)


def test_towers_may_be_configurations_dictionaries_or_left_out():
    as_dict = MiniClipConfig(
        vision_config=vision_config("vit").to_dict(), text_config={"model_type": "bert", "hidden_size": 48}
    )
    assert (
        as_dict.vision_config.to_dict() == MiniClipConfig(vision_config=vision_config("vit")).vision_config.to_dict()
    )
    assert isinstance(as_dict.text_config, BertConfig) and as_dict.text_config.hidden_size == 48
    without_type = MiniClipConfig(vision_config={"architecture": "vit_tiny_patch16_224"}, text_config={"dim": 64})
    assert isinstance(without_type.text_config, DistilBertConfig) and without_type.text_config.hidden_size == 64
    assert without_type.vision_config.architecture == "vit_tiny_patch16_224"


def test_two_configurations_share_no_tower():
    first, second = MiniClipConfig(), MiniClipConfig()
    first.text_config.dim = 5
    assert second.text_config.dim == 768


def test_config_json_holds_no_label_names(tmp_path):
    MiniClipConfig().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "LABEL_" not in text and "tench" not in text and len(text) < 3000
    imagenet = TimmWrapperConfig.from_dict({"architecture": "resnet18", "num_classes": 1000})
    assert MiniClipConfig(vision_config=imagenet).vision_config.num_labels == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_pooling", "max"),
        ("projection_dim", 0),
        ("projection_depth", -1),
        ("projection_depth", [1]),
        ("projection_depth", [1, True]),
        ("projection_bias", 1),
        ("projection_bias", [None, "no"]),
        ("projection_hidden", 0),
        ("projection_hidden", [8]),
        ("projection_hidden", [None, 8.0]),
        ("projection_hidden_bias", 1),
        ("vision_pooling", "mean"),
        ("vision_pooling", "cls"),  # timm's own pooling decides
        ("text_length", 0),
        ("text_length", "64"),
        ("projection_dropout", 1.0),
        ("projection_dropout", -0.1),
        ("loss_type", "hinge"),
        ("logit_bias_init_value", "ten"),
        ("logit_scale_max", 0),
        ("logit_scale_init_value", 4.7),  # beyond ln(100) = 4.605
        ("vision_config", BertConfig()),
        # wrong types
        ("projection_dim", "256"),
        ("projection_depth", 1.5),
        ("projection_dropout", "0.1"),
        ("text_pooling", 3),
        ("logit_scale_max", None),
        ("matryoshka_dimensions", [64]),
        ("matryoshka_dimensions", 256),
    ],
)
def test_wrong_value_or_type_error_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        MiniClipConfig(**{field: value})


def test_limits_of_the_ranges_are_accepted():
    config = MiniClipConfig(
        projection_dim=1, projection_depth=1, projection_dropout=0, logit_scale_init_value=math.log(100)
    )
    assert config.projection_dropout == 0
    assert MiniClipConfig(text_config=text_config("t5")).text_config.hidden_size == 32
