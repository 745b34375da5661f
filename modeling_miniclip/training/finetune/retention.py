"""`--retention_dataset`: a second dataset, on which each validation measures what a model still knows."""

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from ...data.columns import ColumnNames
from ...data.load_rows import SeededSplit, Splits, load_rows
from ...data.loading.batches import GlobalBatches
from ...data.loading.dataset import CaptionRows
from ...data.loading.loader import BatchLoader
from ...data.loading.order import InOrder
from ...data.rows import ReadOptions
from ...data.shards.shard_patterns import is_pattern
from ...data.tables.row_blocks import caption_counts
from ...errors import DataError, Problem
from ...hub.model_card import inline_code
from ...modeling_miniclip import MiniClipModel
from ...processing_miniclip import MiniClipProcessor
from ...utils.performance import release_freed_memory
from ..command_line.arguments import TrainingArguments
from ..limit_splits import limit_splits
from ..reports.reporting import say
from ..towers.feature_cache import default_cache_dir
from ..towers.features import EVALUATION_BATCH, frozen_image_features, frozen_text_features

SPLIT = "retention_dataset"  # its name among the splits, for images that cannot be decoded
BLOCK = 1000  # rows that are read at a time


@dataclass
class RetentionSet:
    """The images and captions of the second dataset.

    Args:
        name: the dataset, for the log.
        rows: `{image, image_id, captions}` of each image.
        loader: loader of this process's share of them.
    """

    name: str
    rows: Dataset
    loader: BatchLoader


def load_retention(arguments: TrainingArguments, accelerator: Accelerator) -> Dataset | None:
    """The validation split of `--retention_dataset`, None without it; reports its size.

    It is what a run on that dataset would validate on: a split of the dataset, or one drawn by `--seed` and
    `--validation_fraction`, of at most `--max_validation_images`.

    Raises:
        DataError: the dataset cannot be used, or has no such split.
    """
    if arguments.retention_dataset is None:
        return None
    columns = ColumnNames(arguments.image_column, arguments.caption_column, arguments.allow_outside_images)
    splits = load_rows(
        arguments.retention_dataset,
        ReadOptions(columns, caption_template=arguments.caption_template),
        SeededSplit(arguments.validation_fraction, arguments.seed),
        arguments.dataset_cache_dir,
        arguments.max_bad_image_fraction,
    )
    release_freed_memory()
    if "validation" not in splits:
        text = f"no validation split among {', '.join(splits)}, which --retention_dataset measures"
        raise DataError(Problem("unusable", text, arguments.retention_dataset))
    rows = _limited(splits["validation"], arguments)
    captions = int(caption_counts(rows).sum())
    say(accelerator, f"retention: {arguments.retention_dataset}, validation: {len(rows)} images, {captions} captions")
    return rows


def _limited(rows: Dataset, arguments: TrainingArguments) -> Dataset:
    """The rows that `--max_validation_images` leaves, drawn as those of the run's own validation split."""
    splits = Splits({"train": rows, "validation": rows})
    splits.sizes, splits.samples = {"train": [len(rows)], "validation": [len(rows)]}, {}
    limit_splits(splits, replace(arguments, max_train_images=None))
    return splits["validation"]


def retention_checksum(rows: Dataset | None) -> int:
    """What must stay the same when a run is resumed: names and captions of the images."""
    if rows is None:
        return 0
    checksum, texts = 0, rows.select_columns(["image_id", "captions"])  # without the images, which would be decoded
    for start in range(0, len(texts), BLOCK):
        part = texts[start : start + BLOCK]
        checksum = zlib.crc32(json.dumps([part["image_id"], part["captions"]]).encode(), checksum)
    return checksum


def retention_about(rows: Dataset | None, arguments: TrainingArguments) -> dict[str, Any]:
    """What the model card says about them."""
    if rows is None:
        return {}
    about = {
        "name": inline_code(_short_name(str(arguments.retention_dataset))),
        "images": len(rows),
        "captions": int(caption_counts(rows).sum()),
    }
    return {"retention": about}


def _short_name(source: str) -> str:
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() or is_pattern(source) else source


def build_retention(
    rows: Dataset | None,
    model: MiniClipModel,
    processor: MiniClipProcessor,
    arguments: TrainingArguments,
    accelerator: Accelerator,
) -> RetentionSet | None:
    """Loader of the images; features of frozen towers are computed here, once, and kept on disk."""
    if rows is None:
        return None
    cache_dir = Path(arguments.feature_cache_dir or default_cache_dir())
    images = texts = None
    if arguments.freeze in ("vision", "both"):
        plain = CaptionRows(rows, processor)
        images = frozen_image_features(model, plain, 1, arguments.num_workers, cache_dir, accelerator)
    if arguments.freeze in ("text", "both"):
        texts = frozen_text_features(model, rows, processor, cache_dir, accelerator)
    captioned = CaptionRows(rows, processor, vision_features=images, text_features=texts)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = GlobalBatches(InOrder(len(rows)), EVALUATION_BATCH * world_size, rank, world_size)
    workers = arguments.num_workers if images is None else 0
    loader = BatchLoader(captioned, batches, workers, accelerator.device.type == "cuda")
    return RetentionSet(str(arguments.retention_dataset), rows, loader)
