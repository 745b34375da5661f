"""What trained models can do: the built-in recipe from nothing, and real photographs through real towers."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from modeling_miniclip import MiniClipModel, MiniClipProcessor, encode_images, encode_texts
from modeling_miniclip.data.scenes import build_scenes, describe_pair, swap_attributes, validation_scenes
from tests.helpers.runs import PLAIN, ROOT, metrics_of
from train_miniclip import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the built-in recipe, run as `make demo` runs it, or already run by `.ci/run`."""
    if "MINICLIP_DEMO" in os.environ:
        return Path(os.environ["MINICLIP_DEMO"])
    run = tmp_path_factory.mktemp("demo") / "run"
    subprocess.run([sys.executable, str(ROOT / "train_miniclip.py"), f"--output_dir={run}"], check=True)
    return run


@pytest.mark.slow
def test_the_built_in_recipe_learns(demo: Path) -> None:
    best = min((line for line in metrics_of(demo) if line["split"] == "validation"), key=lambda line: line["loss"])
    assert best["text_to_image_R@1"] >= 50 and best["text_to_image_R@10"] >= 90, best


@pytest.mark.slow
def test_true_captions_score_above_swapped_ones(demo: Path) -> None:
    """The swaps are the scenes' own, which no training uses; prints the figures of `benchmarks/README.md`."""
    model = MiniClipModel.from_pretrained(demo / "export")
    processor = MiniClipProcessor.from_pretrained(demo / "export")
    images = encode_images(model, build_scenes(num_train=1)["validation"], processor, progress=False)
    both = []
    for i, scene in enumerate(validation_scenes()):
        true, swapped = describe_pair(scene, swap_attributes(scene, Random(i)), Random(i))
        both += [true[0], swapped[0]]
    true, swapped = encode_texts(model, both, processor, progress=False).unflatten(0, (-1, 2)).unbind(1)
    right, wrong = (
        ((some * true).sum(1) > (some * swapped).sum(1)).float().mean().item() for some in (images, images.roll(1, 0))
    )
    print(f"true captions preferred over swapped ones: {100 * right:.1f} %, with another image {100 * wrong:.1f} %")
    assert right > 0.8 and 0.45 < wrong < 0.55


@pytest.mark.slow
def test_real_photographs_train_through_real_towers(shared: Path, tmp_path: Path) -> None:
    weights = shared / "weights"
    arguments = PLAIN | {
        "dataset": shared / "flickr8k",
        "vision_model": weights / "tf_efficientnet_lite0",
        "text_model": weights / "all-MiniLM-L6-v2",
        "text_pooling": "mean",
        "output_dir": tmp_path / "run",
        "max_train_images": 48,
        "max_validation_images": 40,
        "batch_size": 16,
        "projection_dim": 256,
        "projection_dropout": 0.1,
        "image_size": 224,
        "max_steps": 3,
        "num_workers": 0,
        "logging_steps": 1,
        "vision_learning_rate": 1e-5,
    }
    with pytest.warns(UserWarning, match="left out 91 images"):
        export = main([f"--{name}={value}" for name, value in arguments.items()])
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3]
    assert lines[-1]["split"] == "validation" and lines[-1]["rsum"] > 110  # by chance about 80
    model = MiniClipModel.from_pretrained(export)
    assert model.config.vision_config.architecture == "tf_efficientnet_lite0"
    assert all(torch.isfinite(p).all() for p in model.parameters())
