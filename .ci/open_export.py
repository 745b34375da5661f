"""Open an export as its receiver would, by the Auto classes and pipelines of transformers, and write what they return.

python .ci/open_export.py OUTPUT.npz FOLDER_OR_REPOSITORY...

Needs transformers, torch and timm, and not this package: the code comes from the export.
"""

import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

TEXTS = ["a red dog runs", "two children and a ball", "a boat"]
LABELS = ["red dog", "boat", "child"]


def noise(*shape: int) -> np.ndarray:
    """Random bytes, the same under every version of numpy."""
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


def pictures() -> dict[str, Any]:
    """One image of each kind that a processor takes."""
    return {
        "rgb": Image.fromarray(noise(50, 70, 3)),
        "transparent": Image.fromarray(noise(60, 41, 4)),
        "thin": Image.fromarray(noise(2, 600, 3)),
        "grey_array": noise(45, 40),
        "array": noise(3, 45, 40),
        "grey_column": noise(45, 40, 1),
        "transparent_array": noise(45, 40, 4),
        "tensor": torch.from_numpy(noise(3, 45, 40)),
    }


@torch.no_grad()
def outputs_of(source: str) -> dict[str, np.ndarray]:
    """What the Auto classes and pipelines return for an export."""
    found: dict[str, Any] = {}
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)  # first: nothing else brings its code
    for name, picture in pictures().items():
        found[f"pixels/{name}"] = processor(images=picture, return_tensors="pt")["pixel_values"]
    inputs = processor(images=[pictures()["rgb"]] * 2, text=TEXTS, return_tensors="pt")
    found |= {f"inputs/{name}": value for name, value in inputs.items()}
    tokens = AutoTokenizer.from_pretrained(source, trust_remote_code=True)(TEXTS, padding=True, return_tensors="pt")
    found |= {f"tokens/{name}": value for name, value in tokens.items()}
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        model = auto.from_pretrained(source, trust_remote_code=True)
        outputs = model(**inputs)
        for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
            found[f"{auto.__name__}/{name}"] = outputs[name]
        found[f"{auto.__name__}/text_features"] = model.get_text_features(**tokens).pooler_output
    half = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.bfloat16)(**inputs)
    assert half.image_embeds.dtype == torch.bfloat16
    torch.testing.assert_close(half.image_embeds.float(), found["AutoModel/image_embeds"], atol=0.05, rtol=0)
    found |= pipeline_outputs(source, processor)
    return {name: np.asarray(value) for name, value in found.items()}


def pipeline_outputs(source: str, processor: Any) -> dict[str, Any]:
    """What the three pipelines return. By default they may resize with torchvision: that picture needs no resize."""
    found: dict[str, Any] = {}
    crop = processor.image_processor.crop_size["height"]
    ready = Image.fromarray(noise(crop, crop, 3))
    for kind, picture, options in (
        ("default", ready, {}),
        ("pil", pictures()["rgb"], {"image_processor": processor.image_processor}),
    ):
        options = {"model": source, "trust_remote_code": True} | options
        found[f"image-feature-extraction/{kind}"] = pipeline("image-feature-extraction", **options)(picture)
        scores = pipeline("zero-shot-image-classification", **options)(
            picture, candidate_labels=LABELS, hypothesis_template="a {}"
        )
        by_label = {item["label"]: item["score"] for item in scores}
        found[f"zero-shot-image-classification/{kind}"] = [by_label[label] for label in LABELS]
    extract = pipeline("feature-extraction", model=source, trust_remote_code=True)
    found["feature-extraction"] = [row[0] for row in extract(TEXTS)]
    return found


if __name__ == "__main__":
    output, *sources = sys.argv[1:]
    found = {f"{i}/{name}": value for i, source in enumerate(sources) for name, value in outputs_of(source).items()}
    assert "modeling_miniclip" not in sys.modules  # the code came from the exports
    np.savez(output, **found)  # type: ignore[arg-type]
