"""What sentence-transformers reads of an export: its modules, how each modality is embedded, and the similarity."""

import json
from pathlib import Path
from typing import Any

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
