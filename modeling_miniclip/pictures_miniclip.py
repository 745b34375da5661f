"""Decode any picture to upright 8-bit RGB, with Pillow and NumPy alone."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Images whose longer side is more than this many times the shorter one are cut to their middle before the resize.
LONGEST_SIDE = 256

# What turns an image with an EXIF orientation upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(file: Any, prepare: Any = None, formats: Any = None) -> Image.Image:
    """Open and decode an image file. Metadata that Pillow cannot read is left out, as the pixels do not need it.

    Args:
        file: path, or the encoded image as bytes.
        prepare: function to call with the opened image; if it returns False, the image is not decoded.
        formats: names of the formats to try, such as `["PNG"]`; None tries all.

    Raises:
        OSError: there is no such file, or it holds no image. Pillow's decoders raise errors of other classes too.
    """

    def decoded(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data), formats=formats)
        if prepare is None or prepare(image) is not False:
            image.load()
        return image

    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    try:
        return decoded(data)
    except Exception as error:
        if isinstance(error, UnidentifiedImageError):
            place = "" if isinstance(file, bytes) else f"{file}: "
            error = UnidentifiedImageError(f"{place}not an image, damaged, or in a format that Pillow does not read")
        bare, exif = _without_metadata(data)
        try:
            image = decoded(bare)
        except Exception:
            raise error from None  # the pixels are damaged, too
    if exif:
        image.info["exif"] = exif
    return image


def _without_metadata(data: bytes) -> tuple[bytes, bytes]:
    # A PNG or JPEG file with nothing but its pixels, and its EXIF data. Other files stay as they are.
    kept, exif, place = [data[:2]], b"", 2
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kept, place = [data[:8]], 8
        while place < len(data):
            end, kind = place + 12 + int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
            if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept.append(data[place:end])
            exif = data[place + 8 : end - 4] if kind == b"eXIf" else exif
            place = end
        return b"".join(kept), exif
    if data.startswith(b"\xff\xd8"):
        while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] not in (b"\xda", b""):
            end, marker = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big"), data[place + 1]
            body = data[place + 4 : end]
            is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
            if not is_metadata or (marker == 0xEE and len(body) == 12):  # the latter says how colours are stored
                kept.append(data[place:end])
            exif = body if marker == 0xE1 and body.startswith(b"Exif") else exif
            place = end
        return b"".join(kept) + data[place:], exif
    return data, exif


def exif_orientation(image: Any) -> int | None:
    """How the camera was held: the EXIF orientation from 1 to 8, 1 if there is none, None if it cannot be read."""
    exif, profile = image.info.get("exif"), image.info.get("Raw profile type exif")
    if not exif and profile:
        try:
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        except ValueError:
            return None
    # Pillow gives up at the first damaged entry; the orientation may be behind it.
    stored = _stored_orientation(exif.removeprefix(b"Exif\0\0")) if exif else 0
    if stored != 0:
        return stored
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)  # of a TIFF, from XMP, or set by a program
    except Exception:  # Pillow raises errors of many classes
        return 1
    return int(value) if value in range(1, 9) else 1


def _stored_orientation(tiff: bytes) -> int | None:
    # The orientation in EXIF data, however damaged its other entries are: 0 if there is none, None if nobody can tell.
    order: Any = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return None
    start = int.from_bytes(tiff[4:8], order)
    count = int.from_bytes(tiff[start : start + 2], order)
    for place in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        entry = tiff[place : place + 12]
        if int.from_bytes(entry[:2], order) == ExifTags.Base.Orientation:
            size = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}.get(int.from_bytes(entry[2:4], order), 4)  # bytes, by type
            value = int.from_bytes(entry[8 : 8 + size], order)
            return (value or 1) if value in range(9) else None  # cameras write 0 if they do not know
    return 0 if start >= 8 and start + 2 + 12 * count <= len(tiff) else None


def to_rgb(image: Any, name: str = "") -> Image.Image:
    """Any PIL image as 8-bit RGB: first frame, EXIF rotation applied, transparency on white.

    16-bit values are scaled to 8 bits, and floating-point values (mode F) from 0..1 to 0..255 unless some are larger.
    NaN becomes black. An image whose EXIF data cannot be read is used as it is stored, with a warning.

    Args:
        image: image to convert; it is not changed.
        name: name of the image for the warning.

    Returns:
        A new image, or the given one if nothing has to change.

    Raises:
        OSError: the image cannot be decoded, or has no pixels.

    Examples:
        >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 51))).getpixel((0, 0))  # a fifth of red on white
        (255, 204, 204)
    """
    image.load()  # decode now, so that a broken file raises here
    if 0 in image.size:
        raise OSError(f"it has {image.width} x {image.height} pixels")
    orientation = exif_orientation(image)
    if orientation != 1:
        if orientation is None:
            name = name or getattr(image, "filename", "") or "an image"
            warnings.warn(f"{name}: its EXIF data cannot be read, so it may be shown turned", stacklevel=2)
        image = image.transpose(TURNS[orientation]) if orientation in TURNS else image.copy()
        for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):  # or it would be turned twice
            image.info.pop(key, None)
    if image.mode.startswith("I") or image.mode == "F":
        stored = np.asarray(image)
        values = np.nan_to_num(stored.astype(np.float64), copy=False)
        if image.mode == "F":
            values *= 255 if values.max() <= 1 else 1
        elif image.mode != "I" or values.max() > 255:  # "I;16" always holds 16 bits, "I" may hold 8
            values /= 257
        values[stored == image.info.get("transparency", np.nan)] = 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.mode == "La":  # the only conversion that Pillow has for it
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def middle(image: Image.Image) -> Image.Image:
    """The middle of a very long and thin image, else the image itself.

    An image of 1 x 60,000 pixels would be resized to 235 x 14 million, for a crop that keeps a square.
    """
    margins = [max(0, side - LONGEST_SIDE * min(image.size)) // 2 for side in image.size]
    if not any(margins):
        return image
    return image.crop((margins[0], margins[1], image.width - margins[0], image.height - margins[1]))
