"""Configuration of a MiniCLIP model: two towers, two projection heads, a temperature."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

TEXT_POOLINGS = ("cls", "mean")
# The losses, each with the logarithm of its initial inverse temperature: CLIP's 1/0.07, SigLIP's 10.
LOSS_TYPES = {"softmax_sum": math.log(1 / 0.07), "softmax_mean": math.log(1 / 0.07), "sigmoid": math.log(10)}


@strict
class MiniClipConfig(PreTrainedConfig):
    """Configuration of a [`MiniClipModel`]. The default is timm's ResNet-50 and DistilBERT in a 256-d space.

    Args:
        vision_config: `TimmWrapperConfig` of any timm image model, or its dictionary.
        text_config: configuration of any Hugging Face text encoder, or its dictionary.
        text_pooling: `"cls"` takes the last hidden state of the first token, `"mean"` averages over all tokens except
            padding.
        projection_dim: number of dimensions of the shared space.
        projection_depth: number of linear layers in each head. 1 is a linear projection without bias, as in CLIP; 2 is
            linear, GELU, linear, dropout, residual, layer norm; more layers repeat the residual block.
        projection_dropout: dropout probability in the residual blocks of the heads, in [0, 1).
        loss_type: `"softmax_sum"` and `"softmax_mean"` are CLIP's cross-entropy over the batch; for an image with
            several captions they take the logarithm of the summed probability, or the mean of the log-probabilities.
            `"sigmoid"` is SigLIP's loss, a binary decision for each pair.
        logit_scale_init_value: logarithm of the initial inverse temperature; None means ln(1/0.07) as in CLIP, or
            ln(10) as in SigLIP for `"sigmoid"`.
        logit_bias_init_value: initial value of the bias that `"sigmoid"` adds to its logits; -10 as in SigLIP.
        logit_scale_max: upper bound of the inverse temperature (not of its logarithm); 100 as in CLIP.

    Raises:
        StrictDataclassError: a value has the wrong type or is out of range, or the image tower is not a timm model.

    Example:
        >>> from modeling_miniclip import MiniClipConfig
        >>> config = MiniClipConfig(projection_dim=128, text_pooling="mean")
        >>> config.vision_config.architecture, config.text_config.model_type
        ('resnet50.a1_in1k', 'distilbert')
    """

    model_type = "miniclip"
    # Trainer's evaluation keeps the embeddings, but not the outputs of the towers or the logits within each batch.
    keys_to_ignore_at_inference = [
        "logits_per_image",
        "logits_per_text",
        "text_model_output",
        "vision_model_output",
        "logit_scale",
        "logit_bias",
    ]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="distilbert"),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="timm_wrapper", init_kwargs={"architecture": "resnet50.a1_in1k"}
        ),
    }

    # Passed as a configuration, a dictionary or None; always a configuration in the finished object.
    text_config: Any = None
    vision_config: Any = None
    text_pooling: str = "cls"
    projection_dim: int = 256
    projection_depth: int = 2
    projection_dropout: int | float = 0.1
    loss_type: str = "softmax_sum"
    logit_scale_init_value: int | float | None = None
    logit_bias_init_value: int | float = -10.0
    logit_scale_max: int | float = 100.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.logit_scale_init_value is None:
            self.logit_scale_init_value = LOSS_TYPES.get(self.loss_type)
        # The towers have no classifier, so leave the thousand ImageNet labels out of config.json.
        if self.vision_config.id2label:
            self.vision_config.num_labels = 0
            for stale in ("label_names", "num_classes"):
                if hasattr(self.vision_config, stale):
                    delattr(self.vision_config, stale)

    def validate_architecture(self) -> None:
        """Part of the `@strict` validation: checks ranges and choices, and reports the wrong value."""
        super().validate_architecture()
        if self.text_pooling not in TEXT_POOLINGS:
            raise ValueError(f"text_pooling must be one of {', '.join(TEXT_POOLINGS)}, not {self.text_pooling!r}")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {self.loss_type!r}")
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be at least 1, not {self.projection_dim}")
        if self.projection_depth < 1:
            raise ValueError(f"projection_depth must be at least 1 (a linear head), not {self.projection_depth}")
        if not 0 <= self.projection_dropout < 1:
            raise ValueError(f"projection_dropout must be in [0, 1), not {self.projection_dropout}")
        if not self.logit_scale_max > 0:
            raise ValueError(f"logit_scale_max must be positive, not {self.logit_scale_max}")
        start = self.logit_scale_init_value
        if start is not None and start > math.log(self.logit_scale_max):
            raise ValueError(
                f"logit_scale_init_value must be at most ln(logit_scale_max) = {math.log(self.logit_scale_max):.4g}, "
                f"not {start}: a clamped temperature gets no gradient"
            )
        if isinstance(self.vision_config, PreTrainedConfig) and self.vision_config.model_type != "timm_wrapper":
            raise ValueError(
                f"vision_config must describe a timm image model (model_type 'timm_wrapper'), "
                f"not {self.vision_config.model_type!r}"
            )


__all__ = ["MiniClipConfig"]
