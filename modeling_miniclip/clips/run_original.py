"""Load a converted model with the library that it was written for, and nothing of this package; write its logits.

python run_original.py transformers|open_clip MODEL INPUTS, where INPUTS holds `texts.json`, `0.png`, `1.png`, ...;
writes `INPUTS/logits.npy`, the `logits_per_image`. It runs in a process of its own.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def transformers_logits(folder: Path, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """Logits of a model of transformers, its inputs prepared with Pillow."""
    from transformers import AutoModel, AutoProcessor

    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"]:
        raise ValueError(f"missing weights: {sorted(info['missing_keys'])[:3]}")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    limit = min(processor.tokenizer.model_max_length, 512)
    padding: Any = "max_length" if model.config.model_type == "siglip" else True
    rules = {"padding": padding, "truncation": True, "max_length": limit}
    inputs = processor(images=images, text=texts, return_tensors="pt", **rules)
    return model.eval()(**inputs).logits_per_image


def open_clip_logits(folder: Path, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """Logits of a model of open_clip."""
    open_clip: Any = import_module("open_clip")  # optional: neither a dependency nor an extra
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name, require_pretrained=True)
    ids = open_clip.get_tokenizer(name)(texts)
    return model.eval().get_logits(torch.stack([transform(image) for image in images]), ids)[0]


def main(library: str, folder: Path, inputs: Path) -> None:
    """Write the logits of all images and texts."""
    texts = json.loads((inputs / "texts.json").read_text(encoding="utf-8"))
    images = [Image.open(path).convert("RGB") for path in sorted(inputs.glob("*.png"))]
    logits = {"transformers": transformers_logits, "open_clip": open_clip_logits}[library]
    with torch.no_grad():
        np.save(inputs / "logits.npy", logits(folder, images, texts).float().numpy())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
