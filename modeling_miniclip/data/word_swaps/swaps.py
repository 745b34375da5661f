"""Swap adjectives, nouns or whole noun phrases of an English caption, so that the result is wrong for its image."""

import random
import re
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import combinations

from . import words
from .english import is_english
from .facts import attribute_facts, in_common_words, owner_facts, relation_facts
from .phrases import Phrase, Span, find_phrases

# "a red ball on a blue box" becomes "a blue ball on a red box", "a red box on a blue ball" and "a blue box on a red
# ball".
SWAP_KINDS = ("adjectives", "nouns", "relations")

_ARTICLE = re.compile(r"\b(a|an)(\s+)$", re.IGNORECASE)
_SOUNDS_LIKE_A_VOWEL = re.compile(r"(?!uni|use|usu|eu|one|once|ukulele)[aeiou]|hour|honest|heir", re.IGNORECASE)


def draw_swap(
    captions: Sequence[str], index: int, seed: int, epoch: int, row: int, kinds: Collection[str] = SWAP_KINDS
) -> tuple[str, str] | None:
    """One of an image's captions with two words or phrases swapped, so that it is wrong.

    Args:
        captions: all captions of the image.
        index: caption to change.
        seed, epoch, row: the result depends only on these, on the index and on the captions.
        kinds: some of [`SWAP_KINDS`]; each that the caption allows is equally likely.

    Returns:
        The kind and the changed caption; None if the caption allows no swap, or is not English.
    """
    if not is_english(captions[index]):
        return None
    rng = random.Random(f"swap-{seed}-{epoch}-{row}-{index}")  # a str seed is hashed with SHA-512, not with hash()
    for kind in rng.sample(SWAP_KINDS, len(SWAP_KINDS)):
        if kind in kinds:
            text = draw_swap_of_kind(captions, index, kind, rng)
            if text is not None:
                return kind, text
    return None


def draw_swap_of_kind(captions: Sequence[str], index: int, kind: str, rng: random.Random) -> str | None:
    """As [`draw_swap`], of one kind; swaps whose result is plausible are more likely."""
    phrases = phrases_of(captions[index])
    candidates = [(implausible + rng.random(), exchange) for implausible, exchange in _CANDIDATES[kind](phrases)]
    for _, exchange in sorted(candidates, key=lambda candidate: candidate[0]):
        text = _exchanged(captions[index], exchange)
        if is_wrong(text, kind, captions, index):
            return text
    return None


@lru_cache(maxsize=4096)
def phrases_of(caption: str) -> tuple[Phrase, ...]:
    """[`find_phrases`], remembered, since the captions of an image are compared with each other."""
    return tuple(find_phrases(caption))


def is_wrong(text: str, kind: str, captions: Sequence[str], index: int) -> bool:
    """Whether a changed caption says something new that no caption of the image says.

    Args:
        text: changed caption.
        kind: kind of the change.
        captions: all captions of the image.
        index: caption that was changed.
    """
    if normalised(text) in map(normalised, captions):
        return False
    before, after = phrases_of(captions[index]), find_phrases(text)
    others = [phrases_of(caption) for i, caption in enumerate(captions) if i != index]
    for facts_of in (relation_facts,) if kind == "relations" else (attribute_facts, owner_facts):
        if new := facts_of(after) - facts_of(before):
            known = {in_common_words(fact) for phrases in others for fact in facts_of(phrases)}
            return known.isdisjoint(map(in_common_words, new))
    return False


def normalised(caption: str) -> str:
    return " ".join(re.findall(r"\w+", caption.casefold()))


# --- candidates: how implausible they are, from 0 to 1, and for each place the one whose text goes there ------------

_Place = tuple[int, int]
_Exchange = dict[_Place, _Place]
_Candidates = Iterator[tuple[float, _Exchange]]


def _swapped_adjectives(phrases: Sequence[Phrase]) -> _Candidates:
    for one, other in combinations(phrases, 2):
        for a in one.adjectives:
            for b in other.adjectives:
                if a.word == b.word or b.word in _adjective_words(one) or a.word in _adjective_words(other):
                    continue
                everywhere = [span for phrase in phrases for span in phrase.adjectives]
                yield float(_kind_of(a.word) != _kind_of(b.word)), _everywhere(everywhere, a, b)


def _adjective_words(phrase: Phrase) -> set[str]:
    return {span.word for span in phrase.adjectives}


def _kind_of(adjective: str) -> str:
    return words.ADJECTIVES[adjective.split()[-1]]


def _swapped_nouns(phrases: Sequence[Phrase]) -> _Candidates:
    nouns = [phrase.noun for phrase in phrases if phrase.noun]
    for one, other in _alike(phrases):
        if one.noun and other.noun and (one.adjectives or other.adjectives):
            yield _implausible(one, other), _everywhere(nouns, one.noun, other.noun)


def _swapped_phrases(phrases: Sequence[Phrase]) -> _Candidates:
    for one, other in _alike(phrases):
        if words.NEAR in (one.role, other.role) and not _implausible(one, other):
            continue  # "a man talks with a woman"
        if one.role != other.role and _occurrence(phrases, one) == _occurrence(phrases, other):
            yield _implausible(one, other), {one.span: other.span, other.span: one.span}


def _occurrence(phrases: Sequence[Phrase], phrase: Phrase) -> int:
    """How often its noun was named before: "a disc and a ring, the disc above the ring" exchanges the last two."""
    return sum(before.head == phrase.head and before.span < phrase.span for before in phrases)


def _implausible(one: Phrase, other: Phrase) -> float:
    """A boy and a dog can do the same; a boy and a ball cannot."""
    return 0.5 * (words.kind_of_noun(one.head) != words.kind_of_noun(other.head))


def _alike(phrases: Sequence[Phrase]) -> Iterator[tuple[Phrase, Phrase]]:
    """Pairs of phrases that fit into each other's place."""
    for one, other in combinations(phrases, 2):
        fits = one.is_plural == other.is_plural and one.has_determiner == other.has_determiner
        is_other_thing = one.head != other.head and "picture" not in map(words.kind_of_noun, (one.head, other.head))
        if fits and is_other_thing:
            yield one, other


def _everywhere(spans: Sequence[Span], one: Span, other: Span) -> _Exchange:
    """Exchange two words everywhere, as in "a red disc and a blue ring, the red disc above the blue ring".

    If there are more of one of them, only these two are exchanged, so that all words stay the same.
    """
    ones, others = ([(s.start, s.end) for s in spans if s.word == word] for word in (one.word, other.word))
    if len(ones) != len(others):
        ones, others = [(one.start, one.end)], [(other.start, other.end)]
    return dict(zip(ones + others, others + ones, strict=True))


_CANDIDATES = {"adjectives": _swapped_adjectives, "nouns": _swapped_nouns, "relations": _swapped_phrases}


def _exchanged(caption: str, exchange: _Exchange) -> str:
    """The caption with the text of other places in some places, and the right one of "a" and "an" before them."""
    first = len(caption) - len(caption.lstrip())
    result, at = "", 0
    for (start, end), (source_start, source_end) in sorted(exchange.items()):
        text = caption[source_start:source_end]
        if source_start == first and not text.isupper():
            text = text[0].lower() + text[1:]
        if start == first and caption[first].isupper():
            text = text[0].upper() + text[1:]
        result += caption[at:start]
        article = _ARTICLE.search(result)
        if article:
            right = "an" if _SOUNDS_LIKE_A_VOWEL.match(text) else "a"
            right = right.capitalize() if article[1][0].isupper() else right
            result = result[: article.start()] + right + article[2]
        result, at = result + text, end
    return result + caption[at:]
