"""The processor: pixels against timm's own transform, any picture to RGB, texts padded and cut, save and reload."""

import base64
import io
import json
import math
import shutil
import struct
import threading
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from tokenizers import ByteLevelBPETokenizer, SentencePieceUnigramTokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    RobertaTokenizer,
    T5Tokenizer,
    TimmWrapperConfig,
    ViTImageProcessorPil,
)
from transformers.image_utils import load_image

from modeling_miniclip import MiniClipConfig, MiniClipProcessor
from modeling_miniclip.pictures_miniclip import to_rgb
from modeling_miniclip.processing_miniclip import image_processor_from_timm, max_text_length
from tests.helpers.towers import (
    CAPTIONS,
    PIXELS,
    TEXT,
    save_towers,
    text_config,
    tiny_processor,
    vision_config,
    with_slow,
)

# Width and height: square, landscape, portrait, odd, large, and some that are next to nothing.
SIZES = [(224, 224), (300, 200), (200, 300), (333, 257), (1200, 901), (1, 1), (50, 1), (3, 200), (3, 3), (40, 700)]
LONG = "two children play with a yellow ball on the beach and a dog runs over the green grass near a shore of a lake"


def tower(**preprocessing) -> TimmWrapperConfig:
    return TimmWrapperConfig(architecture="resnet50", pretrained_cfg={"input_size": [3, 224, 224]} | preprocessing)


TOWERS = {
    "default": MiniClipConfig().vision_config,  # crop 0.95: the short side of 235 leaves a margin of 5.5
    "whole": tower(crop_pct=1.0, interpolation="bicubic", mean=[0.5] * 3, std=[0.5] * 3),
    "classic": tower(crop_pct=0.875, interpolation="bilinear"),
    "lanczos": tower(crop_pct=0.9, interpolation="lanczos", mean=[0.48, 0.46, 0.41], std=[0.27, 0.26, 0.28]),
    "squash": tower(crop_pct=0.95, interpolation="bicubic", crop_mode="squash"),
}


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Coarse structure and noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return Image.blend(coarse, noise, 0.3)


def timm_transform(config: TimmWrapperConfig):
    cfg = getattr(config, "pretrained_cfg", None)
    if cfg is None:  # of the default tower, in full: what timm's registry says of resnet50.a1_in1k
        cfg = {"input_size": [3, 224, 224], "crop_pct": 0.95, "interpolation": "bicubic"}
    return create_transform(**resolve_data_config(pretrained_cfg=cfg), is_training=False)


def timm_with_floored_margins(config: TimmWrapperConfig, image: Image.Image) -> tuple[torch.Tensor, bool]:
    """timm's transform but for the crop's offset, and whether both margins halve alike in both libraries."""
    resize, crop, to_tensor, normalize = timm_transform(config).transforms
    resized = resize(image)
    margins = [resized.width - crop.size[1], resized.height - crop.size[0]]
    left, top = (math.floor(margin / 2) for margin in margins)
    cropped = resized.crop((left, top, left + crop.size[1], top + crop.size[0]))
    alike = all(round(margin / 2) == math.floor(margin / 2) for margin in margins)
    return normalize(to_tensor(cropped)), alike


# --- pixels ---


ALIKE = {"default": {False}, "whole": {True}, "classic": {True, False}, "lanczos": {True}, "squash": {False}}


@pytest.mark.parametrize("name", TOWERS)
def test_pixels_equal_timms_transform_except_odd_margins(name):
    config, kinds = TOWERS[name], set()
    for size in SIZES:
        image = picture(size)
        ours = image_processor_from_timm(config)(image, return_tensors="pt")["pixel_values"][0]
        floored, alike = timm_with_floored_margins(config, image)
        assert ours.dtype == torch.float32 and ours.shape == (3, 224, 224), size
        assert torch.equal(ours, floored), size
        if alike:
            assert torch.equal(ours, timm_transform(config)(image)), size
        kinds.add(alike)
    assert kinds == ALIKE[name]


def test_default_crop_is_one_pixel_off_timm():
    image = picture((500, 500))
    config = TOWERS["default"]
    ours = image_processor_from_timm(config)(image, return_tensors="pt")["pixel_values"][0]
    timms = timm_transform(config)(image)
    assert torch.equal(ours[:, 1:, 1:], timms[:, :-1, :-1])  # from pixel 5 here, from pixel 6 in timm
    assert not torch.equal(ours, timms)


def steps_between_backends(config: TimmWrapperConfig, images: list[Image.Image], folder: Path) -> list[torch.Tensor]:
    """Differences of the PIL and the torchvision backend before normalisation, in steps of 1/255."""
    pil = image_processor_from_timm(config)
    pil.save_pretrained(folder)
    torchvision = AutoImageProcessor.from_pretrained(folder, backend="torchvision")
    assert (pil.backend, torchvision.backend) == ("pil", "torchvision")
    std = torch.tensor(pil.image_std).view(3, 1, 1)
    differences = []
    for image in images:
        ours, theirs = (p(image, return_tensors="pt")["pixel_values"][0] for p in (pil, torchvision))
        differences.append(((ours - theirs) * std * 255).abs())
    return differences


@pytest.mark.parametrize("name", with_slow(["default", "squash"], ["whole", "classic", "lanczos"]))
def test_torchvision_backend_differs_by_two_steps_at_most(name, tmp_path):
    # Distorted noise ("squash") is harder than any photograph.
    bound = 3.01 if name == "squash" else 2.01
    for steps in steps_between_backends(TOWERS[name], [picture(size) for size in [*SIZES, (2500, 1900)]], tmp_path):
        assert steps.max() < bound
        assert steps.mean() < 0.3


@pytest.mark.parametrize("name", with_slow(["default"], ["whole", "classic", "lanczos", "squash"]))
def test_torchvision_backend_is_within_two_steps_on_photographs(name, shared, tmp_path):
    photographs = [to_rgb(Image.open(path)) for path in sorted((shared / "flickr8k" / "Images").glob("*.jpg"))[:6]]
    assert max(steps.max() for steps in steps_between_backends(TOWERS[name], photographs, tmp_path)) < 2.01


def test_photographs_equal_timms_transform(shared):
    config = TOWERS["classic"]
    paths = sorted((shared / "flickr8k" / "Images").glob("*.jpg"))[:6]
    images = [to_rgb(Image.open(path)) for path in paths]
    ours = image_processor_from_timm(config)(images, return_tensors="pt")["pixel_values"]
    for image, pixels in zip(images, ours, strict=True):
        floored, alike = timm_with_floored_margins(config, image)
        assert torch.equal(pixels, timm_transform(config)(image) if alike else floored)


@pytest.mark.parametrize("name", TOWERS)
def test_normalize_equals_the_image_processor_bit_for_bit(name):
    processor = MiniClipProcessor(image_processor_from_timm(TOWERS[name]), tiny_processor().tokenizer)
    every_value = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    processor.image_processor.crop_size = {"height": 256, "width": 256}
    processor.image_processor.size = {"height": 256, "width": 256}
    for image in (Image.fromarray(every_value), picture((300, 200))):
        expected = processor(images=image, return_tensors="pt")["pixel_values"]
        pixels = processor.crop(image)
        assert pixels.dtype == np.uint8 and pixels.shape == (3, 256, 256)
        assert torch.equal(processor.normalize(torch.from_numpy(pixels)[None]), expected)
    # and the reference for every one of the 256 values: timm's division by 255
    image_processor = processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    values = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(processor.normalize(values), (values.float() / 255 - mean) / std)


SQUARE = {"height": 50, "width": 50}
RANDOM_SIZES = [tuple(map(int, 10 ** np.random.default_rng(s).uniform(0.3, 2.7, 2))) for s in range(40)]


@pytest.mark.parametrize("count", with_slow([8], [40]))
@pytest.mark.parametrize("resample", list(Image.Resampling))
@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ({"shortest_edge": 235}, 224),
        ({"shortest_edge": 33}, {"height": 20, "width": 31}),
        ({"height": 40, "width": 29}, 24),  # squash
        ({"shortest_edge": 30}, {"height": 41, "width": 24}),  # padded with black where the crop is larger
    ],
)
def test_crop_equals_the_image_processor_bit_for_bit(size, crop, resample, count):
    stock = CLIPImageProcessorPil(size=size, crop_size=crop, resample=resample)
    processor = MiniClipProcessor(stock, tiny_processor().tokenizer)
    for seed, pixels in enumerate(RANDOM_SIZES[:count]):
        image = picture(pixels, seed)
        expected = stock(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        assert processor._plan(image) is not None  # none of them is left to the image processor
        cropped = processor.crop(image)
        assert cropped.dtype == expected.dtype and np.array_equal(cropped, expected), pixels


@pytest.mark.parametrize(
    "stock",
    [
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32),  # torchvision's pixels are others
        CLIPImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 60}, crop_size=32),
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32, do_center_crop=False),
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32, do_resize=False),
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32, do_pad=True, pad_size=SQUARE),
        ViTImageProcessorPil(size={"height": 40, "width": 30}),
    ],
)  # fmt: skip
def test_crop_supports_other_processors_and_settings(stock):
    processor = MiniClipProcessor(stock, tiny_processor().tokenizer)
    image = picture((90, 70))
    expected = stock(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(processor.crop(image), expected)


def test_crop_is_writable_and_a_valid_tensor():
    cropped = tiny_processor().crop(picture((50, 40)))
    assert cropped.flags.writeable and torch.equal(torch.from_numpy(cropped), torch.tensor(cropped))


def test_a_batch_is_its_images_one_by_one():
    processor = tiny_processor()
    images = [picture(size, seed) for seed, size in enumerate([(40, 30), (32, 32), (31, 90)])]
    batch = processor(images=images, return_tensors="pt")["pixel_values"]
    assert batch.shape == (3, 3, PIXELS, PIXELS)
    for image, pixels in zip(images, batch, strict=True):
        assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"][0], pixels)


def test_image_size_and_model_args_change_the_size():
    processor = image_processor_from_timm(TOWERS["default"], image_size=128)
    assert processor.size["shortest_edge"] == math.floor(128 / 0.95) == 134
    assert processor(picture((300, 200)), return_tensors="pt")["pixel_values"].shape == (1, 3, 128, 128)
    from_scratch = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={"img_size": 64})
    assert image_processor_from_timm(from_scratch).crop_size["height"] == 64


def test_full_crop_keeps_a_square_picture():
    processor = image_processor_from_timm(TOWERS["default"], image_size=64, crop_pct=1.0)
    assert processor.size["shortest_edge"] == 64
    whole = picture((64, 64))
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    pixels = processor(whole, return_tensors="np")["pixel_values"][0] * std + mean
    np.testing.assert_allclose(pixels * 255, np.array(whole).transpose(2, 0, 1), atol=1e-3)


def test_unsupported_tower_settings_raise():
    vit = TimmWrapperConfig(architecture="vit_tiny_patch16_224")
    assert image_processor_from_timm(vit, image_size=224).crop_size["height"] == 224
    with pytest.raises(ValueError, match="takes images of 224x224 pixels only, not image_size 256"):
        image_processor_from_timm(vit, image_size=256)
    with pytest.raises(ValueError, match="crop mode 'border'"):
        image_processor_from_timm(tower(crop_mode="border"))
    with pytest.raises(ValueError, match="224x192"):
        image_processor_from_timm(
            TimmWrapperConfig(architecture="resnet50", pretrained_cfg={"input_size": [3, 224, 192]})
        )


# --- any picture to RGB ---


def reopened(image: Image.Image, fmt: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return Image.open(buffer)


def pixels_of(image: Image.Image) -> list:
    converted = to_rgb(image)
    assert converted.mode == "RGB" and converted.size == image.size
    return np.asarray(converted).reshape(-1, 3).tolist()


def test_palette_becomes_its_colours():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 0, 255, 255, 255])
    image.putdata([1, 0, 2])
    assert pixels_of(reopened(image, "PNG")) == [[200, 100, 0], [10, 20, 30], [255, 255, 255]]


def test_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([0, 1])
    assert pixels_of(reopened(image, "PNG", transparency=0)) == [[255, 255, 255], [200, 100, 0]]
    assert pixels_of(reopened(image, "GIF", transparency=1)) == [[10, 20, 30], [255, 255, 255]]


def test_alpha_is_laid_on_white():
    rgba = Image.new("RGBA", (4, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 51), (0, 0, 0, 0), (0, 0, 255, 102)])
    # 51 / 255 is a fifth, 102 / 255 two fifths of the colour, the rest white
    expected = [[255, 0, 0], [255, 204, 204], [255, 255, 255], [153, 153, 255]]
    assert pixels_of(rgba) == pixels_of(reopened(rgba, "PNG")) == expected
    grey = Image.new("LA", (3, 1))
    grey.putdata([(0, 255), (0, 51), (100, 0)])
    assert pixels_of(grey) == pixels_of(reopened(grey, "PNG")) == [[0] * 3, [204] * 3, [255] * 3]


def test_transparent_colour_of_an_rgb_file_becomes_white():
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    assert pixels_of(reopened(image, "PNG", transparency=(1, 2, 3))) == [[255] * 3, [4, 5, 6]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 257, 2 * 257, 128 * 257, 65535, 100]], dtype=np.uint16)
    expected = [[v] * 3 for v in (0, 1, 2, 128, 255, 0)]
    image = reopened(Image.fromarray(values), "PNG")
    assert image.mode == "I;16"
    assert pixels_of(image) == expected
    assert pixels_of(reopened(Image.fromarray(values), "TIFF")) == expected
    assert pixels_of(Image.fromarray(values.astype(np.int32))) == expected  # mode I
    dark = Image.fromarray(np.full((1, 2), 255, dtype=np.uint16))  # 0.4 % of full scale, not white
    assert pixels_of(dark) == [[1] * 3] * 2
    assert pixels_of(Image.fromarray(np.array([[0, 7, 255]], dtype=np.int32))) == [[0] * 3, [7] * 3, [255] * 3]


def test_transparent_value_of_sixteen_bit_grey_becomes_white():
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = b"\0" + struct.pack(">3H", 7 * 257, 9 * 257, 65535)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 3, 1, 16, 0, 0, 0, 0),
        b"tRNS": struct.pack(">H", 7 * 257),
        b"IDAT": zlib.compress(pixels),
        b"IEND": b"",
    }
    file = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())
    assert pixels_of(Image.open(io.BytesIO(file))) == [[255] * 3, [9] * 3, [255] * 3]


def test_float_pixels_may_be_0_to_1_or_255():
    unit = np.array([[0, 0.2, 0.4, 1]], dtype=np.float32)
    expected = [[v] * 3 for v in (0, 51, 102, 255)]
    assert pixels_of(Image.fromarray(unit)) == pixels_of(reopened(Image.fromarray(unit), "TIFF")) == expected
    assert pixels_of(Image.fromarray(unit * 255)) == expected


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "PA", "RGBa", "RGBX"])
def test_rarer_modes_keep_the_colour(mode):
    colour = (200, 60, 30)
    if mode == "LAB":  # CIE L*a*b* of this colour, by LittleCMS: 47, 55, 49; stored as L * 2.55, a + 128, b + 128
        image = Image.new("LAB", (2, 1), (120, 183, 177))
    elif mode == "PA":
        image = Image.new("RGB", (2, 1), colour).quantize(2).convert("PA")
    else:
        image = Image.new("RGB", (2, 1), colour).convert("RGBA" if mode == "RGBa" else mode).convert(mode)
    assert np.abs(np.array(pixels_of(image)) - colour).max() <= 4


def test_one_bit_is_black_and_white():
    image = Image.new("1", (2, 1))
    image.putdata([0, 1])
    assert pixels_of(reopened(image, "PNG")) == [[0] * 3, [255] * 3]


def test_cmyk_is_converted():
    image = Image.new("CMYK", (4, 1))
    image.putdata([(0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (255, 0, 255, 0)])
    expected = [[255] * 3, [255, 0, 0], [0] * 3, [0, 255, 0]]
    assert pixels_of(image) == pixels_of(reopened(image, "TIFF")) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    # How the camera's sensor saw the upright scene: the inverse of what the tag asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),  # shown by turning clockwise
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reopened(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(np.asarray(to_rgb(image)), upright)
    # the processor does the same
    processor = tiny_processor()
    straight = processor(images=[Image.fromarray(upright)], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=[image], return_tensors="pt")["pixel_values"], straight)


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (2, 1), colour) for colour in ("red", "blue", "green")]
    image = reopened(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert image.n_frames == 3
    assert pixels_of(image) == [[255, 0, 0]] * 2


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF"])
def test_first_frame_of_animations_and_pages_is_used(fmt):
    frames = [Image.new("RGB", (2, 1), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    image = reopened(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert image.n_frames == 3
    assert pixels_of(image) == [[255, 0, 0]] * 2


def test_an_rgb_image_is_not_copied():
    image = picture((9, 9))
    assert to_rgb(image) is image


def test_the_given_image_stays_as_it_is():
    for mode in ("RGB", "RGBA", "L", "P", "I;16"):
        image = Image.new(mode, (2, 2))
        before = image.copy()
        to_rgb(image)
        assert image == before


def test_a_truncated_file_is_an_os_error():
    buffer = io.BytesIO()
    picture((64, 64)).save(buffer, format="JPEG")
    with pytest.raises(OSError):
        to_rgb(Image.open(io.BytesIO(buffer.getvalue()[:-400])))


@pytest.mark.parametrize("size", [(0, 0), (0, 3), (3, 0)])
def test_an_image_without_pixels_is_an_os_error(size):
    with pytest.raises(OSError, match=f"it has {size[0]} x {size[1]} pixels"):
        to_rgb(Image.new("RGB", size))


def test_nan_pixels_are_black_and_others_scaled():
    image = Image.fromarray(np.array([[np.nan, 0.2, 1.0]], dtype=np.float32))
    assert pixels_of(image) == [[0] * 3, [51] * 3, [255] * 3]


# --- where images come from ---


def odd_files(folder: Path) -> dict[str, Path]:
    """One file of each odd kind, whose RGB is not what `Image.convert("RGB")` makes of it, and a plain one."""
    coarse = picture((48, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = coarse.copy()
    transparent.putalpha(Image.radial_gradient("L").resize(coarse.size))
    grey16 = Image.fromarray(np.asarray(coarse.convert("L")).astype(np.uint16) * 200)
    transparent.save(folder / "rgba.png")
    transparent.convert("LA").save(folder / "la.png")
    grey16.save(folder / "grey16.png")
    coarse.save(folder / "turned.jpg", exif=exif)
    coarse.quantize(16).save(folder / "palette.png", transparency=3)
    coarse.save(folder / "animated.gif", save_all=True, append_images=[picture((48, 40), 5)])
    coarse.save(folder / "plain.png")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_files_of_any_kind_are_read_right(tmp_path, backend):
    tiny_processor().save_pretrained(tmp_path / "saved")
    processor = MiniClipProcessor.from_pretrained(tmp_path / "saved", backend=backend)
    (tmp_path / "files").mkdir()
    files = odd_files(tmp_path / "files")
    expected = [processor(images=to_rgb(Image.open(f)), return_tensors="pt")["pixel_values"] for f in files.values()]
    for name, pixels in zip(files, expected, strict=True):
        for form in (files[name], str(files[name]), [files[name]], Image.open(files[name])):
            assert torch.equal(processor(images=form, return_tensors="pt")["pixel_values"], pixels), name
    batch = processor(images=list(files.values()), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, torch.cat(expected))


class Files(BaseHTTPRequestHandler):
    """Serves `files`; paths that start with /moved/ are redirected to the rest of the path."""

    files: dict[str, Path] = {}

    def do_GET(self):
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
            return
        found = self.files.get(self.path[1:])
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(found.read_bytes() if found else b"nothing here")

    def log_message(self, *args):
        pass


def test_urls_and_base64_are_files_too(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # for a server on loopback
    processor = tiny_processor()
    Files.files = odd_files(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        for name, path in Files.files.items():
            expected = processor(images=path, return_tensors="pt")["pixel_values"]
            text = base64.b64encode(path.read_bytes()).decode()
            forms = [f"{url}/{name}", f"{url}/moved/{name}", f"data:image/{path.suffix[1:]};base64,{text}", text]
            for pixels in processor(images=forms, return_tensors="pt")["pixel_values"]:
                assert torch.equal(pixels, expected[0]), name
        # and the same as transformers' own loading where that is right
        loaded = processor(images=load_image(f"{url}/turned"), return_tensors="pt")["pixel_values"]
        assert torch.equal(processor(images=f"{url}/turned", return_tensors="pt")["pixel_values"], loaded)
        with pytest.raises(Exception, match=r"404.*/nothing"):
            processor(images=f"{url}/nothing")
    finally:
        server.shutdown()
        server.server_close()


def test_what_is_no_image_is_named(tmp_path):
    processor = tiny_processor()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError, match=r"text\.png"):
        processor(images=tmp_path / "text.png")
    for missing in ("no.png", "a dog", Path("no.png"), "data:image/png;base64,AAAA"):
        with pytest.raises(FileNotFoundError, match="no such image file, and not a URL"):
            processor(images=[missing])
    with pytest.raises(TypeError, match="int"):
        processor(images=5)


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize(
    "form",
    [
        lambda array: array,
        lambda array: array.transpose(2, 0, 1),
        lambda array: array[None],
        lambda array: [array, array],
        lambda array: (array,),
        lambda array: array.astype(np.float32),
        lambda array: array.astype(np.int64),
        lambda array: array.astype(np.uint16) * 257,
        lambda array: np.dstack([array, np.full(array.shape[:2], 255, dtype=np.uint8)]),
        torch.from_numpy,
        lambda array: torch.from_numpy(array).permute(2, 0, 1),
        lambda array: torch.from_numpy(array).permute(2, 0, 1)[None],
        lambda array: [torch.from_numpy(array), Image.fromarray(array)],
        lambda array: torch.from_numpy(array).permute(2, 0, 1).float().requires_grad_(),
    ],
    ids="hwc chw bhwc list tuple float int uint16 rgba torch_hwc torch_chw torch_bchw mixed gradient".split(),
)
def test_arrays_and_tensors_are_the_image_they_hold(form, backend, tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    processor = MiniClipProcessor.from_pretrained(tmp_path, backend=backend)
    image = picture((45, 38))
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    images = form(np.array(image))
    found = processor(images=images, return_tensors="pt")["pixel_values"]
    assert len(found) == (len(images) if isinstance(images, list | tuple) else 1)
    # torchvision resizes floating-point pixels without rounding them: half a step of 255
    for pixels in found:
        torch.testing.assert_close(pixels, expected[0], atol=1e-6 if backend == "pil" else 0.05, rtol=0)


@pytest.mark.parametrize("form", [np.asarray, lambda grey: np.asarray(grey)[:, :, None], torch.from_numpy, list])
def test_grey_arrays_are_grey_images(form):
    processor = tiny_processor()
    grey = picture((45, 38)).convert("L")
    expected = processor(images=grey, return_tensors="pt")["pixel_values"]
    images = [np.asarray(grey)] if form is list else form(np.array(grey))
    assert torch.equal(processor(images=images, return_tensors="pt")["pixel_values"], expected)
    high = np.asarray(grey).astype(np.uint16) * 257
    assert torch.equal(processor(images=high, return_tensors="pt")["pixel_values"], expected)


def test_scaled_pixels_warn_about_do_rescale():
    processor = tiny_processor()
    image = Image.fromarray(np.asarray(picture((PIXELS, PIXELS))))
    unit = np.asarray(image).astype(np.float32) / 255
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
            found = processor(images=unit, return_tensors="pt", **options)["pixel_values"]
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
        processor(images=[np.zeros((40, 40, 3), np.float32), unit * 255])
    for form in (unit, [unit], torch.from_numpy(unit), torch.from_numpy(unit).bfloat16()):
        with pytest.warns(UserWarning, match="between 0 and 1.*do_rescale=False") as caught:
            processor(images=form)
        assert [w.filename for w in caught] == [__file__]


# --- keyword arguments ---


def test_keyword_arguments_go_where_processor_mixin_sends_them():
    processor = tiny_processor()
    image, texts = picture((60, 50)), ["a dog", "two children play with a ball"]
    own = {
        "pixel_values": processor.image_processor(image, crop_size=20, do_normalize=False, return_tensors="np"),
        "input_ids": processor.tokenizer(texts, padding="max_length", max_length=12, truncation=True),
    }
    flat = {"crop_size": 20, "do_normalize": False, "padding": "max_length", "max_length": 12}
    nested = {
        "images_kwargs": {"crop_size": 20, "do_normalize": False},
        "text_kwargs": {"padding": "max_length", "max_length": 12},
    }
    for options in (flat, nested, nested | {"common_kwargs": {"return_tensors": "np"}}):
        outputs = processor(images=image, text=texts, **({"return_tensors": "np"} | options))
        for name, expected in own.items():
            assert np.array_equal(outputs[name], expected[name]), (name, options)
    with pytest.raises(ValueError, match="max_length was passed two times"):
        processor(text=texts, text_kwargs={"max_length": 12}, max_length=16)
    assert len(processor(text=texts[0])["input_ids"]) == 4  # nothing is kept for the next call


def test_options_of_the_tokenizer_change_what_comes_out():
    processor = tiny_processor()
    assert "attention_mask" not in processor(text=[LONG, "a dog"], return_attention_mask=False)
    assert "special_tokens_mask" in processor(text=["a dog"], return_special_tokens_mask=True)
    ids = processor(text=["a dog"], add_special_tokens=False)["input_ids"][0]
    assert ids == processor(text=["a dog"])["input_ids"][0][1:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # overflowing tokens become an extra row and are not lost
        rows = processor(text=[LONG, "a dog"], max_length=8, return_overflowing_tokens=True)["input_ids"]
    assert len(rows) > 2 and {len(row) for row in rows} == {8}


def test_wrong_input_raises_like_processor_mixin():
    processor = tiny_processor()
    with pytest.raises(ValueError, match="at least one input to call MiniClipProcessor"):
        processor()
    with pytest.raises(ValueError, match="string or list of strings|must be of type `str`"):
        processor(text=[1, 2])
    assert processor.batch_decode(processor(text=["a dog"])["input_ids"], skip_special_tokens=True) == ["a dog"]
    assert set(processor.model_input_names) == {"pixel_values", "input_ids", "attention_mask"}


# --- texts ---


def test_texts_are_padded_to_the_longest():
    processor = tiny_processor()
    outputs = processor(text=["a dog", "two children play", "a"], return_tensors="pt")
    single = [processor(text=text)["input_ids"] for text in ("a dog", "two children play", "a")]
    assert outputs["input_ids"].shape[1] == max(map(len, single)) < 24
    for row, mask, ids in zip(outputs["input_ids"], outputs["attention_mask"], single, strict=True):
        assert row[: len(ids)].tolist() == ids
        assert mask.tolist() == [1] * len(ids) + [0] * (len(row) - len(ids))
        assert set(row[len(ids) :].tolist()) <= {processor.tokenizer.pad_token_id}
    assert set(outputs) == {"input_ids", "attention_mask"}  # the pipelines pass all of it on to the model


def test_images_and_texts_together_are_both_alone():
    processor = tiny_processor()
    images, texts = [picture((40, 30)), picture((20, 20))], ["a dog", "a boat on a lake"]
    both = processor(images=images, text=texts, return_tensors="pt")
    assert set(both) == {"pixel_values", "input_ids", "attention_mask"}
    assert torch.equal(both["pixel_values"], processor(images=images, return_tensors="pt")["pixel_values"])
    assert torch.equal(both["input_ids"], processor(text=texts, return_tensors="pt")["input_ids"])


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_truncated_captions_are_counted(return_tensors):
    processor = tiny_processor()
    with pytest.warns(UserWarning, match="^2 of 3 captions were truncated to 24 tokens$") as caught:
        outputs = processor(text=[LONG, "a dog", LONG + LONG], return_tensors=return_tensors)
    assert [len(row) for row in outputs["input_ids"]] == [24] * 3
    assert [w.filename for w in caught] == [__file__]  # points at the caller
    assert outputs["input_ids"][0][-1] == processor.tokenizer.sep_token_id
    assert processor.count_truncated([LONG, "a dog", LONG]) == 2 and processor.count_truncated([]) == 0
    with pytest.warns(UserWarning, match="^1 of 1 captions were truncated to 24 tokens$"):
        processor(text=LONG, return_tensors=return_tensors)


def test_what_is_not_truncated_gives_no_warning():
    processor = tiny_processor()
    words = LONG.split()
    for count in range(1, len(words) + 1):
        text = " ".join(words[:count])
        if len(processor.tokenizer(text, truncation=False)["input_ids"]) == 24:
            break
    else:
        pytest.fail("no text fills the limit exactly")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(text=[text, "a dog"])
        processor(text=[LONG], truncation=False)
        processor(text=[LONG], max_length=200)
    with pytest.warns(UserWarning, match="1 of 2 captions were truncated to 8 tokens"):
        processor(text=["a dog", text], max_length=8)
    with pytest.warns(UserWarning, match="1 of 2 captions were truncated to 8 tokens"):
        processor(text=["a dog", text], text_kwargs={"max_length": 8})


@pytest.mark.parametrize("family", TEXT)
def test_limit_is_what_the_tower_can_take(family):
    tokenizer = tiny_processor().tokenizer
    tokenizer.model_max_length = 1000
    config = text_config(family)
    limit = max_text_length(config, tokenizer)
    assert limit == (1000 if family == "t5" else 24)
    tokenizer.model_max_length = 10
    assert max_text_length(config, tokenizer) == 10
    if family in ("t5", "modernbert"):  # no table that could end
        return
    model = AutoModel.from_config(config).eval()
    model(input_ids=torch.full((1, limit), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 7))


def test_real_roberta_has_a_limit_of_512():
    tokenizer = tiny_processor().tokenizer
    tokenizer.model_max_length = 10**30
    assert max_text_length(AutoConfig.for_model("roberta", max_position_embeddings=514), tokenizer) == 512
    assert max_text_length(AutoConfig.for_model("xlm-roberta", max_position_embeddings=514), tokenizer) == 512
    assert max_text_length(AutoConfig.for_model("deberta-v2"), tokenizer) == 10**30


# --- from the towers, save and reload ---


def test_from_towers_uses_size_and_limit_of_towers(tmp_path):
    vision, text = save_towers(tmp_path)
    processor = MiniClipProcessor.from_towers(vision, text)
    assert processor.tokenizer.model_max_length == 24
    cfg = json.loads((vision / "config.json").read_text())["pretrained_cfg"]
    image = picture((45, 60))
    expected = create_transform(**resolve_data_config(pretrained_cfg=cfg))(image)
    assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"][0], expected)
    other = MiniClipProcessor.from_towers(vision_config(), str(text), image_size=48, max_length=9)
    assert other.tokenizer.model_max_length == 9
    assert other(images=image, return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)
    for wrong in (0, 25):
        with pytest.raises(ValueError, match=rf"max_length must be in 1\.\.24.*not {wrong}"):
            MiniClipProcessor.from_towers(vision, text, max_length=wrong)


def test_lengths_of_earlier_calls_are_dropped(tmp_path):
    vision, text = save_towers(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.padding_side = "left"
    tokenizer(["a dog"], padding="max_length", truncation=True, max_length=5)
    tokenizer.save_pretrained(text)  # as all-MiniLM-L6-v2 was saved
    assert json.loads((text / "tokenizer.json").read_text())["truncation"]["max_length"] == 5
    processor = MiniClipProcessor.from_towers(vision, text)
    with pytest.warns(UserWarning, match="truncated to 24 tokens"):
        assert processor(text=["a dog", LONG], return_tensors="pt")["input_ids"].shape == (2, 24)
    assert processor(text=["a dog", "a boat on a lake"], return_tensors="pt")["attention_mask"][:, 0].all()
    assert len(processor(text="a dog")["input_ids"]) == 4
    with pytest.warns(UserWarning, match="truncated to 6 tokens"):
        processor(text=[LONG], max_length=6, padding="max_length")
    processor.save_pretrained(tmp_path / "saved")
    loaded = MiniClipProcessor.from_pretrained(tmp_path / "saved")
    assert len(loaded(text="a dog")["input_ids"]) == 4
    with pytest.warns(UserWarning, match="truncated to 24 tokens"):
        assert len(loaded(text=LONG)["input_ids"]) == 24


def test_explicit_tokenizer_settings_are_kept(tmp_path):
    tiny_processor().tokenizer.save_pretrained(tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text", max_length=10, padding="max_length")
    processor = MiniClipProcessor(tiny_processor().image_processor, tokenizer)
    for number in range(2):
        assert len(processor(text="a dog")["input_ids"]) == 10
        with pytest.warns(UserWarning, match="truncated to 10 tokens"):
            assert len(processor(text=LONG)["input_ids"]) == 10
        processor.save_pretrained(tmp_path / f"saved{number}")
        processor = MiniClipProcessor.from_pretrained(tmp_path / f"saved{number}")


def test_saving_changes_nothing_and_a_round_trip_neither(tmp_path):
    processor = tiny_processor()
    before = processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert processor.to_dict() == MiniClipProcessor.from_pretrained(tmp_path).to_dict() == before
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_miniclip.MiniClipProcessor"}
    assert "auto_map" not in saved["image_processor"]


def test_limit_of_a_real_tokenizer_is_the_towers(shared):
    weights = shared / "weights"
    processor = MiniClipProcessor.from_towers(weights / "tf_efficientnet_lite0", weights / "all-MiniLM-L6-v2")
    assert processor.tokenizer.model_max_length == 512
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(processor(text="dog " * 300)["input_ids"]) == 302


def test_reload_is_bit_equal_with_the_pil_backend(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "saved")
    saved = shutil.move(tmp_path / "saved", tmp_path / "moved")
    images, texts = [picture((70, 50)), picture((33, 80))], ["a dog", "a boat on a lake"]
    expected = processor(images=images, text=texts, return_tensors="pt")
    for loaded in (MiniClipProcessor.from_pretrained(saved), AutoProcessor.from_pretrained(saved)):
        assert type(loaded) is MiniClipProcessor
        assert loaded.image_processor.backend == "pil"
        assert loaded.tokenizer.model_max_length == 24
        outputs = loaded(images=images, text=texts, return_tensors="pt")
        assert outputs.keys() == expected.keys()
        assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "processor_config.json"):
        assert (tmp_path / "again" / name).read_text() == (saved / name).read_text()
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["backend"] == "tokenizers"


def test_which_backend_a_reload_selects(tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    assert MiniClipProcessor.from_pretrained(tmp_path).image_processor.backend == "pil"
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.backend == "pil"
    for auto in (MiniClipProcessor, AutoProcessor):
        assert auto.from_pretrained(tmp_path, backend="torchvision").image_processor.backend == "torchvision"
    assert AutoImageProcessor.from_pretrained(tmp_path).backend == "torchvision"
    assert AutoImageProcessor.from_pretrained(tmp_path, backend="pil").backend == "pil"


def bpe_tokenizer() -> RobertaTokenizer:
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = (text for row in CAPTIONS for text in row)
    trained.train_from_iterator(texts, vocab_size=300, special_tokens=special, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def unigram_tokenizer() -> T5Tokenizer:
    trained = SentencePieceUnigramTokenizer()
    texts = (text for row in CAPTIONS for text in row)
    special = ["<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(texts, vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    return T5Tokenizer(vocab=[tuple(v) for v in json.loads(trained.to_str())["model"]["vocab"]], extra_ids=0)


@pytest.mark.parametrize("make", [bpe_tokenizer, unigram_tokenizer])
def test_other_kinds_of_tokenizer_reload_too(make, tmp_path):
    tokenizer = make()
    tokenizer.model_max_length = 24
    processor = MiniClipProcessor(image_processor_from_timm(vision_config()), tokenizer)
    texts = ["a dog runs", "two children play with a yellow ball"]
    expected = processor(text=texts, return_tensors="pt")
    processor.save_pretrained(tmp_path)
    loaded = MiniClipProcessor.from_pretrained(tmp_path)
    assert type(loaded.tokenizer) is type(tokenizer)
    assert loaded.tokenizer.decode(expected["input_ids"][0], skip_special_tokens=True).strip() == "a dog runs"
    assert torch.equal(loaded(text=texts, return_tensors="pt")["input_ids"], expected["input_ids"])


def test_processor_uses_nothing_deprecated(tmp_path):
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("error", category)
        processor = MiniClipProcessor.from_towers(*save_towers(tmp_path))
        for mode in ("RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "I;16", "I"):
            processor(images=[Image.new(mode, (40, 30))], text=["a dog"], return_tensors="pt")
        processor.save_pretrained(tmp_path / "saved")
        MiniClipProcessor.from_pretrained(tmp_path / "saved")


def test_rounded_margins_crop_as_torchvision_does() -> None:
    from torchvision import transforms

    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        round_margins=True,
    )  # fmt: skip
    processor = MiniClipProcessor(images, tiny_processor().tokenizer)
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(32, bicubic), transforms.CenterCrop(32), transforms.ToTensor()]
    random = np.random.default_rng(0)
    for height, width in ((32, 35), (32, 37), (61, 40), (45, 45)):  # margins of 1.5, 2.5, 8 and 0 pixels
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = transforms.Compose(steps)(image)
        assert torch.allclose(processor(images=[image], return_tensors="pt")["pixel_values"][0], expected, atol=1e-6)
        assert torch.equal(processor.normalize(torch.from_numpy(processor.crop(image))[None])[0], expected)
