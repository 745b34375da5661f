"""Wrong captions from right ones."""

import random
import re

import pytest

from modeling_miniclip.data.scenes import COLOURS, SHAPES, SIZES, SYNONYMS, describe_scene, validation_scenes
from modeling_miniclip.data.word_swaps.english import english_share, is_english
from modeling_miniclip.data.word_swaps.phrases import find_phrases
from modeling_miniclip.data.word_swaps.swaps import SWAP_KINDS, draw_swap, draw_swap_of_kind


def swaps_of(caption: str, kind: str, *others: str) -> set[str]:
    """All swaps of a kind that are ever drawn."""
    drawn = {draw_swap_of_kind([caption, *others], 0, kind, random.Random(i)) for i in range(40)}
    return {text for text in drawn if text is not None}


@pytest.mark.parametrize(
    ("kind", "caption", "swapped"),
    [
        ("adjectives", "A red ball on a blue box .", "A blue ball on a red box ."),
        ("adjectives", "a light blue disc and an orange ring", "an orange disc and a light blue ring"),
        ("adjectives", "A boy in red and a girl in blue", "A boy in blue and a girl in red"),
        ("adjectives", "a boy in a red shirt and a girl in a blue shirt",
         "a boy in a blue shirt and a girl in a red shirt"),
        ("adjectives", "a red disc and a blue ring, the red disc above the blue ring",
         "a blue disc and a red ring, the blue disc above the red ring"),
        ("nouns", "Red ball on an open umbrella", None),
        ("nouns", "A red ball on an open umbrella", "A red umbrella on an open ball"),
        ("nouns", "A dog runs through the snow .", None),
        ("nouns", "two young girls watch a dog", None),  # a plural and a singular
        ("relations", "A dog runs through the snow .", "A snow runs through the dog ."),
        ("relations", "An old man chases a small black dog.", "A small black dog chases an old man."),
        ("relations", "two dogs chase three cats", "two cats chase three dogs"),
        ("relations", "Dogs watch people", "People watch dogs"),
        ("relations", "A man and a dog run .", None),
        ("relations", "A man talks with a woman .", None),
        ("relations", "a man in a park on a bench", {"a park in a man on a bench", "a bench in a park on a man"}),
        ("relations", "a disc and a ring, with the disc above the ring",
         "a disc and a ring, with the ring above the disc"),
        ("relations", "a man stands while a dog runs", "a dog stands while a man runs"),
    ],
)  # fmt: skip
def test_swaps(kind: str, caption: str, swapped: str | set[str] | None) -> None:
    expected = swapped if isinstance(swapped, set) else {swapped} - {None}
    assert swaps_of(caption, kind) == expected


@pytest.mark.parametrize(
    ("kind", "caption", "other"),
    [
        ("adjectives", "A red ball on a blue box", "a blue ball and a red box"),
        ("adjectives", "A red ball on a blue box", "one blue ball"),
        ("nouns", "A small dog near a cat", "a small cat"),
        ("relations", "A man watches a dog", "The dog watches the boy"),
        ("relations", "a ring above a disc", "a ring is below a disc"),
    ],
)
def test_swap_agrees_with_no_caption(kind: str, caption: str, other: str) -> None:
    assert swaps_of(caption, kind)
    assert not swaps_of(caption, kind, other)


def test_swaps_of_scenes_are_wrong() -> None:
    """By an own reading: a colour and a shape that no object of the scene has."""
    names = {"": ""} | {name: word for word in (*SIZES, *COLOURS, *SHAPES) for name in SYNONYMS.get(word, (word,))}
    sizes, colours, shapes = ("|".join(n for n in names if names[n] in words) for words in (SIZES, COLOURS, SHAPES))
    named = re.compile(rf"\b(?:({sizes}) )?({colours}) ({shapes})\b")
    counts = dict.fromkeys(SWAP_KINDS, 0)
    for i, scene in enumerate(validation_scenes(60)):
        captions = describe_scene(scene, random.Random(i))
        true = {(size, item.colour, item.shape) for item in scene.objects for size in (item.size, "")}
        for kind in SWAP_KINDS:
            text = draw_swap_of_kind(captions, i % 5, kind, random.Random(i))
            if text is None:
                continue
            counts[kind] += 1
            assert text not in captions
            assert sorted(re.findall(r"\w{3,}", text)) == sorted(re.findall(r"\w{3,}", captions[i % 5]))
            found = {tuple(names[word] for word in words) for words in named.findall(text)}
            if kind == "relations":
                assert found <= true, "whole objects change places"
            else:
                # A colour may have been exchanged with the background's, which is no object's.
                assert not found <= true or "background" in text, text
    assert counts["adjectives"] == 60 and counts["nouns"] >= 50 and counts["relations"] >= 40


def test_a_draw_depends_on_seed_epoch_and_row() -> None:
    captions = ["A small red ball on a large blue box near a green tree .", "A ball"]
    draws = {key: draw_swap(captions, 0, *key) for key in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (2, 0, 0))}
    assert draws == {key: draw_swap(captions, 0, *key) for key in draws}
    assert len(set(draws.values())) > 2
    kinds = {draw_swap(captions, 0, 0, epoch, 0)[0] for epoch in range(20)}
    assert kinds == set(SWAP_KINDS)
    assert {draw_swap(captions, 0, 0, epoch, 0, ["nouns"])[0] for epoch in range(20)} == {"nouns"}
    assert draw_swap(captions, 1, 0, 0, 0) is None


def test_phrases() -> None:
    phrases = find_phrases("Two brown and white dogs run through the tennis court in front of a man's house .")
    found = [([a.word for a in p.adjectives], p.noun.word if p.noun else None, p.role) for p in phrases]
    assert found == [
        (["brown", "white"], "dogs", "subject of run"),
        ([], "tennis court", "place"),
        ([], "man", "in front of"),
        ([], "house", "in front of"),
    ]


@pytest.mark.parametrize(
    "caption",
    [
        "Ein Mann in einem roten Hemd steht auf der Straße .",
        "Un homme avec un chapeau rouge est assis sur un banc",
        "Un perro corre en la playa a lo largo",
        "Um homem a correr na praia com um cão",
        "Een man in een rood shirt staat op straat",
        "En man i röd tröja står på gatan",
        "Egy férfi a strandon fut a kutyával",
        "Uomo che corre sulla spiaggia",
        "Mężczyzna w czerwonej koszuli stoi na ulicy",
        "мужчина в красной рубашке стоит на улице",
        "一只狗在草地上奔跑",
        "",
    ],
)
def test_other_languages_are_not_english(caption: str) -> None:
    assert not is_english(caption)
    assert draw_swap([caption], 0, 0, 0, 0) is None


def test_share_of_english() -> None:
    assert english_share(["A dog runs .", "Ein Hund rennt auf der Wiese ."]) == 0.5
    assert english_share([]) == 0
