"""The towers of an export in the libraries that they came from, by the README's lines, without the package's code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_miniclip import MiniClipModel, MiniClipProcessor
from tests.clients.cases import Case
from tests.test_readme import blocks


def towers_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the README's block leaves, run where `my-clip/export` is the export of a case."""
    (block,) = [block for block in blocks("python") if "DistilBertModel" in block]
    (case.export.parent / "my-clip").mkdir(exist_ok=True)
    link = case.export.parent / "my-clip" / "export"
    if not link.exists():
        link.symlink_to(case.export)
    monkeypatch.chdir(case.export.parent)
    if case.name != "scenes":  # whose text tower is a DistilBERT; timm's lines come first
        block = block.partition("text_tower =")[0]
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    return namespace


def test_plain_timm_computes_the_image_features_bit_for_bit(
    case: Case, monkeypatch: pytest.MonkeyPatch, compared: Callable[[str], None]
) -> None:
    tower = towers_of(case, monkeypatch)["image_tower"]
    assert type(tower).__module__.startswith("timm.")
    model, processor = MiniClipModel.from_pretrained(case.export), MiniClipProcessor.from_pretrained(case.export)
    pixels = processor(images=case.images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        theirs, ours = tower(pixels), model.pool_images(pixels).pooler_output
    difference = (theirs - ours).abs().max().item()
    compared(f"timm, {type(tower).__name__}, features {list(ours.shape)}: largest difference {difference}")
    assert torch.equal(theirs, ours) and ours.std(dim=0).max() > 0


@pytest.mark.parametrize("case", ["scenes"], indirect=True)  # the text tower of the photographs is a BERT
def test_plain_distilbert_computes_the_hidden_states_bit_for_bit(
    case: Case, monkeypatch: pytest.MonkeyPatch, compared: Callable[[str], None]
) -> None:
    model, processor = MiniClipModel.from_pretrained(case.export), MiniClipProcessor.from_pretrained(case.export)
    tower = towers_of(case, monkeypatch)["text_tower"]
    inputs = processor(text=case.texts, return_tensors="pt")
    with torch.inference_mode():
        theirs, ours = tower(**inputs).last_hidden_state, model.pool_texts(**inputs).last_hidden_state
    difference = (theirs - ours).abs().max().item()
    compared(f"transformers, {type(tower).__name__}, states {list(ours.shape)}: largest difference {difference}")
    assert torch.equal(theirs, ours)
