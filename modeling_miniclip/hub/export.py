"""Export a model as a folder that others can load: weights, processor, code and model card."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..utils.checksums import seal_weights
from ..utils.files import replaced_folder
from .model_card import is_hub_id, write_card

_MODULES = "sentence_transformers.base.modules"  # sentence-transformers 5.4 and later

# Files as `SentenceTransformer.save` writes them. Without `modules.json`, sentence-transformers would find the same
# methods by the model's annotations, but would not normalise the embeddings.
SENTENCE_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{_MODULES}.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{_MODULES}.normalize.Normalize"},
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            modality: {"method": f"get_{modality}_features", "method_output_name": "pooler_output"}
            for modality in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}


def export(
    model: MiniClipModel,
    processor: MiniClipProcessor,
    folder: str | os.PathLike,
    card: dict[str, Any] | None = None,
    state_dict: dict[str, Any] | None = None,
) -> Path:
    """Write everything that `from_pretrained` needs on another machine, with or without this package.

    The folder appears complete or not at all; an existing folder is replaced.

    Args:
        model: model whose weights go to `model.safetensors`.
        processor: processor of the model.
        folder: path of the folder to write.
        card: values for the model card, all optional; the card says which were not measured or recorded. `name` (of
            the repository, or any other), `metrics` on validation (`loss` and those of `retrieval_metrics`) and their
            `intervals` (from `recall_intervals`), the metrics `at_start` of the model that the run started from,
            `with_shared` (`metrics` with captions that belong to several images counted as right for these, and the
            number of these `texts`), the metrics of short embeddings `by_length` (by their dimensions), those on a
            second dataset, `retained` and `retained_at_start`, how the weights were `blended` with those before
            training (`share`, `is_auto`, and `rows` of `share`, `metrics` and `retained`), `arguments` of the run and
            the `command` that repeats it, `license` (an identifier of the Hub), `data` (`name`, `hub_ids` of those on
            the Hub, and `splits` with the numbers of `images` and `captions`).
        state_dict: full weights, if the model itself holds only a shard of them (FSDP).

    Returns:
        Path of the folder.

    Raises:
        ModelError: the weights are not those of a model of this configuration. Nothing is written.
    """
    from .. import auto  # noqa: F401  (registers the classes, so that their code is saved with the model)

    target = Path(folder)
    _remove_local_paths(model, processor)
    with torch.device("meta"):
        empty = MiniClipModel(model.config)
    check_tensors(model.state_dict() if state_dict is None else state_dict, empty)
    if state_dict is not None:
        model = empty  # FSDP changes the model's class; the code saved with it would be torch's instead of ours
    with replaced_folder(target) as fresh:
        model.save_pretrained(fresh, state_dict=with_names_of_older_releases(model, state_dict))
        if (weights := fresh / "model.safetensors").exists():  # more than 50 GB are split into several files
            seal_weights(weights)
        processor.save_pretrained(fresh)
        write_sentence_files(fresh)
        write_card(fresh / "README.md", model, card or {})
    return target


def with_names_of_older_releases(
    model: MiniClipModel, state_dict: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor] | None:
    """The weights of the towers of CLIP, SigLIP and their relatives with the names that transformers 4 gave them.

    These towers were a model within a model (`vision_model.vision_model.`); each later release reads these names too.

    Args:
        model: model that will be saved.
        state_dict: full weights; None means those of the model.

    Returns:
        Renamed weights, or `state_dict` if there is nothing to rename.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    prefixes = {}
    for part in ("vision_model", "text_model"):
        for change in get_checkpoint_conversion_mapping(type(getattr(model, part)).__name__) or ():
            if getattr(change, "prefix_to_remove", None):
                prefixes[f"{part}."] = f"{part}.{change.prefix_to_remove}."
    if not prefixes:
        return state_dict
    weights = model.state_dict() if state_dict is None else state_dict
    renamed = {}
    for name, tensor in weights.items():
        found = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes.get(found, "") + name.removeprefix(found)] = tensor
    return renamed


def check_tensors(weights: Mapping[str, Tensor], model: MiniClipModel) -> None:
    """Check that weights fit a model: loading would fill what is missing with random values.

    Args:
        weights: weights by name.
        model: model with the expected names and shapes.

    Raises:
        ModelError: a name or a shape differs; the message has the first of each kind.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    resized = [name for name in expected if found.get(name, expected[name]) != expected[name]]
    differences = [f"{len(names)} {what}, such as {names[0]}" for names, what in (
        (missing, "missing"), (unknown, "that the model does not have"), (resized, "of another shape")
    ) if names]  # fmt: skip
    if differences:
        raise ModelError(
            f"not exported: the weights are not those of a model of this configuration: {'; '.join(differences)}; "
            "pass the model itself, without what wraps it (accelerator.unwrap_model, merge_and_unload of PEFT)"
        )


def _remove_local_paths(model: MiniClipModel, processor: MiniClipProcessor) -> None:
    # Otherwise the export would reveal where the towers were on this machine, and how they were loaded.
    for config in (model.config.vision_config, model.config.text_config):
        if not is_hub_id(config.name_or_path):
            config.name_or_path = ""
    for key in ("is_local", "local_files_only"):
        processor.tokenizer.init_kwargs.pop(key, None)


def write_sentence_files(folder: Path) -> None:
    """Let a saved model load as `SentenceTransformer(folder, trust_remote_code=True)`, with unit-norm embeddings.

    Args:
        folder: folder with the saved model and its processor.
    """
    for name, content in SENTENCE_FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
