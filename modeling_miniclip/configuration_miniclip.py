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

TEXT_POOLINGS = ("cls", "mean", "last")
# sentence-transformers' names of the poolings, and those of `text_pooling`.
DECLARED_POOLINGS = {"cls": "cls", "mean": "mean", "mean_tokens": "mean", "lasttoken": "last"}
# The losses, each with the logarithm of its initial inverse temperature: CLIP's 1/0.07, SigLIP's 10.
LOSS_TYPES = {"softmax_sum": math.log(1 / 0.07), "softmax_mean": math.log(1 / 0.07), "sigmoid": math.log(10)}
NUMBERS = {
    "projection_dim": int,
    "projection_depth": int,
    "projection_dropout": float,
    "logit_scale_init_value": float,
    "logit_bias_init_value": float,
    "logit_scale_max": float,
}

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
        vision_config: `TimmWrapperConfig` of any timm image model, or its dictionary.
        text_config: configuration of any Hugging Face text encoder, or its dictionary.
        text_pooling: `"cls"` takes the last hidden state of the first token, `"last"` that of the last one, `"mean"`
            averages over all; padding does not count. None means `"last"` for a causal tower such as GPT-2, whose
            first token does not see the others, and `"cls"` for any other.
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
        matryoshka_dimensions: for a model trained with a loss over several lengths of its embeddings: these lengths,
            ascending, the last one `projection_dim`. The first dimensions of an embedding, normalised again, are an
            embedding, too (Kusupati et al. 2022). Others read it under this name, such as vLLM.

    Raises:
        ValueError: a value has the wrong type or is out of range, or the image tower is not a timm model.

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
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        text_pooling: str | None = None,
        projection_dim: int = 256,
        projection_depth: int = 2,
        projection_dropout: float = 0.1,
        loss_type: str = "softmax_sum",
        logit_scale_init_value: float | None = None,
        logit_bias_init_value: float = -10.0,
        logit_scale_max: float = 100.0,
        matryoshka_dimensions: list[int] | None = None,
        **kwargs: Any,
    ):
        if vision_config is None:
            vision_config = {"architecture": "resnet50.a1_in1k"}
        self.text_config = _tower_config(text_config, "distilbert")
        self.vision_config = _tower_config(vision_config, "timm_wrapper")
        causal = is_causal(self.text_config)
        if text_pooling is None:
            text_pooling = "last" if causal else "cls"
        if causal:
            self.text_config.use_cache = False  # of keys and values, which only generation needs
        self.text_pooling = text_pooling
        self.projection_dim = projection_dim
        self.projection_depth = projection_depth
        self.projection_dropout = projection_dropout
        self.loss_type = loss_type
        if logit_scale_init_value is None:
            logit_scale_init_value = LOSS_TYPES.get(str(loss_type), 0.0)  # another loss is reported below
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_bias_init_value = logit_bias_init_value
        self.logit_scale_max = logit_scale_max
        self.matryoshka_dimensions = matryoshka_dimensions
        # The towers have no classifier, so leave the thousand ImageNet labels out of config.json.
        if self.vision_config.id2label:
            self.vision_config.num_labels = 0
            for stale in ("label_names", "num_classes"):
                if hasattr(self.vision_config, stale):
                    delattr(self.vision_config, stale)
        super().__init__(**kwargs)
        self._check()

    def to_diff_dict(self) -> dict[str, Any]:
        """The values for `config.json`: like the parent's, but without the towers' defaults in each release."""
        values = super().to_diff_dict()
        for name in self.sub_configs:
            tower = getattr(self, name)
            values[name] = tower.to_diff_dict()
            values[name].pop("transformers_version", None)
            if tower.name_or_path:
                values[name]["_name_or_path"] = tower.name_or_path
        return values

    def _check(self) -> None:
        if self.text_pooling not in TEXT_POOLINGS:
            raise ValueError(f"text_pooling must be one of {', '.join(TEXT_POOLINGS)}, not {self.text_pooling!r}")
        if self.text_pooling == "cls" and is_causal(self.text_config):
            raise ValueError(
                f"text_pooling 'cls' takes the first token, which sees no other one in {self.text_config.model_type}; "
                "choose last or mean"
            )
        if self.loss_type not in tuple(LOSS_TYPES):
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {self.loss_type!r}")
        for name, kind in NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, (int, kind)) or isinstance(value, bool):
                raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r}")
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be at least 1, not {self.projection_dim}")
        if self.projection_depth < 1:
            raise ValueError(f"projection_depth must be at least 1 (a linear head), not {self.projection_depth}")
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
        if self.vision_config.model_type != "timm_wrapper":
            raise ValueError(
                f"vision_config must describe a timm image model (model_type 'timm_wrapper'), "
                f"not {self.vision_config.model_type!r}"
            )


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
    if config is None or isinstance(config, dict):
        return AutoConfig.for_model(**({"model_type": model_type} | (config or {})))
    return config


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


def text_tower_class(text_config: Any) -> Any:
    """The class that encodes text for a configuration; for an encoder-decoder such as T5, that of the encoder alone.

    Raises:
        ValueError: transformers has no text encoder for this configuration.
    """
    found = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(text_config), None)
    if found is None and not text_config.is_encoder_decoder:
        found = MODEL_MAPPING.get(type(text_config), None)
    tower_class = found[0] if isinstance(found, tuple) else found  # Funnel has a second class, for its decoder
    modalities = getattr(tower_class, "input_modalities", "text")  # transformers 4 does not say
    if tower_class is None or "text" not in modalities or "image" in modalities:
        raise ValueError(
            f"transformers has no text encoder for a {type(text_config).__name__} (model_type "
            f"{text_config.model_type!r}); choose one such as BERT, RoBERTa, MPNet, ModernBERT or T5"
        )
    return tower_class


def without_pooler(tower_class: Any) -> dict[str, bool]:
    """Keyword arguments that build a text tower without its pooler; empty if the class has none.

    The pooler of BERT would never get a gradient here, and DistributedDataParallel does not allow that.
    """
    has_pooler = "add_pooling_layer" in signature(tower_class.__init__).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


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
