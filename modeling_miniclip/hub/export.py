"""A model as a folder that others can load: weights, processor, code and a measured card."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..utils.checksums import seal_weights
from ..utils.files import replaced_folder
from .model_card import is_hub_id, write_card


def export(
    model: MiniClipModel,
    processor: MiniClipProcessor,
    folder: str | os.PathLike,
    card: dict[str, Any] | None = None,
    state_dict: dict[str, Any] | None = None,
) -> Path:
    """Write everything that `from_pretrained` needs elsewhere, with or without this package installed there.

    The folder appears complete or not at all; one that is there is replaced.

    Args:
        model: weights go to `model.safetensors`.
        processor: that belongs to it.
        folder: to write.
        card: what `README.md` tells: `name` (of the repository, or any other), `metrics` (`loss` and those of
            `retrieval_metrics`, on validation) and their `intervals` (of `recall_intervals`), `arguments` of the run
            and the `command` that repeats it, `license` (an identifier of the Hub), `data` (`name`, `hub_id` if it is
            on the Hub, and `splits` with numbers of `images` and `captions`). What is left out, the card says was not
            measured or recorded.
        state_dict: the weights, where the model itself has but a part of them (FSDP).

    Returns:
        The folder.
    """
    from .. import auto  # noqa: F401  (from now on the code travels with the model)

    target = Path(folder)
    _forget_machine(model, processor)
    if state_dict is not None:
        # FSDP gives the model a class of its own, with which torch's code would travel instead of the model's.
        with torch.device("meta"):
            model = MiniClipModel(model.config)
    with replaced_folder(target) as fresh:
        model.save_pretrained(fresh, state_dict=state_dict)
        if (weights := fresh / "model.safetensors").exists():  # of more than 50 GB there are several
            seal_weights(weights)
        processor.save_pretrained(fresh)
        write_sentence_files(fresh)
        write_card(fresh / "README.md", model, card or {})
    return target


def _forget_machine(model: MiniClipModel, processor: MiniClipProcessor) -> None:
    # Saved, these would tell where the towers lay on this machine, and how they were loaded.
    for config in (model.config.vision_config, model.config.text_config):
        if not is_hub_id(config.name_or_path):
            config.name_or_path = ""
    for key in ("is_local", "local_files_only"):
        processor.tokenizer.init_kwargs.pop(key, None)


_MODULES = "sentence_transformers.base.modules"  # sentence-transformers 5.4 and later


# Contents as `SentenceTransformer.save` writes them. Without `modules.json` it would find the same methods in the
# model's annotations, but leave the embeddings at the length that the projection gives them.
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


def write_sentence_files(folder: Path) -> None:
    """Make a saved model load as `SentenceTransformer(folder, trust_remote_code=True)`, with unit-norm embeddings.

    Args:
        folder: that holds the model and its processor.
    """
    for name, content in SENTENCE_FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
