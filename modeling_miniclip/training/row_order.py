"""The order of the training images: `--shuffle`, and several datasets by weights."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from datasets import DatasetDict

from ..data.fetch_ahead import fetched_ahead
from ..data.load_rows import Splits
from ..data.mixing import shuffled_order
from ..data.order import RowOrder
from ..data.split_shards import find_shards
from .arguments import TrainingArguments
from .fingerprint import Fingerprint
from .reporting import say


def choose_shuffle(
    splits: DatasetDict, checkpoint: Path | None, arguments: TrainingArguments, accelerator: Accelerator
) -> TrainingArguments:
    """Arguments with `--shuffle`: as given, as in the checkpoint, or in windows where single rows are slow to read."""
    if arguments.shuffle is not None:
        return arguments
    if checkpoint is not None:
        return replace(arguments, shuffle=Fingerprint.load(checkpoint).flags["shuffle"])
    if not find_shards(splits["train"]).need_windows:
        return replace(arguments, shuffle="full")
    say(accelerator, "--shuffle window, as Parquet files and remote shards are slow to read in any order")
    return replace(arguments, shuffle="window")


def training_order(splits: DatasetDict, arguments: TrainingArguments) -> RowOrder:
    """The order of the training rows in each epoch."""
    boundaries, sizes = _depends_on(splits, arguments)
    weights = arguments.dataset_weights if sizes else None
    rows = len(splits["train"])
    order = shuffled_order(rows, arguments.batch_size, arguments.seed, boundaries, sizes, weights)
    return fetched_ahead(order, splits["train"], boundaries)


def order_checksum(splits: DatasetDict, arguments: TrainingArguments) -> int:
    """A number that changes with what the order depends on besides flags and the number of rows."""
    boundaries, sizes = _depends_on(splits, arguments)
    return zlib.crc32(repr((None if boundaries is None else boundaries.tolist(), sizes)).encode())


def _depends_on(splits: DatasetDict, arguments: TrainingArguments) -> tuple[np.ndarray | None, list[int]]:
    """Boundaries of the shards, to shuffle in windows, and sizes of several datasets."""
    boundaries = find_shards(splits["train"]).boundaries if arguments.shuffle == "window" else None
    sizes = splits.sizes["train"] if isinstance(splits, Splits) else []
    return boundaries, sizes if len(sizes) > 1 else []
