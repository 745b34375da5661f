"""`picture_of`: requested size, upright, no metadata, from a file or from the index."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from modeling_miniclip import ImageIndex, update_index
from modeling_miniclip.search.page.pictures import picture_of
from tests.helpers.indexes import write_picture


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_export: Path) -> ImageIndex:
    """Index of a large photograph turned by EXIF data, a file that was deleted later, and an image in an archive."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "photos").mkdir()
    blobs = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    photo = Image.fromarray(blobs).resize((900, 600), Image.Resampling.BICUBIC)
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "a camera"
    photo.save(folder / "photos" / "a.jpg", exif=exif, quality=95)
    gone = write_picture(folder / "photos" / "b.png", 1)
    with tarfile.open(folder / "c.tar", "w") as archive:
        archive.add(write_picture(folder / "c.png", 2), "c.png")
    sources = [folder / "photos", folder / "c.tar"]
    update_index(folder / "index", sources, tiny_export, progress=False)
    gone.unlink()
    (folder / "c.tar").unlink()
    return ImageIndex.open(folder / "index")


@pytest.mark.parametrize(("pixels", "size"), [(75, (50, 75)), (500, (333, 500)), (5000, (600, 900))])
def test_photograph_is_upright_and_has_requested_size(index: ImageIndex, pixels: int, size: tuple[int, int]) -> None:
    picture = picture_of(index, 0, pixels)
    assert picture is not None and (picture.mode, picture.size) == ("RGB", size)
    assert not picture.info and not picture.getexif()
    whole = ImageOps.exif_transpose(Image.open(index.entry(0)["path"])).resize(size, Image.Resampling.BOX)
    assert np.abs(np.asarray(picture, float) - np.asarray(whole, float)).mean() < 3


def test_archive_image_is_shown_without_the_archive(index: ImageIndex) -> None:
    assert index.entry(2)["path"] is None
    picture = picture_of(index, 2, 20)
    assert picture is not None and max(picture.size) == 20


def test_missing_file_gives_no_picture(index: ImageIndex) -> None:
    assert picture_of(index, 1, 20) is None
