"""Run a whole split through the model: embeddings for validation, and features of frozen towers, computed once."""

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ...data.loading.collation import model_inputs
from ...data.loading.dataset import CaptionRows, TaughtRows
from ...data.loading.loader import BatchLoader
from ...data.tables.image_places import image_parts
from ...data.tables.row_blocks import caption_counts, record_batches
from ...inference.fit import Parts
from ...modeling_miniclip import MiniClipModel
from ...processing_miniclip import MiniClipProcessor
from ...utils.performance import release_freed_memory
from ..processes.distributed import gather_rows, spreads_weights
from ..reports.diagnostics import not_finite
from .feature_cache import (
    CaptionFeatures,
    FeatureRows,
    FeatureTable,
    digest_of_texts,
    digest_of_tokenizer,
    digest_of_weights,
    image_tower_settings,
    text_tower_settings,
)
from .fold_batch_norm import folded_batch_norms

EVALUATION_BATCH = 64  # images per forward pass
TEXT_BLOCK = 256  # captions per forward pass of the text tower
TRIM_EVERY = 4  # batches of a validation
TEXT_IMAGES = 8_192  # images whose captions are sorted by length together
TOKENIZED_TOGETHER = 512  # captions, which takes little memory


@dataclass
class FrozenFeatures:
    """Pooled features of one split, from frozen towers and from a teacher; None for a tower that runs in every step.

    Args:
        vision: `[rows, width]` for each augmented view.
        text: `[captions, width]` for each image.
        taught: those of a teacher; None without one.
    """

    vision: list[FeatureRows] | None = None
    text: CaptionFeatures | None = None
    taught: TaughtRows | None = None


class Collected:
    """Embeddings of batches and their ids, each in one tensor from the start: many small ones would fragment memory.

    Args:
        most: largest number of rows.
        device: where they are kept.
    """

    def __init__(self, most: int, device: torch.device):
        self.most, self.count = most, 0
        self.embeddings = torch.empty(0, device=device)
        self.ids = torch.empty(most, dtype=torch.int64, device=device)

    def add(self, embeddings: Tensor, ids: Tensor) -> None:
        """Append embeddings `[n, dim]` with their ids `[n]`, without fillers, whose ids are negative."""
        embeddings, ids = embeddings[ids >= 0], ids[ids >= 0]
        if self.count == 0:
            self.embeddings = embeddings.new_empty((self.most, embeddings.shape[1]), device=self.ids.device)
        here = slice(self.count, self.count + len(ids))
        self.embeddings[here], self.ids[here] = embeddings, ids
        self.count = here.stop

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Take those of all processes: `[n, dim]` float32 embeddings and `[n]` ids, ascending by id, on the CPU.

        Those of one process ascend already, and are not copied.
        """
        local, self.embeddings = self.embeddings[: self.count], torch.empty(0)
        embeddings, ids = gather_rows(local).cpu(), gather_rows(self.ids[: self.count]).cpu()
        del local
        if (ids.diff() < 0).any():
            order = ids.argsort(stable=True)
            embeddings, ids = embeddings[order], ids[order]
        return embeddings.float(), ids


@torch.no_grad()
def embed_split(
    model: MiniClipModel,
    loader: BatchLoader,
    processor: MiniClipProcessor,
    device: torch.device,
    title: str | None,
    on_undecodable: Callable[[list[tuple[int, str]]], Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of a whole split, gathered from all processes, in the order of its rows.

    Args:
        model: unwrapped model.
        loader: loader of the split, without shuffling; its images may have no captions.
        processor: preprocessing that belongs to the model.
        device: device of the model.
        title: title of the progress bar, None for no bar.
        on_undecodable: function called once with the rows of this process's undecodable images and the reasons; these
            images are skipped.

    Returns:
        `[B, dim]` image embeddings, `[N, dim]` text embeddings, and `[N]`, the row of each text's image; on the CPU.
    """
    model.eval()
    images = Collected(len(loader.rows), device)  # of all processes
    texts = Collected(int(caption_counts(loader.rows.texts).sum()), device)
    undecodable: list[tuple[int, str]] = []
    fitting, can_repeat = Parts("images with their texts", device, tqdm.write), not spreads_weights(model)
    for number, batch in enumerate(tqdm(loader, desc=title, unit="batch", leave=False, disable=title is None)):
        if device.type == "cpu" and number % TRIM_EVERY == 0:  # texts of many lengths leave gaps that add up
            release_freed_memory()
        undecodable += batch.pop("undecodable", [])
        embed = partial(_embed_part, model, batch, processor, device)
        found = fitting.compute(len(batch["image_id"]), embed) if can_repeat else [embed(0, 1)]
        images.add(torch.cat([embeds for embeds, _ in found]), batch["image_id"])
        if embedded := [embeds for _, embeds in found if embeds is not None]:
            texts.add(torch.cat(embedded), batch["text_image_id"])
    on_undecodable(undecodable)
    release_freed_memory()
    (image_embeds, image_id), (text_embeds, text_image_id) = images.in_order(), texts.in_order()
    return image_embeds, text_embeds, torch.searchsorted(image_id, text_image_id)


def _embed_part(
    model: MiniClipModel,
    batch: dict[str, Tensor],
    processor: MiniClipProcessor,
    device: torch.device,
    part: int,
    parts: int,
) -> tuple[Tensor, Tensor | None]:
    """`[b, dim]` and `[n, dim]` embeddings of the images and of the texts, if any, in one of some parts of a batch."""
    if parts > 1:
        pieces = {name: rows.tensor_split(parts)[part] for name, rows in batch.items()}
        batch = {name: piece for name, piece in pieces.items() if len(piece)}  # there may be fewer texts than parts
    output = model(**model_inputs(batch, processor, device))
    return output.image_embeds, output.text_embeds


@torch.no_grad()
def frozen_image_features(
    model: MiniClipModel, rows: CaptionRows, views: int, num_workers: int, cache_dir: Path, accelerator: Accelerator
) -> list[FeatureRows]:
    """Pooled features of every image, each computed once; the processes of a machine share the work.

    If all of them are cached, no image is opened.

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
    width = model.vision_width
    depends_on = {
        "tower": image_tower_settings(model),
        "weights": digest_of_weights(model.vision_model),
        "preprocessing": rows.processor.image_processor.to_dict(),
    }
    parts = list(image_parts(rows.undecoded))

    def compute(view: int, batches: list[range]) -> Iterator[Tensor]:
        loader = BatchLoader(rows, [[(view, i) for i in batch] for batch in batches], num_workers)
        for numbers, batch in zip(batches, loader, strict=True):
            pixels = model_inputs(batch, rows.processor, accelerator.device)["pixel_values"]
            pooled = fitting.of(pixels, lambda some: model.pool_images(some).pooler_output.float().cpu())
            if not pooled.isfinite().all():
                raise not_finite("image tower's features", math.nan, accelerator.mixed_precision)
            features = torch.full((len(numbers), width), math.nan)
            decoded = batch["image_id"] >= 0
            features[batch["image_id"][decoded] - numbers.start] = pooled[decoded]
            yield features

    found, crop = [], rows.processor.image_processor.crop_size
    fitting = Parts("images", accelerator.device, tqdm.write)
    folded = partial(folded_batch_norms, model.vision_model, (crop["height"], crop["width"]))
    for view in range(views):
        tables = []
        for part, images in parts:
            about = depends_on | {"images": images}
            if rows.augmentation is not None:
                draws = {"draws": 3, "seed": rows.seed, "view": view, "first_row": part.start}
                about["augmentation"] = draws | {"transforms": rows.augmentation.to_dict()}
            tables.append((part, FeatureTable(cache_dir, about, len(part), width)))
        title = "image features" if views == 1 else f"image features, view {view + 1} of {views}"
        _fill_with_images(tables, partial(compute, view), folded, accelerator, title)
        found.append(FeatureRows.of_tables([table for _, table in tables]))
    return found


def _fill_with_images(
    tables: list[tuple[range, FeatureTable]],
    compute: Callable[[list[range]], Iterator[Tensor]],
    prepared: Callable[[], AbstractContextManager[Any]],
    accelerator: Accelerator,
    title: str,
) -> None:
    """Compute what is missing in the tables of a split's images.

    Args:
        tables: rows of the split in each table.
        compute: function that computes the features of batches of rows.
        prepared: context in which they are computed; it is not entered if nothing is missing.
        accelerator: device and processes of the run.
        title: title of the progress bar.
    """
    starts = [part.start for part, _ in tables]

    def fill(rank: int, world_size: int) -> None:
        done = np.concatenate([np.zeros(0, bool), *(table.done() for _, table in tables)])
        # Batches have the same rows however they are stored: a tower's last bits depend on the rows of its batch.
        every = (range(i, min(i + EVALUATION_BATCH, len(done))) for i in range(0, len(done), EVALUATION_BATCH))
        own = (rows for k, rows in enumerate(every) if k % world_size == rank)
        batches = [rows for rows in own if not done[rows.start : rows.stop].all()]
        if not batches:  # neither prepare the tower nor start loader processes
            return
        with prepared(), _bar(title, len(batches), accelerator) as bar:
            for rows, features in zip(batches, compute(batches), strict=True):
                for part, table in tables[bisect_right(starts, rows.start) - 1 : bisect_left(starts, rows.stop)]:
                    here = range(max(rows.start, part.start), min(rows.stop, part.stop))
                    table.write(range(here.start - part.start, here.stop - part.start),
                                features[here.start - rows.start : here.stop - rows.start])  # fmt: skip
                bar.update()

    _share(fill, accelerator)


@torch.no_grad()
def frozen_text_features(
    model: MiniClipModel, rows: Dataset, processor: MiniClipProcessor, cache_dir: Path, accelerator: Accelerator
) -> CaptionFeatures:
    """Pooled features of every caption, each computed once; the processes of a machine share the work.

    The captions of [`TEXT_IMAGES`] images are sorted by length, so that there is almost no padding. Captions whose
    features are cached are not tokenized.

    Args:
        model: model on its device, with a frozen text tower.
        rows: rows of a split with their captions.
        processor: preprocessing that belongs to the model.
        cache_dir: folder of the [`FeatureTable`]s.
        accelerator: device and processes of the run.

    Returns:
        Features of the captions of each image, memory-mapped.
    """
    model.text_model.eval()
    depends_on = text_tower_settings(model) | {
        "weights": digest_of_weights(model.text_model),
        "tokenizer": digest_of_tokenizer(processor.tokenizer),
    }
    width, parts, fitting = model.text_width, [], Parts("captions", accelerator.device, tqdm.write)
    for batch in record_batches(rows, ["captions"], TEXT_IMAGES):
        captions = batch["captions"].flatten()
        if len(captions):
            about = depends_on | {"captions": digest_of_texts(captions)}
            parts.append((captions, FeatureTable(cache_dir, about, len(captions), width)))

    def compute(ids: list[np.ndarray], batches: list[np.ndarray]) -> Iterator[Tensor]:
        def embed(some: np.ndarray) -> Tensor:
            texts = [torch.from_numpy(ids[i]) for i in some]
            mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
            padded = pad_sequence(texts, batch_first=True, padding_value=processor.tokenizer.pad_token_id)
            inputs = {"input_ids": padded.to(accelerator.device), "attention_mask": mask.to(accelerator.device)}
            return model.pool_texts(**inputs).pooler_output.float()

        for batch in batches:
            yield fitting.of(batch, embed)

    def fill(rank: int, world_size: int) -> None:
        missing = [(captions, table) for captions, table in parts if not table.done().all()]
        total = sum(-(-len(captions) // (TEXT_BLOCK * world_size)) for captions, _ in missing)
        bar = _bar("text features", total, accelerator)
        for captions, table in missing:
            ids = _token_ids(captions, processor)
            order = np.array(sorted(range(len(ids)), key=lambda i: len(ids[i])))
            done, every = table.done(), (order[i : i + TEXT_BLOCK] for i in range(0, len(order), TEXT_BLOCK))
            batches = [batch for k, batch in enumerate(every) if k % world_size == rank and not done[batch].all()]
            for batch, features in zip(batches, compute(ids, batches), strict=True):
                table.write(batch, features)
                bar.update()
        bar.close()

    _share(fill, accelerator)
    offsets = np.concatenate([[0], np.cumsum(caption_counts(rows))])
    return CaptionFeatures(FeatureRows.of_tables([table for _, table in parts]), offsets)


def _token_ids(captions: pa.Array, processor: MiniClipProcessor) -> list[np.ndarray]:
    """Token ids of each caption, as int64 arrays."""
    ids: list[np.ndarray] = []
    for start in range(0, len(captions), TOKENIZED_TOGETHER):
        texts = captions[start : start + TOKENIZED_TOGETHER].to_pylist()
        ids += map(np.array, processor.tokenizer(texts, truncation=True)["input_ids"])
    return ids


def _share(fill: Callable[[int, int], None], accelerator: Accelerator) -> None:
    """Let the processes of this machine each fill a part of the tables; arguments of `fill` are `rank, world_size`."""
    fill(accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    accelerator.wait_for_everyone()
    fill(0, 1)  # nothing, unless the launcher did not set LOCAL_WORLD_SIZE on several machines


def _bar(title: str, batches: int, accelerator: Accelerator) -> tqdm:
    return tqdm(desc=title, total=batches, unit="batch", disable=not (batches and accelerator.is_local_main_process))
