"""`miniclip check`: find every problem of a dataset before training, each with its file and row."""

import csv
import io
import json
import os
import posixpath
import re
import warnings
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DataError, ModelError, Problem, UsageError, one_line, printable
from ..utils.files import replace_text
from .caption_files import UNDECODED, CaptionedImage, ColumnNames
from .captions import Source, load_captions, local_path, read_source
from .image_files import is_image_file
from .near_duplicates import ImageInspection, find_image_copies, inspect_images
from .problems import KINDS
from .splits import split_by_image

if TYPE_CHECKING:
    from datasets import DatasetDict

LONGEST_CAPTION = 1000  # characters; more than any text tower reads
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # all control characters except tabs and line ends
FEWEST_VALIDATION_IMAGES = 11  # with ten, recall@10 is always 100 %
SHOWN = 100  # problems of each kind on the terminal; --json and the report of --fix list all of them


class Entry(NamedTuple):
    """An image of a split with all its captions.

    Args:
        name: name of the image.
        split: name of its split, "none" if it is in no split.
        captions: all captions of the image.
        rows: row number of each caption.
        file: caption file, or dataset and split on the Hub.
        column: name of the column that names the image.
        content: path of the image file, or the encoded image.
    """

    name: str
    split: str
    captions: list[str]
    rows: list[int]
    file: str
    column: str | None
    content: str | bytes


@dataclass
class Report:
    """All problems of a dataset, and its figures.

    Args:
        dataset: name or path of the dataset.
        problems: all problems found.
        figures: numbers of images and captions, expected false negatives, truncated captions.
    """

    dataset: str
    problems: list[Problem] = field(default_factory=list)
    figures: dict[str, int | float] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of problems of each kind, in the order of [`KINDS`]."""
        counted = Counter(problem.kind for problem in self.problems)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    def as_json(self) -> str:
        """The whole report as JSON."""
        values = {"dataset": self.dataset, "counts": self.counts, "figures": self.figures}
        return json.dumps(values | {"problems": [asdict(problem) for problem in self.problems]}, indent=1)

    def as_text(self, most: int | None = SHOWN) -> str:
        """The report for people: at most `most` problems of each kind (None: all), the figures, the counts."""
        lines = []
        for kind, count in self.counts.items():
            of_kind = [printable(problem) for problem in self.problems if problem.kind == kind]
            lines += of_kind[:most]
            if most is not None and count > most:
                lines.append(f"... and {count - most} more {KINDS[kind]} (--json lists them)")
        lines += [f"{name.replace('_', ' ')}: {printable(value)}" for name, value in self.figures.items()]
        lines += [f"{count} {KINDS[kind]}" for kind, count in self.counts.items()] or ["no problems found"]
        return "\n".join(lines)


# --- the command ----------------------------------------------------------------------------------------------------


def check_command(args: Namespace) -> int:
    """`miniclip check`: print the report; the exit code is 1 if there are problems."""
    options = ("image_dir", "image_column", "caption_column", "validation_fraction", "seed", "batch_size", "tokenizer",
               "num_workers", "allow_outside_images", "fix")  # fmt: skip
    report = check(args.dataset, decode=not args.quick, **{name: getattr(args, name) for name in options})
    print(report.as_json() if args.json else report.as_text())
    if args.fix and not args.json:
        print(f"written: {printable(args.fix)} and {printable(_report_path(Path(args.fix)))}")
    return 1 if report.problems else 0


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
) -> Report:
    """Find everything that would stop a run or harm the trained model.

    Args:
        dataset, image_dir, image_column, caption_column, validation_fraction, seed, allow_outside_images: as in
            `load_captions`; a source without splits is split as in training.
        batch_size: images per step, for the expected false negatives.
        tokenizer: text tower or export whose tokenizer is used to count truncated captions.
        decode: whether to open every image, instead of only looking for its file.
        num_workers: number of processes that decode images.
        fix: path of a new CSV with only the valid rows, where the captions of identical files are joined; a report is
            written next to it.

    Raises:
        DataError: the dataset does not exist or cannot be loaded from the Hub.
        UsageError: `fix` cannot be written.
    """
    target = _fix_target(fix) if fix else None
    if batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, not {batch_size}")
    columns = ColumnNames(image_column, caption_column, allow_outside_images)
    path = local_path(dataset) if dataset != "scenes" else None
    report, source = Report(dataset), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the figures show what is in no split
            if path is not None:
                source = read_source(path, image_dir, columns, report.problems.append)
                entries = _entries_of_source(source, validation_fraction, seed)
            else:
                entries = _load_entries(dataset, columns, validation_fraction, seed)
    except DataError as error:
        if error.problem is None:
            raise
        report.problems.append(replace(error.problem, kind="unusable"))
        return report
    inspections = _inspect_usable_images(entries, report.problems, num_workers) if decode else {}
    report.problems += _run_checks(entries, inspections, batch_size)
    if source is not None:
        report.problems += files_without_captions(source)
    report.figures = _figures(entries, batch_size, tokenizer)
    if target is not None:
        if source is None:
            raise UsageError(f"--fix: {dataset} is not a local caption file or folder, so there is no copy to write")
        write_fixed_copy(target, entries, inspections, report, source)
    return report


def quick_check(splits: "DatasetDict", dataset: str, batch_size: int) -> list[str]:
    """Warnings for the start of a run, one for each kind of problem that can be found without opening images.

    Args:
        splits: splits as returned by `load_captions`.
        dataset: name or path of the dataset.
        batch_size: images per step.
    """
    entries = entries_of_splits(splits, dataset, with_images=False)
    counts = Report(dataset, _run_checks(entries, {}, batch_size)).counts
    return [f"{count} {KINDS[kind]}; `miniclip check` lists them" for kind, count in counts.items()]


# --- entries --------------------------------------------------------------------------------------------------------


def _entries_of_source(source: Source, validation_fraction: float, seed: int) -> list[Entry]:
    splits = source.splits or {"train": sorted(source.images)}
    if "validation" not in splits and len(splits["train"]) > 1:
        splits = splits | split_by_image(splits["train"], validation_fraction, seed)
    split_of = {name: split for split, names in splits.items() for name in names}

    def entry(name: str, image: CaptionedImage) -> Entry:
        path = os.path.join(source.folder, name)
        return Entry(name, split_of.get(name, "none"), image.captions, image.rows, image.file, image.column, path)

    return [entry(name, image) for name, image in source.images.items()]


def _load_entries(dataset: str, columns: ColumnNames, validation_fraction: float, seed: int) -> list[Entry]:
    """Entries of the built-in dataset or of one on the Hub."""
    splits = load_captions(
        dataset,
        image_column=columns.image,
        caption_column=columns.caption,
        validation_fraction=validation_fraction,
        seed=seed,
    )
    return entries_of_splits(splits, dataset)


def entries_of_splits(splits: "DatasetDict", dataset: str, with_images: bool = True) -> list[Entry]:
    """Entries of splits as returned by `load_captions`.

    Args:
        splits: splits with the columns `image`, `image_id` and `captions`.
        dataset: name or path of the dataset.
        with_images: whether to read the encoded images.
    """
    from datasets import Image

    entries = []
    for split, rows in splits.items():
        images: Iterable[dict[str, Any]] = [{"bytes": b"", "path": None}] * len(rows)
        if with_images:
            images = (row["image"] for row in rows.select_columns(["image"]).cast_column("image", Image(decode=False)))
        columns = zip(rows["image_id"], rows["captions"], images, strict=True)
        for i, (name, captions, image) in enumerate(columns):
            content = image["bytes"] if image["bytes"] is not None else image["path"]
            file = f"{dataset}, split {split}"
            entries.append(Entry(name, split, captions, [i] * len(captions), file, None, content))
    return entries


Inspections = Mapping[str, ImageInspection]  # by the name of the image


def _inspect_usable_images(entries: list[Entry], problems: list[Problem], num_workers: int) -> Inspections:
    """Decode all images except those that have a problem already."""
    bad = {problem.image for problem in problems}
    usable = [entry for entry in entries if entry.name not in bad]
    inspected = inspect_images([entry.content for entry in usable], num_workers)
    return {entry.name: one for entry, one in zip(usable, inspected, strict=True)}


# --- checks: each takes the entries, the inspections of their images, and the batch size ----------------------------


def caption_problems(entries: list[Entry], inspections: Inspections, batch_size: int) -> Iterator[Problem]:
    """Captions that are much too long, contain control characters, or occur twice for an image."""
    for entry in entries:
        first_at: dict[str, int] = {}
        for i, caption in enumerate(entry.captions):
            row = entry.rows[i]
            if len(caption) > LONGEST_CAPTION:
                text = f"a caption of {len(caption)} characters, {caption[:40]!r}...; shorten it or split it"
                yield Problem("long-caption", text, entry.file, row)
            if CONTROL.search(caption):
                text = f"control characters in {caption[:80]!r}; delete them"
                yield Problem("odd-caption", text, entry.file, row)
            first = first_at.setdefault(caption, i)
            if first != i:
                other = entry.rows[first]
                text = f"{caption[:80]!r} is already a caption of {entry.name!r}, in row {other}; delete one"
                yield Problem("duplicate-caption", text, entry.file, row)


def image_problems(entries: list[Entry], inspections: Inspections, batch_size: int) -> Iterator[Problem]:
    """Images that cannot be decoded, and images that look like another one."""
    by_name = {entry.name: entry for entry in entries}
    for name, inspection in inspections.items():
        if inspection.kind is not None:
            entry = by_name[name]
            text = f"image {name!r} {inspection.message}"
            yield Problem(inspection.kind, text, entry.file, entry.rows[0], entry.column, name)
    for name, first, identical in find_image_copies(inspections):
        entry, other = by_name[name], by_name[first]
        relation = "is byte for byte" if identical else "looks like"
        if entry.split == other.split:
            text = f"image {name!r} {relation} {first!r} (row {other.rows[0]}); move its captions to that one"
            yield Problem("duplicate-image", text, entry.file, entry.rows[0])
        elif "none" not in (entry.split, other.split):
            text = (
                f"image {name!r} of {entry.split} {relation} {first!r} of {other.split} (row {other.rows[0]}), so the "
                "metrics are not those of unseen images; delete one"
            )
            yield Problem("two-splits", text, entry.file, entry.rows[0])


def split_problems(entries: list[Entry], inspections: Inspections, batch_size: int) -> Iterator[Problem]:
    """Splits that are too small for training or validation."""
    sizes, files = Counter(entry.split for entry in entries), {entry.split: entry.file for entry in entries}
    if sizes["train"] < batch_size:
        text = f"the {sizes['train']} training images do not fill a batch of {batch_size}; lower --batch_size"
        yield Problem("small-split", text, files.get("train", ""))
    if 0 < sizes["validation"] < FEWEST_VALIDATION_IMAGES:
        text = f"with only {sizes['validation']} validation images, recall@10 means nothing; use more"
        yield Problem("small-split", text, files["validation"])


Check = Callable[[list[Entry], Inspections, int], Iterator[Problem]]
CHECKS: tuple[Check, ...] = (caption_problems, image_problems, split_problems)


def _run_checks(entries: list[Entry], inspections: Inspections, batch_size: int) -> list[Problem]:
    return [problem for find_problems in CHECKS for problem in find_problems(entries, inspections, batch_size)]


def files_without_captions(source: Source) -> Iterator[Problem]:
    """Image files that no row names, in the folders that hold images named by rows."""
    for parent in sorted({posixpath.dirname(name) for name in source.images}):
        folder = source.folder / parent
        for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if is_image_file(file) and posixpath.join(parent, file) not in source.images:
                text = "an image without captions; write some or delete it"
                yield Problem("no-captions", text, str(folder / file))


# --- figures --------------------------------------------------------------------------------------------------------


def _figures(entries: list[Entry], batch_size: int, tokenizer: str | None) -> dict[str, int | float]:
    train = [entry.captions for entry in entries if entry.split == "train"]
    sizes = Counter(entry.split for entry in entries)
    figures: dict[str, int | float] = {f"images_in_{split}": size for split, size in sorted(sizes.items())}
    figures["captions"] = sum(len(entry.captions) for entry in entries)
    expected = expected_false_negatives(train, batch_size)
    figures[f"false_negatives_expected_in_a_batch_of_{batch_size}"] = float(f"{expected:.3g}")
    if tokenizer is not None:
        texts = [caption for entry in entries for caption in entry.captions if not UNDECODED.search(caption)]
        truncated, limit = _count_truncated(tokenizer, texts)
        figures[f"captions_cut_to_{limit}_tokens"] = truncated
    return figures


def expected_false_negatives(captions: list[list[str]], batch_size: int) -> float:
    """Expected number of ordered pairs of images in a batch that have the same caption.

    Each image contributes one of its captions, drawn at random. Case and white space do not matter.

    Args:
        captions: captions of each image.
        batch_size: number of images per batch.
    """
    images = len(captions)
    if images < 2:
        return 0.0
    shares: dict[str, list[float]] = defaultdict(list)  # probability of each caption, for each image that has it
    for several in captions:
        counted = Counter(" ".join(caption.casefold().split()).rstrip(" .") for caption in several)
        for caption, count in counted.items():
            shares[caption].append(count / len(several))
    pairs = sum(sum(p) ** 2 - sum(x * x for x in p) for p in shares.values() if len(p) > 1)
    batch = min(batch_size, images)
    return pairs * batch * (batch - 1) / (images * (images - 1))


def _count_truncated(tokenizer: str, texts: list[str]) -> tuple[int, int]:
    """How many texts are longer than the limit of a text tower or an export, and this limit in tokens."""
    from transformers import AutoConfig, AutoTokenizer

    from .. import auto  # noqa: F401  (registers MiniCLIP, so that an export can be loaded)
    from ..processing_miniclip import max_text_length

    try:
        config, loaded = AutoConfig.from_pretrained(tokenizer), AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ModelError(f"--tokenizer {tokenizer}: no text tower with a tokenizer: {one_line(error)}") from error
    limit = max_text_length(getattr(config, "text_config", config), loaded)
    lengths = (len(ids) for ids in loaded(texts, truncation=False, verbose=False)["input_ids"])
    return sum(length > limit for length in lengths), limit


# --- a fixed copy ---------------------------------------------------------------------------------------------------


def _fix_target(fix: str) -> Path:
    target = Path(fix).expanduser()
    if target.suffix.lower() != ".csv" or not target.parent.is_dir():
        raise UsageError(f"--fix {fix}: expected the name of a new .csv file in an existing folder")
    for path in (target, _report_path(target)):
        if path.exists() or path.is_symlink():
            raise UsageError(f"--fix {fix}: {path} already exists and is not overwritten; choose another name")
    return target


def _report_path(target: Path) -> Path:
    return target.with_suffix(".report.txt")


def write_fixed_copy(
    target: Path, entries: list[Entry], inspections: Inspections, report: Report, source: Source
) -> None:
    """Write the valid rows as a new CSV, and next to it the report of all problems.

    Duplicate captions of an image are written once. Captions of a file that is identical to an earlier one go to that
    one, if both are in the same split or the source has no splits.
    """
    bad = {problem.image for problem in report.problems}
    first_of = {name: first for name, first, identical in find_image_copies(inspections) if identical}
    split_of = {entry.name: entry.split for entry in entries}
    captions: dict[str, list[str]] = {}
    for entry in entries:
        first = first_of.get(entry.name, entry.name)
        name = first if not source.splits or split_of[first] == entry.split else entry.name
        good = [text for text in entry.captions if not UNDECODED.search(text)]
        if entry.name not in bad and not UNDECODED.search(entry.name):
            captions.setdefault(name, []).extend(good)
    unique = {name: list(dict.fromkeys(several)) for name, several in captions.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "caption"])
    for name, several in unique.items():
        writer.writerows([name, " ".join(caption.split())] for caption in several)
    written, total = sum(map(len, unique.values())), sum(len(entry.captions) for entry in entries)
    head = f"{target.name}: {written} of {total} readable captions, images in {printable(source.folder)}\n"
    replace_text(_report_path(target), head + report.as_text(None) + "\n")
    replace_text(target, text.getvalue())
