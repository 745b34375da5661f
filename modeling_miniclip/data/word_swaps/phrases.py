"""Find the noun phrases of an English caption and what relates them, by word lists and a few rules."""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from . import words

_TOKEN = re.compile(r"['’]s\b|[A-Za-z]+(?:[-'’](?!s\b)[A-Za-z]+)*|\d+|\S")


class Span(NamedTuple):
    """Characters `start` to `end` of a caption, and the text there in lower case."""

    start: int
    end: int
    word: str


@dataclass(frozen=True)
class Phrase:
    """A noun phrase, such as "a small red ball".

    Args:
        adjectives: its adjectives, "small" and "red".
        noun: its noun with the nouns before it, "ball" or "tennis ball"; None in "a man in red".
        has_determiner: whether an article, a number or the like is before it.
        role: what it does in its sentence: "subject of VERB", or the relation before it, a value of `RELATIONS` or a
            verb. Phrases with equal roles ("a bus and a car", "on the grass in a park") can be exchanged without a
            change of meaning.
    """

    adjectives: tuple[Span, ...]
    noun: Span | None
    has_determiner: bool
    role: str

    @property
    def span(self) -> tuple[int, int]:
        """Where the phrase starts and ends, without its determiner."""
        parts = [*self.adjectives, *([self.noun] if self.noun else [])]
        return parts[0].start, parts[-1].end

    @property
    def head(self) -> str:
        """The last word of the noun as a singular; "" without a noun."""
        return singular(self.noun.word.split()[-1]) if self.noun else ""

    @property
    def is_plural(self) -> bool:
        """Whether the noun has the form of a plural."""
        return self.noun is not None and is_plural(self.noun.word.split()[-1])


def tokenize(caption: str) -> list[Span]:
    """Words, numbers and marks of a caption."""
    return [Span(m.start(), m.end(), m.group().lower().replace("’", "'")) for m in _TOKEN.finditer(caption)]


def is_plural(noun: str) -> bool:
    """Whether a word in lower case has the form of a plural."""
    ends_in_s = len(noun) > 3 and noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    return noun in words.IRREGULAR_PLURALS or ends_in_s


def singular(noun: str) -> str:
    """The singular of a noun in lower case, good enough to compare words."""
    if noun in words.IRREGULAR_PLURALS or not is_plural(noun):
        return words.IRREGULAR_PLURALS.get(noun, noun)
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    return noun[:-2] if noun.endswith(("shes", "ches", "xes", "sses")) else noun[:-1]


def find_phrases(caption: str) -> list[Phrase]:
    """The noun phrases of an English caption, from left to right."""
    return _Parser(caption).parse()


class _Parser:
    """Reads a caption from left to right.

    Attributes:
        relation: the last relation or verb since the last phrase, or "".
        does: the first one since the last phrase; a subject is known by it.
        joined_by: "and" if there was nothing but that or a comma, "near" for a relation that holds both ways, or "".
        after: what the last word was: "noun", "relation", "verb" or "other".
    """

    def __init__(self, caption: str):
        self.caption = caption
        self.tokens = tokenize(caption)
        self.phrases: list[Phrase] = []
        self.relation, self.joined_by, self.after = "", "", "other"
        self.does = ""
        self.subjects: list[int] = []  # those of whom it is not known yet what they do

    def parse(self) -> list[Phrase]:
        at = 0
        while at < len(self.tokens):
            at = self._amount(at) or self._relation(at) or self._verb(at) or self._phrase(at) or self._other(at)
        self._name_subjects()
        return self.phrases

    def _word(self, at: int) -> str:
        return self.tokens[at].word if at < len(self.tokens) else ""

    def _relation_at(self, at: int) -> int:
        """Number of words of the relation that starts here, 0 if none does."""
        if self._word(at) not in words.RELATION_STARTS:
            return 0
        for length in range(min(words.LONGEST_RELATION, len(self.tokens) - at), 0, -1):
            if " ".join(token.word for token in self.tokens[at : at + length]) in words.RELATIONS:
                return length
        return 0

    def _is_closed(self, at: int) -> bool:
        """Whether no noun phrase can contain this word."""
        word = self._word(at)
        is_word = word[:1].isalpha()
        known = word in words.OTHER_WORDS or word in words.JOINING or word in words.DETERMINERS
        return not is_word or known or self._relation_at(at) > 0

    # Each of these returns the position after what it has read, or 0 if that is something else.

    def _amount(self, at: int) -> int:
        skipped = at + (self._word(at) in words.DETERMINERS)
        while self._word(skipped) in words.ADJECTIVES:
            skipped += 1
        if self._word(skipped) in words.AMOUNTS and self._word(skipped + 1) == "of":
            return skipped + 2
        return 0

    def _relation(self, at: int) -> int:
        length = self._relation_at(at)
        if not length:
            return 0
        meaning = words.RELATIONS[" ".join(token.word for token in self.tokens[at : at + length])]
        if meaning == words.NEAR and not self.relation:
            self.joined_by = words.NEAR
        else:
            self.relation, self.joined_by, self.does = meaning, "", self.does or meaning
        self.after = "relation"
        return at + length

    def _verb(self, at: int) -> int:
        word = self._word(at)
        is_verb = (word.endswith("ing") and len(word) > 4 and word not in words.ING_NOUNS) or (
            self.after in ("noun", "other") and (word in words.PRESENT_FORMS or word in words.PAST_FORMS)
        )
        is_verb |= word in words.BASE_FORMS and at > 0 and self._word(at - 1) == "to"
        last = self.phrases[-1] if self.phrases else None
        if self.after == "noun" and last and word in words.BASE_FORMS:
            is_verb |= last.is_plural or words.SAME_THING.get(last.head) == "person" or not last.noun
        if not is_verb:
            return 0
        verb = words.VERB_OF.get(word, word)
        self.relation, self.joined_by, self.after = words.NEAR if verb in words.MUTUAL else verb, "", "verb"
        self.does = self.does or self.relation
        return at + 1

    def _phrase(self, at: int) -> int:
        start = at
        while self._word(at) in words.DETERMINERS or self._word(at).isdigit():
            at += 1
        has_determiner = at > start
        adjectives, at = self._adjectives(at)
        first = at
        while not self._is_closed(at) and not (at > first and self._ends_noun(at, at - first)):
            at += 1
        noun = None
        if at > first:
            begin, end = self.tokens[first].start, self.tokens[at - 1].end
            noun = Span(begin, end, self.caption[begin:end].lower())
        elif adjectives and has_determiner:  # "an orange"
            noun = adjectives.pop()
        if noun is None and not adjectives:
            return at if has_determiner else 0
        self._name_subjects()
        phrase = Phrase(tuple(adjectives), noun, has_determiner, self.relation)
        if self.joined_by:
            phrase = replace(phrase, role=self._role_of_joined(phrase))
        if not phrase.role:
            self.subjects.append(len(self.phrases))
        self.phrases.append(phrase)
        self.relation, self.does, self.joined_by, self.after = "", "", "", "noun"
        return at

    def _role_of_joined(self, phrase: Phrase) -> str:
        """Role of the phrase that another one is joined to: "a boy in a red shirt and a girl", not the shirt."""
        if self.joined_by == words.NEAR:
            return self.phrases[-1].role if self.phrases else ""
        kind = words.kind_of_noun(phrase.head)
        role = next((one.role for one in reversed(self.phrases) if words.kind_of_noun(one.head) == kind), "")
        return "" if role.startswith("subject") else role

    def _adjectives(self, at: int) -> tuple[list[Span], int]:
        """Adjectives from here on, also joined as in "black and white"; a colour and its shade are one."""
        found: list[Span] = []
        while True:
            word, following = self._word(at), self._word(at + 1)
            if word.endswith("ly") and (following in words.ADJECTIVES or following.endswith(("ed", "ing"))):
                at += 1
            elif word in words.SHADES and words.ADJECTIVES.get(following) == "colour":
                here = self.tokens[at : at + 2]
                found.append(Span(here[0].start, here[1].end, f"{word} {following}"))
                at += 2
            elif word in words.ADJECTIVES:
                found.append(self.tokens[at])
                at += 1
            elif found and (joined := self._joined_adjective(at)):
                at = joined
            else:
                return found, at

    def _joined_adjective(self, at: int) -> int:
        """Position of an adjective after "and" or commas, if a noun phrase goes on after it; otherwise 0."""
        start = at
        while self._word(at) in words.JOINING:
            at += 1
        goes_on = not self._is_closed(at + 1) or self._word(at + 1) in words.JOINING
        return at if at > start and self._word(at) in words.ADJECTIVES and goes_on else 0

    def _ends_noun(self, at: int, length: int) -> bool:
        """Whether a word after a noun of some words is a verb or an adverb."""
        word, before = self._word(at), self._word(at - 1)
        if word in words.PRESENT_FORMS or word in words.PAST_FORMS or word.endswith("ly"):
            return True
        if word.endswith("ing") and word not in words.ING_NOUNS:
            return True
        is_person = words.SAME_THING.get(before) == "person"
        return word in words.BASE_FORMS and (is_plural(before) or (is_person and length == 1))

    def _other(self, at: int) -> int:
        if self._word(at) in words.JOINING:
            if not self.relation:
                self.joined_by = self.joined_by or "and"
        elif self._word(at) in ("while", "as", "when", "that", "who", "which", "where", ".", "but"):
            self.relation, self.joined_by = "", ""
        self.after = "other"
        return at + 1

    def _name_subjects(self) -> None:
        """Name the role of subjects after what they do, once that is known."""
        if self.does or not self.joined_by:
            for i in self.subjects:
                self.phrases[i] = replace(self.phrases[i], role=f"subject of {self.does}")
            self.subjects.clear()
