"""Small pictures of images: kept in an index for those that are no files of their own, embedded in HTML pages."""

import io

from PIL import Image

THUMBNAIL = 320  # pixels of the longer side


def encode_thumbnail(image: Image.Image) -> bytes:
    """JPEG of an RGB image, its longer side at most `THUMBNAIL` pixels."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()
