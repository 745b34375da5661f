"""What an index finds in a source."""

import os
import tempfile
from pathlib import Path

from modeling_miniclip.data.all_images import DEFAULT_COLUMNS, Listing, list_images
from modeling_miniclip.data.columns import ColumnNames
from modeling_miniclip.data.find_images import resolve_source
from modeling_miniclip.errors import Problem


def listing_of(*sources: str | os.PathLike, columns: ColumnNames = DEFAULT_COLUMNS) -> Listing:
    """The list of all images of some sources; what is in its folder stays open after the folder is gone."""
    with tempfile.TemporaryDirectory() as folder:
        return list_images([resolve_source(source) for source in sources], Path(folder) / "listed", columns)


Image = tuple[str, list[str], str, bytes]  # name, captions, split and content


def images_of(
    *sources: str | os.PathLike, columns: ColumnNames = DEFAULT_COLUMNS
) -> tuple[list[Image], list[Problem]]:
    """All images of some sources, and what was left out."""
    listing = listing_of(*sources, columns=columns)
    texts = [
        (captions, split)
        for batch in listing.batches(listing.rows, ("captions", "split"))
        for captions, split in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    ]
    items = listing.items(listing.rows)
    return [(item.id, *text, item.read()) for item, text in zip(items, texts, strict=True)], listing.problems
