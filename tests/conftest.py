"""Fixtures: the shared real data where it is there, small captioned pictures everywhere."""

import csv
import os
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network; those with a Hub of their own say so
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in parallel already
# Where weights lie in memory, mapped from a file or not, must not decide on the last bits of a product of matrices.
os.environ.setdefault("MKL_CBWR", "AUTO")

import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from tests.helpers.runs import shared_folder  # noqa: E402
from tests.helpers.towers import CAPTIONS  # noqa: E402


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights: `MINICLIP_SHARED`, else `../shared` beside the checkout."""
    folder = shared_folder()
    if not (folder / "flickr8k" / "captions.csv").is_file():
        pytest.skip(f"no shared data at {folder}: set MINICLIP_SHARED")
    return folder


@pytest.fixture
def captioned_folder(tmp_path: Path) -> Path:
    """`captions.csv` with `id,image,caption` and `Images/` with four pictures of one colour each."""
    folder = tmp_path / "captioned"
    (folder / "Images").mkdir(parents=True)
    colours = ["red", "yellow", "gray", "blue"]
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "caption"])
        number = 0
        for i, (captions, colour) in enumerate(zip(CAPTIONS, colours, strict=True)):
            Image.new("RGB", (40 + 4 * i, 36), colour).save(folder / "Images" / f"{i}.png")
            for caption in captions:
                writer.writerow([number, f"{i}.png", caption])
                number += 1
    return folder
