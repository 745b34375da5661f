"""The pixels of drawn pictures."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path) -> np.ndarray:
    """`[H, W, 3]` of a PNG of a size that fits a README."""
    with Image.open(path) as image:
        assert image.format == "PNG" and 300 <= image.width <= 3000 and 150 <= image.height <= 4000, image.size
        return np.asarray(image.convert("RGB"))


def has_color(pixels: np.ndarray, color: tuple[int, int, int], at_least: int = 20) -> bool:
    return int((pixels == color).all(axis=2).sum()) >= at_least
