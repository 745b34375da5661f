"""What a caption says, as far as word order decides it: attributes of things, and relations between them."""

from collections.abc import Iterator, Sequence

from . import words
from .phrases import Phrase

Fact = tuple[str, ...]


def attribute_facts(phrases: Sequence[Phrase]) -> set[Fact]:
    """`(adjective, noun)` for each adjective with its noun, or what it is said of: "boy" in "a boy in red"."""
    pairs = (
        (adjective.word, phrase.head or owner) for phrase, owner in _owners(phrases) for adjective in phrase.adjectives
    )
    return {pair for pair in pairs if pair[1]}


def owner_facts(phrases: Sequence[Phrase]) -> set[Fact]:
    """`(adjective, noun, owner)`, such as "red", "shirt" and "boy" for "a boy in a red shirt"."""
    return {
        (adjective.word, phrase.head, owner)
        for phrase, owner in _owners(phrases)
        for adjective in phrase.adjectives
        if phrase.head and words.kind_of_noun(owner) == "alive"
    }


def _owners(phrases: Sequence[Phrase]) -> Iterator[tuple[Phrase, str]]:
    """Each phrase, with the noun of the last one before it that has another role."""
    for i, phrase in enumerate(phrases):
        yield phrase, next((other.head for other in reversed(phrases[:i]) if other.role != phrase.role), "")


def relation_facts(phrases: Sequence[Phrase]) -> set[Fact]:
    """`(noun, relation, noun)` for each phrase with a relation and each phrase before it, and what subjects do."""
    facts: set[Fact] = set()
    things = [phrase for phrase in phrases if words.kind_of_noun(phrase.head) != "picture"]
    for i, phrase in enumerate(things):
        if phrase.role.startswith("subject"):
            facts.add((phrase.head, phrase.role))
            continue
        for before in things[:i]:
            if before.role != phrase.role:
                one, other, relation = before.head, phrase.head, phrase.role
                if relation in words.INVERSE:
                    one, other, relation = other, one, words.INVERSE[relation]
                facts.add((one, relation, other))
    return facts


def in_common_words(fact: Fact) -> Fact:
    """A fact with one word for what other captions may name otherwise: "bicycle" for "bike", "person" for "boy".

    Only one of two persons is renamed, so that "a boy follows a girl" and "a girl follows a boy" stay different.
    """
    names = [words.SAME_THING.get(word, word) for word in fact]
    if names.count("person") > 1 or len(fact) == 2:
        return tuple(word if name == "person" else name for word, name in zip(fact, names, strict=True))
    return tuple(names)
