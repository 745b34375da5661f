"""What can be wrong with a dataset that can be read: its captions, its images, its splits, files without captions."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from ...errors import Problem
from ...utils.names import name_of
from ..listing import is_hidden
from ..picture_formats import is_picture_file
from .entries import NONE, Entry, is_file
from .near_duplicates import ImageInspection, find_image_copies

LONGEST_CAPTION = 1000  # characters; more than any text tower reads
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # all control characters except tabs and line ends
# Texts in place of a caption: Python and JSON lists and objects, and how tables write that there is none.
LIST = re.compile(r"""\[\s*(\]|["'].*["']\s*,?\s*\])|\{\s*["'].*["']\s*:.*\}|\(\s*["'].*["']\s*,?\s*\)""", re.DOTALL)
MISSING = frozenset({"nan", "none", "null", "n/a", "#n/a", "na", "<na>", "nil", "undefined", "-", "--", "?"})
FEWEST_VALIDATION_IMAGES = 11  # with ten, recall@10 is always 100 %

Inspections = Mapping[str, ImageInspection]  # by the name of the image

# A check takes the entries, the inspections of their images, and the batch size.
Check = Callable[[list[Entry], Inspections, int], Iterator[Problem]]


def looks_like_data(caption: str) -> str | None:
    """What a caption looks like that is no text, such as `['a dog', 'a wet dog']` or `nan`; None for a text."""
    if caption[0] in "[{(" and LIST.fullmatch(caption):
        return "a list or an object, not a text"
    return "a missing value" if len(caption) <= 9 and caption.lower() in MISSING else None


def caption_problems(entries: list[Entry], inspections: Inspections, batch_size: int) -> Iterator[Problem]:
    """Captions that are much too long, contain control characters, or occur twice for an image."""
    for entry in entries:
        first_at: dict[str, int] = {}
        for i, caption in enumerate(entry.captions):
            row = entry.rows[i]
            if len(caption) > LONGEST_CAPTION:
                text = f"a caption of {len(caption)} characters, {caption[:40]!r}...; shorten it or split it"
                yield Problem("long-caption", text, entry.file, row)
            if (looks := looks_like_data(caption)) is not None:
                text = f"{caption[:80]!r} looks like {looks}; write the caption itself, or delete the row"
                yield Problem("data-caption", text, entry.file, row)
            if CONTROL.search(caption):
                text = f"control characters in {caption[:80]!r}; delete them"
                yield Problem("odd-caption", text, entry.file, row)
            first = first_at.setdefault(caption, i)
            if first != i:
                other = entry.rows[first]
                where = "" if other is None else f", in row {other}"
                text = f"{caption[:80]!r} is already a caption of {entry.name!r}{where}; delete one"
                yield Problem("duplicate-caption", text, entry.file, row)


def image_problems(entries: list[Entry], inspections: Inspections, batch_size: int) -> Iterator[Problem]:
    """Images that cannot be decoded, and images that look like another one."""
    by_name = {entry.name: entry for entry in entries}
    for name, inspection in inspections.items():
        if inspection.kind is not None:
            entry = by_name[name]
            text = f"image {name!r} {inspection.message}"
            yield Problem(inspection.kind, text, entry.file, entry.rows[0], entry.column, name)
        elif not inspection.metadata_is_readable:
            entry = by_name[name]
            text = f"image {name!r}: its EXIF data cannot be read; it is used, but may be shown turned"
            yield Problem("metadata", text, entry.file, entry.rows[0], entry.column)
    for name, first, identical in find_image_copies(inspections):
        entry, other = by_name[name], by_name[first]
        relation = "is byte for byte" if identical else "looks like"
        where = "" if other.rows[0] is None else f" (row {other.rows[0]})"
        if entry.split == other.split:
            text = f"image {name!r} {relation} {first!r}{where}; move its captions to that one"
            yield Problem("duplicate-image", text, entry.file, entry.rows[0])
        elif NONE not in (entry.split, other.split):
            text = (
                f"image {name!r} of {entry.split} {relation} {first!r} of {other.split}{where}, so the "
                "metrics are not those of unseen images; delete one"
            )
            yield Problem("two-splits", text, entry.file, entry.rows[0])


def split_problems(entries: list[Entry], inspections: Inspections, batch_size: int) -> Iterator[Problem]:
    """Splits that are too small for training or validation."""
    files = {entry.split: entry.file for entry in entries}
    yield from small_splits(Counter(entry.split for entry in entries), batch_size, files)


def small_splits(
    sizes: Mapping[str, int], batch_size: int, files: Mapping[str, str] | None = None
) -> Iterator[Problem]:
    """Splits that are too small; `sizes` and `files` have the number of images and the file of each split."""
    train, validation, files = sizes.get("train", 0), sizes.get("validation", 0), files or {}
    if train < batch_size:
        text = f"the {train} training images do not fill a batch of {batch_size}; lower --batch_size"
        yield Problem("small-split", text, files.get("train", ""))
    if 0 < validation < FEWEST_VALIDATION_IMAGES:
        text = f"with only {validation} validation images, recall@10 means nothing; use more"
        yield Problem("small-split", text, files.get("validation", ""))


ENTRY_CHECKS: tuple[Check, ...] = (caption_problems,)  # of each entry alone, without its image
CHECKS: tuple[Check, ...] = (*ENTRY_CHECKS, image_problems, split_problems)


def find_problems(entries: list[Entry], inspections: Inspections, batch_size: int) -> list[Problem]:
    """Problems found by all checks.

    Args:
        entries: images of all splits with their captions.
        inspections: results of decoding the images; empty if they were not decoded.
        batch_size: number of images per step.
    """
    return [problem for check in CHECKS for problem in check(entries, inspections, batch_size)]


def files_without_captions(entries: list[Entry]) -> Iterator[Problem]:
    """Image files that no row names, in the folders that hold images named by rows."""
    named = {os.path.normpath(str(entry.content)) for entry in entries if is_file(entry.content)}
    for folder in sorted({os.path.dirname(path) for path in named}):
        try:
            files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        except OSError as error:
            text = f"this folder cannot be listed: {error.strerror or error}; check its permissions and its disk"
            yield Problem("unlisted", text, name_of(folder))
            continue
        except ValueError:  # a null byte
            continue
        for file in files:
            if is_picture_file(file) and not is_hidden(file) and os.path.join(folder, file) not in named:
                text = "an image without captions; write some or delete it"
                yield Problem("no-captions", text, name_of(os.path.join(folder, file)))
