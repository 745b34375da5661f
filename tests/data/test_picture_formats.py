"""Picture formats, and pictures with odd metadata, decoded in the same way by every command."""

import base64
import importlib.util
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as DatasetImage
from PIL import Image

from modeling_miniclip.data import picture_formats
from modeling_miniclip.data.checking.near_duplicates import inspect_image
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.picture_formats import (
    FORMATS,
    UnreadableFormat,
    decode_picture,
    picture_format,
    unreadable_format,
)
from modeling_miniclip.data.skipped import describe_skipped
from modeling_miniclip.inference.encode import open_image
from modeling_miniclip.pictures_miniclip import exif_orientation, to_rgb
from modeling_miniclip.processing_miniclip import load_rgb
from tests.helpers.pictures import ROTATED, SIZE, jpeg_with_exif, odd_pictures, png_with_chunk, upright
from tests.helpers.towers import tiny_processor

# The smallest pictures that the encoders write, 8 x 6 pixels, red; no package is needed to have them.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAACsAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNs"
    "eAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAACAAAAAEAAAAGAAAAAf///8gAAAAC////xgAAAAIAAAAQcGl4"
    "aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAAM21kYXQAAAAnKAGvGSFgQkDvXaW//4jK/5iBf67W3ymSgKaXBNeI"
    "mQsDgYCNkZ04"
)
JPEG_XL = base64.b64decode("/wooMBAJAEAUALQAtZ8gAAAVKqOMG7yc6/nyQ4fFtI3rDG21bWEJY7O9MEhIOG+Y+o1jU4YYqCQB")


def readers(path: Path) -> dict[str, Callable[[], Any]]:
    """All functions that decode an image file."""
    rows = Dataset.from_dict({"image": [str(path)], "image_id": ["a"], "captions": [["x"]]})
    rows = rows.cast_column("image", DatasetImage())
    content = path.read_bytes()
    return {
        "index and check": lambda: to_rgb(decode_picture(content)),
        "training": lambda: _trained(rows),
        "encode_images": lambda: open_image(path),
        "eval": lambda: open_image({"bytes": content, "path": None}),
        "processor": lambda: load_rgb(path),
    }


def _trained(rows: Dataset) -> Image.Image:
    image = CaptionRows(rows, tiny_processor())._image(0, None)
    assert isinstance(image, Image.Image), image
    return image


@pytest.mark.filterwarnings("ignore:.*EXIF data cannot be read")
@pytest.mark.parametrize("name", odd_pictures())
def test_odd_metadata_does_not_matter_to_any_reader(tmp_path: Path, name: str) -> None:
    content, orientation = odd_pictures()[name]
    (tmp_path / name).write_bytes(content)
    for reader, read in readers(tmp_path / name).items():
        pixels = np.asarray(read(), dtype=int)
        expected = upright(content[:4], orientation or 1)
        assert pixels.shape == expected.shape and np.abs(pixels - expected).max() <= 8, reader
    inspection = inspect_image(str(tmp_path / name))
    assert inspection.kind is None and inspection.metadata_is_readable == (orientation is not None)


@pytest.mark.parametrize("name", ["exif_garbage.png", "raw_profile.png", "exif_garbage.webp", "cut_off.jpg"])
def test_unreadable_metadata_is_a_warning_with_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(odd_pictures()[name][0])
    with pytest.warns(UserWarning, match=f"{name}: its EXIF data cannot be read, so it may be shown turned"):
        image = open_image(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_rgb(image)  # it warns once
        open_image(tmp_path / name) if name == "good.jpg" else None


@pytest.mark.parametrize(
    ("kind", "size", "value", "expected"),
    [
        (3, 1, struct.pack("<I", 6), 6),
        (3, 2, struct.pack("<HH", 6, 6), 6),
        (4, 1, struct.pack("<I", 8), 8),
        (1, 1, b"\3\0\0\0", 3),
        (3, 1, bytes(4), 1),  # cameras write 0 for "unknown"
        (3, 1, struct.pack("<I", 9), None),
    ],
)
def test_orientation_is_found_whatever_its_type(kind: int, size: int, value: bytes, expected: int | None) -> None:
    broken = (0x100, 12, 2**31, b"\xff" * 4)
    for entries in ([(0x112, kind, size, value)], [broken, (0x112, kind, size, value)]):
        assert exif_orientation(decode_picture(jpeg_with_exif(entries))) == expected


def test_turned_image_is_not_turned_again() -> None:
    once = to_rgb(decode_picture(jpeg_with_exif([ROTATED])))
    assert once.size == SIZE[::-1] and to_rgb(once) is once


def test_damaged_pixels_are_still_an_error() -> None:
    whole = png_with_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * 2_000_000))
    decode_picture(whole)
    with pytest.raises(Exception, match="too large|truncated|Truncated|broken"):
        decode_picture(whole[:-60])


# --- formats --------------------------------------------------------------------------------------------------------


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, form)
    return buffer.getvalue()


PILLOWS = {"JPEG": "JPEG", "PNG": "PNG", "GIF": "GIF", "WEBP": "WebP", "TIFF": "TIFF", "BMP": "BMP", "AVIF": "AVIF",
           "JPEG2000": "JPEG 2000", "PPM": "PNM", "QOI": "QOI"}  # fmt: skip


@pytest.mark.parametrize("form", PILLOWS)
def test_format_is_known_by_its_first_bytes(form: str) -> None:
    content = encoded(form)
    found = picture_format(content[:64])
    assert found is not None and found.name == PILLOWS[form] and found.is_readable
    assert decode_picture(content).size == (8, 6)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (HEIC, "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (JPEG_XL, "JPEG XL"),
        (b"\xff\x0a\xfa", "JPEG XL"),
        (b"II*\0\x10\0\0\0CR\x02\0", "RAW"),
        (b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom", "RAW"),
        (b"FUJIFILMCCD-RAW 0201", "RAW"),
        (b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2", None),  # a video
        (b"BMW,caption\n", None),
        (b"P5 is a gray image", None),
        (b"", None),
    ],
)
def test_other_formats_are_known_by_their_first_bytes(start: bytes, name: str | None) -> None:
    found = picture_format(start[:64])
    assert (found.name if found else None) == name


def test_each_suffix_has_one_format() -> None:
    suffixes = [suffix for each in FORMATS for suffix in each.suffixes]
    assert len(suffixes) == len(set(suffixes)) and all(suffix == suffix.lower() for suffix in suffixes)
    assert all(each.hint for each in FORMATS if each.module != "")


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of the extra `formats` are not installed."""

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(picture_formats, "import_module", missing)
    monkeypatch.setattr(
        Image, "OPEN", {name: each for name, each in Image.OPEN.items() if name not in ("HEIF", "JXL")}
    )


@pytest.mark.parametrize(
    ("content", "name", "package"), [(HEIC, "HEIC", "pillow-heif"), (JPEG_XL, "JPEG XL", "pylibjxl")]
)
def test_message_names_the_package_to_install(
    tmp_path: Path, without_extra: None, content: bytes, name: str, package: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(content)  # phones and apps often rename such files
    with pytest.raises(UnreadableFormat, match=rf"^{name}, .*: pip install {package} reads it$"):
        decode_picture(content)
    inspection = inspect_image(content)
    assert inspection.kind == "format" and f"is {name}, " in inspection.message
    reasons = {"a.jpg": str(inspection.message), "b.jpg": inspection.message, "c.jpg": "empty"}
    expected = rf"3 of 7 images could not be read: a.jpg, b.jpg, c.jpg; 2 of them {name} \(pip install {package}"
    assert np.char.startswith(describe_skipped(reasons, 7), expected.replace("\\", ""))


def test_only_unreadable_formats_are_named_by_suffix(tmp_path: Path, without_extra: None) -> None:
    contents = {"a.heic": HEIC, "b.cr2": b"II*\0", "c.heic": encoded("JPEG"), "d.dng": encoded("TIFF"), "e.jpg": HEIC}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = {name: unreadable_format(str(tmp_path / name)) for name in contents}
    named = {name: each.name for name, each in found.items() if each}
    assert named == {"a.heic": "HEIC", "b.cr2": "RAW", "d.dng": "RAW"}  # e.jpg is found out when it is decoded


@pytest.mark.parametrize(("content", "module"), [(HEIC, "pillow_heif"), (JPEG_XL, "pylibjxl")])
def test_extra_reads_its_formats(tmp_path: Path, content: bytes, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    (tmp_path / "a.jpg").write_bytes(content)
    for reader, read in readers(tmp_path / "a.jpg").items():
        if reader != "processor":  # which knows Pillow's formats only
            image = read()
            assert image.mode == "RGB" and np.abs(np.asarray(image, int) - (255, 0, 0)).max() <= 20, reader
