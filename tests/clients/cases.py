"""What the clients are held against: exports trained for seconds, with the package's own embeddings."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from modeling_miniclip import MiniClipModel, MiniClipProcessor, encode_images, encode_texts, load_captions
from tests.helpers.clips import save_clip
from tests.helpers.runs import flags, shared_folder, write_preset, write_scene_folder
from train_miniclip import main

VALIDATION_FRACTION = 0.5  # of the scenes


@dataclass(frozen=True)
class Case:
    """A trained export, captioned images that it was not trained on, and the package's own embeddings of them."""

    name: str
    export: Path
    images: list[Image.Image]
    captions: list[list[str]]
    image_embeds: Tensor
    text_embeds: Tensor

    @property
    def texts(self) -> list[str]:
        """All captions, in the order of `text_embeds`."""
        return [caption for row in self.captions for caption in row]

    @property
    def rows(self) -> list[int]:
        """For each text the index of its image."""
        return [i for i, row in enumerate(self.captions) for _ in row]


def train_on_scenes(folder: Path) -> tuple[str, list[str]]:
    """The built-in scenes, a tiny ResNet and a tiny DistilBERT."""
    dataset = write_scene_folder(folder / "scenes", 160)
    write_preset(folder)
    return str(dataset), flags(folder, validation_fraction=VALIDATION_FRACTION, num_train_epochs=10)


def train_on_flickr8k(folder: Path) -> tuple[str, list[str]]:
    """Photographs, EfficientNet-Lite0 and a MiniLM sentence encoder."""
    shared = shared_folder()
    arguments = {
        "dataset": shared / "flickr8k",
        "vision_model": shared / "weights" / "tf_efficientnet_lite0",
        "text_model": shared / "weights" / "all-MiniLM-L6-v2",
        "text_pooling": "mean",
        "output_dir": folder / "run",
        "max_train_images": 48,
        "max_validation_images": 40,
        "batch_size": 16,
        "max_steps": 3,
        "num_workers": 0,
        "vision_learning_rate": 1e-5,
    }
    return str(shared / "flickr8k"), [f"--{name}={value}" for name, value in arguments.items()]


def train_from_clip(folder: Path) -> tuple[str, list[str]]:
    """The built-in scenes, from a tiny CLIP of transformers."""
    dataset, clip = write_scene_folder(folder / "scenes", 40), save_clip("clip", folder / "clip")
    start = {"preset": None, "model_name_or_path": clip, "max_steps": 2}
    return str(dataset), flags(folder, validation_fraction=VALIDATION_FRACTION, **start)


CASES = {"scenes": train_on_scenes, "flickr8k": train_on_flickr8k, "clip": train_from_clip}
# Without the shared data the photographs are no case at all: the clients are held against the others either way.
PRESENT = [name for name in CASES if name != "flickr8k" or (shared_folder() / "flickr8k" / "captions.csv").is_file()]


def train(name: str, folder: Path) -> Case:
    """Train one of `CASES` for seconds and embed at most 40 of its validation images with all their captions."""
    dataset, argv = CASES[name](folder)
    export = main(argv)
    model, processor = MiniClipModel.from_pretrained(export), MiniClipProcessor.from_pretrained(export)
    split = load_captions(dataset, validation_fraction=VALIDATION_FRACTION)["validation"]
    split = split.select(range(min(40, len(split))))
    images, captions = [row["image"].convert("RGB") for row in split], list(split["captions"])
    texts = [caption for row in captions for caption in row]
    image_embeds = encode_images(model, images, processor, progress=False)
    return Case(name, export, images, captions, image_embeds, encode_texts(model, texts, processor, progress=False))
