"""Pictures with odd metadata and whole pixels."""

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

SIZE = (40, 30)
ROTATED = (0x112, 3, 1, struct.pack("<I", 6))  # an entry of EXIF data: tag, type, number of values, value

Entry = tuple[int, int, int, bytes]


def scene() -> Image.Image:
    """A picture whose four corners differ."""
    image = Image.new("RGB", SIZE, "white")
    for box, colour in (((0, 0, 20, 15), "red"), ((20, 0, 40, 15), "lime"), ((0, 15, 20, 30), "blue")):
        image.paste(colour, box)
    return image


@cache
def encoded(form: str, **options: object) -> bytes:
    """The scene as a file."""
    buffer = io.BytesIO()
    scene().save(buffer, form, **(options | ({"quality": 100, "subsampling": 0} if form == "JPEG" else {})))
    return buffer.getvalue()


def upright(start: bytes, orientation: int) -> np.ndarray:
    """Pixels of the scene as a file with this start and orientation shows it."""
    content = encoded("JPEG") if start[:2] == b"\xff\xd8" else encoded("PNG")
    stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=int)
    return np.rot90(stored, -1) if orientation == 6 else stored  # 6: shown by turning clockwise


def exif(entries: list[Entry]) -> bytes:
    """EXIF data with these entries in little-endian order."""
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI", t, k, n) + v for t, k, n, v in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + body + bytes(4)


def jpeg_with_segment(marker: int, body: bytes) -> bytes:
    """A JPEG with a segment at its start."""
    content = encoded("JPEG")
    return content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + content[2:]


def jpeg_with_exif(entries: list[Entry]) -> bytes:
    """A JPEG with EXIF data."""
    return jpeg_with_segment(0xE1, exif(entries))


def png_with_chunk(kind: bytes, data: bytes, before_pixels: bool = True, checksum: int | None = None) -> bytes:
    """A PNG with a chunk before or after its pixels."""
    content = encoded("PNG")
    place = content.index(b"IDAT") - 4 if before_pixels else len(content) - 12
    check = zlib.crc32(kind + data) if checksum is None else checksum
    return content[:place] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check) + content[place:]


@cache
def odd_pictures() -> dict[str, tuple[bytes, int | None]]:
    """Files by name, each with the orientation that can be read: 1 without any, None if nobody knows."""
    workflow = b"workflow\0\0" + zlib.compress(b"a" * 2_000_000)
    return {
        "good.jpg": (jpeg_with_exif([ROTATED]), 6),
        "width_as_float.jpg": (jpeg_with_exif([ROTATED, (0x100, 11, 1, struct.pack("<f", 3.5))]), 6),
        "unit_undefined.jpg": (jpeg_with_exif([ROTATED, (0x128, 7, 4, b"\xff" * 4)]), 6),
        "negative_width.jpg": (jpeg_with_exif([ROTATED, (0x100, 9, 1, struct.pack("<i", -5))]), 6),
        "broken_entry_first.jpg": (jpeg_with_exif([(0x100, 12, 2**31, b"\xff" * 4), ROTATED]), 6),
        "cut_off.jpg": (jpeg_with_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x09\0"), None),
        "colour_profile.jpg": (jpeg_with_segment(0xE2, b"ICC_PROFILE\0"), 1),
        "photoshop.jpg": (jpeg_with_segment(0xED, b"Photoshop 3.0\x008BIMO\xbc"), 1),
        "exif_garbage.png": (png_with_chunk(b"eXIf", b"garbage!"), None),
        "rotated.png": (png_with_chunk(b"eXIf", exif([ROTATED])[6:]), 6),
        "exif_garbage.webp": (encoded("WEBP", exif=b"garbage!", lossless=True), None),
        "raw_profile.png": (png_with_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 20\nzzzz not hex"), None),
        "workflow.png": (png_with_chunk(b"zTXt", workflow), 1),
        "workflow_at_the_end.png": (png_with_chunk(b"zTXt", workflow, before_pixels=False), 1),
        "checksum.png": (png_with_chunk(b"tEXt", b"key\0value", checksum=5), 1),
        "short_gamma.png": (png_with_chunk(b"gAMA", b"\0"), 1),
    }
