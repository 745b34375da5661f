"""Collate the rows of a batch into tensors, and turn these into the inputs of the model."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import default_collate

from ...processing_miniclip import MiniClipProcessor
from ...utils.performance import image_layout
from .pair_keys import NO_KEY, keys_tensor
from .pixel_memory import PixelMemory

BY_VALUE = 2**18  # size in bytes up to which a tensor is copied to the trainer instead of shared with it


class Batch(dict[str, Any]):
    """A batch whose small tensors are copied from a loader process to the trainer.

    PyTorch shares each tensor through shared memory and its own connection, which takes longer than copying some
    kilobytes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        small = {
            name: value.numpy()
            for name, value in self.items()
            if isinstance(value, Tensor) and value.nbytes <= BY_VALUE
        }
        return _restore_batch, (small, {name: value for name, value in self.items() if name not in small})


def _restore_batch(small: dict[str, np.ndarray], others: dict[str, Any]) -> Batch:
    return Batch({name: torch.from_numpy(value) for name, value in small.items()} | others)


class Collator:
    """Turns rows of [`CaptionRows`] into the tensors of a step.

    Args:
        tokenizer: tokenizer of the processor.
        memory: memory that the pixels are left in for another process.

    Returns from a call:
        `pixel_values` `[B, 3, H, W]` uint8 (normalised on the device by `MiniClipProcessor.normalize`) or
        `vision_pooler_output` `[B, width]`; `input_ids`, `attention_mask` `[N, L]`, padded to the longest text of the
        batch, or `text_pooler_output` `[N, width]`; `image_id` `[B]`, the indices of the rows; `text_image_id` `[N]`.
        With hard negatives, the texts of an image end with its wrong captions, and `is_negative` `[N]` marks these.
        With keys, `image_keys` `[B, K]` and `text_keys` `[N, L]`, of which a pair shares at least one.
        With those of a teacher, `taught_image` `[B, width]` and `taught_text` `[N, width]`, zero for wrong captions.
        If images cannot be decoded, also `undecodable`: a list of their indices and the reasons; they are in none of
        the tensors.
    """

    def __init__(self, tokenizer: Any, memory: PixelMemory | None = None):
        self.tokenizer, self.memory = tokenizer, memory

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        undecodable = [(row["image_id"], row["undecodable"]) for row in rows if "undecodable" in row]
        rows = [row for row in rows if "undecodable" not in row]
        batch: dict[str, Any] = {"image_id": torch.tensor([row["image_id"] for row in rows])}
        texts = "text_features" if "text_features" in rows[0] else "captions"
        if "negatives" in rows[0]:
            own = [len(row["captions"]) for row in rows]
            rows = [row | {"captions": row["captions"] + row["negatives"]} for row in rows]
            places = [i >= count for row, count in zip(rows, own, strict=True) for i in range(len(row["captions"]))]
            batch["is_negative"] = torch.tensor(places)
        counts = torch.tensor([len(row[texts]) for row in rows])
        batch["text_image_id"] = batch["image_id"].repeat_interleave(counts)
        if "keys" in rows[0]:
            batch["image_keys"] = keys_tensor([row["keys"].image for row in rows])
            batch["text_keys"] = keys_tensor([keys for row in rows for keys in row["keys"].texts])
        if "taught_image" in rows[0]:
            batch["taught_image"] = torch.stack([row["taught_image"] for row in rows])
            taught = ((row["taught_texts"], len(row[texts])) for row in rows)
            batch["taught_text"] = torch.cat([pad(found, (0, 0, 0, count - len(found))) for found, count in taught])
        if "vision_features" in rows[0]:
            batch["vision_pooler_output"] = torch.stack([row["vision_features"] for row in rows])
        else:
            images = [row["pixels"] for row in rows]
            place = None if self.memory is None else self.memory.write(images)  # received as a tensor
            batch["pixel_values"] = stack_pixels(images) if place is None else place
        if texts == "text_features":
            batch["text_pooler_output"] = torch.cat([row["text_features"] for row in rows])
        else:
            captions = [caption for row in rows for caption in row["captions"]]
            if captions:
                batch |= self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        # An undecodable filler is reported by the process that has its row.
        real = [(image_id, reason) for image_id, reason in undecodable if image_id >= 0]
        return Batch(batch | ({"undecodable": real} if real else {}))


def join_pieces(pieces: Iterable[Batch], images: int, tokenizer: Any) -> Batch:
    """One batch from its pieces, whose pixels are copied as they come, so that few of them are in memory twice.

    Args:
        pieces: collated pieces of the batch.
        images: number of its images; pieces with images that cannot be decoded may have more or fewer.
        tokenizer: tokenizer that padded the texts of each piece.
    """
    parts: dict[str, list[Any]] = {}
    pixels, filled = torch.empty(0), 0
    for piece in pieces:
        for name, value in piece.items():
            if name != "pixel_values":
                parts.setdefault(name, []).append(value)
                continue
            if filled == 0 or filled + len(value) > len(pixels):
                pixels = _with_room(pixels[:filled], value, max(images, filled + len(value)))
            pixels[filled : filled + len(value)] = value
            filled += len(value)
    undecodable = [found for each in parts.pop("undecodable", []) for found in each]
    batch = {name: torch.cat(_padded(name, values, tokenizer)) for name, values in parts.items()}
    if filled:
        batch["pixel_values"] = pixels[:filled]
    return Batch(batch | ({"undecodable": undecodable} if undecodable else {}))


def _with_room(pixels: Tensor, like: Tensor, images: int) -> Tensor:
    """A copy of some images `[b, 3, H, W]` with room for more; the memory layout is that of [`stack_pixels`]."""
    _, channels, height, width = like.shape
    larger = torch.empty((images, height, width, channels), dtype=like.dtype).permute(0, 3, 1, 2)
    larger[: len(pixels)] = pixels if len(pixels) else larger[:0]
    return larger


def _padded(name: str, values: list[Tensor], tokenizer: Any) -> list[Tensor]:
    """Token ids, masks and keys padded to the longest; other tensors as they are."""
    if name not in (*tokenizer.model_input_names, "image_keys", "text_keys"):
        return values
    longest = max(value.shape[1] for value in values)
    fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id,
             "image_keys": NO_KEY, "text_keys": NO_KEY}  # fmt: skip
    fill, left = fills.get(name, 0), tokenizer.padding_side == "left"
    return [pad(value, (missing, 0) if left else (0, missing), value=fill)
            for value in values for missing in [longest - value.shape[1]]]  # fmt: skip


def stack_pixels(images: list[np.ndarray]) -> Tensor:
    """Stack images `[3, H, W]` to `[B, 3, H, W]` with the memory layout `[B, H, W, 3]`, that of Pillow and cuDNN.

    In a loader process the pixels go straight into memory that is shared with the trainer.
    """
    return default_collate([image.transpose(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def model_inputs(batch: dict[str, Tensor], processor: MiniClipProcessor, device: torch.device) -> dict[str, Tensor]:
    """Keyword arguments of the model for a collated batch: on the device, pixels normalised, ids left out."""
    names = ("pixel_values", "input_ids", "attention_mask", "vision_pooler_output", "text_pooler_output")
    # On mps, such a copy may read its source when that is gone (https://github.com/pytorch/pytorch/issues/189690).
    at_once = device.type != "mps"
    inputs = {name: batch[name].to(device, non_blocking=at_once) for name in names if name in batch}
    if "pixel_values" in inputs:
        pixels = processor.normalize(inputs["pixel_values"])
        inputs["pixel_values"] = pixels.contiguous(memory_format=image_layout(device))
    return inputs
