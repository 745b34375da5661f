"""DataFrames, lists of dictionaries and datasets of a Python program as Arrow tables in memory."""

import io
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ...errors import DataError, Problem, one_line
from ...pictures_miniclip import to_rgb
from ..columns import CAPTION_COLUMNS, IMAGE_COLUMNS, NEGATIVES
from ..splits import SPLIT_ALIASES, SPLITS

if TYPE_CHECKING:
    from datasets import Dataset

# As `datasets` stores images, with room for more than 2 GB of them.
STORED = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
LIKELY = {*IMAGE_COLUMNS, *CAPTION_COLUMNS, NEGATIVES}  # columns that are read unless others are named
MISSING, TEXT, TEXTS, PICTURE, OTHER = "nothing", "text", "texts", "a picture", "something else"


def is_data(source: Any) -> bool:
    """Whether a source is data of a Python program, rather than a path or a name."""
    return not isinstance(source, str | os.PathLike)


def kind_of_data(data: Any) -> str:
    """What data is, in a word for messages: `DataFrame`, `list`, `Dataset`, `DatasetDict`."""
    return type(data).__name__


def parts_of(data: Any, wanted: Collection[str] = ()) -> dict[str | None, "pa.Table | Dataset"]:
    """Data by split, None for data without splits.

    Args:
        data: DataFrame of pandas or polars, `datasets.Dataset`, `DatasetDict`, Arrow table, list of dictionaries, or a
            dictionary with one of these for each split. Images are paths, PIL images, encoded images (bytes, or
            `{"bytes", "path"}`), or arrays and tensors as `encode_images` takes them.
        wanted: columns that are read in any case: a value of the wrong type in one of them is an error. Any other
            column is left out if it cannot be stored.

    Raises:
        DataError: it is none of these, or holds something else than an image, or than texts; names the row, from 0.
    """
    from datasets import Dataset

    if isinstance(data, Mapping):
        if not data or not {SPLIT_ALIASES.get(str(name), str(name)) for name in data} & set(SPLITS):
            text = f"a dictionary needs the splits of a dataset as its keys, such as train; it has {_listed(data)}"
            raise DataError(Problem("unusable", text, kind_of_data(data)))
        return {str(split): _part(part, wanted) for split, part in data.items()}
    if isinstance(data, Dataset):
        return {str(data.split) if data.split else None: data}
    return {None: _part(data, wanted)}


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _part(data: Any, wanted: Collection[str]) -> "pa.Table | Dataset":
    from datasets import Dataset

    if isinstance(data, Dataset | pa.Table):
        return data
    where = kind_of_data(data)
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return _table(_columns_of_rows(data), wanted, where, len(data))
    if hasattr(data, "collect") and hasattr(data, "columns"):  # a LazyFrame of polars
        data = data.collect()
    if hasattr(data, "columns") and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _table(_columns_of_frame(data), wanted, where, len(data))
    text = "expected a DataFrame, a Dataset, a DatasetDict or a list of dictionaries, such as [{'image': 'a.jpg', "
    raise DataError(Problem("unusable", f"{text}'caption': 'a dog'}}]; `list(data)` may make one", where))


def _columns_of_rows(rows: Sequence[Any]) -> dict[str, list[Any]]:
    names: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            text = f"expected a dictionary with an image and a caption, found {type(row).__name__}"
            raise DataError(Problem("unusable", text, kind_of_data(rows), number))
        names |= dict.fromkeys(map(str, row))
    return {name: [row.get(name) for row in rows] for name in names}


def _columns_of_frame(frame: Any) -> dict[str, list[Any]]:
    names = [str(name) for name in frame.columns]
    if twice := next((name for name in names if names.count(name) > 1), None):
        text = f"two columns are named {twice!r}; rename or delete one"
        raise DataError(Problem("unusable", text, kind_of_data(frame)))
    return {name: frame[column].to_list() for name, column in zip(names, frame.columns, strict=True)}


def _table(columns: Mapping[str, list[Any]], wanted: Collection[str], where: str, rows: int) -> pa.Table:
    if not rows:
        raise DataError(Problem("unusable", "it has no rows; pass some with an image and a caption", where))
    arrays = {}
    for name, values in columns.items():
        array = _array(values, name, where, name in LIKELY or name in wanted)
        if array is not None:
            arrays[name] = array
    return pa.table(arrays)


def _array(values: list[Any], name: str, where: str, is_needed: bool) -> Any:
    """A column as an Arrow array; None for one that cannot be stored, if it is not needed."""
    kinds = [_kind(value) for value in values]
    try:
        if PICTURE in kinds:
            return _pictures(values, kinds, name, where)
        known = [None if kind == MISSING else value for value, kind in zip(values, kinds, strict=True)]
        return _texts_or_numbers(known, kinds)
    except DataError:
        if is_needed:
            raise
        return None
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        if not is_needed:
            return None
        number = kinds.index(OTHER) if OTHER in kinds else None
        found = "half a character (a lone surrogate)" if number is None else type(values[number]).__name__
        text = f"expected a text, a list of texts or an image, found {found} ({one_line(error)})"
        raise DataError(Problem("unusable", text, where, number, name)) from error


def _texts_or_numbers(values: list[Any], kinds: list[str]) -> Any:
    found = set(kinds) - {MISSING}
    if found <= {TEXT}:
        return pa.array([None if value is None else os.fspath(value) for value in values], pa.string())
    if found <= {TEXT, TEXTS}:
        lists = [
            None if value is None else [os.fspath(value)] if kind == TEXT else [str(text) for text in value]
            for value, kind in zip(values, kinds, strict=True)
        ]
        return pa.array(lists, pa.list_(pa.string()))
    return pa.array(values, from_pandas=True)


def _kind(value: Any) -> str:
    """What a cell holds."""
    if isinstance(value, str | os.PathLike):
        return TEXT
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return MISSING
    if isinstance(value, float):
        return MISSING if value != value else OTHER
    if isinstance(value, bytes | bytearray | memoryview | Image.Image):
        return PICTURE
    if isinstance(value, Mapping):
        return PICTURE if value.keys() == {"bytes", "path"} else OTHER
    if hasattr(value, "shape") and len(value.shape) > 1:  # an array or a tensor
        return PICTURE
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype.kind in "OUT"):
        return TEXTS if all(isinstance(text, str) for text in value) else OTHER
    return OTHER


def _pictures(values: list[Any], kinds: list[str], name: str, where: str) -> pa.Array:
    """Images as `datasets` stores them; one that occurs several times is encoded once."""
    stored: list[dict[str, Any] | None] = []
    encoded: dict[int, dict[str, Any]] = {}
    for number, (value, kind) in enumerate(zip(values, kinds, strict=True)):
        if kind == MISSING:
            stored.append(None)
            continue
        if id(value) not in encoded:
            try:
                encoded[id(value)] = stored_image(value)
            except (ValueError, TypeError, OSError) as error:
                text = f"expected an image (a path, PIL image, bytes or an array), found {one_line(error)}"
                raise DataError(Problem("unusable", text, where, number, name)) from error
        stored.append(encoded[id(value)])
    return pa.array(stored, STORED)


def stored_image(value: Any) -> dict[str, Any]:
    """An image as `datasets` stores it, `{"bytes", "path"}`; one that is decoded becomes a PNG with the same pixels.

    Raises:
        ValueError, TypeError, OSError: it is no image.
    """
    if isinstance(value, str | os.PathLike):
        return {"bytes": None, "path": os.fspath(value)}
    if isinstance(value, Mapping):
        return {"bytes": value["bytes"], "path": value["path"]}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value), "path": None}
    if not isinstance(value, Image.Image):
        from ...processing_miniclip import is_between_0_and_1, rgb_of_array  # loads torch

        if not hasattr(value, "shape"):
            raise TypeError(type(value).__name__)
        if is_between_0_and_1(value):
            raise ValueError("an array with values 0..1: multiply it by 255")
        value = rgb_of_array(value)
    file = io.BytesIO()
    Image.fromarray(np.asarray(to_rgb(value))).save(file, "PNG", compress_level=1)  # without its metadata
    return {"bytes": file.getvalue(), "path": None}
