"""Images of an index as pictures to look at: from their files where these are, else from the index itself."""

import io

from PIL import Image

from ..processing_miniclip import to_rgb
from ..utils.thumbnails import shrunk
from .index import ImageIndex


def picture_of(index: ImageIndex, row: int, pixels: int) -> Image.Image | None:
    """An image of the index without its metadata.

    Args:
        index: that has it.
        row: of the image.
        pixels: of the longer side at most.

    Returns:
        RGB; None if its file is no longer there or cannot be read.

    Raises:
        DataError: the index is damaged.
    """
    path = index.entry(row)["path"]
    source = io.BytesIO(index.thumbnail(row) or b"") if path is None else path
    try:
        with Image.open(source) as image:
            image.draft(None, (2 * pixels, 2 * pixels))  # a JPEG is decoded no larger than that: many times faster
            return shrunk(to_rgb(image), pixels)
    except Exception:  # Pillow's decoders raise all sorts
        return None
