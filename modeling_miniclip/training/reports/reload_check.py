"""Load the export again at the end of a run, and compare what it embeds with what the run measured."""

import warnings

import torch

from ...errors import ModelError, one_line
from ...inference.encode import encode_images, encode_texts
from ...inference.loading import load_export
from ...modeling_miniclip import MiniClipModel
from ..run import TrainingRun

# Largest distance of two unit vectors that differ by rounding: in float32 (TF32 on GPUs), and in half precision.
TOLERANCE = {"no": 0.01, "bf16": 0.2, "fp16": 0.2}

CHECKPOINTS = "the trained weights are in the checkpoints"


def load_checked_export(run: TrainingRun) -> MiniClipModel:
    """The exported model, loaded from disk on the device of the run.

    Raises:
        ModelError: it cannot be loaded, or it embeds the first validation images or their captions in another way than
            the model that was exported.
    """
    try:
        model, processor = load_export(str(run.export_dir), "export")
    except (OSError, ValueError) as error:
        raise ModelError(f"{run.export_dir} is wrong: {one_line(error)}; {CHECKPOINTS}") from error
    model = model.to(run.accelerator.device)
    images, texts = run.exported.images, run.exported.texts
    if images is None or texts is None:
        return model
    split = run.validation_split.select(run.bad_images.good_rows("validation")[: len(images)])
    with run.accelerator.autocast(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about truncated captions
        found_images = encode_images(model, (row["image"] for row in split), processor, progress=False)
        found_texts = encode_texts(model, [row["captions"][0] for row in split], processor, progress=False)
    tolerance = TOLERANCE[run.accelerator.mixed_precision]
    for what, expected, found in (("images", images, found_images), ("captions", texts, found_texts)):
        distance = torch.linalg.vector_norm(found - expected, dim=1).max().item()
        if not distance <= tolerance:
            raise ModelError(
                f"{run.export_dir} is wrong: loaded again, it embeds validation {what} in another way than the model "
                f"that was trained (distance {distance:.2g}, at most {tolerance} expected); {CHECKPOINTS}"
            )
    return model
