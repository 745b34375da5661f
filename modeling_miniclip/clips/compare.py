"""Compare a model with its converted copy, which another process loads with the library that it was written for."""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import ModelError
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor

TEXTS = ("a dog", "", "two people ride a red bicycle along the beach at sunset", "word " * 200)
# Pictures that lie, stand, and are smaller than the crop; squares where crops are rounded in different ways.
SIZES, SQUARES = ((300, 232), (64, 96), (518, 620)), ((300, 300), (64, 64), (518, 518))
LARGEST_DIFFERENCE = 1e-5  # of the logits, relative to the largest one


def check_copy(model: MiniClipModel, processor: MiniClipProcessor, folder: Path, library: str, squares: bool) -> float:
    """Compare the logits of a model and its copy on a few pictures and texts.

    Args:
        model: the model.
        processor: its processor.
        folder: the copy.
        library: `"transformers"` or `"open_clip"`, which loads the copy in a fresh process.
        squares: whether to take square pictures only, because crops of others are one pixel apart.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        ModelError: the copy does not load, or its logits differ.
    """
    random = np.random.default_rng(0)
    sizes = SQUARES if squares else SIZES
    images = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name)
        (inputs / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
        for i, image in enumerate(images):
            image.save(inputs / f"{i}.png")
        program = Path(__file__).with_name("run_original.py")
        command = [sys.executable, "-P", str(program), library, str(folder), str(inputs)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"not written: {library} cannot load the copy; {reason}")
        theirs = torch.from_numpy(np.load(inputs / "logits.npy"))
    prepared = [processor.normalize(torch.from_numpy(processor.crop(image))[None]) for image in images]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a text is too long on purpose
        tokens = processor(text=list(TEXTS), return_tensors="pt")
    with torch.no_grad():
        ours = model(pixel_values=torch.cat(prepared), **tokens).logits_per_image
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        raise ModelError(
            f"not written: {library} computes other logits with the copy, {difference:.1e} apart; report it with the "
            "model's config.json"
        )
    return difference
