"""Captions in the values that shards hold: texts, lists of texts, and lists of objects with a text each."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..columns import caption_columns, has_captions
from .text_files import check_surrogates

TEXT_KEYS = ("raw", "caption", "text", "sentence")  # of a caption that is an object, such as COCO's


def texts_of(value: Any) -> list[str]:
    """All captions in a value, stripped; what is empty or no text is left out.

    Examples:
        >>> texts_of([{"raw": "a dog ", "tokens": ["a", "dog"]}, None, "a cat"])
        ['a dog', 'a cat']
    """
    if isinstance(value, str):
        text = value.strip()
        return [text] if text else []
    if isinstance(value, Mapping):
        key = next((key for key in TEXT_KEYS if key in value), None)
        return texts_of(value[key]) if key else []
    if isinstance(value, list | tuple):
        return [text for each in value for text in texts_of(each)]
    return []


def negatives_of(value: Any) -> list[str]:
    """Wrong captions in a value: a text, a list of texts, or such a list as JSON, as it is in a CSV file.

    Examples:
        >>> negatives_of('["a cat", "two dogs"]'), negatives_of("a cat")
        (['a cat', 'two dogs'], ['a cat'])
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
            check_surrogates(value)
    return texts_of(value)


def captions_of_record(record: Mapping[str, Any], wanted: str) -> list[str]:
    """Captions of a JSON object; empty if it has none."""
    columns = caption_columns(record.keys(), "", None, wanted) if has_captions(record.keys(), wanted) else []
    return [text for column in columns for text in texts_of(record[column])]


def join_captions(texts: list[str], captions: list[str]) -> list[str]:
    """Captions of an image in a WebDataset; what its text files and its JSON file both hold counts once.

    Args:
        texts: its text files: one caption per line, unless a file repeats a caption of the JSON file.
        captions: captions of its JSON file.
    """
    lines = [[text] if text in captions else text.splitlines() for text in texts]
    joined = [line.strip() for several in lines for line in several if line.strip()]
    missing = Counter(captions) - Counter(joined)
    for caption in captions:
        if missing[caption] > 0:
            joined.append(caption)
            missing[caption] -= 1
    return joined
