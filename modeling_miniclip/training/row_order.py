"""The order of the training images: `--shuffle`, and several datasets by weights."""

from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from datasets import DatasetDict

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
    rows = splits["train"]
    boundaries = find_shards(rows).boundaries if arguments.shuffle == "window" else None
    sizes = splits.sizes["train"] if isinstance(splits, Splits) else []
    weights = arguments.dataset_weights if len(sizes) > 1 else None
    return shuffled_order(len(rows), arguments.batch_size, arguments.seed, boundaries, sizes, weights)
