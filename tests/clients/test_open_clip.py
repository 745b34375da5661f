"""`miniclip eval` with a model of open_clip: its own preprocessing and tokenizer, a checkpoint by name or file."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from modeling_miniclip import export, retrieval_metrics
from modeling_miniclip.errors import ModelError, UsageError
from modeling_miniclip.evaluation.encoders import open_encoder
from modeling_miniclip.evaluation.eval_sets import load_eval_set
from modeling_miniclip.evaluation.evaluate import evaluate_model
from tests.helpers.runs import write_scene_folder
from tests.helpers.towers import tiny_model, tiny_processor

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of a tiny model of random weights, whose architecture open_clip then knows as `ViT-Tiny-Test`."""
    (tmp_path / "ViT-Tiny-Test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-Tiny-Test").state_dict(), tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


def test_open_clip_model_is_measured_by_its_embeddings(checkpoint: Path, tmp_path: Path) -> None:
    data = load_eval_set(str(write_scene_folder(tmp_path / "scenes", 12)), "train")
    export(tiny_model(), tiny_processor(), tmp_path / "mine")
    name = f"open_clip:ViT-Tiny-Test/{checkpoint}"
    report = evaluate_model(str(tmp_path / "mine"), data, baseline=name)
    model, _, transform = open_clip.create_model_and_transforms("ViT-Tiny-Test", pretrained=str(checkpoint))
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([transform(data.open(i)) for i in range(len(data.images))])
        images = normalize(model.encode_image(pixels), dim=-1)
        texts = normalize(model.encode_text(open_clip.get_tokenizer("ViT-Tiny-Test")(data.texts)), dim=-1)
    assert report["baseline_metrics"] == pytest.approx(retrieval_metrics(images, texts, data.text_group))


def test_unknown_architecture_and_checkpoint_raise(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="open_clip has no architecture 'ViT-Z'"):
        open_encoder("open_clip:ViT-Z/openai", "--baseline")
    with pytest.raises(ModelError, match="neither a file nor one of the checkpoints of ViT-Tiny-Test"):
        open_encoder("open_clip:ViT-Tiny-Test/nothing", "--baseline")
