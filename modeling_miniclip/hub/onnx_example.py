"""Score images against texts with a MiniCLIP model in ONNX. Needs only `pip install onnxruntime pillow tokenizers`.

    python example.py photo.jpg other.png --text "two dogs on a beach" "a bowl of soup"

From Python: `from example import MiniClip`.
"""

import argparse
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession
from PIL import ExifTags, Image, UnidentifiedImageError
from tokenizers import Tokenizer


class MiniClip:
    """Both encoders, the tokenizer and the settings in a folder written by `miniclip export --onnx`."""

    def __init__(self, folder: Path = Path(__file__).parent):
        providers = ["CPUExecutionProvider"]  # with onnxruntime-gpu: CUDAExecutionProvider
        self.image_encoder = InferenceSession(str(folder / "image_encoder.onnx"), providers=providers)
        self.text_encoder = InferenceSession(str(folder / "text_encoder.onnx"), providers=providers)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # truncates and pads as the model needs
        self.settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.empty_text = str(model["empty_text"])  # what stands for a text without characters
        self.logit_scale, self.logit_bias = float(model["logit_scale"]), float(model["logit_bias"])

    def prepare_image(self, image: Image.Image) -> np.ndarray:
        """Resize, crop the centre and normalise: `[3, H, W]` float32."""
        image, size, crop = to_rgb(image), self.settings["size"], self.settings["crop_size"]
        if "shortest_edge" in size:
            long = int(size["shortest_edge"] * max(image.size) / min(image.size))
            width, height = (size["shortest_edge"] if edge == min(image.size) else long for edge in image.size)
        else:
            width, height = size["width"], size["height"]
        image = image.resize((width, height), self.settings["resample"])
        left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
        pixels = (np.asarray(image, np.float64) * self.settings["rescale_factor"]).astype(np.float32)
        mean, std = (np.float32(self.settings[name]) for name in ("image_mean", "image_std"))
        return ((pixels - mean) / std).transpose(2, 0, 1)

    def prepare_images(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """`pixel_values` `[B, 3, H, W]`."""
        return {"pixel_values": np.stack([self.prepare_image(image) for image in images])}

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """`input_ids` and `attention_mask` `[N, L]`, padded to the longest text."""
        rows = self.tokenizer.encode_batch([text or self.empty_text for text in texts])
        ids, masks = [row.ids for row in rows], [row.attention_mask for row in rows]
        return {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(masks, np.int64)}

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """`[B, dim]` embeddings, unit norm. All images of a call form one batch."""
        return self.image_encoder.run(None, self.prepare_images(images))[0]

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """`[N, dim]` embeddings, unit norm. All texts of a call form one batch."""
        return self.text_encoder.run(None, self.prepare_texts(texts))[0]

    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """`[B, N]` logits, the model's `logits_per_image`; softmax over the texts gives zero-shot probabilities."""
        return self.logit_scale * self.encode_images(images) @ self.encode_texts(texts).T + self.logit_bias


def main(argv: Any = None) -> None:
    """Print the scores of each image under its name."""
    parser = argparse.ArgumentParser(description="Score images against texts: the higher, the better they match.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--text", nargs="+", required=True, metavar="TEXT", help="texts to compare them with")
    args = parser.parse_args(argv)
    scores = MiniClip().scores([to_rgb(open_picture(name), name) for name in args.images], args.text)
    for name, row in zip(args.images, scores, strict=True):
        print(name)
        for text, score in zip(args.text, row, strict=True):
            print(f"{score:10.4f}  {text}")


# --- decode any picture ---------------------------------------------------------------------------------------------

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

    Example:
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


if __name__ == "__main__":
    main()
