"""Images of any mode, size and type, damaged files, and any text: right pixels and embeddings, or a `DataError`."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from modeling_miniclip import MiniClipModel, MiniClipProcessor, encode_texts
from modeling_miniclip.inference.encode import open_image
from modeling_miniclip.training.towers.create_model import train_tokenizer
from tests.helpers.fuzzing import CAPTIONS, NASTY, TEXT, cases, damaged, fuzz, result_or_error
from tests.helpers.pictures import ROTATED, SIZE, jpeg_with_exif, jpeg_with_segment, png_with_chunk, upright
from tests.helpers.towers import PIXELS, tiny_model, tiny_processor

# Bytes a pixel of Pillow's modes; those of 8 bits without transparency have but one conversion to RGB.
MODES = {"1": 1, "L": 1, "P": 1, "RGB": 3, "CMYK": 4, "YCbCr": 3, "HSV": 3, "LAB": 3, "RGBX": 4}
MORE_MODES = {"LA": 2, "PA": 2, "RGBA": 4, "RGBa": 4, "La": 2, "I": 4, "F": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}
SIDES = st.one_of(st.integers(1, 40), st.sampled_from((1, 2, 3, 300)))
FORMATS = {"PNG": "RGBA", "JPEG": "RGB", "GIF": "P", "WEBP": "RGB", "TIFF": "I;16", "BMP": "RGB", "PPM": "L"}


@pytest.fixture(scope="module")
def processor() -> MiniClipProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def model() -> MiniClipModel:
    torch.manual_seed(0)
    return tiny_model()


@st.composite
def pictures(draw: Any, modes: dict[str, int]) -> Image.Image:
    mode, size = draw(st.sampled_from(sorted(modes))), (draw(SIDES), draw(SIDES))
    count = modes[mode] * size[0] * size[1]
    content = draw(st.binary(min_size=1, max_size=64))
    data = (content * (count // len(content) + 1))[:count]
    if mode == "1":
        return Image.frombytes("L", size, data).convert("1")
    image = Image.frombytes(mode, size, data)
    if mode in ("P", "PA"):
        image.putpalette(data[:768].ljust(768, b"\x80"))
    return image


def assert_pixels(processor: MiniClipProcessor, image: Any) -> None:
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, PIXELS, PIXELS) and pixels.dtype == torch.float32 and pixels.isfinite().all()


@cases(60, 3000)
def test_simple_modes_equal_pillows_conversion(processor: MiniClipProcessor, record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(image=pictures(MODES))
    def check(image: Image.Image) -> None:
        opened, _ = result_or_error(open_image, image)
        assert opened.mode == "RGB" and opened.size == image.size
        assert opened.tobytes() == image.convert("RGB").tobytes()
        assert_pixels(processor, opened)

    check()


@cases(60, 3000)
def test_every_mode_gives_pixels_of_its_size(processor: MiniClipProcessor, record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(image=pictures(MODES | MORE_MODES))
    def check(image: Image.Image) -> None:
        opened, message = result_or_error(open_image, image)
        assert not message and opened.mode == "RGB" and opened.size == image.size
        assert_pixels(processor, image)
        assert processor.crop(opened).shape == (3, PIXELS, PIXELS)

    check()


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (3, 65_000), (65_000, 2)])
def test_thin_images_need_no_extra_memory(
    processor: MiniClipProcessor, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    areas = []
    resize = Image.Image.resize

    def counted(image: Image.Image, size: Any, *args: Any, **kwargs: Any) -> Image.Image:
        areas.append(size[0] * size[1])
        assert areas[-1] < 10**6, "the whole length of the image is made wider"
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counted)
    image = Image.effect_noise(size, 90).convert("RGB")
    assert_pixels(processor, image)
    processor.crop(image)
    assert len(areas) >= 2


@pytest.mark.parametrize("size", [(4, 2000), (2701, 3), (2, 831)])
def test_cut_thin_image_keeps_its_middle_pixels(processor: MiniClipProcessor, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    whole = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    cut = processor(images=image, return_tensors="pt")["pixel_values"]
    step = 1 / 255 / min(processor.image_processor.image_std)
    assert (whole - cut).abs().max() <= 2.01 * step  # each of the two passes of a resize rounds


@cases(60, 3000)
def test_any_array_opens_or_error_names_shape_and_type(
    processor: MiniClipProcessor, record_property: Any, count: int
) -> None:
    shapes = st.one_of(
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12),
        st.tuples(SIDES, SIDES),
        st.tuples(SIDES, SIDES, st.sampled_from((1, 3, 4))),
    )
    dtypes = st.one_of(st.just(np.dtype("uint8")), arrays.scalar_dtypes())

    @fuzz(count, record_property)
    @given(dtype=dtypes, shape=shapes, fill=st.integers(0, 255))
    @example(dtype=np.dtype("uint8"), shape=(0, 0), fill=0)
    @example(dtype=np.dtype("uint8"), shape=(0, 5, 3), fill=0)
    def check(dtype: np.dtype, shape: tuple[int, ...], fill: int) -> None:
        array = np.full(shape, fill).astype(dtype)
        opened, message = result_or_error(open_image, array)
        if opened is None:
            assert str(array.shape) in message or str(array.dtype) in message
        else:
            assert opened.mode == "RGB" and opened.size in (array.shape[1::-1], array.shape[:0:-1])
            assert_pixels(processor, opened)

    check()


NUMBERS = "bool uint8 int16 uint16 int32 int64 uint64 float16 bfloat16 float32 float64".split()


@st.composite
def numbers(draw: Any) -> tuple[Any, Image.Image | None]:
    """An array, tensor or nested list of any type and layout, with the image that it holds; None if it holds none."""
    dtype, channels = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from((0, 1, 3, 4)))
    size = (draw(st.integers(5, 40)), draw(st.integers(5, 40)))
    data = draw(st.binary(min_size=8, max_size=64)) + b"\0\xff"
    values = np.resize(np.frombuffer(data, np.uint8), (*size, channels or 1))
    held = values > 127 if dtype == "bool" else values
    image = Image.fromarray(held[:, :, 0] if channels < 3 else held * np.uint8(255 if dtype == "bool" else 1))
    array = torch.from_numpy(held.astype(np.int64)) * (257 if dtype == "uint16" else 1)
    if "float" in dtype:  # bfloat16 keeps only halves above 127
        array = (array.double() + draw(st.floats(-0.4, 0.4) if dtype != "bfloat16" else st.just(0))).clamp(0, 255)
    wrong = draw(st.sampled_from((0, 0, 0, 300, -300))) if dtype not in ("bool", "uint8", "uint16") else 0
    if wrong and (dtype != "uint64" or wrong > 0):
        array, image = array + wrong, None
    array = array.to(getattr(torch, dtype))
    array = array.permute(2, 0, 1) if channels and draw(st.booleans()) else array
    array = array[:, :, 0] if not channels else array
    array = array[None] if channels and draw(st.booleans()) else array
    kind = draw(st.sampled_from(("tensor", "array", "list")))
    if kind == "array" and dtype != "bfloat16":
        array = array.numpy()
    return array.tolist() if kind == "list" and dtype not in ("bool", "uint16") else array, image


@cases(100, 5000)
def test_arrays_equal_the_image_they_hold(processor: MiniClipProcessor, record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(case=numbers())
    def check(case: tuple[Any, Image.Image | None]) -> None:
        array, image = case
        if image is None:
            with pytest.raises(
                ValueError, match=r"type (u?int|float)\d+ with values -?[0-9.e+]+\.\.-?[0-9.e+]+: expected 0"
            ):
                processor(images=array)
            return
        expected = processor(images=image, return_tensors="pt")["pixel_values"]
        assert torch.equal(processor(images=array, return_tensors="pt")["pixel_values"], expected)
        if not isinstance(array, list) and array.ndim < 4:
            assert open_image(array).tobytes() == open_image(image).tobytes()

    check()


def encoded(name: str, mode: str, **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert("I" if mode == "I;16" else mode)
    buffer = io.BytesIO()
    (image.convert(mode) if mode == "I;16" else image).save(buffer, format=name, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow's and the decoders', of damaged files
@cases(70, 5000)
def test_damaged_image_opens_or_error_names_file(
    tmp_path: Path, processor: MiniClipProcessor, record_property: Any, count: int
) -> None:
    seeds = {name: encoded(name, mode) for name, mode in FORMATS.items()}
    seeds["JPEG"] = encoded("JPEG", "RGB", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0")

    @fuzz(count, record_property)
    @given(name=st.sampled_from(sorted(seeds)), data=st.data())
    def check(name: str, data: Any) -> None:
        path = tmp_path / f"image.{name.lower()}"
        path.write_bytes(data.draw(damaged(st.just(seeds[name])), label="content"))
        with_size, _ = result_or_error(lambda: Image.open(path).size if _opens(path) else (0, 0))
        assume(with_size[0] * with_size[1] < 10**7)  # a flipped bit of a header may ask for gigabytes
        opened, message = result_or_error(open_image, path)
        if opened is None:
            assert str(path) in message
        else:
            assert opened.mode == "RGB"
            assert_pixels(processor, opened)

    check()


def _opens(path: Path) -> bool:
    try:
        Image.open(path).close()
    except Exception:
        return False
    return True


# --- metadata -------------------------------------------------------------------------------------------------------

ENTRIES = st.lists(
    st.tuples(
        st.sampled_from((0x100, 0x101, 0x10F, 0x11A, 0x128, 0x132, 0x8769, 0x8825)),
        st.integers(0, 13),
        st.sampled_from((0, 1, 2, 4, 100, 2**31)),
        st.binary(min_size=4, max_size=4) | st.sampled_from((b"\xff" * 4, bytes(4), struct.pack("<f", 3.5))),
    ),
    max_size=4,
)
STARTS = (
    b"",
    b"JFIF\0",
    b"Exif\0\0",
    b"Exif\0\0II*\0",
    b"ICC_PROFILE\0",
    b"MPF\0",
    b"Photoshop 3.0\x008BIM",
    b"Adobe\0",
)
CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL", b"prVt")
KEYS = (b"", b"key\0", b"key\0\0" + zlib.compress(b"a" * 2_000_000), b"Raw profile type exif\0\nexif\n 20\n")


@st.composite
def odd_files(draw: Any) -> tuple[bytes, int | None]:
    """A file with whole pixels and odd metadata, and its orientation; None if it has none that can be relied on."""
    kind = draw(st.sampled_from(("exif", "segment", "chunk")))
    if kind == "exif":
        entries = draw(ENTRIES)
        turned = draw(st.booleans())
        if turned:
            entries.insert(draw(st.integers(0, len(entries))), ROTATED)
        return jpeg_with_exif(entries), 6 if turned else 1
    if kind == "segment":
        body = draw(st.sampled_from(STARTS)) + draw(st.binary(max_size=40))
        return jpeg_with_segment(draw(st.integers(0xE0, 0xEF) | st.just(0xFE)), body), None
    data = draw(st.sampled_from(KEYS)) + draw(st.binary(max_size=40))
    checksum = draw(st.none() | st.integers(0, 5))
    return png_with_chunk(draw(st.sampled_from(CHUNKS)), data, draw(st.booleans()), checksum), None


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
@cases(200, 20_000)
def test_odd_metadata_does_not_change_pixels(record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(odd=odd_files())
    def check(odd: tuple[bytes, int | None]) -> None:
        content, orientation = odd
        opened, message = result_or_error(open_image, {"bytes": content, "path": None})
        assert opened is not None, message
        if orientation is not None or opened.size == SIZE:
            expected = upright(content[:4], orientation or 1)
            assert np.asarray(opened).shape == expected.shape and np.abs(np.asarray(opened) - expected).max() <= 2

    check()


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*truncated")
@cases(25, 1500)
def test_texts_are_embedded_as_if_each_was_alone(
    model: MiniClipModel, processor: MiniClipProcessor, record_property: Any, count: int
) -> None:
    @fuzz(count, record_property)
    @given(texts=st.lists(TEXT, min_size=1, max_size=4))
    @example(texts=list(NASTY))
    def check(texts: list[str]) -> None:
        together, message = result_or_error(encode_texts, model, texts, processor, progress=False)
        assert not message
        torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)), atol=1e-5, rtol=0)
        alone = torch.cat([encode_texts(model, [text], processor, progress=False) for text in texts])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)

    check()


@pytest.mark.parametrize("wrong", [None, 3, b"dog", ["dog"], "\ud83d", "dog \udc00"])
def test_wrong_text_error_has_its_number(model: MiniClipModel, processor: MiniClipProcessor, wrong: Any) -> None:
    embeddings, message = result_or_error(encode_texts, model, ["a dog", wrong], processor, progress=False)
    assert embeddings is None and message.startswith("text 1: ")


@cases(20, 1000)
def test_a_vocabulary_of_any_captions_knows_their_words(record_property: Any, count: int) -> None:
    @fuzz(count, record_property)
    @given(captions=st.lists(st.lists(CAPTIONS, min_size=1, max_size=3), min_size=1, max_size=4))
    @example(captions=[list(NASTY)])
    def check(captions: list[list[str]]) -> None:
        tokenizer = train_tokenizer(captions, 3000)
        assert tokenizer.get_vocab() == train_tokenizer(captions, 3000).get_vocab()
        for text in (text for row in captions for text in row):
            tokens = tokenizer.tokenize(text[:400])
            longest = max(map(len, text.split()), default=0)
            assert longest > 90 or "[UNK]" not in tokens  # WordPiece takes no words of more than 100 characters

    check()
