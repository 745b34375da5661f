"""Recognise English captions by their short words."""

from collections.abc import Sequence

from .phrases import tokenize

_ENGLISH = frozenset(
    """a an the of and with in on at to by from is are his her its their while through over near for into two three
    this that up down there some other as who it""".split()
)
# Frequent short words of other languages with Latin letters that are no English words.
_OTHERS = frozenset(
    """der das ein eine einem einen einer und mit auf ist im am von den dem zu zwei vor durch über
    le la les un une des du et dans avec sur est sont deux au aux en qui par pour
    el los las una con del y por dos junto que se su al
    il lo gli di che nel nella sulla due sono mentre
    o os um uma em com na no da dois homem e ao
    het een van op met de twee door naar
    och på med av som ett den det er til
    w z i się jest bir ve ile egy az és w na""".split()
) - _ENGLISH  # fmt: skip


def is_english(caption: str) -> bool:
    """Whether a caption has short words of English, and more of them than of other languages."""
    words = [token.word for token in tokenize(caption)]
    english, others = (sum(word in known for word in words) for known in (_ENGLISH, _OTHERS))
    return english > 2 * others


def english_share(captions: Sequence[str]) -> float:
    """Share of captions that are English, between 0 and 1; 0 without captions."""
    return sum(map(is_english, captions)) / max(1, len(captions))
