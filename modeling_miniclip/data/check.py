"""`miniclip check`: what is wrong with captioned images, each problem with its file and row, before any training."""

import csv
import io
import json
import os
import posixpath
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, ModelError, Problem, UsageError, printable
from ..utils.files import replace_text
from .caption_files import UNDECODED, CaptionedImage, ResolvedColumns
from .captions import Source, load_captions, read_source
from .image_files import IMAGE_SUFFIXES
from .near_duplicates import ImageInspection, inspect_images, same_images
from .problems import KINDS
from .splits import split_by_image

LONGEST_CAPTION = 1000  # characters; no text tower reads as many
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # but for tabs and line ends
FEWEST_VALIDATION_IMAGES = 11  # with ten, recall at 10 is 100 %
SHOWN = 100  # problems of a kind on the terminal; --json and the report of --fix have all


class Entry(NamedTuple):
    """An image of a split with all its captions; `rows` are those of the captions."""

    name: str
    split: str
    captions: list[str]
    rows: list[int]
    file: str
    column: str | None
    content: str | bytes  # path, or the encoded image


@dataclass
class Report:
    """All problems of a data set, and figures of it."""

    dataset: str
    problems: list[Problem] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Problems by kind, in the order of [`KINDS`]."""
        counted = Counter(problem.kind for problem in self.problems)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    def as_json(self) -> str:
        """Everything, as JSON."""
        values = {"dataset": self.dataset, "counts": self.counts, "figures": self.figures}
        return json.dumps(values | {"problems": [asdict(problem) for problem in self.problems]}, indent=1)

    def as_text(self, most: int | None = SHOWN) -> str:
        """Lines for people: each problem (of a kind at most `most`), the figures, the counts."""
        lines = []
        for kind, count in self.counts.items():
            of_kind = [printable(problem) for problem in self.problems if problem.kind == kind]
            lines += of_kind[:most]
            if most is not None and count > most:
                lines.append(f"... and {count - most} more {KINDS[kind]} (--json lists them)")
        lines += [f"{name.replace('_', ' ')}: {printable(value)}" for name, value in self.figures.items()]
        lines += [f"{count} {KINDS[kind]}" for kind, count in self.counts.items()] or ["no problems found"]
        return "\n".join(lines)


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
    """ImageInspection for everything that would stop a run or spoil what it learns.

    Args:
        dataset, image_dir, image_column, caption_column, validation_fraction, seed, allow_outside_images: as in
            `load_captions`; a source without splits is split as training would do it.
        batch_size: images a step, for the expected false negatives.
        tokenizer: text tower or export whose tokenizer counts the captions that it cuts.
        decode: open every image; otherwise images are only looked for.
        num_workers: processes that decode.
        fix: CSV to write that leaves the bad rows out and joins the captions of equal files, with a report beside it.

    Raises:
        DataError: no such data set.
        UsageError: `fix` cannot be written.
    """
    target = _fix_target(fix) if fix else None
    if batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, not {batch_size}")
    report, columns = Report(dataset), ResolvedColumns(image_column, [caption_column], "id")
    try:
        source, entries = _read(dataset, image_dir, columns, validation_fraction, seed, allow_outside_images, report)
    except DataError as error:
        if error.__cause__ is not None or "no such file or folder" in str(error):  # nothing that could be looked at
            raise
        report.problems.append(_fatal(error, dataset))
        return report
    bad = {problem.image for problem in report.problems}
    there = [entry for entry in entries if decode and entry.name not in bad]
    inspections = dict(
        zip((e.name for e in there), inspect_images([e.content for e in there], num_workers), strict=True)
    )
    report.problems += [problem for one in CHECKS for problem in one(entries, inspections, batch_size)]
    if source is not None:
        report.problems += files_without_captions(source)
    report.figures = _figures(entries, batch_size, tokenizer)
    if target is not None:
        if source is None:
            raise UsageError(f"--fix: {dataset} is no caption file or folder here that could be written anew")
        write_fix(target, entries, inspections, report, source)
    return report


def _read(
    dataset: str,
    image_dir: str | None,
    columns: ResolvedColumns,
    validation_fraction: float,
    seed: int,
    allow_outside: bool,
    report: Report,
) -> tuple[Source | None, list[Entry]]:
    """What a source says, problems noted in the report; no `Source` for the built-in set and those of the Hub."""
    path = Path(dataset).expanduser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the figures tell what is in no split
        if os.path.exists(path):
            source = read_source(path, image_dir, columns, allow_outside, report.problems.append)
            return source, _entries_of_source(source, validation_fraction, seed)
        splits = load_captions(
            dataset,
            image_column=columns.image,
            caption_column=columns.captions[0],
            validation_fraction=validation_fraction,
            seed=seed,
        )
        return None, entries_of_splits(splits, dataset)


def _fatal(error: DataError, dataset: str) -> Problem:
    place = re.match(r"(?P<file>.*?)(?:, row (?P<row>\d+))?: (?P<text>.*)", str(error))
    if place is None:
        return Problem("unusable", str(error), dataset)
    return Problem("unusable", place["text"], place["file"], int(place["row"]) if place["row"] else None)


def _entries_of_source(source: Source, validation_fraction: float, seed: int) -> list[Entry]:
    splits = source.splits or {"train": sorted(source.images)}
    if "validation" not in splits and len(splits["train"]) > 1:
        splits = splits | split_by_image(splits["train"], validation_fraction, seed)
    split_of = {name: split for split, names in splits.items() for name in names}

    def entry(name: str, image: CaptionedImage) -> Entry:
        place = os.path.join(source.folder, name)
        return Entry(name, split_of.get(name, "none"), image.captions, image.rows, image.file, image.column, place)

    return [entry(name, image) for name, image in source.images.items()]


def entries_of_splits(splits: Any, dataset: str, with_images: bool = True) -> list[Entry]:
    """Rows of `load_captions`; `with_images=False` leaves the images where they are."""
    from datasets import Image

    entries = []
    for split, rows in splits.items():
        images: Iterable[Any] = [{"bytes": b"", "path": None}] * len(rows)
        if with_images:
            images = (row["image"] for row in rows.select_columns(["image"]).cast_column("image", Image(decode=False)))
        several = zip(rows["image_id"], rows["captions"], images, strict=True)
        for i, (name, captions, image) in enumerate(several):
            content = image["bytes"] if image["bytes"] is not None else image["path"]
            entries.append(
                Entry(name, split, captions, [i] * len(captions), f"{dataset}, split {split}", None, content)
            )
    return entries


def quick_check(splits: Any, dataset: str, batch_size: int) -> list[str]:
    """What a run tells at its start, without opening an image: a line for each kind of problem."""
    entries = entries_of_splits(splits, dataset, with_images=False)
    counts = Report(dataset, [problem for one in CHECKS for problem in one(entries, {}, batch_size)]).counts
    return [f"{count} {KINDS[kind]}; `miniclip check` lists them" for kind, count in counts.items()]


# --- images ---------------------------------------------------------------------------------------------------------


# --- checks: each takes the entries, what decoding them gave and the batch size --------------------------------------


def _at(kind: str, told: str, entry: Entry, i: int = 0) -> Problem:
    return Problem(kind, told, entry.file, entry.rows[i])


def caption_problems(
    entries: list[Entry], inspections: Mapping[str, ImageInspection], batch_size: int
) -> Iterator[Problem]:
    """Captions that are much too long, hold control characters, or stand twice."""
    for entry in entries:
        seen: dict[str, int] = {}
        for i, caption in enumerate(entry.captions):
            if len(caption) > LONGEST_CAPTION:
                told = f"a caption of {len(caption)} characters, {caption[:40]!r}...; shorten it or split it"
                yield _at("long-caption", told, entry, i)
            if CONTROL.search(caption):
                yield _at("odd-caption", f"control characters in {caption[:80]!r}; delete them", entry, i)
            first = seen.setdefault(caption, i)
            if first != i:
                told = f"{caption[:80]!r} is a caption of {entry.name!r} already, in row {entry.rows[first]}"
                yield _at("duplicate-caption", f"{told}; delete one", entry, i)


def image_problems(
    entries: list[Entry], inspections: Mapping[str, ImageInspection], batch_size: int
) -> Iterator[Problem]:
    """Images that cannot be decoded, and those that look like another one."""
    by_name = {entry.name: entry for entry in entries}
    for name, one in inspections.items():
        if one.kind is not None:
            entry = by_name[name]
            told = f"image {name!r} {one.told}"
            yield Problem(one.kind, told, entry.file, entry.rows[0], entry.column, name)
    for name, first, equal in same_images(inspections):
        entry, other = by_name[name], by_name[first]
        how = "is byte for byte" if equal else "inspections like"
        if entry.split == other.split:
            told = f"image {name!r} {how} {first!r} (row {other.rows[0]}); give its captions to that one"
            yield _at("duplicate-image", told, entry)
        elif "none" not in (entry.split, other.split):
            told = f"image {name!r} of {entry.split} {how} {first!r} of {other.split} (row {other.rows[0]}): what is "
            yield _at("two-splits", told + "measured is not on unseen images; delete one", entry)


def split_problems(
    entries: list[Entry], inspections: Mapping[str, ImageInspection], batch_size: int
) -> Iterator[Problem]:
    """Splits that are too small to train on or to measure."""
    sizes, files = Counter(entry.split for entry in entries), {entry.split: entry.file for entry in entries}
    if sizes["train"] < batch_size:
        told = f"{sizes['train']} images to train on are fewer than a batch of {batch_size}; lower --batch_size"
        yield Problem("small-split", told, files.get("train", ""))
    if 0 < sizes["validation"] < FEWEST_VALIDATION_IMAGES:
        told = f"{sizes['validation']} validation images are too few: recall at 10 tells nothing; set more aside"
        yield Problem("small-split", told, files["validation"])


Check = Callable[[list[Entry], Mapping[str, ImageInspection], int], Iterator[Problem]]
CHECKS: tuple[Check, ...] = (caption_problems, image_problems, split_problems)


def files_without_captions(source: Source) -> Iterator[Problem]:
    """Image files that no row names, in the folders that hold a named one."""
    for parent in sorted({posixpath.dirname(name) for name in source.images}):
        folder = source.folder / parent
        for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if Path(file).suffix.lower() in IMAGE_SUFFIXES and posixpath.join(parent, file) not in source.images:
                told = "an image without captions; write some or delete it"
                yield Problem("no-captions", told, str(folder / file))


# --- figures --------------------------------------------------------------------------------------------------------


def expected_false_negatives(captions: list[list[str]], batch_size: int) -> float:
    """Mean number of ordered pairs of a batch whose captions are equal although their images differ.

    A batch is of different images, each with one of its captions; case and white space do not count.

    Args:
        captions: of each image.
        batch_size: images.
    """
    images = len(captions)
    if images < 2:
        return 0.0
    shares: dict[str, list[float]] = defaultdict(list)
    for several in captions:
        counted = Counter(" ".join(caption.casefold().split()).rstrip(" .") for caption in several)
        for caption, count in counted.items():
            shares[caption].append(count / len(several))
    pairs = sum(sum(p) ** 2 - sum(x * x for x in p) for p in shares.values() if len(p) > 1)
    batch = min(batch_size, images)
    return pairs * batch * (batch - 1) / (images * (images - 1))


def _figures(entries: list[Entry], batch_size: int, tokenizer: str | None) -> dict[str, Any]:
    train = [entry.captions for entry in entries if entry.split == "train"]
    sizes = Counter(entry.split for entry in entries)
    figures: dict[str, Any] = {f"images_in_{split}": size for split, size in sorted(sizes.items())}
    figures["captions"] = sum(len(entry.captions) for entry in entries)
    expected = expected_false_negatives(train, batch_size)
    figures[f"false_negatives_expected_in_a_batch_of_{batch_size}"] = float(f"{expected:.3g}")
    if tokenizer is not None:
        texts = [caption for entry in entries for caption in entry.captions if not UNDECODED.search(caption)]
        cut, limit = _truncated(tokenizer, texts)
        figures[f"captions_cut_to_{limit}_tokens"] = cut
    return figures


def _truncated(tokenizer: str, texts: list[str]) -> tuple[int, int]:
    """How many texts a text tower (or an export) cuts, and its limit."""
    from transformers import AutoConfig, AutoTokenizer

    from .. import auto  # noqa: F401  (an export is known)
    from ..errors import one_line
    from ..processing_miniclip import max_text_length

    try:
        config, loaded = AutoConfig.from_pretrained(tokenizer), AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ModelError(f"--tokenizer {tokenizer}: no text tower with its tokenizer: {one_line(error)}") from error
    limit = max_text_length(getattr(config, "text_config", config), loaded)
    lengths = (len(ids) for ids in loaded(texts, truncation=False, verbose=False)["input_ids"])
    return sum(length > limit for length in lengths), limit


# --- a mended copy --------------------------------------------------------------------------------------------------


def _fix_target(fix: str) -> Path:
    target = Path(fix).expanduser()
    if target.suffix.lower() != ".csv" or not target.parent.is_dir():
        raise UsageError(f"--fix {fix}: expected the name of a new .csv file in a folder that is there")
    for path in (target, _report_path(target)):
        if path.exists() or path.is_symlink():
            raise UsageError(f"--fix {fix}: {path} is there already; nothing is overwritten, choose another name")
    return target


def _report_path(target: Path) -> Path:
    return target.with_suffix(".report.txt")


def write_fix(
    target: Path, entries: list[Entry], inspections: Mapping[str, ImageInspection], report: Report, source: Source
) -> None:
    """Write the rows that are in order as a new CSV, and beside it a report of what was found.

    Captions that an image has twice are written once; those of a file that equals an earlier one byte for byte go to
    that one, where both are in one split or the source has no splits of its own.
    """
    bad = {problem.image for problem in report.problems}
    first_of = {name: first for name, first, equal in same_images(inspections) if equal}
    split_of = {entry.name: entry.split for entry in entries}
    captions: dict[str, list[str]] = {}
    for entry in entries:
        first = first_of.get(entry.name, entry.name)
        name = first if not source.splits or split_of[first] == entry.split else entry.name
        good = [text for text in entry.captions if not UNDECODED.search(text)]
        if entry.name not in bad and not UNDECODED.search(entry.name):
            captions.setdefault(name, []).extend(good)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "caption"])
    for name, several in captions.items():
        writer.writerows([name, " ".join(caption.split())] for caption in dict.fromkeys(several))
    kept = sum(len(dict.fromkeys(several)) for several in captions.values())
    whole = sum(len(entry.captions) for entry in entries)
    head = f"{target.name}: {kept} of {whole} captions that could be read, images in {printable(source.folder)}\n"
    replace_text(_report_path(target), head + report.as_text(None) + "\n")
    replace_text(target, text.getvalue())


def check_command(args: Any) -> int:
    """`miniclip check`: print the report; the exit code is 1 where there are problems."""
    options = ("image_dir", "image_column", "caption_column", "validation_fraction", "seed", "batch_size", "tokenizer",
               "num_workers", "allow_outside_images", "fix")  # fmt: skip
    report = check(args.dataset, decode=not args.quick, **{name: getattr(args, name) for name in options})
    print(report.as_json() if args.json else report.as_text())
    if args.fix and not args.json:
        print(f"written: {printable(args.fix)} and {printable(_report_path(Path(args.fix)))}")
    return 1 if report.problems else 0
