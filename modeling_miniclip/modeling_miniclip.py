"""MiniCLIP: an image tower and a text tower, with projection heads into a shared space.

The functions are in the order in which data passes through them.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, TimmWrapperModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import (
    ModelOutput,
    TransformersKwargs,
    cached_file,
    can_return_tuple,
    extract_commit_hash,
    logging,
)

from .configuration_miniclip import (
    FIELDS,
    TEXT_WIDTHS,
    VISION_WIDTHS,
    MiniClipConfig,
    Origin,
    counts_positions,
    declared_pooling,
    pooler_switch,
    text_tower_class,
    tower_name,
    vision_tower_class,
    vision_tower_config,
    width_of,
)
from .loss_miniclip import ids_of_pairs, symmetric_contrastive_loss

logger = logging.get_logger(__name__)

AUTO_CLASSES = ("AutoModel", "AutoModelForZeroShotImageClassification")  # those that load a MiniClipModel


class MiniClipVisionModel(TimmWrapperModel):
    """`TimmWrapperModel` that keeps timm's initial weights.

    transformers would initialise them again by its general rule (convolutions with standard deviation 0.02 instead of
    0.18, the zero-initialised last batch norm of a block set to 1), which slows training from scratch. A weight that
    is missing from a checkpoint (built on the meta device) still gets the general rule.
    """

    _no_split_modules = ["MiniClipVisionModel"]  # FSDP would not find the name of the parent class

    def post_init(self) -> None:
        for tensor in (*self.timm_model.parameters(), *self.timm_model.buffers()):
            tensor._is_hf_initialized = not tensor.is_meta
        super().post_init()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable)  # timm's own switch, unknown to transformers
        self.gradient_checkpointing = enable

    @property
    def pooled_size(self) -> int:
        """Width of the pooled feature: 2048 for ResNet-50."""
        return getattr(self.timm_model, "head_hidden_size", None) or self.timm_model.num_features


@contextmanager
def with_all_weights(tower: Any) -> Iterator[None]:
    """Within the block, a tower has all its weights, even those that accelerate has offloaded.

    accelerate's hooks fetch the weights of a module when the module is called. timm computes features without calling
    the whole model, and some layers read the weights of a submodule without calling it.
    """
    is_offloaded = tower.device.type == "meta"
    hooked = [module for module in tower.modules() if hasattr(module, "_hf_hook")] if is_offloaded else []
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            module._hf_hook.post_forward(module, None)


def _load_pretrained_tower(tower_class: type[PreTrainedModel], config: Any, pooling: str) -> PreTrainedModel:
    """Load the pretrained tower at `config.name_or_path`; heads in its checkpoint are silently dropped."""
    source, switch = config.name_or_path, pooler_switch(tower_class, pooling)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tower, info = tower_class.from_pretrained(
            source, config=config, output_loading_info=True, use_safetensors=True, **switch
        )
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(_lacks_weights(source, info["missing_keys"]) + f" of {tower_class.__name__}")
    return tower


def _commit(source: str | os.PathLike | None, revision: str, options: dict[str, Any]) -> str | None:
    """The commit that a revision of a repository stands for now; None for a local folder."""
    if source is None or os.path.isdir(source):
        return None
    known = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")
    where = {name: options[name] for name in known if name in options}
    file = cached_file(source, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False, **where)
    return extract_commit_hash(file, None)


def _lacks_weights(source: object, names: Iterable[str]) -> str:
    missing = sorted(names)
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    return f"{source} lacks weights: {shown}"


def pool_image(outputs: Any, pooling: str) -> Tensor:
    """The feature `[B, width]` in an image tower's output, see `vision_pooling` in [`MiniClipConfig`].

    Raises:
        ValueError: the tower has returned no such feature.
    """
    if pooling == "cls":
        return outputs.last_hidden_state[:, 0]
    if getattr(outputs, "pooler_output", None) is None:
        raise ValueError("the image tower returns no pooled feature: choose another one")
    return outputs.pooler_output.flatten(1)  # [B, width, 1, 1] of ResNet


def end_tokens(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Position `[N]` of the end token in token ids `[N, L]`, as CLIP's text tower finds it.

    It is the first one; in files with the number 2, which was wrong for years, the token with the largest number.
    """
    ids = input_ids.int()  # an int64 argmax is no operation of ONNX
    return ids.argmax(dim=1) if eos_token_id == 2 else (ids == eos_token_id).int().argmax(dim=1)


def pool_text(
    last_hidden_state: Tensor, attention_mask: Tensor | None, pooling: str, ends: Tensor | None = None
) -> Tensor:
    """Pool the token states of each text into one vector.

    Args:
        last_hidden_state: `[N, L, width]` token states.
        attention_mask: `[N, L]`, 1 for tokens and 0 for padding; None means no padding.
        pooling: `"cls"` (state of the first token), `"last"` (of the last one) or `"mean"` (average), without padding.
        ends: `[N]` positions of the tokens to take instead.

    Returns:
        `[N, width]`.
    """
    if ends is not None:
        return last_hidden_state[torch.arange(len(ends), device=ends.device), ends]
    if pooling == "cls":
        return last_hidden_state[:, 0]
    if attention_mask is None:
        return last_hidden_state.mean(dim=1) if pooling == "mean" else last_hidden_state[:, -1]
    if pooling == "last":
        positions = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
        last = (attention_mask.long() * positions).argmax(dim=1)  # [N]; the padding may be on either side
        return last_hidden_state[torch.arange(len(last), device=last.device), last]
    weights = attention_mask.unsqueeze(-1).to(last_hidden_state.dtype)  # [N, L, 1]
    return (last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class ResidualBlock(nn.Module):
    """GELU, linear, dropout, added to the input, layer norm: `[N, dim] -> [N, dim]`."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.activation = nn.GELU()
        self.linear = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer_norm(hidden + self.dropout(self.linear(self.activation(hidden))))


class ProjectionHead(nn.Module):
    """Projection of a tower's pooled feature into the shared space: `[N, in_features] -> [N, dim]`.

    A linear layer followed by `depth - 1` residual blocks; `depth=1` is CLIP's projection, `depth=0` none. With
    `hidden` units, a hidden layer with GELU comes first.
    """

    def __init__(
        self,
        in_features: int,
        dim: int,
        depth: int,
        dropout: float,
        bias: bool,
        hidden: int | None = None,
        hidden_bias: bool = True,
    ):
        super().__init__()
        if depth == 0 and in_features != dim:
            raise ValueError(
                f"projection_depth 0 leaves a tower's {in_features} features as they are: set projection_dim "
                f"{in_features} instead of {dim}, or projection_depth 1"
            )
        self.hidden = nn.Linear(in_features, hidden, bias=hidden_bias) if hidden else None
        self.linear = nn.Linear(hidden or in_features, dim, bias=bias) if depth else nn.Identity()
        self.blocks = nn.ModuleList(ResidualBlock(dim, dropout) for _ in range(depth - 1))

    def forward(self, pooled: Tensor) -> Tensor:
        if self.hidden is not None:
            pooled = nn.functional.gelu(self.hidden(pooled))
        hidden = self.linear(pooled)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def vision_class_of(vision_config: Any) -> Any:
    """The class of an image tower.

    Raises:
        ValueError: the configuration is that of another model.
    """
    return MiniClipVisionModel if vision_config.model_type == "timm_wrapper" else vision_tower_class(vision_config)


def _towers(config: MiniClipConfig) -> list[tuple[Any, Any, str]]:
    """Class, configuration and pooling of the image tower and of the text tower."""
    return [
        (vision_class_of(config.vision_config), config.vision_config, config.vision_pooling),
        (text_tower_class(config.text_config), config.text_config, config.text_pooling),
    ]


def _widths(config: MiniClipConfig, vision_model: Any) -> tuple[int, int]:
    """Widths of the pooled features of both towers.

    Raises:
        ValueError: `vision_pooling` needs a class token, which the image tower lacks.
    """
    names = {name.rpartition(".")[2] for name, _ in vision_model.named_parameters()}
    if config.vision_pooling == "cls" and not names & {"cls_token", "class_embedding"}:
        raise ValueError(f"vision_pooling 'cls': {tower_name(config.vision_config)} has no class token")
    of_texts = width_of(config.text_config, TEXT_WIDTHS if config.text_pooling == "pooler" else ("hidden_size",))
    if isinstance(vision_model, MiniClipVisionModel):
        return vision_model.pooled_size, of_texts
    return width_of(config.vision_config, VISION_WIDTHS), of_texts


@dataclass
class MiniClipOutput(ModelOutput):
    """Output of [`MiniClipModel`]. Values that a call did not compute are None, and left out of the tuple form.

    Args:
        loss: scalar loss in nats; only with `return_loss=True`.
        logits_per_image: `[B, N]` scaled cosine similarities, plus the bias of the sigmoid loss.
        logits_per_text: `[N, B]`, the transpose of `logits_per_image`.
        text_embeds: `[N, projection_dim]`, unit norm.
        image_embeds: `[B, projection_dim]`, unit norm.
        text_model_output: output of the text tower, with the pooled feature as `pooler_output`.
        vision_model_output: output of the image tower, with the pooled feature as `pooler_output`.
        logit_scale: `[1]` clamped inverse temperature of the logits; only with both modalities.
        logit_bias: `[1]` bias of the logits; only with both modalities and the sigmoid loss.
        pooler_output: the embeddings again if there is only one modality, because pipelines look for them here.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: Any = None
    vision_model_output: Any = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    pooler_output: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The output as a tuple.

        Returns:
            The values that are not None; nested outputs become tuples, too.
        """
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class MiniClipModel(PreTrainedModel):
    """Image tower, text tower, projection heads and temperature.

    `MiniClipModel(config)` has random weights; [`from_towers`][modeling_miniclip.MiniClipModel.from_towers] joins two
    pretrained towers, and [`from_pretrained`][modeling_miniclip.MiniClipModel.from_pretrained] loads a trained model.

    Args:
        config: towers, heads and loss.

    Examples:
        >>> import torch
        >>> from modeling_miniclip import MiniClipConfig, MiniClipModel
        >>> config = MiniClipConfig(
        ...     vision_config={"architecture": "test_resnet"},
        ...     text_config={"model_type": "distilbert", "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2},
        ... )
        >>> model = MiniClipModel(config).eval()
        >>> output = model(input_ids=torch.tensor([[5, 7, 6]]), pixel_values=torch.zeros(2, 3, 32, 32))
        >>> output.logits_per_image.shape, output.text_embeds.shape
        (torch.Size([2, 1]), torch.Size([1, 256]))
    """

    config: MiniClipConfig
    config_class = MiniClipConfig
    base_model_prefix = "miniclip"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False  # a batch's loss is not a sum over items, which Trainer could divide by their number
    loaded_revision: str | None = None  # commit of the Hub repository that the weights came from
    loaded_from: "Origin | None" = None  # None for a model built in memory
    processor: Any = None  # of a model converted in memory
    _no_split_modules = ["MiniClipVisionModel", "ProjectionHead"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MiniClipConfig):
        super().__init__(config)
        dtype = torch.get_default_dtype()  # as for the heads, whatever the dtype of the towers' checkpoints
        self.vision_model, self.text_model = (
            tower_class._from_config(tower_config, dtype=dtype, **pooler_switch(tower_class, pooling))
            for tower_class, tower_config, pooling in _towers(config)
        )
        self.vision_width, self.text_width = _widths(config, self.vision_model)
        self.counts_positions = counts_positions(config.text_config)
        dim, dropout, heads = config.projection_dim, config.projection_dropout, config.heads()
        self.visual_projection, self.text_projection = (
            ProjectionHead(width, dim, head["depth"], dropout, head["bias"], head["hidden"], head["hidden_bias"])
            for width, head in zip((self.vision_width, self.text_width), heads, strict=True)
        )
        self.logit_scale = nn.Parameter(torch.empty(1))  # shape [1]: FSDP rejects 0-d parameters
        self.logit_bias = nn.Parameter(torch.empty(1)) if config.loss_type == "sigmoid" else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.constant_(self.logit_scale, self.config.logit_scale_init_value)
            if self.logit_bias is not None:
                nn.init.constant_(self.logit_bias, self.config.logit_bias_init_value)
        elif isinstance(module, nn.Linear):
            # PyTorch's own rule for the heads: a standard deviation of 0.02 is meant for 768-wide transformers.
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers treats this model like a built-in one.

        In custom code that initialises weights in place, it skips modules without direct weights. With them it would
        skip ModernBERT's rule for layers that a checkpoint lacks.

        Returns:
            False.
        """
        return False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        revision: str = "main",
        allow_missing: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Like `PreTrainedModel.from_pretrained`, but reads safetensors only: a pickle can hold any program.

        Sets `loaded_revision`, and `loaded_from`, the arguments that load the matching processor.

        Args:
            pretrained_model_name_or_path: folder of a saved model, or its repository on the Hub.
            *args: as for `PreTrainedModel.from_pretrained`.
            revision: branch, tag or commit of the repository.
            allow_missing: whether weights that the files lack get initial values instead of being an error.
            output_loading_info: whether to also return what was missing, unexpected or of another shape.
            **kwargs: as for `PreTrainedModel.from_pretrained`. The weights of a `state_dict` need not be complete.

        Returns:
            The model in evaluation mode; with `output_loading_info`, also a dictionary of what was missing, unexpected
            or of another shape.

        Raises:
            ValueError: the files lack weights.
            OSError: there is no such folder or repository, or its files cannot be read.
        """
        source = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)
        commit = _commit(source, revision, kwargs)
        model, info = super().from_pretrained(
            source, *args, revision=commit or revision, output_loading_info=True, **kwargs
        )
        if info["missing_keys"] and not allow_missing and kwargs.get("state_dict") is None:
            raise ValueError(_lacks_weights(source, info["missing_keys"]))
        if not hasattr(model, "hf_device_map") and any(parameter.is_meta for parameter in model.parameters()):
            model.tie_weights()  # of T5, which transformers 5.3 leaves out in code that is not its own
        model.loaded_revision = commit
        if source is not None:
            where: dict[str, Any] = {
                name: kwargs[name] for name in ("token", "local_files_only", "cache_dir") if name in kwargs
            }
            where["subfolder"] = kwargs.get("subfolder", "")
            where["pretrained_model_name_or_path"] = os.path.abspath(source) if os.path.isdir(source) else str(source)
            model.loaded_from = Origin(where, revision=commit or revision)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Like `PreTrainedModel.save_pretrained`, but every Auto class finds the code saved with the weights.

        Args:
            save_directory: folder to write.
            *args: as for `PreTrainedModel.save_pretrained`.
            **kwargs: as for `PreTrainedModel.save_pretrained`.
        """
        if self.is_remote_code():
            # transformers enters only the one class that the model was registered for or loaded with.
            auto_map = dict.fromkeys(AUTO_CLASSES, "modeling_miniclip.MiniClipModel")
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_towers(cls, vision: str | os.PathLike, text: str | os.PathLike, **config: Any) -> "MiniClipModel":
        """A model made of two pretrained towers and new heads.

        Args:
            vision: timm name, or Hub repository or local folder of a timm model or of an image encoder of
                transformers.
            text: Hub name or local folder of a Hugging Face text encoder.
            **config: fields of [`MiniClipConfig`] other than the towers, such as `projection_dim=512`. The default of
                `text_pooling` is what the text tower's repository declares, see [`declared_pooling`].

        Returns:
            The model in evaluation mode and float32.

        Raises:
            ValueError: a tower is unknown or lacks weights, a keyword is no field of [`MiniClipConfig`] or has a
                wrong value, or the text tower declares a pooling that is not supported.
            OSError: the weights cannot be found.

        Examples:
            >>> model = MiniClipModel.from_towers("resnet50.a1_in1k", "distilbert-base-uncased")  # doctest: +SKIP
        """
        unknown = sorted(set(config) - set(FIELDS))
        if unknown:
            raise ValueError(f"from_towers got unknown fields {', '.join(unknown)}; it takes {', '.join(FIELDS)}")
        vision_config, text_config = vision_tower_config(os.fspath(vision)), AutoConfig.from_pretrained(text)
        text_tower_class(text_config)
        if config.get("text_pooling") is None:
            config["text_pooling"] = declared_pooling(text)
        model_config = MiniClipConfig(
            vision_config=vision_config.to_dict(), text_config=text_config.to_dict(), **config
        )
        # Built as from_pretrained builds it, so that a new model and its reload are the same in every respect.
        towers, model = _towers(model_config), cls(model_config)
        for part, config, (tower_class, _, pooling) in zip(
            (model.vision_model, model.text_model), (vision_config, text_config), towers, strict=True
        ):
            part.load_state_dict(_load_pretrained_tower(tower_class, config, pooling).state_dict())
        return model.eval()

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Switch gradient checkpointing on or off in each tower that supports it; warn about one that does not.

        timm's towers have nothing but a switch: `every_n_layers` and the arguments of `torch.utils.checkpoint` only
        reach towers of transformers. As with any checkpointing, batch norm in training mode counts a batch twice in
        its running statistics.

        Raises:
            ValueError: neither tower supports it.
        """
        towers = {
            tower_name(self.config.vision_config): self.vision_model,
            type(self.text_model).__name__: self.text_model,
        }
        able = {name: tower for name, tower in towers.items() if tower.supports_gradient_checkpointing}
        for tower in able.values():
            tower._set_gradient_checkpointing(enable, **kwargs)
        unable = ", ".join(name for name in towers if name not in able)
        if enable and not able:
            raise ValueError(f"neither tower supports gradient checkpointing: {unable}")
        if enable and unable:
            logger.warning(f"{unable} does not support gradient checkpointing and keeps all its activations")

    def enable_input_require_grads(self) -> None:
        """As in transformers, for the text tower: its hook does not take a tuple, which Swin's embeddings are."""
        self.text_model.enable_input_require_grads()
        self._require_grads_hook = self.text_model._require_grads_hook
        self._require_grads_hooks = getattr(self.text_model, "_require_grads_hooks", [self._require_grads_hook])

    def train(self, mode: bool = True) -> "MiniClipModel":
        """Like `Module.train`, but an image tower's batch norm with frozen weights keeps its running statistics too.

        Otherwise they would drift with every step, and an adapter of a frozen tower (PEFT) does not save them.

        Args:
            mode: training mode, otherwise evaluation mode.

        Returns:
            The model itself.
        """
        super().train(mode)
        for module in self.vision_model.modules():
            has_statistics = getattr(module, "running_mean", None) is not None
            weight = getattr(module, "weight", None)
            if has_statistics and weight is not None and not weight.requires_grad:
                module.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embeddings.

        Returns:
            A layer whose `weight` is `[vocabulary, text width]`.
        """
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text tower's token embeddings.

        Args:
            value: new embeddings, of the same width.
        """
        self.text_model.set_input_embeddings(value)

    def pool_images(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] | None = None
    ) -> BaseModelOutputWithPooling:
        """Run the image tower alone.

        Args:
            pixel_values: `[B, 3, H, W]`, normalised by the processor.
            output_hidden_states: True to also return the feature maps of the tower's stages or blocks. Indices keep
                only those maps and set the others to None; as in transformers, indices out of range are ignored.

        Returns:
            Output with `pooler_output` `[B, vision width]`.
        """
        chosen = None if isinstance(output_hidden_states, bool | None) else output_hidden_states
        wanted = {"output_hidden_states": chosen is not None or output_hidden_states}
        if output_hidden_states is None:  # the tower's configuration decides
            wanted = {}
        pixel_values = pixel_values.to(self.vision_model.dtype)  # some towers leave them in float32
        with with_all_weights(self.vision_model):
            outputs = self.vision_model(pixel_values, return_dict=True, **wanted)
        maps = outputs.get("hidden_states")
        if chosen is not None and maps is not None:
            kept = {chosen} if isinstance(chosen, int) else set(chosen)
            maps = tuple(m if {i, i - len(maps)} & kept else None for i, m in enumerate(maps))
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pool_image(outputs, self.config.vision_pooling),
            hidden_states=maps,
        )

    def pool_texts(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Run the text tower alone.

        Args:
            input_ids: `[N, L]` token ids.
            attention_mask: `[N, L]`, 1 for tokens and 0 for padding.
            **kwargs: further arguments of the tower, such as `output_hidden_states` or `position_ids`.

        Returns:
            Output with `pooler_output` `[N, text width]`.
        """
        pooling, length, ends = self.config.text_pooling, self.config.text_length, None
        if length is not None:  # padding is text, however the tokenizer has padded
            padding = self.config.text_config.pad_token_id
            if attention_mask is not None:
                input_ids, attention_mask = input_ids.masked_fill(attention_mask == 0, padding), None
            rest = input_ids.new_full((input_ids.shape[0], length), padding)
            input_ids = torch.cat([input_ids, rest], dim=1)[:, :length]
        if pooling == "eos":
            ends = end_tokens(input_ids, self.config.text_config.eos_token_id)
        if self.counts_positions and attention_mask is not None and "position_ids" not in kwargs:
            kwargs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        states, pooled = outputs.last_hidden_state, outputs.get("pooler_output")
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=pooled if pooling == "pooler" else pool_text(states, attention_mask, pooling, ends),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Project images into the shared space, without normalisation, like CLIP's method of the same name.

        Args:
            pixel_values: `[B, 3, H, W]`, normalised by the processor.
            **kwargs: `output_hidden_states`; others have no effect, as not every image tower returns attentions.

        Returns:
            Output whose `pooler_output` is the projected feature `[B, projection_dim]`.
        """
        outputs = self.pool_images(pixel_values, kwargs.get("output_hidden_states"))
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Project texts into the shared space, without normalisation, like CLIP's method of the same name.

        Args:
            input_ids: `[N, L]` token ids.
            attention_mask: `[N, L]`, 1 for tokens and 0 for padding.
            **kwargs: further arguments of the text tower.

        Returns:
            Output whose `pooler_output` is the projected feature `[N, projection_dim]`.
        """
        outputs = self.pool_texts(input_ids, attention_mask, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """The loss for `return_loss=True`: [`symmetric_contrastive_loss`], or the function that was assigned.

        Its arguments are `image_embeds`, `text_embeds`, `logit_scale`, `image_id`, `text_image_id`, `loss_type` and
        `logit_bias`, by position.
        """
        return getattr(self, "_assigned_loss", symmetric_contrastive_loss)

    @loss_function.setter
    def loss_function(self, loss: Callable[..., Tensor]) -> None:
        self._assigned_loss = loss

    def inverse_temperature(self) -> Tensor:
        """The factor of the cosine similarities.

        Returns:
            `[1]`, at most `config.logit_scale_max`; the logits are the similarities times this factor.
        """
        return self.logit_scale.clamp(max=math.log(self.config.logit_scale_max)).exp()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        image_id: Tensor | None = None,
        text_image_id: Tensor | None = None,
        vision_pooler_output: Tensor | None = None,
        text_pooler_output: Tensor | None = None,
        return_logits: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MiniClipOutput:
        """Embed images, texts or both; with both, also compare them.

        Args:
            input_ids: `[N, L]` token ids.
            pixel_values: `[B, 3, H, W]`, normalised by the processor.
            attention_mask: `[N, L]`, 1 for tokens and 0 for padding.
            return_loss: whether to compute the loss of this batch by `loss_function`, see
                [`symmetric_contrastive_loss`].
            image_id: `[B]` integer ids of the images. With `text_image_id`, any number of texts may describe an
                image. Without them, text i describes image i and B must equal N.
            text_image_id: `[N]` ids of the images that the texts describe.
            vision_pooler_output: `[B, vision width]` features of a frozen image tower, instead of `pixel_values`.
            text_pooler_output: `[N, text width]` features of a frozen text tower, instead of `input_ids`.
            return_logits: whether to compute the similarities of all images and texts, which a loss in tiles does not
                need.
            **kwargs: further arguments of the text tower; `output_hidden_states` applies to both towers.

        Returns:
            [`MiniClipOutput`], or a tuple of its values with `return_dict=False`. With images and texts, it has the
            logits `[B, N]`; with only one of them, the embeddings.

        Raises:
            ValueError: there is no input, or `return_loss=True` without one of the modalities, without ids for unequal
                numbers of images and texts, or with ids that leave an image or a text without a partner.
        """
        _check_inputs((pixel_values, vision_pooler_output), (input_ids, text_pooler_output), return_loss)
        vision_output = text_output = image_embeds = text_embeds = None
        if pixel_values is not None:
            vision_output = self.pool_images(pixel_values, kwargs.get("output_hidden_states"))
            vision_pooler_output = vision_output.pooler_output  # [B, vision width]
        if input_ids is not None:
            text_output = self.pool_texts(input_ids, attention_mask, **kwargs)
            text_pooler_output = text_output.pooler_output  # [N, text width]
        if vision_pooler_output is not None:
            image_embeds = nn.functional.normalize(self.visual_projection(vision_pooler_output), dim=-1)
        if text_pooler_output is not None:
            text_embeds = nn.functional.normalize(self.text_projection(text_pooler_output), dim=-1)
        if image_embeds is None or text_embeds is None:
            compared = {"pooler_output": image_embeds if text_embeds is None else text_embeds}
        else:
            text_embeds = text_embeds.to(image_embeds.device)
            scale, bias = self.inverse_temperature(), self.logit_bias
            compared = {"logit_scale": scale, "logit_bias": bias}
            if return_logits or return_loss:
                compared |= self._compare(image_embeds, text_embeds, image_id, text_image_id, return_loss, scale, bias)
        return MiniClipOutput(
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
            **compared,
        )

    def _compare(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        image_id: Tensor | None,
        text_image_id: Tensor | None,
        return_loss: bool | None,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
    ) -> dict[str, Tensor | None]:
        """The logits of all images and texts, and the loss if it is wanted."""
        loss = None
        logits_per_image = logit_scale * image_embeds @ text_embeds.t()  # [B, N]
        if logit_bias is not None:
            logits_per_image = logits_per_image + logit_bias
        if return_loss:
            ids = ids_of_pairs(image_embeds, text_embeds, image_id, text_image_id)
            loss = self.loss_function(image_embeds, text_embeds, logit_scale, *ids, self.config.loss_type, logit_bias)
        return {"loss": loss, "logits_per_image": logits_per_image, "logits_per_text": logits_per_image.t()}


def _check_inputs(images: tuple[Any, Any], texts: tuple[Any, Any], return_loss: bool | None) -> None:
    has_images, has_texts = (any(value is not None for value in values) for values in (images, texts))
    if not has_images and not has_texts:
        raise ValueError("pass input_ids, pixel_values or both: there is nothing to embed")
    if return_loss and not has_images:
        raise ValueError("return_loss=True needs pixel_values in addition to input_ids")
    if return_loss and not has_texts:
        raise ValueError("return_loss=True needs input_ids in addition to pixel_values")


__all__ = ["MiniClipModel", "MiniClipOutput"]
