"""Use of a trained model: embed images and texts once, then find what matches a query."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .errors import DataError
from .modeling_miniclip import MiniClipModel
from .processing_miniclip import MiniClipProcessor, to_rgb


def open_image(image: Any) -> Image.Image:
    """RGB image of a path, a PIL image, an array (`[H, W, 3]` or `[H, W]` uint8) or a row with the key `image`.

    Raises:
        DataError: there is no such file, or it is no image.
    """
    if isinstance(image, dict):
        image = image["image"]
    if isinstance(image, str | os.PathLike):
        try:
            with Image.open(image) as opened:
                return to_rgb(opened)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{os.fspath(image)}: not an image that can be read: {error}") from error
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image.numpy() if isinstance(image, Tensor) else image)
    return to_rgb(image)


def processor_of(model: MiniClipModel, processor: MiniClipProcessor | None = None) -> MiniClipProcessor:
    """The given processor, or the one saved where the model was loaded from (folder, or repository and revision).

    Raises:
        ValueError: the model was not loaded from a place that holds a processor.
    """
    if processor is not None:
        return processor
    source = model.config.name_or_path
    try:
        return MiniClipProcessor.from_pretrained(
            source, revision=getattr(model.config, "_commit_hash", None) or "main"
        )
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"no processor found with the model ({source or 'it was not loaded by from_pretrained'}): pass processor="
        ) from error


def encode_images(
    model: MiniClipModel,
    images: Iterable[Any],
    processor: MiniClipProcessor | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """Unit-norm embeddings of images.

    Args:
        model: on any device; it is not changed.
        images: paths, PIL images, arrays or rows with the key `image`; read as they are needed.
        processor: by default the one saved with the model.
        batch_size: images a forward pass.
        progress: show a progress bar.

    Returns:
        `[len(images), projection_dim]` float32 on the CPU.

    Raises:
        DataError: an image cannot be read.
        ValueError: no image at all, or no processor.
    """
    processor = processor_of(model, processor)

    def embed(batch: list[Any]) -> Tensor:
        inputs = processor(images=[open_image(image) for image in batch], return_tensors="pt")
        return model(pixel_values=inputs["pixel_values"].to(model.device)).image_embeds

    return _encode(model, images, embed, batch_size, "images", progress)


def encode_texts(
    model: MiniClipModel,
    texts: Iterable[str],
    processor: MiniClipProcessor | None = None,
    batch_size: int = 128,
    progress: bool = True,
) -> Tensor:
    """Unit-norm embeddings of texts; arguments and result as in [`encode_images`]."""
    processor = processor_of(model, processor)

    def embed(batch: list[str]) -> Tensor:
        return model(**processor(text=batch, return_tensors="pt").to(model.device)).text_embeds

    return _encode(model, texts, embed, batch_size, "texts", progress)


def _encode(
    model: MiniClipModel, items: Iterable[Any], embed: Any, batch_size: int, what: str, progress: bool
) -> Tensor:
    was_training = model.training
    model.eval()
    parts = []
    total = len(items) if isinstance(items, Sequence) else None
    try:
        with (
            torch.inference_mode(),
            tqdm(total=total, desc=f"encode {what}", unit=what[:-1], disable=not progress) as bar,
        ):
            for batch in _batches(items, batch_size):
                parts.append(embed(batch).float().cpu())
                bar.update(len(batch))
    finally:
        model.train(was_training)
    if not parts:
        raise ValueError(f"no {what} to encode")
    return torch.cat(parts).clone()  # outside inference mode, so that the result can be used in training


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@dataclass(frozen=True)
class Match:
    """An image found for a query: its name, its cosine similarity, and its row in the embeddings."""

    name: str
    score: float
    index: int


def find_matches(
    model: MiniClipModel,
    image_embeddings: Tensor,
    query: Any,
    image_filenames: Sequence[str | os.PathLike],
    n: int = 9,
    processor: MiniClipProcessor | None = None,
    draw: str | os.PathLike | None = None,
) -> list[Match]:
    """The images that match a query best, best first.

    Args:
        model: the model that made the embeddings.
        image_embeddings: `[images, projection_dim]` of [`encode_images`].
        query: a text, or an image: `PIL.Image`, array or `Path`.
        image_filenames: one name an embedding; a name that stands several times is returned once, with its best score.
        n: how many.
        processor: by default the one saved with the model.
        draw: file name of a picture (PNG) of the found images to be written; the names must then be readable paths.

    Returns:
        At most `n` [`Match`]es, one a name.

    Raises:
        ValueError: as many names as embeddings are needed; no processor.

    Example:
        >>> find_matches(model, embeddings, "two dogs playing in the snow", filenames, n=3)  # doctest: +SKIP
    """
    if len(image_filenames) != len(image_embeddings):
        raise ValueError(f"{len(image_embeddings)} image embeddings but {len(image_filenames)} image_filenames")
    if isinstance(query, str):
        embedding = encode_texts(model, [query], processor, progress=False)
    else:
        embedding = encode_images(model, [query], processor, progress=False)
    scores = (torch.nn.functional.normalize(image_embeddings.float(), dim=-1) @ embedding.T).squeeze(1)
    matches: dict[str, Match] = {}
    for index in scores.argsort(descending=True, stable=True).tolist():
        name = os.fspath(image_filenames[index])
        matches.setdefault(name, Match(name, scores[index].item(), index))
        if len(matches) == n:
            break
    found = list(matches.values())
    if draw is not None:
        from .plots import draw_matches

        title = query if isinstance(query, str) else "images like the query"
        draw_matches(Path(draw), [(title, [(open_image(m.name), f"{m.score:.2f}", False) for m in found])])
    return found
