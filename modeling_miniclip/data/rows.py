"""What every reader of a source yields: one row per image, or one per caption of an image."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .columns import ColumnNames
from .problems import OnProblem


@dataclass(slots=True)
class Row:
    """A row of a source, its image not opened yet.

    Args:
        name: name of the image within its source, its later `image_id`; unique, unless `key` says otherwise.
        image: path of the image file, a name in a shard (see `shard_url.py`), or the encoded image.
        captions: captions of the row, stripped and not empty.
        key: rows with equal keys show the same image, and their captions are joined; None for a row on its own.
        split: `train`, `validation`, `test` or any other name; None if the source does not say.
        group: images with the same group show the same thing; None without groups.
        ids: values of the id column, one per caption, or empty.
        file: file, or dataset and split, where the row was read, for messages.
        number: number of the row in it, as an editor counts it; None for a whole file.
        column: name of the column that names the image; None if there is none.
        negatives: wrong captions of the image, stripped and not empty.
    """

    name: str
    image: str | bytes
    captions: list[str] = field(default_factory=list)
    key: str | None = None
    split: str | None = None
    group: str | None = None
    ids: list[str] = field(default_factory=list)
    file: str = ""
    number: int | None = None
    column: str | None = None
    negatives: list[str] = field(default_factory=list)


class SplitName(NamedTuple):
    """A line of a split file.

    Args:
        split: `train`, `validation` or `test`.
        name: name of an image.
        file, number: where the line is.
    """

    split: str
    name: str
    file: str
    number: int


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read.

    Args:
        columns: columns to look for, and whether names may lead outside the folder of images.
        image_dir: folder of the images that a caption file names.
        revision: commit, branch or tag of a dataset on the Hub.
        stream_first_rows: number of rows to stream from the start of each split of a dataset on the Hub.
        caption_template: caption of the images of a class folder, with `{}` for its name.
        all_images: whether to yield images without captions too, as an index wants them.
        bad_images: whether to yield rows too whose image file is missing, empty, outside or unreadable, after it was
            reported.
        shard_folder: folder of indexes and fetched shards; None for `miniclip/shards` in HF_HOME.
    """

    columns: ColumnNames = field(default_factory=ColumnNames)
    image_dir: str | os.PathLike | None = None
    revision: str | None = None
    stream_first_rows: int | None = None
    caption_template: str = "a photo of a {}"
    all_images: bool = False
    bad_images: bool = False
    shard_folder: str | os.PathLike | None = None


# Reads one kind of source: its path (or name on the Hub), the options, and a function called with each problem. If
# that function returns, the reader leaves the row out and goes on.
Reader = Callable[[str, ReadOptions, OnProblem], Iterator[Row]]
