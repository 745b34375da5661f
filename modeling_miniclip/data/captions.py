"""Load captioned images from any source as splits with one row per image: `{image, image_id, captions}`."""

import os
from typing import TYPE_CHECKING

from .columns import ColumnNames
from .load_rows import SeededSplit, load_rows, public_rows
from .rows import ReadOptions

if TYPE_CHECKING:
    from datasets import DatasetDict


def load_captions(
    source: str | os.PathLike,
    *,
    image_dir: str | os.PathLike | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    id_column: str = "id",
    validation_fraction: float | None = 0.1,
    seed: int = 0,
    revision: str | None = None,
    stream_first_rows: int | None = None,
    allow_outside_images: bool = False,
    caption_template: str = "a photo of a {}",
    cache_dir: str | os.PathLike | None = None,
) -> "DatasetDict":
    """Load captioned images as `datasets` splits with one row per image.

    Args:
        source: path, pattern, URL or name of any source in the table of `docs/data.md`: CSV, TSV, JSON, Flickr8k,
            an imagefolder, text files next to images, class folders, COCO's or Karpathy's JSON, tar archives, Parquet
            files, a dataset saved by `datasets` or on the Hub, or `"scenes"`, the built-in drawings.
        image_dir: folder of the images of a caption file, if they are not next to it.
        image_column: name of the column that identifies the image.
        caption_column: name of the column with the text.
        id_column: name of the column with the caption's id; kept as `caption_ids`, never used to group or to split.
        validation_fraction: fraction of the images in the validation split, if the source has none; None leaves the
            images of a source without splits in `train`.
        seed: random seed of the split into training and validation.
        revision: commit, branch or tag of a dataset on the Hub.
        stream_first_rows: number of rows to stream from the start of each split of a Hub dataset into memory, instead
            of downloading all of it.
        allow_outside_images: whether a caption file may name images outside the folder of images (with `..`, an
            absolute path or a symbolic link). Whoever wrote the file then chooses which of your files are read.
        caption_template: caption of the images of a class folder, with `{}` for its name.
        cache_dir: folder of tables of captions and places of images, `HF_HOME/miniclip/datasets` by default.

    Returns:
        `DatasetDict` with `train`, `validation` and, if the source has it, `test`; columns `image` (decoded when
        read), `image_id` (str, unique over the splits), `captions` (list of str) and, if there are ids, `caption_ids`.

    Raises:
        DataError: a path, column, image file or caption is missing; the message names its file and row.
    """
    options = ReadOptions(
        ColumnNames(image_column, caption_column, allow_outside_images, id_column),
        image_dir,
        revision,
        stream_first_rows,
        caption_template,
    )
    split = None if validation_fraction is None else SeededSplit(validation_fraction, seed)
    return public_rows(load_rows(source, options, split, cache_dir))
