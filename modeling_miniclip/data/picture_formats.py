"""Picture formats: one list, with what reads each, and the one function that decodes a picture for every command."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..pictures_miniclip import open_picture, to_rgb

START = 64  # bytes at the start of a file that show its format
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# How many times smaller a picture may be decoded, by its width and height.
Reduction = Callable[[int, int], float]


@dataclass(frozen=True)
class PictureFormat:
    """A picture format.

    Args:
        name: its usual name.
        suffixes: suffixes of its files.
        module: what reads it: "" for Pillow itself, a module of the extra `formats`, or None if nothing does.
        hint: how to read it nevertheless.
    """

    name: str
    suffixes: tuple[str, ...]
    module: str | None = ""
    hint: str = ""

    @property
    def is_readable(self) -> bool:
        """Whether it can be read here; registers its reader with Pillow."""
        return self.module is not None and (self.module == "" or _register(self.module))

    @property
    def reason(self) -> str:
        """Why a file of this format could not be read."""
        return f"{self.name}, a format that is not read here: {self.hint}"


def _format(name: str, suffixes: str, module: str | None = "", hint: str = "") -> PictureFormat:
    return PictureFormat(name, tuple(suffixes.split()), module, hint)


AVIF = _format("AVIF", ".avif .avifs")
HEIC = _format("HEIC", ".heic .heif .heics .heifs .hif", "pillow_heif", "pip install pillow-heif reads it")
JXL = _format("JPEG XL", ".jxl", "pylibjxl", "pip install pylibjxl reads it")
RAW = _format(
    "RAW",
    ".3fr .arw .cr2 .cr3 .crw .dng .erf .fff .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 "
    ".srf .srw .x3f",
    None,
    "export it as JPEG",
)
EXR = _format("OpenEXR", ".exr", None, "convert it to TIFF")
JXR = _format("JPEG XR", ".jxr .wdp .hdp", None, "convert it to JPEG")
XCF = _format("GIMP's XCF", ".xcf", None, "export it as PNG")
JPEG = _format("JPEG", ".jpg .jpeg .jpe .jfif .mpo")
PNG, GIF, WEBP = _format("PNG", ".png .apng"), _format("GIF", ".gif"), _format("WebP", ".webp")
TIFF, BMP = _format("TIFF", ".tif .tiff"), _format("BMP", ".bmp .dib")
JPEG_2000 = _format("JPEG 2000", ".jp2 .j2k .j2c .jpc .jpf .jpx")
PNM, TGA, QOI = _format("PNM", ".ppm .pgm .pbm .pnm .pfm"), _format("TGA", ".tga"), _format("QOI", ".qoi")
PSD = _format("Photoshop", ".psd")

FORMATS = (
    JPEG, PNG, GIF, WEBP, TIFF, BMP, AVIF, JPEG_2000, PNM, TGA, QOI, PSD, HEIC, JXL, RAW, EXR, JXR, XCF
)  # fmt: skip
BY_SUFFIX = {suffix: each for each in FORMATS for suffix in each.suffixes}

# How files of a format start. For those with boxes (`ftyp`), and for TIFF, see `picture_format`.
STARTS = {
    b"\xff\xd8\xff": JPEG,
    b"\x89PNG\r\n\x1a\n": PNG,
    b"GIF8": GIF,
    b"\0\0\0\x0cjP  \r\n": JPEG_2000,
    b"\xff\x4f\xff\x51": JPEG_2000,
    b"qoif": QOI,
    b"8BPS": PSD,
    b"\0\0\0\x0cJXL \r\n": JXL,
    b"\xff\x0a": JXL,
    b"FUJIFILMCCD-RAW": RAW,
    b"IIRO": RAW,
    b"IIRS": RAW,
    b"MMOR": RAW,
    b"IIU\0": RAW,
    b"FOVb": RAW,
    b"\x76\x2f\x31\x01": EXR,
    b"II\xbc\x01": JXR,
    b"gimp xcf": XCF,
}
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), AVIF),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"), HEIC),
    b"crx ": RAW,
}


class UnreadableFormat(UnidentifiedImageError):
    """A picture in a format that is not read here."""


def picture_format(start: bytes) -> PictureFormat | None:
    """The format of a file that starts with these bytes ([`START`] are enough), None if it is no known picture."""
    if start[4:8] == b"ftyp":
        end = min(int.from_bytes(start[:4], "big"), len(start))
        brands = [start[8:12], *(start[i : i + 4] for i in range(16, end, 4))]
        found = next((BRANDS[brand] for brand in brands if brand in BRANDS), None)
        return found or (HEIC if {b"mif1", b"msf1"} & set(brands) else None)
    if start.startswith(TIFF_STARTS):
        return RAW if start[8:10] == b"CR" else TIFF
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return WEBP
    if start[:2] == b"BM" and start[6:10] == b"\0\0\0\0":
        return BMP
    if start[:1] == b"P" and start[1:2] in b"123456" and start[2:3] in (b"\n", b"\r"):
        return PNM
    return next((each for magic, each in STARTS.items() if start.startswith(magic)), None)


def is_picture_file(name: str) -> bool:
    """Whether a file's suffix is that of a picture, in a format that can be read or not."""
    return os.path.splitext(name)[1].lower() in BY_SUFFIX


def unreadable_format(path: str) -> PictureFormat | None:
    """The format of a picture file if it cannot be read here; only files with such a suffix are opened.

    Raises:
        OSError: the file cannot be opened.
    """
    by_suffix = BY_SUFFIX.get(os.path.splitext(path)[1].lower())
    if by_suffix is None or by_suffix.is_readable:
        return None
    with open(path, "rb") as file:
        by_content = picture_format(file.read(START))
    if by_content is TIFF and by_suffix is RAW:  # most RAW formats are a kind of TIFF
        return RAW
    found = by_content or by_suffix
    return None if found.is_readable else found


def decode_picture(
    file: str | os.PathLike | bytes,
    prepare: Callable[[Image.Image], Any] | None = None,
    reduction: Reduction | None = None,
) -> Image.Image:
    """Decode a picture of any format of [`FORMATS`].

    Args:
        file: path, or the encoded picture.
        prepare: function to call with the opened image; if it returns False, the image is not decoded.
        reduction: how many times smaller the picture may be; a JPEG then is, by 2, 4 or 8.

    Raises:
        UnreadableFormat: nothing that is installed reads its format.
        OSError: the file cannot be read, or holds no picture. Decoders raise errors of other classes too.
    """
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    found = picture_format(data[:START])
    if found is not None and not found.is_readable:
        raise UnreadableFormat(found.reason)

    def prepare_all(opened: Image.Image) -> Any:
        is_decoded = prepare is None or prepare(opened)
        if is_decoded is not False and reduction is not None:
            _decode_smaller(opened, reduction(*opened.size))
        return is_decoded

    # The names of Pillow's formats; several readers claim the files that start with a general `ftyp`.
    only = {HEIC: ["HEIF"], JXL: ["JXL"], AVIF: ["AVIF"]}.get(found) if found else None
    image = open_picture(data, prepare_all, only)
    if found is JXL:
        image.info.pop("exif", None)  # its decoder has turned the image already
    return image


def _decode_smaller(opened: Image.Image, times: float) -> None:
    """Let Pillow decode an opened JPEG at most so many times smaller; it does nothing to other formats."""
    factor = next((factor for factor in (8, 4, 2) if factor <= times), 1)
    if factor > 1:
        opened.draft(None, (opened.width // factor, opened.height // factor))


def decode_row(image: Mapping[str, Any], name: str = "", reduction: Reduction | None = None) -> Image.Image:
    """The image of an undecoded row of a dataset, as RGB.

    Args:
        image: `{"bytes", "path"}`, as in a column `datasets.Image(decode=False)`.
        name: name of the image for warnings.
        reduction: as in [`decode_picture`].

    Raises:
        DataError, OSError, UnreadableFormat: as in [`read_encoded`] and [`decode_picture`].
    """
    picture = decode_picture(read_encoded(image), reduction=reduction)
    return to_rgb(picture, name or str(image.get("path") or ""))


def read_encoded(image: Mapping[str, Any]) -> bytes:
    """The encoded image of a row: from the row itself, a file, a shard or the Hub.

    Args:
        image: `{"bytes", "path"}`, as in a column `datasets.Image(decode=False)`.

    Raises:
        DataError: its shard is shorter than it was, or names no image there.
        OSError: the file or shard cannot be read; `errno` is set unless it is damaged.
    """
    content, path = image.get("bytes"), str(image.get("path") or "")
    if content is not None:
        return content
    if not path:
        raise UnidentifiedImageError("this row has no image")
    if path.startswith("row://"):  # the prefix of such names
        from .shards.shard_url import place_of, read_place  # whose imports take long

        if (place := place_of(path)) is not None:
            return read_place(place)
    if "://" not in path or os.path.isfile(path):
        with open(path, "rb") as file:
            return file.read()
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:  # in an archive or on the Hub
        return file.read()


def _register(module: str) -> bool:
    """Let Pillow use a reader of the extra `formats`; False if it is not installed."""
    try:
        reader = import_module(module)
    except ImportError:
        return False
    if module == "pillow_heif":
        if "HEIF" not in Image.OPEN:
            reader.register_heif_opener()
    elif "JXL" not in Image.OPEN:
        reader.register_pillow()
    return True
