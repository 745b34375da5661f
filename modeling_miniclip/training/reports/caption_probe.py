"""Do captions belong to their images? A permutation test that does not depend on how well a model learns.

If captions say something about their images, images with similar captions look more alike than others. That relation
is compared with the one that is left when images exchange their captions at random (Mantel's test, with similarities
centred as in HSIC, Gretton et al. 2005). It needs far fewer images than a model that learns to match them. An image is
described by its tower as the run finds it and by 8 x 8 pixels, a caption by its tower and by its words; one related
pair of descriptions is enough.
"""

import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ...data.loading.collation import stack_pixels
from ...data.loading.dataset import CaptionRows
from ...data.tables.image_places import image_parts
from ...errors import DataError
from ...modeling_miniclip import MiniClipModel
from ...processing_miniclip import MiniClipProcessor
from ..towers.feature_cache import (
    KeptValue,
    digest_of_tokenizer,
    digest_of_weights,
    image_tower_settings,
    text_tower_settings,
)

FIRST, MOST = 64, 500  # images to look at: enough for most sets, and for those that the first do not settle
PERMUTATIONS = 200
RELATED = 4.5  # standard deviations above shuffled captions that are no accident
# With fewer images, captions that belong to theirs may look like shuffled ones. On photographs, the weakest of 15
# samples of 50 had 11 standard deviations with pretrained towers, the weakest of 15 of 400 had 13 with random ones.
ENOUGH_PRETRAINED, ENOUGH, FEWEST = 50, 400, 16
SPREAD = 0.02  # standard deviation of similarities below which a description distinguishes nothing
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # Chinese and Japanese have no spaces between words
BUCKETS = 1024  # of hashed words
SIDE = 8  # pixels
BLOCK = 32  # images per forward pass
FORMAT = 1  # part of the name of kept evidence: increase it when it is found in another way


class CaptionEvidence(NamedTuple):
    """What [`probe_captions`] found.

    Args:
        z: standard deviations of the relation above that of shuffled captions.
        images: number of images that it looked at.
        enough: whether captions that belong to these images would have shown it.
    """

    z: float = 0.0
    images: int = 0
    enough: bool = False

    @property
    def related(self) -> bool:
        """Whether the captions say something about their images."""
        return self.z > RELATED

    def warning(self) -> str | None:
        """The warning about unrelated captions; None if they are related, or if that is unknown."""
        if self.related or not self.enough:
            return None
        return (
            f"{self.images} images fit their own captions no better than shuffled ones (z = {self.z:.1f}): likely "
            "captions are unrelated to their images; look at some rows (a shifted column, a sorted list of files)"
        )


def probe_captions(
    splits: DatasetDict,
    model: MiniClipModel,
    processor: MiniClipProcessor,
    device: torch.device,
    is_pretrained: bool,
    cache_dir: Path | None = None,
) -> CaptionEvidence:
    """Look at a random sample of images with their captions.

    Args:
        splits: rows `{image, image_id, captions}`; those of `train` and `validation` are looked at.
        model: model on its device, as the run starts with it.
        processor: preprocessing of images and texts.
        device: device of the model.
        is_pretrained: whether the towers know something.
        cache_dir: folder where the result is kept, so that a run with the same images, captions and towers opens none;
            None keeps nothing.
    """
    parts = [splits[name].select_columns(["image", "image_id", "captions"]) for name in ("train", "validation")]
    total = sum(map(len, parts))
    if total < ENOUGH_PRETRAINED:  # too few for any verdict
        return CaptionEvidence(images=total)
    places = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MOST].tolist()
    sample, enough = _select(parts, places), ENOUGH_PRETRAINED if is_pretrained else ENOUGH
    kept = None
    if cache_dir is not None:
        kept = KeptValue(cache_dir, "evidence", _about_evidence(sample, total, model, processor, enough))
        with suppress(TypeError):  # a damaged file
            return CaptionEvidence(**kept.read())
    evidence, is_whole = _look(sample, total, model, processor, device, enough)
    if kept is not None and is_whole:
        kept.write(evidence._asdict())
    return evidence


def _about_evidence(
    sample: Dataset, total: int, model: MiniClipModel, processor: MiniClipProcessor, enough: int
) -> dict[str, Any]:
    """Everything that the evidence depends on; images in files are not opened."""
    return {
        "format": FORMAT,
        "limits": [FIRST, MOST, PERMUTATIONS, enough, total],
        "images": [part for _, part in image_parts(sample)],
        "captions": list(sample.select_columns(["captions"])["captions"]),
        "weights": [digest_of_weights(tower) for tower in (model.vision_model, model.text_model)],
        "vision": image_tower_settings(model),
        "text": text_tower_settings(model),
        "preprocessing": processor.image_processor.to_dict(),
        "tokenizer": digest_of_tokenizer(processor.tokenizer),
    }


def _look(
    sample: Dataset, total: int, model: MiniClipModel, processor: MiniClipProcessor, device: torch.device, enough: int
) -> tuple[CaptionEvidence, bool]:
    """The evidence of a sample of `total` images, and whether each image could be decoded."""
    evidence, is_whole = CaptionEvidence(images=total), False
    for count in (FIRST, MOST):
        rows = CaptionRows(sample.select(range(min(count, len(sample)))), processor)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling takes longer than a few batches
            try:
                images, captions = _describe_images(rows, model, processor, device)
            except DataError:  # the files cannot be read: training will say so, if it needs them
                return evidence, False
            texts = [describe_words(captions)]
            if count == MOST or len(rows) == total:
                texts.append(_describe_texts(captions, model, processor, device))
        z = relation(images, texts)
        evidence = CaptionEvidence(z or 0.0, len(captions), z is not None and len(captions) >= enough)
        is_whole = len(captions) == len(rows)
        if evidence.related or len(rows) == total:
            break
    return evidence, is_whole


def _select(parts: list[Dataset], places: list[int]) -> Dataset:
    """Rows of several tables, numbered one table after the other. (All rows together would need an index of each.)"""
    first, second = parts
    chosen = [first.select([i for i in places if i < len(first)]),
              second.select([i - len(first) for i in places if i >= len(first)])]  # fmt: skip
    order = sorted(range(len(places)), key=lambda k: places[k] >= len(first))  # of the places in `chosen`
    return concatenate_datasets(chosen).select(np.argsort(order))


def relation(images: Sequence[Tensor], texts: Sequence[Tensor]) -> float | None:
    """Strength of the relation between images and texts, in standard deviations above that of shuffled texts.

    Args:
        images: descriptions `[n, width]` of the images, each of another kind.
        texts: descriptions `[n, width]` of their texts, each of another kind.

    Returns:
        The strength in the most related pair of descriptions; None if no pair can show any.
    """
    n = len(images[0])
    if n < FEWEST:
        return None
    sides = [[_similarities(x) for x in side] for side in (images, texts)]
    one, other = ([x for x in side if x.std() > SPREAD] for side in sides)
    if not one or not other:
        return None
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(PERMUTATIONS))]
    whole = torch.stack(one).flatten(1)  # [kinds, n * n]
    strengths = whole.new_empty(len(orders), len(other), len(one))
    for p, row in zip(orders, strengths, strict=True):  # in place: a list of small tensors would fragment the memory
        for x, cell in zip(other, row, strict=True):
            cell.copy_(whole @ x[p][:, p].flatten())
    true, shuffled = strengths[0], strengths[1:]
    return float(((true - shuffled.mean(dim=0)) / shuffled.std(dim=0).clamp(min=1e-9)).max())


def _similarities(rows: Tensor) -> Tensor:
    """`[n, n]` cosines between centred `[n, width]` rows, centred again; 0 on the diagonal, which shuffling keeps."""
    unit = normalize(rows.double() - rows.double().mean(dim=0), dim=-1)
    similar = unit @ unit.t()
    similar = similar - similar.mean(dim=0) - similar.mean(dim=1, keepdim=True) + similar.mean()
    return similar.fill_diagonal_(0)


def describe_words(captions: Sequence[Sequence[str]]) -> Tensor:
    """`[n, BUCKETS]`, the words of each image's captions; rare words count more."""
    counts = torch.zeros(len(captions), BUCKETS, dtype=torch.double)
    for row, texts in zip(counts, captions, strict=True):
        for word in WORD.findall(" ".join(texts).lower()):
            row[zlib.crc32(word.encode("utf-8", "surrogatepass")) % BUCKETS] += 1
    images_with = (counts > 0).sum(dim=0)
    return counts.log1p() * ((len(captions) + 1) / (images_with + 1)).log()


def _describe_images(
    rows: CaptionRows, model: MiniClipModel, processor: MiniClipProcessor, device: torch.device
) -> tuple[list[Tensor], list[list[str]]]:
    """`[n, width]` features and `[n, 192]` pixels of the images that can be decoded, and their captions."""
    features = torch.empty(len(rows), model.vision_width)
    pixels, captions = torch.empty(len(rows), 3 * SIDE * SIDE), list[list[str]]()
    for start in range(0, len(rows), BLOCK):
        block = rows.__getitems__([(0, i) for i in range(start, min(start + BLOCK, len(rows)))])
        block = [row for row in block if "undecodable" not in row and row["image_id"] >= 0]
        if block:
            values = stack_pixels([row["pixels"] for row in block])  # [b, 3, H, W] uint8
            here = slice(len(captions), len(captions) + len(block))
            features[here] = model.pool_images(processor.normalize(values.to(device))).pooler_output.float().cpu()
            pixels[here] = adaptive_avg_pool2d(values.float(), SIDE).flatten(1)
            captions += [row["captions"] for row in block]
    return [features[: len(captions)], pixels[: len(captions)]], captions


def _describe_texts(
    captions: Sequence[Sequence[str]], model: MiniClipModel, processor: MiniClipProcessor, device: torch.device
) -> Tensor:
    """`[n, width]`, mean features of each image's captions."""
    means = torch.empty(len(captions), model.text_width)
    for start in range(0, len(captions), BLOCK):
        block = captions[start : start + BLOCK]
        texts = [text for row in block for text in row]
        ids = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        found = model.pool_texts(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output
        for i, part in enumerate(found.float().cpu().split([len(row) for row in block]), start):
            means[i] = part.mean(dim=0)
    return means
