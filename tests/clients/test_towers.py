"""The towers of an export load in timm and transformers, by the code in `docs/sharing.md`, without the package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_miniclip import MiniClipModel, MiniClipProcessor, export
from tests.clients.cases import Case
from tests.helpers.runs import ROOT
from tests.helpers.towers import PIXELS, VISION, tiny_model, tiny_processor
from tests.test_documents import code_blocks


def towers_of(folder: Path, monkeypatch: pytest.MonkeyPatch, text: bool = False) -> dict[str, Any]:
    """The variables that the block of `docs/sharing.md` defines, run where `my-clip/export` is this export.

    Args:
        folder: folder of the export.
        monkeypatch: changes the working folder.
        text: whether to run the part for a DistilBERT text tower too; timm's part comes first and runs alone.
    """
    (block,) = [block for block in code_blocks(ROOT / "docs" / "sharing.md", "python") if "DistilBertModel" in block]
    (folder.parent / "my-clip").mkdir(exist_ok=True)
    link = folder.parent / "my-clip" / "export"
    if not link.exists():
        link.symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    namespace: dict[str, Any] = {}
    exec(block if text else block.partition("text_tower =")[0], namespace)
    return namespace


def test_plain_timm_gives_bit_equal_image_features(
    case: Case, monkeypatch: pytest.MonkeyPatch, compared: Callable[[str], None]
) -> None:
    tower = towers_of(case.export, monkeypatch)["image_tower"]
    assert type(tower).__module__.startswith("timm.")
    model, processor = MiniClipModel.from_pretrained(case.export), MiniClipProcessor.from_pretrained(case.export)
    pixels = processor(images=case.images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        theirs, ours = tower(pixels), model.pool_images(pixels).pooler_output
    difference = (theirs - ours).abs().max().item()
    compared(f"timm, {type(tower).__name__}, features {list(ours.shape)}: largest difference {difference}")
    assert torch.equal(theirs, ours) and ours.std(dim=0).max() > 0


@pytest.mark.parametrize("family", VISION)
def test_plain_timm_loads_every_image_tower(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them get their input size, depth and width from `model_args`."""
    model = tiny_model(family).eval()
    tower = towers_of(export(model, tiny_processor(), tmp_path / "export"), monkeypatch)["image_tower"]
    pixels = torch.randn(3, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(tower(pixels), model.pool_images(pixels).pooler_output)


@pytest.mark.parametrize("case", ["scenes"], indirect=True)  # the text tower of the photographs is a BERT
def test_plain_distilbert_gives_bit_equal_hidden_states(
    case: Case, monkeypatch: pytest.MonkeyPatch, compared: Callable[[str], None]
) -> None:
    model, processor = MiniClipModel.from_pretrained(case.export), MiniClipProcessor.from_pretrained(case.export)
    tower = towers_of(case.export, monkeypatch, text=True)["text_tower"]
    inputs = processor(text=case.texts, return_tensors="pt")
    with torch.inference_mode():
        theirs, ours = tower(**inputs).last_hidden_state, model.pool_texts(**inputs).last_hidden_state
    difference = (theirs - ours).abs().max().item()
    compared(f"transformers, {type(tower).__name__}, states {list(ours.shape)}: largest difference {difference}")
    assert torch.equal(theirs, ours)
