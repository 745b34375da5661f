"""Small copies of images for HTML pages and indexes."""

import io

from PIL import Image

THUMBNAIL = 224  # pixels of the longer side


def encode_thumbnail(image: Image.Image, pixels: int = THUMBNAIL) -> bytes:
    """A small JPEG of an image, without its metadata (location, camera).

    Args:
        image: RGB image; not changed.
        pixels: length of the longer side in pixels; a smaller image keeps its size.
    """
    buffer = io.BytesIO()
    shrink(image, pixels).save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def shrink(image: Image.Image, pixels: int) -> Image.Image:
    """A small copy of an image without its metadata; arguments as in [`encode_thumbnail`]."""
    small = Image.new("RGB", image.size)
    small.paste(image)
    small.thumbnail((pixels, pixels), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return small
