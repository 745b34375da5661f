"""`miniclip check`: find every problem of a dataset before training, each with its file and row."""

import warnings
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DataError, ModelError, Problem, UsageError, one_line, printable
from ..columns import ColumnNames
from ..load_rows import SeededSplit
from ..loading.pair_keys import same_text
from ..problems import HARMLESS, KINDS
from ..rows import ReadOptions
from ..source_kinds import Sources
from ..tables.row_blocks import record_batches, sample_of_captions
from .check_report import Report
from .entries import Entry, read_entries
from .find_problems import ENTRY_CHECKS, Inspections, files_without_captions, find_problems, small_splits
from .fixed_copy import fix_target, report_path, write_fixed_copy
from .near_duplicates import inspect_images

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


# --- the command ----------------------------------------------------------------------------------------------------


def check_command(args: Namespace) -> int:
    """`miniclip check`: print the report; the exit code is 1 if there are problems that do harm."""
    options = ("image_dir", "image_column", "caption_column", "validation_fraction", "seed", "batch_size", "tokenizer",
               "num_workers", "allow_outside_images", "fix", "validation_dataset", "caption_template",
               "revision")  # fmt: skip
    report = check(args.dataset, decode=not args.quick, **{name: getattr(args, name) for name in options})
    print(report.as_json() if args.json else report.as_text())
    if args.fix and not args.json:
        print(f"written: {printable(args.fix)} and {printable(report_path(Path(args.fix)))}")
    return 1 if any(problem.kind not in HARMLESS for problem in report.problems) else 0


def check(
    dataset: str,
    *,
    image_dir: str | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    validation_fraction: float = 0.1,
    seed: int = 0,
    batch_size: int = 32,
    tokenizer: str | None = None,
    decode: bool = True,
    num_workers: int = 2,
    allow_outside_images: bool = False,
    fix: str | None = None,
    validation_dataset: Sources | None = None,
    caption_template: str = ReadOptions.caption_template,
    revision: str | None = None,
) -> Report:
    """Find everything that would stop a run or harm the trained model.

    Args:
        dataset, image_dir, image_column, caption_column, validation_fraction, seed, allow_outside_images,
        caption_template, revision: as in `load_captions`; a source without splits is split as in training.
        batch_size: images per step, for the expected false negatives.
        tokenizer: text tower or export whose tokenizer is used to count truncated captions.
        decode: whether to open every image, instead of only looking for its file.
        num_workers: number of processes that decode images.
        fix: path of a new CSV with only the valid rows, where the captions of identical files are joined; a report is
            written next to it.
        validation_dataset: source of all validation images, or several.

    Raises:
        DataError: the dataset does not exist or cannot be loaded from the Hub.
        UsageError: an option is out of range, or `fix` cannot be written.
    """
    target = fix_target(fix) if fix else None
    _check_options(batch_size, validation_fraction, fix, validation_dataset)
    columns = ColumnNames(image_column, caption_column, allow_outside_images)
    options = ReadOptions(columns, image_dir, revision, caption_template=caption_template)
    split = SeededSplit(validation_fraction, seed)
    report = Report(dataset)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the figures show what is in no split
            source = read_entries(dataset, options, split, report.problems.append, validation_dataset)
    except DataError as error:
        if error.problem is None:
            raise
        report.problems.append(replace(error.problem, kind="unusable"))
        return report
    if target is not None and source.folder is None:
        raise UsageError(f"--fix: {dataset} is not a local caption file or folder, so there is no copy to write")
    inspections = _inspect_usable_images(source.entries, report.problems, num_workers) if decode else {}
    report.problems += find_problems(source.entries, inspections, batch_size)
    report.problems += files_without_captions(source.entries)
    report.figures = _figures(source.entries, batch_size, tokenizer)
    if target is not None:
        write_fixed_copy(target, source, inspections, report)
    return report


def _check_options(batch_size: int, validation_fraction: float, fix: str | None, validation_dataset: object) -> None:
    if batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, not {batch_size}")
    if not 0 < validation_fraction < 1:
        raise UsageError(f"--validation_fraction must be between 0 and 1, not {validation_fraction}")
    if fix and validation_dataset is not None:
        raise UsageError(
            "--fix writes a copy of one dataset: leave out --validation_dataset, and check that separately"
        )


def quick_check(splits: "DatasetDict", dataset: str, batch_size: int) -> list[str]:
    """Warnings for the start of a run, one for each kind of problem that can be found without opening images.

    Args:
        splits: splits as returned by `load_captions`.
        dataset: name or path of the dataset.
        batch_size: images per step.
    """
    found = Counter(problem.kind for problem in small_splits({n: len(rows) for n, rows in splits.items()}, batch_size))
    looked_at, whole = 0, True
    for split, rows in splits.items():
        sample = sample_of_captions(rows)
        whole = whole and len(sample) == len(rows)
        for entries in _blocks_of_entries(sample, split, f"{dataset}, split {split}"):
            looked_at += sum(len(entry.captions) for entry in entries)
            found.update(problem.kind for check in ENTRY_CHECKS for problem in check(entries, {}, batch_size))
    among = "" if whole else f" among {looked_at} sampled captions"
    return [
        f"{found[kind]} {KINDS[kind]}{'' if kind == 'small-split' else among}; `miniclip check` lists them"
        for kind in KINDS
        if found[kind]
    ]


# --- entries --------------------------------------------------------------------------------------------------------


def _blocks_of_entries(rows: "Dataset", split: str, file: str) -> Iterator[list[Entry]]:
    """Entries of a split without their images, a block of rows at a time."""
    for batch in record_batches(rows, ["image_id", "captions"]):
        columns = zip(*(column.to_pylist() for column in batch), strict=True)
        yield [Entry(name, split, texts, [0] * len(texts), file, None, b"") for name, texts in columns]


def _inspect_usable_images(entries: list[Entry], problems: list[Problem], num_workers: int) -> Inspections:
    """Decode all images except those that have a problem already."""
    bad = {problem.image for problem in problems}
    usable = [entry for entry in entries if entry.name not in bad]
    inspected = inspect_images([entry.content for entry in usable], num_workers)
    return {entry.name: one for entry, one in zip(usable, inspected, strict=True)}


# --- figures --------------------------------------------------------------------------------------------------------


def _figures(entries: list[Entry], batch_size: int, tokenizer: str | None) -> dict[str, int | float]:
    train = [entry for entry in entries if entry.split == "train"]
    sizes = Counter(entry.split for entry in entries)
    figures: dict[str, int | float] = {f"images_in_{split}": size for split, size in sorted(sizes.items())}
    figures["captions"] = sum(len(entry.captions) for entry in entries)
    groups = [entry.group for entry in train]
    expected = expected_false_negatives([entry.captions for entry in train], batch_size, groups)
    figures[f"false_negatives_expected_in_a_batch_of_{batch_size}"] = float(f"{expected:.3g}")
    if tokenizer is not None:
        texts = [caption for entry in entries for caption in entry.captions]
        truncated, limit = _count_truncated(tokenizer, texts)
        figures[f"captions_cut_to_{limit}_tokens"] = truncated
    return figures


def expected_false_negatives(
    captions: list[list[str]], batch_size: int, groups: Sequence[str | None] | None = None
) -> float:
    """Expected number of ordered pairs of images in a batch that have the same caption, but are not in one group.

    Each image contributes one of its captions, drawn at random. Case and white space do not matter.

    Args:
        captions: captions of each image.
        batch_size: number of images per batch.
        groups: group of each image, None for one on its own; by default, all are.
    """
    images = len(captions)
    if images < 2:
        return 0.0
    # Probability of each caption: the sums over the images of each group that has it.
    shares: dict[str, dict[str | int, float]] = defaultdict(lambda: defaultdict(float))
    for i, several in enumerate(captions):
        counted = Counter(map(same_text, several))
        group = groups[i] if groups is not None else None
        for caption, count in counted.items():
            shares[caption][i if group is None else group] += count / len(several)
    pairs = sum(sum(p.values()) ** 2 - sum(x * x for x in p.values()) for p in shares.values() if len(p) > 1)
    batch = min(batch_size, images)
    return pairs * batch * (batch - 1) / (images * (images - 1))


def _count_truncated(tokenizer: str, texts: list[str]) -> tuple[int, int]:
    """How many texts are longer than the limit of a text tower or an export, and this limit in tokens."""
    from transformers import AutoConfig, AutoTokenizer

    from ... import auto  # noqa: F401  (registers MiniCLIP, so that an export can be loaded)
    from ...processing_miniclip import max_text_length

    try:
        config, loaded = AutoConfig.from_pretrained(tokenizer), AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ModelError(f"--tokenizer {tokenizer}: no text tower with a tokenizer: {one_line(error)}") from error
    limit = max_text_length(getattr(config, "text_config", config), loaded)
    lengths = (len(ids) for ids in loaded(texts, truncation=False, verbose=False)["input_ids"])
    return sum(length > limit for length in lengths), limit
