"""The picture of an entry: from its file, or from the thumbnail in the index."""

import io

from PIL import Image

from ..processing_miniclip import to_rgb
from ..utils.thumbnails import shrink
from .index import ImageIndex


def picture_of(index: ImageIndex, row: int, pixels: int) -> Image.Image | None:
    """Load the picture of an image in the index, without its metadata.

    Args:
        index: index with the image.
        row: row of the image.
        pixels: maximum length of the longer side.

    Returns:
        RGB image, or None if the file is missing or cannot be read.

    Raises:
        DataError: the index is damaged.
    """
    path = index.entry(row)["path"]
    source = io.BytesIO(index.thumbnail(row) or b"") if path is None else path
    try:
        with Image.open(source) as image:
            image.draft(None, (2 * pixels, 2 * pixels))  # decodes a JPEG at about this size, many times faster
            return shrink(to_rgb(image), pixels)
    except Exception:  # Pillow's decoders raise errors of many classes
        return None
