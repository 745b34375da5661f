"""`--hard_negatives`: where they come from, and whether the dataset has them."""

from dataclasses import replace

from accelerate import Accelerator
from datasets import Dataset, DatasetDict

from ..data.columns import NEGATIVES
from ..data.loading.hard_negatives import HardNegatives
from ..data.tables.row_blocks import sample_rows
from ..data.word_swaps.english import english_share
from ..data.word_swaps.swaps import draw_swap
from ..errors import DataError
from .command_line.arguments import TrainingArguments
from .processes.distributed import check_on_main
from .reports.reporting import say

SAMPLE = 200  # images whose captions are looked at
ENGLISH = 0.5  # share of captions that must be English
REMEDY = f"it needs a column {NEGATIVES!r}, which `miniclip mine` writes (docs/train.md)"


def choose_hard_negatives(
    splits: DatasetDict, arguments: TrainingArguments, accelerator: Accelerator
) -> TrainingArguments:
    """Arguments with `--hard_negatives`: as given, or from the column if the dataset has it.

    Raises:
        DataError: the column is missing, or words cannot be swapped in these captions.
    """
    train = splits["train"]
    has_column = NEGATIVES in train.column_names
    if arguments.hard_negatives is None:
        if not has_column:
            return replace(arguments, hard_negatives=["none"])
        say(accelerator, f"--hard_negatives column, as the dataset has {NEGATIVES!r}")
        return replace(arguments, hard_negatives=["column"])
    negatives = hard_negatives_of(arguments)
    if negatives is None:
        return arguments
    if negatives.from_column and not has_column:
        raise DataError(f"--hard_negatives column: the dataset has no {NEGATIVES!r}, which `miniclip mine` writes")
    if negatives.kinds:
        found: list[float] = []
        check_on_main(lambda: found.append(share_of_swaps(train, negatives)), accelerator.is_main_process)
        if found:
            say(accelerator, f"hard negatives: words can be swapped in {100 * found[0]:.0f} % of the sampled captions")
    return arguments


def hard_negatives_of(arguments: TrainingArguments) -> HardNegatives | None:
    """Sources of hard negatives of a run; None without any."""
    return HardNegatives.from_sources(arguments.hard_negatives or [], arguments.seed)


def share_of_swaps(rows: Dataset, negatives: HardNegatives) -> float:
    """Share of a sample of the captions in which words can be swapped.

    Raises:
        DataError: most captions are not English, or none can be swapped.
    """
    some = sample_rows(rows.select_columns(["captions"]), SAMPLE)["captions"]
    english = english_share([caption for captions in some for caption in captions])
    flag = "--hard_negatives swap"
    if english < ENGLISH:
        raise DataError(f"{flag}: only {100 * english:.0f} % of {len(some):,} sampled captions are English; {REMEDY}")
    swapped = [
        draw_swap(captions, index, 0, 0, row, negatives.kinds) is not None
        for row, captions in enumerate(some)
        for index in range(len(captions))
    ]
    if not any(swapped):
        raise DataError(f"{flag}: no sampled caption has two words that can be swapped; {REMEDY}")
    return sum(swapped) / len(swapped)
