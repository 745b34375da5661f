"""Upstream's common tests of models, for MiniCLIP models of several families of towers."""

import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import (
    ModelTesterMixin,
    floats_tensor,
    ids_tensor,
    random_attention_mask,
)
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_miniclip import MiniClipConfig
from modeling_miniclip.modeling_miniclip import MiniClipModel
from tests.conformance.skips import FAILING, SWITCHED_OFF
from tests.helpers.towers import CLIP, PIXELS, SIGLIP, tiny_config


class TextTowerOutput(MiniClipModel):
    """A MiniCLIP model whose output is that of its text tower, for tests that look for hidden states at the top."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs).text_model_output


class TinyModels:
    """Configurations and inputs, with the attributes by which the tests ask for sizes."""

    batch_size, seq_length = 4, 7
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32  # of every text tower in tests/helpers/towers.py
    is_training = True

    def __init__(self, vision: str, text: str, **fields: Any):
        self.vision, self.text, self.fields = vision, text, fields

    def get_config(self) -> MiniClipConfig:
        config = tiny_config(self.vision, self.text, **self.fields)
        if self.vision == "vit":  # its width as it is, where the tests look for it
            config.vision_config.model_args = {**config.vision_config.model_args, "embed_dim": 64}
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[MiniClipConfig, dict[str, Any]]:
        return self.get_config(), {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], 200),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
            "pixel_values": floats_tensor([self.batch_size, 3, PIXELS, PIXELS]),
            "return_loss": True,
        }


class MiniClipTests(ModelTesterMixin):
    """Settings of upstream's tests of a CLIP-like model, and overrides of four of them that expect something else."""

    all_model_classes = (MiniClipModel,)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # upstream asks it of models whose source is dated later
    vision, text = "resnet", "distilbert"
    fields: dict[str, Any] = {}
    image_stages = 5  # feature maps in the hidden states of the image tower

    def setUp(self) -> None:
        self.model_tester = TinyModels(self.vision, self.text, **self.fields)
        self.config_tester = ConfigTester(
            self, config_class=MiniClipConfig, has_text_modality=False, common_properties=["projection_dim"]
        )

    @contextmanager
    def of_the_text_tower(self) -> Iterator[None]:
        # Like CLIP's, the output holds those of the towers and has no own hidden states.
        with patch.object(self, "all_model_classes", (TextTowerOutput,)):
            yield

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_attention_outputs(self) -> None:
        with self.of_the_text_tower():
            super().test_attention_outputs()

    def test_hidden_states_output(self) -> None:
        with self.of_the_text_tower():
            super().test_hidden_states_output()

    def test_retain_grad_hidden_states_attentions(self) -> None:
        with self.of_the_text_tower():
            super().test_retain_grad_hidden_states_attentions()

    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        tolerant = partial(MiniClipModel.from_pretrained, allow_missing=True)
        with patch.object(MiniClipModel, "from_pretrained", tolerant):
            super().test_model_weights_reload_no_missing_tied_weights()

    def _image_features_get_expected_num_hidden_states(self, model_tester: Any = None) -> int:
        return self.image_stages


for _name, _reason in FAILING.items():
    setattr(MiniClipTests, _name, pytest.mark.xfail(reason=_reason, strict=True)(getattr(MiniClipTests, _name)))
for _name in SWITCHED_OFF:
    setattr(MiniClipTests, _name, True)


class ResNetDistilBertTest(MiniClipTests, unittest.TestCase):
    pass


class ViTBertTest(MiniClipTests, unittest.TestCase):
    vision, text, image_stages = "vit", "bert", 6
    skip_test_image_features_output_shape = False


class ConvNextModernBertTest(MiniClipTests, unittest.TestCase):
    vision, text, image_stages = "convnext", "modernbert", 4
    fields = {"text_pooling": "mean", "projection_depth": 1, "loss_type": "sigmoid"}


class EfficientNetRobertaTest(MiniClipTests, unittest.TestCase):
    vision, text = "efficientnet", "roberta"


class SwinT5Test(MiniClipTests, unittest.TestCase):
    vision, text, image_stages = "swin", "t5", 2


class ClipTest(MiniClipTests, unittest.TestCase):
    (vision, text, fields), image_stages = CLIP, 3
    skip_test_image_features_output_shape = False


class SiglipTest(MiniClipTests, unittest.TestCase):
    vision, text, image_stages = *SIGLIP[:2], 3
    fields = SIGLIP[2] | {"text_length": TinyModels.seq_length}
    skip_test_image_features_output_shape = False


class OverfitTest(TrainingTesterMixin, unittest.TestCase):
    """Upstream's text, with the images that it describes: the loss of two pairs has to fall by nine tenths."""

    all_model_classes = (MiniClipModel,)

    @property
    def model_tester(self) -> TinyModels:
        return TinyModels("resnet", "distilbert", vocab_size=200)

    def _create_text_training_batch(self, batch_size: int, seq_length: int, vocab_size: int) -> dict[str, Any]:
        return {
            "input_ids": ids_tensor([batch_size, 24], vocab_size),
            "pixel_values": floats_tensor([batch_size, 3, PIXELS, PIXELS]),
            "return_loss": True,
        }
