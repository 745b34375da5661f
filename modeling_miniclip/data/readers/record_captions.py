"""Captions in the values that shards hold: texts, lists of texts, and lists of objects with a text each."""

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...errors import Problem
from ..columns import NEGATIVES, caption_columns, has_captions
from ..problems import OnProblem
from .text_files import check_surrogates

TEXT_KEYS = ("raw", "caption", "text", "sentence")  # of a caption that is an object, such as COCO's

# Lists of texts as Python and numpy write them: "['a cat', None]", "('a cat',)" and "['a cat' 'two dogs']". Only the
# escapes of Python's `repr` are allowed, so that each text can be evaluated by itself.
_ESCAPE = r"""\\(?:[\\'"abfnrtv]|x[0-9a-f]{2}|u[0-9a-f]{4}|U000[0-9a-f]{5})"""
_TEXT = rf"""(?:'(?:[^'\\\n\r\0]|{_ESCAPE})*'|"(?:[^"\\\n\r\0]|{_ESCAPE})*")"""
_ITEM = re.compile(rf"(?:{_TEXT}|None)")
_LIST = re.compile(rf"[\[(]\s*(?:{_ITEM.pattern}(?:\s*,\s*|\s+|(?=[\])])))*[\])]")
_MEANT_AS_LIST = re.compile(r"""\[\s*["']|\[[^\]]*\]$""")
NO_LIST = (
    'looks like a list but is none that can be read; expected a JSON list of texts, such as ["a cat", "two dogs"], '
    "or one text"
)


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
    """Wrong captions in a value: a text, a list of texts, or such a list in a text, as it is in a CSV file.

    A text is a list if it is one in JSON, or as Python writes it with `str`. Any other one is meant as a list, and an
    error, if a quotation mark follows its first bracket, or if this bracket is closed only at the end:
    "[a cat, a dog]", but not "[blurred] a man walks".

    Raises:
        ValueError: a text is meant as a list but is none.

    Examples:
        >>> negatives_of('["a cat", "two dogs"]'), negatives_of("['a cat', 'two dogs']"), negatives_of("a cat")
        (['a cat', 'two dogs'], ['a cat', 'two dogs'], ['a cat'])
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "("):
        return texts_of(value)
    text = value.strip()
    try:
        listed = json.loads(text)
        check_surrogates(listed)
    except (ValueError, RecursionError):
        listed = _evaluated(text)
    if listed is None and not _MEANT_AS_LIST.match(text):
        return [text]
    if listed is None or not all(one is None or isinstance(one, str | list | Mapping) for one in listed):
        raise ValueError(f"{text[:80]!r} {NO_LIST}")
    return texts_of(listed)


def _evaluated(text: str) -> list[Any] | None:
    """The texts of a list as Python writes it; None if it is none."""
    if not _LIST.fullmatch(text):
        return None
    try:
        listed = [ast.literal_eval(item) for item in _ITEM.findall(text)]
        check_surrogates(listed)
    except (ValueError, SyntaxError):
        return None
    return listed


def negatives_at(
    value: Any, file: str, number: int | None, on_problem: OnProblem, column: str = NEGATIVES, of: str = ""
) -> list[str]:
    """As [`negatives_of`], but a text that is no list is a problem of a row, and then there are no wrong captions.

    Args:
        value: the cell.
        file, number, column: where it is.
        on_problem: function called with the problem.
        of: what the wrong captions are of, if the number of the row does not say so.
    """
    try:
        return negatives_of(value)
    except ValueError as error:
        text = f"the wrong captions of {of}: {error}" if of else str(error)
        on_problem(Problem("negatives", text, file, number, column))
        return []


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
