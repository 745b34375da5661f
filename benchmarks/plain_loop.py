"""The plain training loop that MiniCLIP is timed against: the well-known tutorial's, with the same towers and heads.

    python benchmarks/plain_loop.py --dataset FLICKR8K --vision_model LITE0 --text_model MINILM --text_pooling mean

Each caption is a row, so an image is decoded, augmented and encoded once per caption. Captions are tokenized before
training and padded to the longest of the split. Pixels are normalised in the loader's processes and contiguous (NCHW),
the allocator is the default one, and frozen towers run in every step.

It takes the flags of `train_miniclip.py` and uses those that it needs. To make the comparison fair it improves on the
tutorial: CLIP's loss instead of soft targets, a learnable temperature, frozen batch norms, frozen towers in evaluation
mode, and the crop of `MiniClipProcessor`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from modeling_miniclip import retrieval_metrics
from modeling_miniclip.data.loading.augmentation import build_augmentation
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.check_arguments import augmentation_list
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.optimizer import parameter_groups
from modeling_miniclip.training.setup import load_splits
from modeling_miniclip.training.towers.create_model import create_model
from modeling_miniclip.training.towers.layers import freeze_layers, set_training_mode


class CaptionPairs(Dataset):
    """One row per caption: `pixel_values` `[3, H, W]` float32, `input_ids` and `attention_mask` `[L]`."""

    def __init__(self, split: Any, processor: Any, augmentation: Any, captions_per_image: int | None):
        self.processor, self.augmentation = processor, augmentation
        undecoded = split.cast_column("image", datasets.Image(decode=False))
        pairs = [
            (row["image"]["path"], caption) for row in undecoded for caption in row["captions"][:captions_per_image]
        ]
        self.paths, captions = zip(*pairs, strict=True)
        self.tokens = processor.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: values[index] for name, values in self.tokens.items()}
        return row | {"pixel_values": self.processor.normalize(torch.from_numpy(self.pixels(index)))}

    def pixels(self, index: int) -> Any:
        """Decoded image, augmented or cropped: `[3, H, W]` uint8."""
        image = Image.open(self.paths[index]).convert("RGB")
        if self.augmentation is None:
            return self.processor.crop(image)
        return np.ascontiguousarray(self.augmentation(image=np.array(image))["image"].transpose(2, 0, 1))


def pair_loss(logits_per_image: Tensor) -> Tensor:
    """CLIP's loss of a batch of pairs, where row i belongs to column i."""
    labels = torch.arange(len(logits_per_image))
    image_loss = functional.cross_entropy(logits_per_image, labels)
    return (image_loss + functional.cross_entropy(logits_per_image.t(), labels)) / 2


class PlainLoop:
    """Data, model and optimiser of a run."""

    def __init__(self, arguments: TrainingArguments, captions_per_image: int | None = None):
        torch.manual_seed(arguments.seed)
        self.arguments, self.splits = arguments, load_splits(arguments)
        self.model, self.processor = create_model(arguments, list(self.splits["train"]["captions"]))
        freeze_layers(self.model, arguments)
        crop = self.processor.image_processor.crop_size
        augmentation = build_augmentation(augmentation_list(arguments), (crop["height"], crop["width"]))
        rows = CaptionPairs(self.splits["train"], self.processor, augmentation, captions_per_image)
        workers = arguments.num_workers
        self.loader = DataLoader(
            rows, arguments.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, arguments))

    def train_epoch(self) -> Iterator[float]:
        """One pass over all captions; yields the loss of each step."""
        set_training_mode(self.model, self.arguments.freeze, freeze_batch_norm=True)
        for batch in self.loader:
            loss = pair_loss(self.model(**batch).logits_per_image)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Recall on the whole validation split; each image is encoded once, as in the package."""
        self.model.eval()
        rows = self.splits["validation"]
        images = DataLoader(CaptionPairs(rows, self.processor, None, 1), 64, num_workers=self.arguments.num_workers)
        image_embeds = [self.model(pixel_values=batch["pixel_values"]).image_embeds for batch in images]
        texts = [text for captions in rows["captions"] for text in captions]
        parts = [texts[start : start + 256] for start in range(0, len(texts), 256)]
        text_embeds = [self.model(**self.processor(text=part, return_tensors="pt")).text_embeds for part in parts]
        owners = [i for i, captions in enumerate(rows["captions"]) for _ in captions]
        return retrieval_metrics(torch.cat(image_embeds), torch.cat(text_embeds), owners)


def main(argv: list[str]) -> None:
    """Train, and write one line per validation to `metrics.jsonl` in the output folder.

    `loop_seconds` is the time since the process started, without validations. `epoch_seconds` is what it will be at
    the end of the epoch if training continues at the same speed.
    """
    start = time.perf_counter() - (time.time() - psutil.Process().create_time())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validation_steps", type=int, help="steps between two validations (default: an epoch)")
    own, rest = parser.parse_known_args(argv)
    arguments = parse_arguments([f"--recipe={Path(__file__).parent / 'plain.yaml'}", *rest])
    loop = PlainLoop(arguments)
    every, step, validating = own.validation_steps or len(loop.loader), 0, 0.0
    log = Path(arguments.output_dir) / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    prepared = time.perf_counter() - start
    for _ in range(arguments.num_train_epochs):
        for loss in loop.train_epoch():
            step += 1
            if step % every:
                continue
            pause = time.perf_counter()
            seconds, steps = pause - start - validating, -(-step // len(loop.loader)) * len(loop.loader)
            epoch_seconds = prepared + (seconds - prepared) / step * steps
            metrics = {"split": "validation", "step": step, "loop_seconds": seconds, "epoch_seconds": epoch_seconds}
            metrics |= {"train_loss": loss, **loop.validate()}
            set_training_mode(loop.model, arguments.freeze, freeze_batch_norm=True)
            validating += time.perf_counter() - pause
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
