"""The columns of a source, and the names and captions in its cells."""

import difflib
import posixpath
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, Problem
from .picture_formats import is_picture_file
from .problems import OnProblem, raise_problem

# Usual names of the column that names the image, and of those with the captions.
IMAGE_COLUMNS = ("image", "file_name", "filename", "filepath", "image_path", "path", "image_name", "file")
NEGATIVES = "negative_captions"  # wrong captions of an image
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences")


@dataclass(frozen=True)
class ColumnNames:
    """The columns to look for, and whether the image names in them may lead outside the folder of images.

    Args:
        image: column with the image, or its file name.
        caption: column with the caption, or the common part of `caption_0`, `caption_1`, ...
        allow_outside_images: whether a caption file may name images outside its folder of images.
        id: column with the caption's id.
    """

    image: str = "image"
    caption: str = "caption"
    allow_outside_images: bool = False
    id: str = "id"


@dataclass(frozen=True)
class ResolvedColumns:
    """The columns that a source has; several of `captions` if each caption has its own column."""

    image: str
    captions: list[str]
    id: str | None = None
    split: str | None = None
    group: str | None = None
    negatives: str | None = None


def find_columns(
    names: Collection[str], file: str, row: int | None, wanted: ColumnNames, needs_captions: bool = True
) -> ResolvedColumns:
    """The columns of a caption file or of a table, by the names that were asked for or by usual ones.

    Args:
        names: names of all columns.
        file: file, or dataset and split, for the error.
        row: row of the header, for the error.
        wanted: columns to look for.
        needs_captions: whether a source without captions is an error.

    Raises:
        DataError: there is no column for the image, or none for the captions.
    """
    usual = IMAGE_COLUMNS if wanted.image == ColumnNames.image else ()
    image = next((name for name in (wanted.image, *usual) if name in names), None)
    if image is None:
        text = (
            f"no column {wanted.image!r}{' or ' + repr(usual[1]) if usual else ''}; the header has "
            f"{', '.join(names) or 'nothing'}. Name the right one with image_column{_hint(wanted.image, names)}"
        )
        raise DataError(Problem("unusable", text, file, row))
    is_needed = needs_captions or has_captions(names, wanted.caption)
    captions: list[str] = caption_columns(names, file, row, wanted.caption) if is_needed else []
    taken = {image, *captions}
    split, group, negatives = (optional_column(names, name, taken) for name in ("split", "group", NEGATIVES))
    return ResolvedColumns(image, captions, wanted.id if wanted.id in names else None, split, group, negatives)


def optional_column(names: Collection[str], wanted: str, taken: Collection[str] = ()) -> str | None:
    """The column of this name in upper or lower case, unless it is `taken`."""
    same = [name for name in names if name.strip().lower() == wanted and name not in taken]
    return wanted if wanted in same else next(iter(same), None)


def has_captions(names: Collection[str], wanted: str) -> bool:
    """Whether [`caption_columns`] finds a column."""
    return bool(_caption_columns(names, wanted))


def caption_columns(names: Collection[str], file: str, row: int | None, wanted: str) -> list[str]:
    """The caption columns of a dataset: `wanted`, or `wanted_0`, `wanted_1`, ..., or a column with a usual name.

    Args:
        names: names of all columns.
        file: file, or dataset and split, for the error.
        row: row of the header, for the error.
        wanted: name of the caption column that was asked for.

    Raises:
        DataError: none of them exists.
    """
    columns = _caption_columns(names, wanted)
    if not columns:
        text = (
            f"no captions: expected a column {wanted!r} (text or list) or columns {wanted}_0, {wanted}_1, ... among "
            f"{', '.join(names) or 'nothing'}. Name the right one with caption_column{_hint(wanted, names)}"
        )
        raise DataError(Problem("unusable", text, file, row))
    return columns


def _caption_columns(names: Collection[str], wanted: str) -> list[str]:
    usual = CAPTION_COLUMNS if wanted == ColumnNames.caption else ()
    candidates = ([wanted], _numbered_columns(names, wanted), *([name] for name in usual))
    return next((columns for columns in candidates if columns and set(columns) <= set(names)), [])


def _numbered_columns(names: Collection[str], stem: str) -> list[str]:
    """Columns `stem_0`, `stem_1`, ... (also without `_`), sorted by their number."""
    numbered = [name for name in names if re.fullmatch(re.escape(stem) + r"_?\d+", name)]
    return sorted(numbered, key=lambda name: int(name.removeprefix(stem).lstrip("_")))


def _hint(column: str, names: Collection[str]) -> str:
    if any(is_picture_file(name.partition("#")[0]) for name in names):  # the number of a caption may follow the name
        return "; this row looks like data: write a header such as image,caption above it"
    near = difflib.get_close_matches(column, [name.lower() for name in names], n=1)
    return f"; did you mean {next(name for name in names if name.lower() == near[0])!r}?" if near else ""


# --- cells ----------------------------------------------------------------------------------------------------------


def image_name(cell: Any, file: str, row: int, column: str | None, on_problem: OnProblem) -> str | None:
    """An image's name in its normal form, `sub/a.jpg` for `./sub/a.jpg` and `sub\\a.jpg`; None if it is empty."""
    name = cell.strip() if isinstance(cell, str) else ""
    if not name:
        problem = f"no image name, found {cell!r}; fill the cell or delete the row"
        on_problem(Problem("no-name", problem, file, row, column))
        return None
    if "/" not in name and "\\" not in name:
        return name
    return posixpath.normpath(name.replace("\\", "/"))


def captions_of_row(
    cells: Mapping[str, Any], columns: ResolvedColumns, file: str, row: int, on_problem: OnProblem = raise_problem
) -> list[str]:
    """All captions of a row: from one column with a text or a list of texts, or from several columns.

    An image may have fewer captions than there are columns: the others are then empty.
    """
    captions = []
    several = len(columns.captions) > 1
    for column in columns.captions:
        value = cells.get(column)
        for caption in value if isinstance(value, list) and value else [value]:
            if isinstance(caption, str) and caption.strip():
                captions.append(caption.strip())
            elif not several or not (caption is None or caption == "" or isinstance(caption, str)):
                on_problem(_empty(caption, file, row, column))
    if several and not captions:
        on_problem(_empty(cells.get(columns.captions[0]), file, row, columns.captions[0]))
    return captions


def _empty(caption: Any, file: str, row: int, column: str) -> Problem:
    text = f"the caption is empty or not text, found {caption!r}; fill it or delete the row"
    return Problem("empty-caption", text, file, row, column)
