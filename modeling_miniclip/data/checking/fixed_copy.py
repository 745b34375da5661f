"""`miniclip check --fix`: a new CSV with only the valid rows of a dataset, and a report next to it."""

import csv
import io
from pathlib import Path

from ...errors import UsageError, printable
from ...utils.files import replace_text
from .check_report import Report
from .entries import NONE, Entries
from .find_problems import Inspections
from .near_duplicates import find_image_copies


def fix_target(fix: str) -> Path:
    """The path that `--fix` names.

    Raises:
        UsageError: it is not that of a new CSV in an existing folder, or its report exists already.
    """
    target = Path(fix).expanduser()
    if target.suffix.lower() != ".csv" or not target.parent.is_dir():
        raise UsageError(f"--fix {fix}: expected the name of a new .csv file in an existing folder")
    for path in (target, report_path(target)):
        if path.exists() or path.is_symlink():
            raise UsageError(f"--fix {fix}: {path} already exists and is not overwritten; choose another name")
    return target


def report_path(target: Path) -> Path:
    """The report next to a fixed copy."""
    return target.with_suffix(".report.txt")


def write_fixed_copy(target: Path, source: Entries, inspections: Inspections, report: Report) -> None:
    """Write the valid rows as a new CSV, and next to it the report of all problems.

    Duplicate captions of an image are written once. Captions of a file that is identical to an earlier one go to that
    one, if both are in the same split or the source has no splits.

    Args:
        target: CSV file to write, from [`fix_target`].
        source: images of the source with their captions.
        inspections: results of decoding the images.
        report: report of all problems.
    """
    bad = {problem.image for problem in report.problems}
    first_of = {name: first for name, first, identical in find_image_copies(inspections) if identical}
    split_of = {entry.name: entry.split for entry in source.entries}
    captions: dict[str, list[str]] = {}
    for entry in source.entries:
        first = first_of.get(entry.name, entry.name)
        name = first if not source.has_splits or split_of[first] == entry.split else entry.name
        if entry.name not in bad:
            captions.setdefault(name, []).extend(entry.captions)
    unique = {name: list(dict.fromkeys(several)) for name, several in captions.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "caption", *(["split"] if source.rows_name_splits else [])])
    for name, several in unique.items():
        split = [split_of[name].replace(NONE, "")] if source.rows_name_splits else []
        writer.writerows([name, " ".join(caption.split()), *split] for caption in several)
    written, total = sum(map(len, unique.values())), sum(len(entry.captions) for entry in source.entries)
    head = f"{printable(target.name)}: {written} of {total} readable captions, images in {printable(source.folder)}\n"
    try:
        replace_text(report_path(target), head + report.as_text(None) + "\n")
        replace_text(target, text.getvalue())
    except BaseException:
        report_path(target).unlink(missing_ok=True)  # the same command could not run again
        raise
