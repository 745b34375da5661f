"""`find_matches`: search embeddings in memory, without an index on disk."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..inference.encode import encode_images, encode_texts, open_image
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..utils.arrays import as_tensor
from .exact import Match
from .unrelated import UnrelatedCaptions, cut_matches, cutoff_of
from .unrelated_texts import TEXTS


def find_matches(
    model: MiniClipModel,
    image_embeddings: Any,
    query: Any,
    image_filenames: Sequence[str | os.PathLike],
    n: int = 9,
    processor: MiniClipProcessor | None = None,
    draw: str | os.PathLike | None = None,
    truncate_dim: int | None = None,
    cutoff: float | str | None = None,
) -> list[Match]:
    """Find the images that match a query best.

    Args:
        model: the model that made the embeddings.
        image_embeddings: `[images, dim]` tensor or array of [`encode_images`], cut to `truncate_dim` or whole.
        query: a text, or an image: `PIL.Image`, array or `Path`.
        image_filenames: one name per embedding; a repeated name is returned once, with its best score.
        n: number of images to find.
        processor: processor of the model; by default the one saved with it.
        draw: PNG file to which the found images are drawn, if there are any; the names must then be paths of images.
        truncate_dim: number of dimensions to compare, the first ones, as in [`encode_images`]; by default all.
        cutoff: for a text: leave out images if unrelated captions score as high more often than this, from 0 to 1 or
            `auto`, as in [`ImageIndex.search`][modeling_miniclip.search.index.ImageIndex.search]. Each call then also
            encodes 256 captions; an index keeps their embeddings.

    Returns:
        At most `n` [`Match`]es, best first, one per name. With a cutoff they have a `chance`.

    Raises:
        UsageError: `truncate_dim` is not from 1 to the dimensions of the model, there is no such cutoff, or the query
            is an image.
        ValueError: the number of names differs from that of embeddings, the embeddings are of another model, or there
            is no processor.
        DataError: the query, or an image to draw, cannot be read.

    Examples:
        >>> find_matches(model, embeddings, "two dogs playing in the snow", filenames, n=3)  # doctest: +SKIP
    """
    embeddings = as_tensor(image_embeddings).detach().float().cpu()
    names = [os.fspath(name) for name in image_filenames]
    if embeddings.ndim != 2 or len(names) != len(embeddings):
        raise ValueError(f"image_embeddings of shape {tuple(embeddings.shape)} but {len(names)} image_filenames")
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    largest = None if cutoff is None else cutoff_of(cutoff)
    if largest is not None and not isinstance(query, str):
        raise UsageError("cutoff: expected a text to compare with unrelated captions; leave it out for an image")
    encode = encode_texts if isinstance(query, str) else encode_images
    embedding = encode(model, [query], processor, progress=False, truncate_dim=truncate_dim)
    embeddings = embeddings[:, :truncate_dim]
    if embedding.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"image_embeddings are {embeddings.shape[1]}-dimensional, the query's {embedding.shape[1]}-dimensional: "
            "encode the images with this model, and short ones with the same truncate_dim"
        )
    embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
    scores = (embeddings @ embedding.T).squeeze(1)  # [images]
    matches: dict[str, Match] = {}
    for index in scores.argsort(descending=True, stable=True).tolist():
        matches.setdefault(names[index], Match(names[index], scores[index].item(), index))
        if len(matches) == n:
            break
    found = list(matches.values())
    if largest is not None and found:
        with warnings.catch_warnings(action="ignore"):  # about truncated captions, which are not the caller's
            captions = encode_texts(model, TEXTS, processor, progress=False, truncate_dim=truncate_dim).numpy()
        unrelated = UnrelatedCaptions.compare(captions, embeddings.numpy())
        found = cut_matches(found, unrelated, embedding[0].numpy(), largest)
    if draw is not None and (found or largest is None):
        from ..utils.match_grid import LabelledImage, MatchRow, draw_matches

        title = query if isinstance(query, str) else "Images like the query"
        row = MatchRow(title, "", [LabelledImage(open_image(m.name), f"{m.score:.2f}", False) for m in found])
        draw_matches(Path(draw), [row])
    return found
