"""Run a whole split through the model: embeddings for validation, and features of frozen towers, computed once."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..data.collation import model_inputs
from ..data.dataset import CaptionRows
from ..data.loader import BatchLoader
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from .diagnostics import not_finite
from .distributed import gather_rows
from .feature_cache import FeatureTable, digest, digest_of_images, digest_of_weights
from .fold_batch_norm import folded_batch_norms

EVALUATION_BATCH = 64  # images per forward pass
TEXT_BLOCK = 256  # captions per forward pass of the text tower


@dataclass
class FrozenFeatures:
    """Pooled features of one split from frozen towers; None for a tower that runs in every step.

    Args:
        vision: `[rows, width]` for each augmented view.
        text: `[captions, width]` for each image.
    """

    vision: list[Tensor] | None = None
    text: list[Tensor] | None = None


@torch.no_grad()
def embed_split(
    model: MiniClipModel,
    loader: BatchLoader,
    processor: MiniClipProcessor,
    device: torch.device,
    progress: bool,
    on_undecodable: Callable[[list[tuple[int, str]]], Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of a whole split, gathered from all processes, in the order of its rows.

    Args:
        model: unwrapped model.
        loader: loader of the split, without shuffling.
        processor: preprocessing that belongs to the model.
        device: device of the model.
        progress: whether to show a progress bar.
        on_undecodable: function called once with the rows of this process's undecodable images and the reasons; these
            images are skipped.

    Returns:
        `[B, dim]` image embeddings, `[N, dim]` text embeddings, and `[N]`, the row of each text's image; on the CPU.
    """
    model.eval()
    parts: dict[str, list[Tensor]] = {"images": [], "image_id": [], "texts": [], "text_image_id": []}
    undecodable: list[tuple[int, str]] = []
    for batch in tqdm(loader, desc="validate", unit="batch", leave=False, disable=not progress):
        undecodable += batch.pop("undecodable", [])
        output = model(**model_inputs(batch, processor, device))
        for name, values in (("images", output.image_embeds), ("image_id", batch["image_id"])):
            parts[name].append(values[batch["image_id"] >= 0].to(device))
        for name, values in (("texts", output.text_embeds), ("text_image_id", batch["text_image_id"])):
            parts[name].append(values[batch["text_image_id"] >= 0].to(device))
    on_undecodable(undecodable)
    whole = {name: gather_rows(torch.cat(tensors)).cpu() for name, tensors in parts.items()}
    image_order = whole["image_id"].argsort()
    text_order = whole["text_image_id"].argsort(stable=True)
    image_row = torch.searchsorted(whole["image_id"][image_order], whole["text_image_id"][text_order])
    return whole["images"][image_order].float(), whole["texts"][text_order].float(), image_row


@torch.no_grad()
def frozen_image_features(
    model: MiniClipModel, rows: CaptionRows, views: int, num_workers: int, cache_dir: Path, accelerator: Accelerator
) -> list[Tensor]:
    """Pooled features of every image, each computed once; the processes of a machine share the work.

    Args:
        model: model on its device, with a frozen image tower.
        rows: images of a split, with their augmentation if there is one.
        views: number of augmented views; 1 without augmentation.
        num_workers: number of loader processes.
        cache_dir: folder of the [`FeatureTable`]s.
        accelerator: device and processes of the run.

    Returns:
        `[rows, width]` for each view, memory-mapped. View v is the image as `rows` would augment it in epoch v. The
        row of an image that cannot be decoded is NaN.

    Raises:
        MiniClipError: the tower returns NaN or infinity for an image.
    """
    model.vision_model.eval()
    vision = model.config.vision_config
    depends_on = {
        "tower": {"architecture": vision.architecture, "model_args": vision.model_args},
        "weights": digest_of_weights(model.vision_model),
        "preprocessing": rows.processor.image_processor.to_dict(),
        "images": digest_of_images(rows.undecoded_images()),
    }

    def compute(view: int, blocks: list[range]) -> Iterator[Tensor]:
        loader = BatchLoader(rows, [[(view, i) for i in block] for block in blocks], num_workers)
        for block, batch in zip(blocks, loader, strict=True):
            pixels = model_inputs(batch, rows.processor, accelerator.device)["pixel_values"]
            pooled = model.pool_images(pixels).pooler_output.float().cpu()
            if not pooled.isfinite().all():
                raise not_finite("image tower's features", math.nan, accelerator.mixed_precision)
            features = torch.full((len(block), pooled.shape[1]), math.nan)
            decoded = batch["image_id"] >= 0
            features[batch["image_id"][decoded] - block.start] = pooled[decoded]
            yield features

    tables, crop = [], rows.processor.image_processor.crop_size
    with folded_batch_norms(model.vision_model, (crop["height"], crop["width"])):
        for view in range(views):
            if rows.augmentation is not None:
                transforms = rows.augmentation.to_dict()
                depends_on["augmentation"] = {"draws": 2, "seed": rows.seed, "view": view, "transforms": transforms}
            table = FeatureTable(cache_dir, depends_on, len(rows), model.vision_model.pooled_size, EVALUATION_BATCH)
            title = "image features" if views == 1 else f"image features, view {view + 1} of {views}"
            tables.append(_fill_table(table, partial(compute, view), accelerator, title))
    return tables


@torch.no_grad()
def frozen_text_features(
    model: MiniClipModel,
    captions: list[list[str]],
    processor: MiniClipProcessor,
    cache_dir: Path,
    accelerator: Accelerator,
) -> list[Tensor]:
    """Pooled features of every caption, each computed once; the processes of a machine share the work.

    Captions are sorted by length, so that there is almost no padding.

    Args:
        model: model on its device, with a frozen text tower.
        captions: captions of each image.
        processor: preprocessing that belongs to the model.
        cache_dir: folder of the [`FeatureTable`]s.
        accelerator: device and processes of the run.

    Returns:
        One `[captions, width]` tensor per image, memory-mapped.
    """
    model.text_model.eval()
    ids = processor.tokenizer([text for row in captions for text in row], truncation=True)["input_ids"]
    ids = [torch.tensor(row) for row in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    depends_on = {
        "tower": {k: v for k, v in model.config.text_config.to_dict().items() if k != "_name_or_path"},
        "weights": digest_of_weights(model.text_model),
        "pooling": model.config.text_pooling,
        "input_ids": digest(row.numpy().tobytes() for row in ids),
    }

    def compute(blocks: list[range]) -> Iterator[Tensor]:
        for block in blocks:
            rows = [ids[order[i]] for i in block]
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            padded = pad_sequence(rows, batch_first=True, padding_value=processor.tokenizer.pad_token_id)
            inputs = {"input_ids": padded.to(accelerator.device), "attention_mask": mask.to(accelerator.device)}
            yield model.pool_texts(**inputs).pooler_output.float()

    table = FeatureTable(cache_dir, depends_on, len(ids), model.config.text_config.hidden_size, TEXT_BLOCK)
    features = _fill_table(table, compute, accelerator, "text features")
    place = torch.tensor(order).argsort()  # [captions], row of each caption in the table
    return [features[rows] for rows in place.split([len(row) for row in captions])]


def _fill_table(
    table: FeatureTable, compute: Callable[[list[range]], Iterator[Tensor]], accelerator: Accelerator, title: str
) -> Tensor:
    """Compute the missing blocks of a table, shared between the processes of this machine; returns its values."""

    def fill(blocks: list[range]) -> None:
        shown = len(table.done) > 0 and blocks and accelerator.is_local_main_process
        bar = tqdm(compute(blocks), desc=title, total=len(blocks), unit="batch", disable=not shown)
        for block, features in zip(blocks, bar, strict=True):
            table.write(block, features)

    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    fill(table.missing(accelerator.local_process_index, local_processes))
    accelerator.wait_for_everyone()
    fill(table.missing())  # nothing, unless the launcher did not set LOCAL_WORLD_SIZE on several machines
    return table.read()
