"""The order of the training images: `--shuffle`, and several datasets by weights."""

import zlib
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from datasets import DatasetDict

from ..data.load_rows import Splits
from ..data.loading.mixing import shuffled_order
from ..data.loading.order import RowOrder
from ..data.shards.split_shards import SplitShards, find_shards
from .command_line.arguments import TrainingArguments
from .reports.reporting import say
from .resuming.fingerprint import Fingerprint


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
    shards, sizes = _depends_on(splits, arguments)
    weights = arguments.dataset_weights if sizes else None
    rows = len(splits["train"])
    if shards is None:
        return shuffled_order(rows, arguments.batch_size, arguments.seed, None, sizes, weights)
    return shuffled_order(
        rows, arguments.batch_size, arguments.seed, shards.boundaries, sizes, weights, shards.fetch_ahead
    )


def order_checksum(splits: DatasetDict, arguments: TrainingArguments) -> int:
    """A number that changes with what the order depends on besides flags and the number of rows."""
    shards, sizes = _depends_on(splits, arguments)
    return zlib.crc32(repr((None if shards is None else shards.boundaries.tolist(), sizes)).encode())


def _depends_on(splits: DatasetDict, arguments: TrainingArguments) -> tuple[SplitShards | None, list[int]]:
    """The shards, to shuffle in windows, and the sizes of several datasets."""
    shards = find_shards(splits["train"]) if arguments.shuffle == "window" else None
    sizes = splits.sizes["train"] if isinstance(splits, Splits) else []
    return shards, sizes if len(sizes) > 1 else []
