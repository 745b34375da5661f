"""`--lora_rank`: train low-rank adapters in the towers instead of their weights (LoRA, Hu et al. 2021), with PEFT.

PEFT puts the adapters into the model itself, which stays a `MiniClipModel`. An adapted layer has its former weights as
`base_layer`, and two matrices, `lora_A` and `lora_B`, whose product is added to them.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...configuration_miniclip import tower_name
from ...errors import UsageError
from ...modeling_miniclip import MiniClipModel
from ...processing_miniclip import MiniClipProcessor
from ..command_line.arguments import TrainingArguments
from ..command_line.check_arguments import lora_details

ADAPTER = "default"  # PEFT's name for the only adapter of a layer
TOWERS = ("vision_model", "text_model")


def add_adapters(model: MiniClipModel, processor: MiniClipProcessor, arguments: TrainingArguments) -> str:
    """Put adapters into the towers that are trained. Then only these, the heads and the temperature are trained.

    The adapted model computes what the model did before: the second matrix of each adapter is zero at first.

    Args:
        model: model on the CPU, in evaluation mode, whose frozen layers do not require gradients.
        processor: processor of the model.
        arguments: flags of the run.

    Returns:
        One line about the adapters.

    Raises:
        UsageError: a tower has no layer for an adapter, or no layer has a name in `--lora_kwargs`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    details = lora_details(arguments)
    names = layers_to_adapt(model, processor, details["targets"])
    heads = [parameter for name, parameter in model.named_parameters()
             if parameter.requires_grad and not name.startswith(TOWERS)]  # fmt: skip
    config = LoraConfig(
        r=arguments.lora_rank, lora_alpha=details["alpha"], lora_dropout=details["dropout"], target_modules=names
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers of GPT-2, whose matrices are transposed
        inject_adapter_in_model(config, model)  # freezes everything else
    for parameter in heads:
        parameter.requires_grad_(True)
    counts = Counter(name.partition(".")[0] for name in names)
    parts = [f"{counts[part]} layers of the {part.removesuffix('_model')} tower" for part in TOWERS if counts[part]]
    return f"adapters of rank {arguments.lora_rank} in {' and '.join(parts)}".replace("vision tower", "image tower")


def layers_to_adapt(model: MiniClipModel, processor: MiniClipProcessor, targets: list[str] | None) -> list[str]:
    """Names of the layers that get an adapter, in the order of the model.

    By default these are, in each tower with trained layers, the linear layers or the convolutions, whichever have more
    weights. Only layers count that the towers call: the weights of some are read by other code, which no adapter would
    reach.

    Args:
        model: model in evaluation mode, whose frozen layers do not require gradients.
        processor: processor of the model.
        targets: ends of the names of the layers to adapt, such as `q_proj` or `attn.qkv`.

    Raises:
        UsageError: a tower has no such layer, or a target names none.
    """
    found: dict[str, nn.Module] = {}
    for part, run in zip(TOWERS, (_run_images, _run_texts), strict=True):
        tower = getattr(model, part)
        layers = {f"{part}.{name}": layer for name, layer in tower.named_modules() if can_be_adapted(layer)}
        called = _called(layers, partial(run, model, processor)) if layers else set()
        layers = {name: layer for name, layer in layers.items() if name in called}
        is_trained = any(parameter.requires_grad for parameter in tower.parameters())
        if is_trained and not layers:
            config = getattr(model.config, part.replace("_model", "_config"))
            raise UsageError(
                f"--lora_rank: {tower_name(config)} has no layer that can have an adapter: freeze this tower with "
                f"--freeze {part.removesuffix('_model')}, or leave out --lora_rank"
            )
        found |= layers if targets is not None else _largest_kind(layers)
    if targets is None:
        return list(found)
    for target in targets:
        if not any(_has_end(name, target) for name in found):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
            raise UsageError(f"--lora_kwargs: targets: no layer is called {target!r}; the towers have {known}")
    return [name for name in found if any(_has_end(name, target) for target in targets)]


def can_be_adapted(layer: Any) -> bool:
    """Whether a layer is trained and PEFT's adapter computes what a change of its weights would.

    Subclasses may compute something else, such as timm's convolutions with padding like TensorFlow's.
    """
    if type(layer) not in (nn.Linear, nn.Conv2d, Conv1D) or not layer.weight.requires_grad:
        return False
    if not isinstance(layer, nn.Conv2d):
        return True
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def _has_end(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _largest_kind(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The linear layers or the convolutions among some layers, whichever have more weights."""
    kinds: dict[bool, dict[str, nn.Module]] = {False: {}, True: {}}
    for name, layer in layers.items():
        kinds[isinstance(layer, nn.Conv2d)][name] = layer
    return max(kinds.values(), key=lambda kind: sum(weights_of(layer) for layer in kind.values()))


def weights_of(layer: nn.Module) -> int:
    """Number of weights of a layer."""
    return sum(parameter.numel() for parameter in layer.parameters())


@torch.no_grad()
def _called(layers: dict[str, nn.Module], run: Callable[[], object]) -> set[str]:
    """Names of the layers that a function calls."""
    called: set[str] = set()
    handles = [layer.register_forward_hook(partial(_note, called, name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return called


def _note(called: set[str], name: str, *_: Any) -> None:
    called.add(name)


def _run_images(model: MiniClipModel, processor: MiniClipProcessor) -> None:
    crop = processor.image_processor.crop_size
    model.pool_images(torch.zeros(1, 3, crop["height"], crop["width"]))


def _run_texts(model: MiniClipModel, processor: MiniClipProcessor) -> None:
    tokens = processor.tokenizer(["a photo"], truncation=True, return_tensors="pt")
    model.pool_texts(tokens["input_ids"], tokens.get("attention_mask"))


# --- the weights of an adapted model ---------------------------------------------------------------------------------


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter by name; empty for a model without adapters."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def merged_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a plain model that computes what an adapted one does.

    Args:
        weights: full weights of the adapted model, whatever wraps it; empty on processes that do not have them.
        model: the adapted model, or one without adapters, whose weights stay as they are.

    Returns:
        Weights by the names of the plain model.
    """
    layers = adapted_layers(model)
    plain = {}
    for name, tensor in weights.items():
        layer, is_adapter, _ = name.partition(".lora_")
        if is_adapter and layer in layers:
            continue
        layer, _, rest = name.partition(".base_layer.")
        if rest == "weight" and layer in layers:
            tensor = tensor + _change(weights, layer, layers[layer]).reshape(tensor.shape)
        plain[plain_name(name, layers)] = tensor
    return plain


def _change(weights: Mapping[str, Tensor], name: str, layer: Any) -> Tensor:
    """What an adapter adds to the weights of its layer; of a convolution, `[out, in * height * width]`."""
    down, up = (weights[f"{name}.lora_{letter}.{ADAPTER}.weight"].flatten(1) for letter in "AB")
    change = layer.scaling[ADAPTER] * (up @ down)
    return change.t() if getattr(layer, "fan_in_fan_out", False) else change


def plain_name(name: str, layers: Mapping[str, Any]) -> str:
    """The name that a weight of an adapted model has in the plain one."""
    layer, is_base, rest = name.partition(".base_layer.")
    return f"{layer}.{rest}" if is_base and layer in layers else name


@contextmanager
def only_trained_weights(model: nn.Module) -> Iterator[None]:
    """Within the block, the state of an adapted model is what is trained: adapters, heads and temperature.

    `state_dict` leaves out everything else, and `load_state_dict` leaves it as it is, whatever wraps the model. For a
    model without adapters, nothing changes.
    """
    if not adapted_layers(model):
        yield
        return
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in trained}

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in others:
            state.pop(prefix + name, None)

    def fill_in(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, tensor in others.items():
            state.setdefault(prefix + name, tensor)

    handles = (model.register_state_dict_post_hook(leave_out), model.register_load_state_dict_pre_hook(fill_in))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
