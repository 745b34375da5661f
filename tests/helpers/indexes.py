"""Tiny exports and folders of pictures for the tests of search."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modeling_miniclip import export
from tests.helpers.towers import tiny_model, tiny_processor


def write_model(folder: Path, seed: int = 0) -> Path:
    """Export a tiny model with random weights."""
    torch.manual_seed(seed)
    return export(tiny_model(), tiny_processor(), folder)


def write_picture(path: Path, seed: int) -> Path:
    """Write a picture of random noise, as PNG or JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 44, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_pictures(folder: Path, names: str) -> list[Path]:
    """Write pictures of random noise with the given names, separated by spaces."""
    return [write_picture(folder / name, seed) for seed, name in enumerate(names.split())]
