"""Sizes and towers of `gpu.py`, in full and small."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from modeling_miniclip.data.scenes import describe_scene, render, sample_scenes

HERE = Path(__file__).resolve().parent
SCENES, SCENE = 72, 64  # number of drawn scenes, and their pixels per side
RESNET50 = {
    "vision_config": {
        "model_type": "timm_wrapper",
        "architecture": "resnet50",
        "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic"},
    },
    "text_config": {"model_type": "distilbert"},
}


@dataclass(frozen=True)
class Setup:
    """What `gpu.py` measures.

    Args:
        on_cpu: whether to use the CPU in any case.
        data: flags of the data of all runs.
        pairs: flags of each pair of towers; the first is the one that is trained for its recall.
        presets: configurations that are written to files and take the place of the `preset` of a pair.
        recall: further flags of the run that is trained for its recall.
        batches: batch size and chunk size of the steps that are timed.
        warm_up, steps: number of steps before the clock starts, and of timed ones.
        agreement: images of the batch whose gradients are compared.
        images: folder of images to index; empty to draw some, which are then the data, too.
        loss: rows of the loss, and dimensions.
        vectors: vectors to search, and their dimensions.
        resume: batch size, steps, and the step after which the run is killed.
    """

    on_cpu: bool
    data: dict[str, Any]
    pairs: dict[str, dict[str, Any]]
    recall: dict[str, Any]
    batches: tuple[tuple[int, int | None], ...]
    warm_up: int
    steps: int
    agreement: int
    images: str
    loss: tuple[int, int]
    vectors: tuple[int, int]
    resume: tuple[int, int, int]
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)


def full_setup(shared: Path) -> Setup:
    """Everything, with the data and the towers of a folder."""
    lite0, minilm = shared / "weights" / "tf_efficientnet_lite0", shared / "weights" / "all-MiniLM-L6-v2"
    return Setup(
        on_cpu=False,
        data={"dataset": str(shared / "flickr8k"), "image_size": 224, "num_workers": 14},
        pairs={
            "Lite0 + MiniLM": {"vision_model": str(lite0), "text_model": str(minilm), "text_pooling": "mean"},
            "ResNet-50 + DistilBERT": {"preset": "resnet50", "freeze_batch_norm": "true"},
        },
        presets={"resnet50": RESNET50},
        recall={"freeze": "both", "augmentation": "[]", "batch_size": 512, "captions_per_image": 5,
                "num_train_epochs": 4, "head_learning_rate": 3e-3},
        batches=((256, None), (4096, 256)),
        warm_up=3,
        steps=8,
        agreement=32,
        images=str(shared / "flickr8k" / "Images"),
        loss=(65_536, 512),
        vectors=(1_000_000, 512),
        resume=(64, 60, 20),
    )  # fmt: skip


SMALL = Setup(
    on_cpu=True,
    data={"max_validation_images": 16, "image_size": SCENE, "num_workers": 1},
    pairs={"tiny": {"preset": "scenes_tiny"}},
    recall={"batch_size": 16, "num_train_epochs": 1},
    batches=((16, None), (32, 8)),
    warm_up=1,
    steps=2,
    agreement=8,
    images="",
    loss=(2048, 64),
    vectors=(5_000, 64),
    resume=(8, 24, 4),
)


def write_files(setup: Setup, folder: Path) -> Setup:
    """The setup with its presets in files of a folder, and drawn scenes if it has no images."""
    paths = {}
    for name, config in setup.presets.items():
        paths[name] = folder / f"{name}.json"
        values = {"model_type": "miniclip", "projection_dim": 256} | config
        paths[name].write_text(json.dumps(values), encoding="utf-8")
    pairs = {
        pair: flags | ({"preset": str(paths[flags["preset"]])} if flags.get("preset") in paths else {})
        for pair, flags in setup.pairs.items()
    }
    if not setup.images:
        captions = write_scenes(folder)
        setup = replace(setup, data=setup.data | {"dataset": str(captions)}, images=str(folder / "Images"))
    return replace(setup, pairs=pairs)


def write_scenes(folder: Path) -> Path:
    """Write pictures of scenes to the subfolder `Images`, and `captions.csv`, of which it returns the path."""
    (folder / "Images").mkdir()
    lines = ["image,caption"]
    for i, scene in enumerate(sample_scenes(SCENES, seed=3)):
        render(scene, Random(i), SCENE).save(folder / "Images" / f"{i:03d}.png")
        lines += [f'{i:03d}.png,"{caption}"' for caption in describe_scene(scene, Random(i))]
    captions = folder / "captions.csv"
    captions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return captions


def flags_of(setup: Setup, pair: str, **values: Any) -> list[str]:
    """Flags of a run with a pair of towers, on top of `plain.yaml`."""
    flags = {"recipe": HERE / "plain.yaml", **setup.data, **setup.pairs[pair], **values}
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]
