"""Configuration of a MiniCLIP model: two towers, two projection heads, a temperature.

The files `*_miniclip.py` travel with every export and run under each release of transformers from 4.57 on: they use
only names that all of these have, and import nothing else but files that import no other of them.
"""

import difflib
import json
import math
import os
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import timm
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PretrainedConfig,
    TimmWrapperConfig,
)
from transformers.utils import cached_file

VISION_POOLINGS = ("pooler", "cls")
TEXT_POOLINGS = ("cls", "mean", "last", "eos", "pooler")
# sentence-transformers' names of the poolings, and those of `text_pooling`.
DECLARED_POOLINGS = {"cls": "cls", "mean": "mean", "mean_tokens": "mean", "lasttoken": "last"}
# The losses, each with the logarithm of its initial inverse temperature: CLIP's 1/0.07, SigLIP's 10.
LOSS_TYPES = {"softmax_sum": math.log(1 / 0.07), "softmax_mean": math.log(1 / 0.07), "sigmoid": math.log(10)}
NUMBERS = {
    "projection_dim": int,
    "projection_dropout": float,
    "logit_scale_init_value": float,
    "logit_bias_init_value": float,
    "logit_scale_max": float,
}

# Image towers whose feature is the class token, as they have no pooler or one that is often not trained.
CLASS_TOKEN_TOWERS = frozenset("deit dpt flava_image_model git_vision_model vit vit_msn yolos".split())
# Text towers with a layer for their pooled output that is always built, and would never learn with another pooling.
POOLED_TEXTS = frozenset("altclip_text_model siglip_text_model siglip2_text_model".split())
# Configurations that older releases have, but do not find by their type.
UNLISTED = {
    f"{family}_{tower}_model": f"{name}{tower.capitalize()}Config"
    for family, name in {"altclip": "AltCLIP", "chinese_clip": "ChineseCLIP", "metaclip_2": "MetaClip2",
                         "siglip": "Siglip", "siglip2": "Siglip2"}.items()
    for tower in ("text", "vision")
}  # fmt: skip
# Attributes of a configuration with the width of the pooled feature, in the order of preference.
VISION_WIDTHS = ("hidden_size", "hidden_dim", "neck_hidden_sizes", "hidden_sizes")
TEXT_WIDTHS = ("projection_size", "project_dim", "hidden_size")  # those of SigLIP and AltCLIP, and of any other tower

# Causal text towers that have no language model in transformers, and language models that are not causal.
CAUSAL_ENCODERS = frozenset(
    f"{name}_text_model" for name in "clip clipseg groupvit metaclip_2 owlv2 owlvit xclip".split()
)
NOT_CAUSAL = frozenset(("bert-generation", "cpmant", "xlnet"))


def is_causal(text_config: Any) -> bool:
    """Whether a token of this text tower sees only the tokens before it, as in GPT-2."""
    kind, name = type(text_config), getattr(text_config, "model_type", None)
    if name in CAUSAL_ENCODERS:
        return True
    if name in NOT_CAUSAL or getattr(text_config, "use_bidirectional_attention", False):
        return False
    in_one_mapping = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    return in_one_mapping and not text_config.is_encoder_decoder


class MiniClipConfig(PretrainedConfig):
    """Configuration of a [`MiniClipModel`]. The default is timm's ResNet-50 and DistilBERT in a 256-d space.

    Args:
        vision_config: `TimmWrapperConfig` of any timm image model, or the configuration of an image encoder of
            transformers with a pooled feature or a class token, such as `CLIPVisionConfig`; or its dictionary.
        text_config: configuration of any Hugging Face text encoder, or its dictionary.
        vision_pooling: `"pooler"` takes the image tower's own pooled feature, `"cls"` the last hidden state of its
            class token. None means `"cls"` for ViT, DeiT and the others in `CLASS_TOKEN_TOWERS`, whose pooler is
            missing or often untrained, and `"pooler"` for any other.
        text_pooling: `"cls"` takes the last hidden state of the first token, `"last"` that of the last one, `"mean"`
            averages over all; padding does not count. `"eos"` takes the end token as CLIP does: the first
            `text_config.eos_token_id`, or if that is 2, as in old files, the token with the largest number.
            `"pooler"` takes the tower's own pooled output. None means `"pooler"` for the towers of SigLIP and AltCLIP,
            `"last"` for a causal tower such as GPT-2, whose first token does not see the others, and `"cls"` for any
            other.
        text_length: number of tokens to which the model pads every text with `text_config.pad_token_id`; the padding
            then counts as text, as SigLIP was trained. None means that padding does not count.
        projection_dim: number of dimensions of the shared space.
        projection_depth: number of linear layers in each head, or in a list, that of the image head and that of the
            text head. 0 is no head, as in SigLIP; the tower must then have `projection_dim` features. 1 is a linear
            projection, as in CLIP; 2 is linear, GELU, linear, dropout, residual, layer norm; more layers repeat the
            residual block.
        projection_bias: whether the first layer of a head has a bias; a list as for `projection_depth`. None means
            that it has one if more layers follow.
        projection_dropout: dropout probability in the residual blocks of the heads, in [0, 1).
        loss_type: `"softmax_sum"` and `"softmax_mean"` are CLIP's cross-entropy over the batch; for an image with
            several captions they take the logarithm of the summed probability, or the mean of the log-probabilities.
            `"sigmoid"` is SigLIP's loss, a binary decision for each pair.
        logit_scale_init_value: logarithm of the initial inverse temperature; None means ln(1/0.07) as in CLIP, or
            ln(10) as in SigLIP for `"sigmoid"`.
        logit_bias_init_value: initial value of the bias that `"sigmoid"` adds to its logits; -10 as in SigLIP.
        logit_scale_max: upper bound of the inverse temperature (not of its logarithm); 100 as in CLIP.
        matryoshka_dimensions: for a model trained with a loss over several lengths of its embeddings: these lengths,
            ascending, the last one `projection_dim`. The first dimensions of an embedding, normalised again, are an
            embedding, too (Kusupati et al. 2022). Others read it under this name, such as vLLM.
        projection_hidden: units of a hidden layer with GELU before the first layer of a head, as in open_clip's
            two-layer heads; a list as for `projection_depth`. None is no such layer.
        projection_hidden_bias: whether that layer has a bias; a list as for `projection_depth`. None means yes.

    Raises:
        ValueError: a value has the wrong type or is out of range, or the image tower is no image encoder.

    Examples:
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
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        vision_pooling: str | None = None,
        text_pooling: str | None = None,
        text_length: int | None = None,
        projection_dim: int = 256,
        projection_depth: int | list[int] = 2,
        projection_bias: bool | list[bool] | None = None,
        projection_dropout: float = 0.1,
        loss_type: str = "softmax_sum",
        logit_scale_init_value: float | None = None,
        logit_bias_init_value: float = -10.0,
        logit_scale_max: float = 100.0,
        matryoshka_dimensions: list[int] | None = None,
        projection_hidden: int | list[int | None] | None = None,
        projection_hidden_bias: bool | list[bool | None] | None = None,
        **kwargs: Any,
    ):
        if vision_config is None:
            vision_config = {"architecture": "resnet50.a1_in1k"}
        self.text_config = _tower_config(text_config, "distilbert")
        self.vision_config = _tower_config(vision_config, "timm_wrapper")
        if vision_pooling is None:
            vision_pooling = "cls" if self.vision_config.model_type in CLASS_TOKEN_TOWERS else "pooler"
        causal = is_causal(self.text_config)
        if text_pooling is None:
            text_pooling = "last" if causal else "cls"
            if self.text_config.model_type in POOLED_TEXTS:
                text_pooling = "pooler"
        if causal and hasattr(self.text_config, "use_cache"):
            self.text_config.use_cache = False  # of keys and values, which only generation needs
        self.vision_pooling = vision_pooling
        self.text_pooling = text_pooling
        self.text_length = text_length
        self.projection_dim = projection_dim
        self.projection_depth = projection_depth
        self.projection_bias = projection_bias
        self.projection_dropout = projection_dropout
        self.loss_type = loss_type
        if logit_scale_init_value is None:
            logit_scale_init_value = LOSS_TYPES.get(str(loss_type), 0.0)  # another loss is reported below
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_bias_init_value = logit_bias_init_value
        self.logit_scale_max = logit_scale_max
        self.matryoshka_dimensions = matryoshka_dimensions
        self.projection_hidden = projection_hidden
        self.projection_hidden_bias = projection_hidden_bias
        # The towers have no classifier, so leave the thousand ImageNet labels out of config.json.
        if self.vision_config.id2label:
            self.vision_config.num_labels = 0
            for stale in ("label_names", "num_classes"):
                if hasattr(self.vision_config, stale):
                    delattr(self.vision_config, stale)
        super().__init__(**kwargs)
        self._check()

    def to_diff_dict(self) -> dict[str, Any]:
        """The values for `config.json`.

        Returns:
            Like the parent's, but without the towers' defaults in each release.
        """
        values = super().to_diff_dict()
        for name in self.sub_configs:
            tower = getattr(self, name)
            values[name] = tower.to_diff_dict()
            values[name].pop("transformers_version", None)
            if tower.name_or_path:
                values[name]["_name_or_path"] = tower.name_or_path
        return values

    def heads(self) -> list[dict[str, Any]]:
        """What the projection heads consist of.

        Returns:
            `depth`, `bias`, `hidden` and `hidden_bias` of the image head, and of the text head.
        """
        values = (self.projection_depth, self.projection_bias, self.projection_hidden, self.projection_hidden_bias)
        return [
            {
                "depth": depth,
                "bias": depth > 1 if bias is None else bias,
                "hidden": hidden,
                "hidden_bias": True if hidden_bias is None else hidden_bias,
            }
            for depth, bias, hidden, hidden_bias in zip(*map(_pair, values), strict=True)
        ]

    def _check(self) -> None:
        self._check_towers()
        if self.loss_type not in tuple(LOSS_TYPES):
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {self.loss_type!r}")
        for name, kind in NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, (int, kind)) or isinstance(value, bool):
                raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r}")
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be at least 1, not {self.projection_dim}")
        self._check_heads()
        if not 0 <= self.projection_dropout < 1:
            raise ValueError(f"projection_dropout must be in [0, 1), not {self.projection_dropout}")
        if not self.logit_scale_max > 0:
            raise ValueError(f"logit_scale_max must be positive, not {self.logit_scale_max}")
        start = self.logit_scale_init_value
        if start > math.log(self.logit_scale_max):
            raise ValueError(
                f"logit_scale_init_value must be at most ln(logit_scale_max) = {math.log(self.logit_scale_max):.4g}, "
                f"not {start}: a clamped temperature gets no gradient"
            )
        dims = self.matryoshka_dimensions
        if dims is not None and not _ascends_to(dims, self.projection_dim):
            raise ValueError(
                f"matryoshka_dimensions must be ascending whole numbers that end with projection_dim "
                f"({self.projection_dim}), not {dims!r}"
            )

    def _check_heads(self) -> None:
        for name, least, is_optional in (
            ("projection_depth", 0, False),
            ("projection_bias", None, True),
            ("projection_hidden", 1, True),
            ("projection_hidden_bias", None, True),
        ):
            value = getattr(self, name)
            pair, kind = _pair(value), bool if least is None else int
            given = [one for one in pair if one is not None or not is_optional]
            if len(pair) != 2 or any(type(one) is not kind or (least is not None and one < least) for one in given):
                known = {None: "true or false", 0: "at least 0 (no head; 1: a linear head)", 1: "at least 1"}[least]
                raise ValueError(f"{name} must be {known}, or a list for the image and the text head, not {value!r}")
        if any(head["hidden"] and not head["depth"] for head in self.heads()):
            raise ValueError("projection_hidden needs a head: set projection_depth to 1")

    def _check_towers(self) -> None:
        vision, text = self.vision_config, self.text_config
        for name, known in (("vision_pooling", VISION_POOLINGS), ("text_pooling", TEXT_POOLINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if vision.model_type == "timm_wrapper":
            has_class_token = False
        else:
            has_class_token = vision.model_type in CLASS_TOKEN_TOWERS or has_pooler_switch(vision_tower_class(vision))
        if self.vision_pooling == "cls" and not has_class_token:
            raise ValueError(f"vision_pooling 'cls' is not possible with {tower_name(vision)}; leave it out")
        if self.text_pooling == "cls" and is_causal(text):
            raise ValueError(
                f"text_pooling 'cls' takes the first token, which sees no other one in {text.model_type}; "
                "choose last or mean"
            )
        if self.text_pooling != "pooler" and text.model_type in POOLED_TEXTS:
            raise ValueError(f"text_pooling must be pooler for {text.model_type}, not {self.text_pooling!r}")
        if self.text_length is not None and (type(self.text_length) is not int or self.text_length < 1):
            raise ValueError(f"text_length must be a number of tokens, at least 1, not {self.text_length!r}")
        used = {"text_pooling 'eos'": ("eos_token_id", self.text_pooling == "eos"),
                "text_length": ("pad_token_id", self.text_length is not None)}  # fmt: skip
        for field, (token, is_used) in used.items():
            if is_used and not isinstance(getattr(text, token, None), int):
                raise ValueError(f"{field} needs a number as text_config.{token}, not {getattr(text, token, None)!r}")


def _pair(value: Any) -> list[Any]:
    """The values for the image head and for the text head."""
    return value if isinstance(value, list) else [value, value]


def _ascends_to(dims: Any, last: int) -> bool:
    """Whether these are positive whole numbers, each larger than the one before, that end with `last`."""
    if not isinstance(dims, (list, tuple)) or not all(type(dim) is int and dim > 0 for dim in dims):
        return False
    return list(dims) == sorted(set(dims)) and list(dims[-1:]) == [last]


class Origin(dict[str, Any]):
    """Arguments of `from_pretrained` that find a model's processor. A pickle leaves out the token."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, ({name: value for name, value in self.items() if name != "token"},)

    def __deepcopy__(self, memo: Any) -> "Origin":
        return self


TOWERS = tuple(MiniClipConfig.sub_configs)
FIELDS = tuple(name for name in list(signature(MiniClipConfig.__init__).parameters)[1:-1] if name not in TOWERS)


def _tower_config(config: Any, model_type: str) -> Any:
    if config is not None and not isinstance(config, dict):
        return config
    values = {"model_type": model_type} | (config or {})
    unlisted = UNLISTED.get(values["model_type"])
    if unlisted is not None and values["model_type"] not in transformers.CONFIG_MAPPING:
        return getattr(transformers, unlisted)(**{name: values[name] for name in values if name != "model_type"})
    return AutoConfig.for_model(**values)


def timm_config(name: str) -> TimmWrapperConfig:
    """Configuration of a pretrained timm model, with `name_or_path` set to where its weights are.

    Args:
        name: local folder, Hub repository (`timm/resnet50.a1_in1k`) or timm name (`resnet50`, `resnet50.a1_in1k`);
            a name without a tag means timm's default weights.

    Raises:
        ValueError: timm has no such model (the message suggests similar names) or no weights for it on the Hub, or
            the folder or repository holds something else.
        OSError: the folder or repository cannot be read.
    """
    changes = {}
    if os.path.isdir(name) or "/" in name:
        source = name
        if "architecture" not in TimmWrapperConfig.get_config_dict(source)[0]:
            raise ValueError(f"{source} is not a timm image model: its config.json names no architecture")
    else:
        names = timm.list_pretrained() + timm.list_models()
        pretrained_cfg = timm.get_pretrained_cfg(name) if name in names else None
        if pretrained_cfg is None or not pretrained_cfg.hf_hub_id:
            near = difflib.get_close_matches(name, names, n=3)
            hint = f"; similar names: {', '.join(near)}" if near else ""
            raise ValueError(f"{name!r} is neither a folder nor a timm model with weights on the Hub{hint}")
        source = pretrained_cfg.hf_hub_id
        # Architectures that share weights (CLIP towers with GELU and quick GELU) share a repository.
        changes["architecture"] = pretrained_cfg.architecture
    config = TimmWrapperConfig.from_pretrained(source, **changes)
    config.name_or_path = source
    return config


def vision_tower_config(name: str) -> Any:
    """Configuration of a pretrained image tower, with `name_or_path` set to where its weights are.

    Args:
        name: as for [`timm_config`], or local folder or Hub repository of an image encoder of transformers.

    Raises:
        ValueError: there is no such model, or it is no image encoder. Code of the repository is never run.
        OSError: the folder or repository cannot be read.
    """
    is_source = os.path.isdir(name) or "/" in name
    if not is_source or "architecture" in (found := TimmWrapperConfig.get_config_dict(name)[0]):
        return timm_config(name)
    if "model_type" not in found:
        raise ValueError(
            f"{name} is neither a timm image model nor an image encoder of transformers: its config.json names no "
            "architecture and no model_type"
        )
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    vision_tower_class(config)
    config.name_or_path = name
    return config


def tower_name(config: Any) -> str:
    """The architecture of a timm model, the type of any other tower."""
    return str(getattr(config, "architecture", None) or config.model_type)


def _model_class(config: Any) -> Any:
    # The class in the mapping, or named like the configuration, such as SiglipTextModel, which is in none.
    found = MODEL_MAPPING.get(type(config), None)
    if found is None:
        return getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    return found[0] if isinstance(found, tuple) else found  # Funnel has a second class, for its decoder


def vision_tower_class(vision_config: Any) -> Any:
    """The class of transformers that encodes images for a configuration other than timm's.

    Raises:
        ValueError: transformers has no class for this configuration that takes an image and nothing else.
    """
    found, hint = _model_class(vision_config), ""
    inputs = signature(found.forward).parameters.values() if found else ()
    required = [p.name for p in inputs if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [name for name in required if name not in ("self", "pixel_values")]
    takes_video = "video" in getattr(found, "input_modalities", "")
    is_encoder = found is not None and found.main_input_name == "pixel_values" and not vision_config.is_encoder_decoder
    if takes_video or not is_encoder:
        hint = "; choose one such as that of CLIP or SigLIP, ViT, DINOv2, BEiT, Swin or ConvNeXt, or a timm model"
    elif needed:
        hint = f": its {found.__name__} also needs {', '.join(needed)}"
    elif hasattr(vision_config, "mask_ratio"):
        hint = f": its {found.__name__} hides most of an image at random; open its weights as a ViT"
    if hint:
        raise ValueError(
            f"vision_config: transformers has no image encoder for a {type(vision_config).__name__} (model_type "
            f"{vision_config.model_type!r}){hint}"
        )
    return found


def text_tower_class(text_config: Any) -> Any:
    """The class that encodes text for a configuration; for an encoder-decoder such as T5, that of the encoder alone.

    Raises:
        ValueError: transformers has no text encoder for this configuration.
    """
    tower_class = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(text_config), None)
    if tower_class is None and not text_config.is_encoder_decoder:
        tower_class = _model_class(text_config)
    modalities = getattr(tower_class, "input_modalities", "text")  # transformers 4 does not say
    if tower_class is None or "text" not in modalities or "image" in modalities:
        raise ValueError(
            f"transformers has no text encoder for a {type(text_config).__name__} (model_type "
            f"{text_config.model_type!r}); choose one such as BERT, RoBERTa, MPNet, ModernBERT or T5"
        )
    return tower_class


def has_pooler_switch(tower_class: Any) -> bool:
    """Whether a tower can be built without its pooler."""
    return "add_pooling_layer" in signature(tower_class.__init__).parameters


def pooler_switch(tower_class: Any, pooling: str) -> dict[str, bool]:
    """Keyword arguments that build a tower with its pooler only if that is used; empty if the class has no choice.

    An unused pooler, such as BERT's, would never get a gradient, and DistributedDataParallel does not allow that.
    """
    return {"add_pooling_layer": pooling == "pooler"} if has_pooler_switch(tower_class) else {}


def width_of(config: Any, names: tuple[str, ...]) -> int:
    """Width of a tower's pooled feature.

    Raises:
        ValueError: the configuration has none of the attributes.
    """
    found = next((value for name in names if (value := getattr(config, name, None))), None)
    if found is None:
        raise ValueError(f"cannot tell the width of the features of {config.model_type}; choose another tower")
    return found if isinstance(found, int) else int(found[-1])


def counts_positions(text_config: Any) -> bool:
    """Whether a tower takes positions that leave out the padding in front of a text, as decoders do for generation."""
    return is_causal(text_config) and "position_ids" in signature(text_tower_class(text_config).forward).parameters


def declared_pooling(source: str | os.PathLike) -> str | None:
    """The `text_pooling` that a text tower's repository declares for sentence-transformers.

    Args:
        source: Hub name or local folder of the text tower.

    Returns:
        A value of `text_pooling`; None if nothing is declared, or if nobody knows because the Hub cannot be reached,
        with a warning.

    Raises:
        ValueError: it declares a pooling that `text_pooling` lacks, such as the maximum over the tokens.
    """

    def read(name: str) -> Any:
        quiet = [
            f"_raise_exceptions_for_{reason}" for reason in ("missing_entries", "connection_errors", "gated_repo")
        ]
        path = cached_file(source, name, **dict.fromkeys(quiet, False))
        if path is None and not os.path.isdir(source) and try_to_load_from_cache(str(source), name) is None:
            warnings.warn(
                f"{source}: {name} cannot be read from the Hub, so the pooling that it may declare is unknown: set "
                "text_pooling, or connect once",
                stacklevel=3,
            )
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None

    folders = [module["path"] for module in read("modules.json") or () if module["type"].endswith(".Pooling")]
    fields = read(f"{folders[0]}/config.json") if folders else None
    if fields is None:
        return None
    # A single name in recent files; in older ones a flag for each name, of which only the mean is on by default.
    flags = {"pooling_mode_mean_tokens": True} | fields
    names = [name.removeprefix("pooling_mode_") for name in flags if flags[name] is True and "pooling_mode_" in name]
    declared = str(fields.get("pooling_mode", "+".join(names)))
    if declared.removesuffix("_token") not in DECLARED_POOLINGS:
        raise ValueError(
            f"{source} declares the pooling {declared!r} ({folders[0]}/config.json), which is not supported; "
            f"set text_pooling to one of {', '.join(TEXT_POOLINGS)}"
        )
    return DECLARED_POOLINGS[declared.removesuffix("_token")]


__all__ = ["MiniClipConfig"]
