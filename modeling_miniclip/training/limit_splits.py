"""Use only some images of a split: the first ones for training, a sample for validation."""

import numpy as np

from ..data.load_rows import Sample, Splits
from ..data.tables.row_blocks import sample_numbers
from .command_line.arguments import TrainingArguments


def limit_splits(splits: Splits, arguments: TrainingArguments) -> None:
    """Keep the first `--max_train_images`, and `--max_validation_images` that the seed draws, in their order.

    Args:
        splits: splits, which are changed.
        arguments: flags of the run.
    """
    train, validation = len(splits["train"]), len(splits["validation"])
    if arguments.max_train_images is not None and arguments.max_train_images < train:
        _select(splits, "train", np.arange(arguments.max_train_images))
    if arguments.max_validation_images and arguments.max_validation_images < validation:
        _select(splits, "validation", sample_numbers(validation, arguments.max_validation_images, arguments.seed))
        splits.samples["validation"] = Sample(validation, arguments.seed)


def _select(splits: Splits, split: str, rows: np.ndarray) -> None:
    edges = np.cumsum([0, *splits.sizes[split]])
    splits.sizes[split] = np.diff(rows.searchsorted(edges)).tolist()
    splits[split] = splits[split].select(rows)
