"""Pictures of an index: as large as asked for, upright, without metadata, wherever the image is kept."""

import tarfile

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from modeling_miniclip import ImageIndex, update_index
from modeling_miniclip.search.pictures import picture_of
from tests.helpers.indexes import write_model, write_picture


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """Of a large photograph that its camera held upright, of a file that is gone since, and of one in an archive."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "photos").mkdir()
    blobs = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    photo = Image.fromarray(blobs).resize((1800, 1200), Image.Resampling.BICUBIC)
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "a camera"
    photo.save(folder / "photos" / "a.jpg", exif=exif, quality=95)
    gone = write_picture(folder / "photos" / "b.png", 1)
    with tarfile.open(folder / "c.tar", "w") as archive:
        archive.add(write_picture(folder / "c.png", 2), "c.png")
    sources = [folder / "photos", folder / "c.tar"]
    update_index(folder / "index", sources, write_model(folder / "model"), progress=False)
    gone.unlink()
    (folder / "c.tar").unlink()
    return ImageIndex.open(folder / "index")


@pytest.mark.parametrize(("pixels", "size"), [(150, (100, 150)), (1000, (667, 1000)), (5000, (1200, 1800))])
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
