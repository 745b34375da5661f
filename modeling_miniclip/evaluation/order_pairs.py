"""Pairs of a true and a false caption of an image: built-in swaps, or a file of a benchmark."""

import csv
import io
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.columns import IMAGE_COLUMNS
from ..data.loading.pair_keys import same_text
from ..data.readers.image_files import image_folder
from ..data.readers.record_captions import negatives_of
from ..data.word_swaps.english import english_share
from ..data.word_swaps.swaps import SWAP_KINDS, draw_swap_of_kind
from ..errors import DataError, Problem, UsageError, one_line
from ..inference.encode import open_image
from ..utils.names import name_of
from .eval_sets import EvalSet

# Columns of files, in SugarCrepe's layout and in ARO's; Winoground has two images and two captions in each row.
TRUE_COLUMNS = ("true_caption", "caption", "positive_caption")
FALSE_COLUMNS = ("false_caption", "negative_caption", "negative_captions")
KIND_COLUMNS = ("kind", "type", "relation_name", "category", "collapsed_tag", "tag")
WINOGROUND = ("image_0", "image_1", "caption_0", "caption_1")
BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")  # part of the image that ARO shows the model

NO_KIND = "pairs"  # kind of the pairs of a file without kinds
ENGLISH = 0.5  # share of captions that must be English for built-in swaps


@dataclass
class OrderPairs:
    """Pairs of captions, each of one image.

    Args:
        source: what the pairs are, for the report.
        images: different images: anything that `open_image` takes, or a path with a box `(left, top, right, bottom)`.
        image: for each pair, the position of its image.
        true, false, kind: the captions and the kind of each pair.
        names: names of the images in a file of pairs.
    """

    source: str
    images: Sequence[Any]
    image: list[int] = field(default_factory=list)
    true: list[str] = field(default_factory=list)
    false: list[str] = field(default_factory=list)
    kind: list[str] = field(default_factory=list)
    names: Sequence[str] = ()

    def check_images(self) -> None:
        """Check that there is another image for each pair.

        Raises:
            DataError: there is only one.
        """
        if len(self.images) < 2:
            raise DataError(
                f"{self.source}: the order test compares with another image, and all pairs are of one; add pairs of "
                "other images"
            )

    def add(self, image: int, true: str, false: str, kind: str) -> None:
        """Append a pair."""
        self.image.append(image)
        self.true.append(true)
        self.false.append(false)
        self.kind.append(kind)

    def box(self, position: int) -> tuple[int, ...] | None:
        """The part `(left, top, right, bottom)` of an image that is shown; None for the whole of it."""
        image = self.images[position]
        return image[1] if isinstance(image, tuple) else None

    def open(self, position: int) -> Image.Image:
        """Open an image, as RGB."""
        image = self.images[position]
        if isinstance(image, tuple):
            return open_image(image[0]).crop(image[1])
        return open_image(image)


def load_pairs(
    data: EvalSet, order_test: bool | str | os.PathLike, image_dir: str | os.PathLike | None
) -> OrderPairs | None:
    """Pairs from a file, or the captions of a split with words swapped; None if `order_test` is False.

    Raises:
        UsageError: the split has no captions.
        DataError: see [`swapped_pairs`] and [`read_pairs`]; or there is only one image.
    """
    if order_test is False:
        return None
    if order_test is True and data.is_classification:
        raise UsageError(f"--order_test: {data.name} has no captions; pass a file: --order_test FILE")
    if order_test is True:
        pairs = swapped_pairs(data.captions_by_image(), data.images, data.name)
    else:
        pairs = read_pairs(order_test, image_dir)
    pairs.check_images()
    return pairs


def swapped_pairs(captions: Sequence[Sequence[str]], images: Sequence[Any], source: str, seed: int = 0) -> OrderPairs:
    """Pairs of captions and built-in swaps: for each image at most one of each kind.

    Args:
        captions: captions of each image.
        images: the images.
        source: name of the dataset, for the report and for errors.
        seed: random seed of the swaps.

    Raises:
        DataError: the captions are not English, or allow no swap.
    """
    share = english_share([caption for some in captions for caption in some])
    if share < ENGLISH:
        raise DataError(
            f"{source}: only {100 * share:.0f} % of the captions are English, in which words can be swapped; pass a "
            "file with true and false captions: --order_test FILE"
        )
    pairs = OrderPairs("swapped words", images)
    for row, some in enumerate(captions):
        rng = random.Random(f"order-{seed}-{row}")
        for kind in SWAP_KINDS:
            for index in rng.sample(range(len(some)), len(some)):
                if (false := draw_swap_of_kind(some, index, kind, rng)) is not None:
                    pairs.add(row, some[index], false, kind)
                    break
    if not pairs.image:
        raise DataError(f"{source}: no caption has two words that can be swapped; pass a file: --order_test FILE")
    return pairs


def read_pairs(path: str | os.PathLike, image_dir: str | os.PathLike | None = None) -> OrderPairs:
    """Read a CSV, TSV, JSON or JSON Lines file of images with true and false captions.

    Args:
        path: file with the columns `image`, `caption` and `negative_caption` (SugarCrepe), `image_path`,
            `true_caption`, `false_caption` and `bbox_x`, ... (ARO), or `image_0`, `image_1`, `caption_0` and
            `caption_1` (Winoground: each caption is false for the other image). A column such as `kind`, `type`,
            `relation_name` or `tag` names kinds.
        image_dir: folder of the images; by default the file's folder, or `Images` or `images` in it.

    Raises:
        DataError: a column, a caption or an image is missing, a false caption is the true one, a box is none, or the
            file cannot be read; names the row.
    """
    file = Path(path).expanduser()
    rows = [(number, pair) for number, cells in _records(file) for pair in _pairs_of(cells, str(file), number)]
    if not rows:
        raise DataError(Problem("unusable", "no pairs of captions; expected one per line", str(file)))
    folder = Path(image_dir).expanduser() if image_dir else image_folder(file.parent, (pair[0] for _, pair in rows))
    positions: dict[Any, int] = {}
    names: list[str] = []
    pairs = OrderPairs(name_of(file), [])
    for number, (name, box, true, false, kind) in rows:
        place = folder / name
        if not place.is_file():
            text = f"image {name!r} is not in {folder}; name the right folder with --image_dir"
            raise DataError(Problem("missing", text, str(file), number))
        position = positions.setdefault((str(place), box), len(positions))
        if position == len(names):
            names.append(name)
        pairs.add(position, true, false, kind)
    pairs.images = [(place, box) if box else place for place, box in positions]
    pairs.names = names
    return pairs


def _records(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of the file, each with its number in it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".jsonl":
            rows: Iterable[tuple[int, Any]] = (
                (i, json.loads(line)) for i, line in enumerate(text.splitlines(), 1) if line.strip()
            )
        elif text.lstrip()[:1] in ("[", "{"):
            values = json.loads(text)
            rows = enumerate(values.values() if isinstance(values, dict) else values, 1)
        else:
            dialect = "excel-tab" if "\t" in text.partition("\n")[0] else "excel"
            reader = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect)
            rows = ((reader.line_num, row) for row in reader)
        for number, row in rows:
            if not isinstance(row, Mapping):
                problem = f"expected an object with an image and its captions, found {str(row)[:40]!r}"
                raise DataError(Problem("unusable", problem, str(file), number))
            if None in row:
                problem = f"more fields than the {len(row) - 1} of the header; put captions with commas into quotes"
                raise DataError(Problem("fields", problem, str(file), number))
            yield number, row
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(
            f"--order_test {file}: cannot be read: {one_line(error)}; expected a CSV, TSV, JSON or JSON Lines file in "
            "UTF-8"
        ) from error


_Pair = tuple[str, tuple[int, ...] | None, str, str, str]


def _pairs_of(cells: Mapping[str, Any], file: str, number: int) -> Iterator[_Pair]:
    """The pairs of a row: name of the image, box in it, true and false caption, kind."""
    kind = str(_cell(cells, KIND_COLUMNS) or NO_KIND)
    found: list[tuple[Any, ...]]
    if set(WINOGROUND) <= set(cells):
        found = [(cells[f"image_{i}"], None, cells[f"caption_{i}"], cells[f"caption_{1 - i}"]) for i in (0, 1)]
    else:
        image, true, false = (
            _cell(cells, names) for names in ((*IMAGE_COLUMNS, "image_path"), TRUE_COLUMNS, FALSE_COLUMNS)
        )
        try:
            falses: list[Any] = list(negatives_of(false))
            box = _box_of(cells)
        except ValueError as error:
            raise DataError(Problem("unusable", str(error), file, number)) from error
        found = [(image, box, true, wrong) for wrong in falses or [None]]
    for image, box, true, false in found:
        if not all(isinstance(value, str) and value.strip() for value in (image, true, false)):
            text = (
                f"expected an image ({', '.join(IMAGE_COLUMNS[:3])}), a true caption ({', '.join(TRUE_COLUMNS)}) and "
                f"a false one ({', '.join(FALSE_COLUMNS)}), found {_found(cells)}"
            )
            raise DataError(Problem("unusable", text, file, number))
        if same_text(true) == same_text(false):
            text = f"the false caption {false.strip()!r} is the true one; delete the row, or correct it"
            raise DataError(Problem("unusable", text, file, number))
        yield image.strip(), box, true.strip(), false.strip(), kind


def _found(cells: Mapping[str, Any]) -> str:
    """The columns of a row, in words."""
    empty = [str(name) for name, value in cells.items() if value in (None, "", [])]
    return f"the columns {', '.join(map(str, cells))}" + (f", of which empty: {', '.join(empty)}" if empty else "")


def _box_of(cells: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The box of a row, `(left, top, right, bottom)`; None without one.

    Raises:
        ValueError: a number is missing, or the box is empty.
    """
    given = [cells.get(name) for name in BOX]
    if all(value in (None, "") for value in given):
        return None
    wrong = f"expected numbers of pixels in {', '.join(BOX)}, the last two above 0, found {given}"
    try:
        x, y, width, height = (int(float(value)) for value in given)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(wrong) from error
    if x < 0 or y < 0 or width < 1 or height < 1:
        raise ValueError(wrong)
    return x, y, x + width, y + height


def _cell(cells: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((cells[name] for name in names if cells.get(name) not in (None, "")), None)
