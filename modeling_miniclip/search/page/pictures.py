"""The picture of an entry: from its file, or from the thumbnail in the index."""

from PIL import Image

from ...data.picture_formats import decode_picture
from ...pictures_miniclip import to_rgb
from ...utils.names import path_of
from ...utils.thumbnails import shrink
from ..index import ImageIndex


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
    source = (index.thumbnail(row) or b"") if path is None else path_of(path)
    try:
        # A JPEG is decoded at about the size that is needed, many times faster.
        image = decode_picture(source, lambda opened: opened.draft(None, (2 * pixels, 2 * pixels)))
        return shrink(to_rgb(image, path or ""), pixels)
    except Exception:  # Pillow's decoders raise errors of many classes
        return None
