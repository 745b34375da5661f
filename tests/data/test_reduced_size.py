"""JPEGs that are shrunk anyway are decoded at reduced size: how much smaller, and that the picture stays the same."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image

from modeling_miniclip import MiniClipModel, UsageError, encode_images, update_index
from modeling_miniclip.data.loading.augmentation import DEFAULT_AUGMENTATION, build_augmentation
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.loading.reduced_size import reduction_before, reduction_before_crop
from modeling_miniclip.data.picture_formats import decode_picture, decode_row
from modeling_miniclip.search.index import ImageIndex
from tests.helpers.towers import PIXELS, tiny_processor

CROP = {"name": "RandomResizedCrop", "scale": [0.6, 1.0], "ratio": [0.8, 1.25]}
FLIP = {"name": "HorizontalFlip", "p": 0.5}


def photograph(width: int, height: int, orientation: int = 1, grain: int = 40, **options: Any) -> bytes:
    """A JPEG of soft noise, without details finer than `grain` pixels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (max(2, height // grain), max(2, width // grain), 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
        content, **{"format": "JPEG", "quality": 92, "exif": exif} | options
    )
    return content.getvalue()


def split_of(*contents: bytes) -> Dataset:
    features = Features({"image": datasets.Image(), "image_id": Value("string"), "captions": [Value("string")]})
    columns = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "image_id": [f"{i}.jpg" for i in range(len(contents))],
        "captions": [["a photograph"]] * len(contents),
    }
    return Dataset.from_dict(columns, features)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


# --- how much smaller -----------------------------------------------------------------------------------------------


def test_reduction_worked_by_hand() -> None:
    """The smallest crop has 0.6 of the pixels, and a ratio of 0.8: its shorter side is sqrt(0.48 w h)."""
    reduction = reduction_before(build_augmentation([FLIP, CROP], (224, 224)))
    assert reduction is not None
    assert reduction(4000, 3000) == pytest.approx(2400 / 224)  # sqrt(0.48 * 12e6)
    assert reduction(500, 375) == pytest.approx(300 / 224)
    assert reduction(4000, 300) == 300 / 224  # no crop is higher than the image
    assert reduction(3000, 4000) == reduction(4000, 3000)  # EXIF may turn it


def test_reduction_leaves_enough_of_a_long_image() -> None:
    """No crop with a ratio of 1.5 to 2 fits into 300 x 4000 pixels: the whole width is taken, and 200 pixels of it."""
    reduction = reduction_before(build_augmentation([CROP | {"ratio": [1.5, 2.0]}], (50, 50)))
    assert reduction is not None and reduction(300, 4000) == pytest.approx(200 / 50)


@pytest.mark.parametrize(
    "transforms",
    [
        [],
        [FLIP],
        [{"name": "RandomCrop", "height": 32, "width": 32}],
        [{"name": "GaussianBlur"}, CROP],
        [CROP | {"p": 0.9}],
    ],
)
def test_other_augmentations_see_the_whole_image(transforms: list[dict[str, Any]]) -> None:
    assert reduction_before(build_augmentation(transforms, (PIXELS, PIXELS))) is None


def test_reduction_before_a_crop_follows_the_processor() -> None:
    processor = tiny_processor()
    processor.image_processor.size = {"shortest_edge": 40}
    reduction = reduction_before_crop(processor)
    assert reduction is not None and (reduction(400, 160), reduction(160, 400)) == (4, 4)
    processor.image_processor.size = {"height": 40, "width": 80}
    reduction = reduction_before_crop(processor)
    assert reduction is not None and reduction(400, 160) == 2
    processor.image_processor.do_resize = False
    assert reduction_before_crop(processor) is None


SIZES = {0: (401, 303), 1.99: (401, 303), 2: (201, 152), 3.9: (201, 152), 4: (101, 76), 8: (51, 38), 100: (51, 38)}


@pytest.mark.parametrize("times", SIZES)
def test_jpegs_are_decoded_at_a_power_of_two(times: float) -> None:
    assert decode_picture(photograph(401, 303), reduction=lambda width, height: times).size == SIZES[times]
    assert decode_picture(photograph(401, 303, format="PNG"), reduction=lambda width, height: times).size == (401, 303)


def test_image_that_is_not_prepared_is_not_reduced() -> None:
    opened = decode_picture(photograph(400, 300), lambda image: False, lambda width, height: 8)
    assert opened.size == (400, 300)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"orientation": 6}])
def test_reduced_picture_is_the_shrunk_one(options: dict[str, Any]) -> None:
    row = {"bytes": photograph(800, 600, **options), "path": None}
    whole = decode_row(row)
    for times in (2, 4, 8):
        small = decode_row(row, reduction=lambda width, height: float(times))  # noqa: B023
        assert small.size == tuple(side // times for side in whole.size)
        assert difference(np.array(small), np.array(whole.reduce(times))) < 2


# --- who uses it ----------------------------------------------------------------------------------------------------


def test_augmented_images_are_those_of_full_decoding() -> None:
    rows = split_of(photograph(800, 600, grain=160), photograph(60, 50), photograph(600, 900, 6, grain=160))
    pixels, found = [], []
    for full_size in (True, False):
        augmentation = build_augmentation(DEFAULT_AUGMENTATION, (PIXELS, PIXELS))
        dataset = CaptionRows(rows, tiny_processor(), augmentation, full_size=full_size)
        pixels.append([dataset[epoch, i]["pixels"] for epoch in range(4) for i in range(3)])
    for number, (whole, reduced) in enumerate(zip(*pixels, strict=True)):
        if number % 3 == 1:  # too small to be reduced
            assert np.array_equal(whole, reduced)
        else:
            found.append(difference(whole, reduced))
    assert min(found) > 0 and np.median(found) < 3  # a crop that only just fits may be drawn again


def test_images_without_augmentation_are_exact() -> None:
    assert CaptionRows(split_of(photograph(800, 600)), tiny_processor()).reduction is None


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "large.jpg").write_bytes(photograph(1600, 1200, 6))
    (tmp_path / "photos" / "small.jpg").write_bytes(photograph(50, 40))
    return tmp_path / "photos"


def test_embeddings_are_reduced_on_request_only(photos: Path, tiny_export: Path, tmp_path: Path) -> None:
    model = MiniClipModel.from_pretrained(tiny_export)
    files = sorted(photos.iterdir())
    whole, reduced = (encode_images(model, files, progress=False, reduced=value) for value in (False, True))
    assert torch.allclose(whole[1], reduced[1], atol=1e-6) and not torch.allclose(whole[0], reduced[0], atol=1e-6)
    assert float((whole[0] * reduced[0]).sum()) > 0.9
    update_index(tmp_path / "index", [photos], tiny_export, progress=False, reduced=True)
    index = ImageIndex.open(tmp_path / "index")
    assert index.manifest.reduced
    assert np.allclose(index.embeddings[:], reduced.numpy(), atol=1e-5)
    assert (index.entry(0)["width"], index.entry(0)["height"]) == (1200, 1600)
    assert update_index(tmp_path / "index", progress=False).encoded == 0  # it stays as it is
    with pytest.raises(UsageError, match="JPEGs at reduced size; rebuild the index: .* --overwrite$"):
        update_index(tmp_path / "index", progress=False, reduced=False)
    update_index(tmp_path / "index", [photos], overwrite=True, progress=False)
    assert np.allclose(ImageIndex.open(tmp_path / "index").embeddings[:], whole.numpy(), atol=1e-5)
