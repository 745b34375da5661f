"""The built-in dataset `scenes`: small pictures of two or three coloured shapes, each with five captions.

Everything is drawn here and depends only on the seed, so that a CLIP model can be trained from scratch in minutes
without a download. All objects of a scene differ in colour and in shape. A text encoder that sees only a bag of words
therefore cannot distinguish a scene from the one with two colours swapped (`swap_attributes`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:  # `datasets` takes about a second to import: only build_scenes needs it
    from datasets import Dataset, DatasetDict

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (220, 25, 35),
    "orange": (255, 140, 0),
    "yellow": (245, 210, 0),
    "green": (20, 150, 50),
    "blue": (30, 80, 225),
    "purple": (145, 40, 185),
    "brown": (120, 68, 25),
    "black": (20, 20, 20),
}
# Pale enough to differ from all object colours, and to keep blends at soft edges different from the other colours.
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "pale grey": (208, 208, 208),
    "pale blue": (190, 222, 255),
    "pale green": (196, 238, 196),
    "pale pink": (255, 205, 218),
    "cream": (255, 240, 195),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Half the width of an object as a fraction of the picture's side. Even a large star, the thinnest shape, covers more
# than a small square, the fullest one.
SIZES: dict[str, float] = {"small": 0.095, "large": 0.18}

# Every layout as (pair, single), with the places of objects 0, 1 (and 2) in it. `pair` is the position of object 0
# relative to object 1, `single` that of object 2 relative to both. The pair is only "left of" or "above" ("B is right
# of A" is the same scene as "A is left of B"), so that each arrangement has one form and can be compared.
LAYOUTS: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("left of", None): ("on the left", "on the right"),
    ("above", None): ("at the top", "at the bottom"),
    ("left of", "below"): ("at the top left", "at the top right", "at the bottom"),
    ("left of", "above"): ("at the bottom left", "at the bottom right", "at the top"),
    ("above", "right of"): ("at the top left", "at the bottom left", "on the right"),
    ("above", "left of"): ("at the top right", "at the bottom right", "on the left"),
}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Words and phrases with synonyms.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "tiny", "little"),
    "large": ("large", "big"),
    "circle": ("circle", "disc"),
    "ring": ("ring", "hoop"),
    "purple": ("purple", "violet"),
    "pale": ("pale", "light"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "is": ("is", "sits", "lies"),
    "them": ("them", "both", "both of them"),
}
# Sentences with and without the background, around a body with a verb ("a red disc is above ...") ...
_Frames = tuple[tuple[str, ...], tuple[str, ...]]
_SENTENCE_FRAMES: _Frames = (
    (
        "{body} on {background}",
        "on {background}, {body}",
        "against {background}, {body}",
        "{body}, and the background is {background_name}",
    ),
    ("{body}", "in this picture {body}", "here {body}"),
)
# ... and around a body without a verb ("a red disc above ...").
_PHRASE_FRAMES: _Frames = (
    (
        "{body}, on {background}",
        "{background} with {body}",
        "a picture of {body}, on {background}",
        "there is {body}, against {background}",
        "on {background} there is {body}",
        "this image shows {body}, against {background}",
    ),
    ("{body}", "a picture of {body}", "there is {body}", "this image shows {body}"),
)

_MAX_SCENES = 1_000_000  # of about 7.8 million; up to this number, rejection sampling is fast
_MIN_IMAGE_SIZE = 32
_SUPERSAMPLING = 4
_NEAR, _FAR = 0.26, 0.74  # middle of the first and of the second half of the picture, as fractions of its side


@dataclass(frozen=True)
class SceneObject:
    """One object: `colour` of `COLOURS`, `shape` of `SHAPES`, `size` of `SIZES`.

    Raises:
        ValueError: an attribute is unknown.
    """

    colour: str
    shape: str
    size: str

    def __post_init__(self) -> None:
        if self.colour not in COLOURS or self.shape not in SHAPES or self.size not in SIZES:
            raise ValueError(f"unknown colour, shape or size: {self.colour!r}, {self.shape!r}, {self.size!r}")


@dataclass(frozen=True)
class Scene:
    """The content of a picture. Scenes with the same attributes and arrangement are equal.

    Attributes:
        objects: two or three objects.
        pair: position of object 0 relative to object 1, "left of" or "above".
        single: position of object 2 relative to both others, at a right angle to the pair ("above" or "below" a
            horizontal pair, "left of" or "right of" a vertical one); None with two objects.
        background: a name of `BACKGROUNDS`.

    Raises:
        ValueError: the background or the layout is unknown, or the layout is for another number of objects.
    """

    objects: tuple[SceneObject, ...]
    pair: str
    single: str | None
    background: str

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}, expected one of {list(BACKGROUNDS)}")
        places = LAYOUTS.get((self.pair, self.single))
        if places is None or len(places) != len(self.objects):
            raise ValueError(f"no layout of {len(self.objects)} objects has {self.pair=} and {self.single=}")


def sample_scenes(count: int, seed: int) -> list[Scene]:
    """Draw `count` different scenes, about half with two objects and half with three.

    A shorter list is the beginning of a longer one with the same seed.

    Args:
        count: number of scenes, at most one million.
        seed: random seed.

    Raises:
        ValueError: `count` is negative or above one million.
    """
    if not 0 <= count <= _MAX_SCENES:
        raise ValueError(f"count must be between 0 and {_MAX_SCENES}, got {count}")
    rng = Random(f"scenes-{seed}")  # a str seed is hashed with SHA-512, not with hash()
    scenes: dict[Scene, None] = {}  # a dict keeps the order, a set would not
    while len(scenes) < count:
        scenes[_sample_scene(rng)] = None
    return list(scenes)


def _sample_scene(rng: Random) -> Scene:
    number = rng.choice((2, 3))
    pair, single = rng.choice([layout for layout, places in LAYOUTS.items() if len(places) == number])
    # sample() draws without replacement: all colours and shapes differ, so that every swap is visible
    colours, shapes = rng.sample(list(COLOURS), number), rng.sample(SHAPES, number)
    sizes = rng.choices(list(SIZES), k=number)
    objects = tuple(SceneObject(*attributes) for attributes in zip(colours, shapes, sizes, strict=True))
    return Scene(objects, pair, single, rng.choice(list(BACKGROUNDS)))


def swap_attributes(scene: Scene, rng: Random) -> Scene:
    """Swap one attribute of two objects: the same words describe the result, but it is a different picture.

    Colours are swapped if any two objects differ in colour, else shapes, else sizes.

    Args:
        scene: scene to change.
        rng: generator that picks the two objects.

    Raises:
        ValueError: all objects are alike (never true for a sampled scene).
    """
    for attribute in ("colour", "shape", "size"):
        values = [getattr(item, attribute) for item in scene.objects]
        pairs = [(i, j) for i, j in combinations(range(len(values)), 2) if values[i] != values[j]]
        if pairs:
            i, j = rng.choice(pairs)
            objects = list(scene.objects)
            objects[i] = replace(objects[i], **{attribute: values[j]})
            objects[j] = replace(objects[j], **{attribute: values[i]})
            return replace(scene, objects=tuple(objects))
    raise ValueError("all objects of the scene are alike: there is nothing to swap")


def render(scene: Scene, rng: Random, image_size: int = 64) -> Image.Image:
    """Draw a scene.

    Args:
        scene: scene to draw.
        rng: generator of a small jitter of places and sizes. The same state gives the same picture; scenes with the
            same layout get the same jitter.
        image_size: width and height in pixels, at least 32; small stars and rings are crisp from about 48.

    Returns:
        An anti-aliased RGB picture of `image_size` x `image_size` pixels.

    Raises:
        ValueError: `image_size` is below 32, where small shapes look alike.
    """
    if image_size < _MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {_MIN_IMAGE_SIZE} pixels, got {image_size}")
    side = image_size * _SUPERSAMPLING
    background = BACKGROUNDS[scene.background]
    canvas = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(canvas)
    for item, (x, y) in zip(scene.objects, _centres(scene, rng), strict=True):
        radius = SIZES[item.size] * rng.uniform(0.97, 1.03)
        _draw_shape(draw, item.shape, x * side, y * side, radius * side, COLOURS[item.colour], background)
    return canvas.reduce(_SUPERSAMPLING)


def _centres(scene: Scene, rng: Random) -> list[tuple[float, float]]:
    """Centres (x, y) of the objects as fractions of the picture's side, from the top left corner.

    With these margins, even the largest objects never touch each other or the border, whatever the jitter.
    """
    along = [_NEAR, _FAR]  # coordinates along the line of the pair and across it
    if scene.single is None:
        across = [0.5 + rng.uniform(-0.15, 0.15)] * 2
    else:
        pair_is_first = scene.single in ("below", "right of")
        pair_across, single_across = (_NEAR, _FAR) if pair_is_first else (_FAR, _NEAR)
        along.append(0.5 + rng.uniform(-0.1, 0.1))
        across = [pair_across, pair_across, single_across]
    along, across = ([value + rng.uniform(-0.03, 0.03) for value in values] for values in (along, across))
    return list(zip(along, across, strict=True) if scene.pair == "left of" else zip(across, along, strict=True))


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: RGB, background: RGB
) -> None:
    """Draw one shape inside the square of half-width `radius` around (x, y); all lengths are in canvas pixels."""
    if shape in ("circle", "ring"):
        draw.ellipse(_box(x, y, radius), fill=colour)
        if shape == "ring":
            draw.ellipse(_box(x, y, 0.5 * radius), fill=background)
    elif shape == "square":
        draw.rectangle(_box(x, y, 0.88 * radius), fill=colour)
    elif shape == "cross":
        arm = 0.33 * radius
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - 0.9 * radius), (x + radius, y + 0.85 * radius), (x - radius, y + 0.85 * radius)], colour)
    elif shape == "star":
        lengths = (radius, 0.5 * radius) * 5  # five points and the five corners between them
        angles = [math.pi * corner / 5 for corner in range(10)]
        corners = zip(lengths, angles, strict=True)
        draw.polygon([(x + r * math.sin(angle), y - r * math.cos(angle)) for r, angle in corners], colour)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def _box(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def describe_scene(scene: Scene, rng: Random) -> list[str]:
    """Describe a scene in five different captions.

    Every caption names the colour and the shape of each object and the whole arrangement; one of the five leaves out
    the sizes and another one the background. The draws from `rng` depend only on the layout, not on the attributes.

    Args:
        scene: scene to describe.
        rng: generator of the wordings and synonyms.
    """
    flip = rng.random() < 0.5
    wordings = [(_sentence, flip), (_sentence, not flip), (_phrase, rng.random() < 0.5)]
    wordings += [(_listing, rng.random() < 0.5), (_places, rng.random() < 0.5)]
    rng.shuffle(wordings)
    without_sizes, without_background = rng.sample(range(len(wordings)), 2)
    captions = []
    for index, (wording, flipped) in enumerate(wordings):
        words = {word: rng.choice(options) for word, options in SYNONYMS.items()}
        body = wording(scene, words, flipped, index != without_sizes)
        full, bare = _SENTENCE_FRAMES if wording is _sentence else _PHRASE_FRAMES
        frame = rng.choice(bare if index == without_background else full)
        name = " ".join(words.get(word, word) for word in scene.background.split())
        captions.append(frame.format(body=body, background=f"a {name} background", background_name=name))
    return captions


def describe_pair(scene: Scene, swapped: Scene, rng: Random) -> tuple[list[str], list[str]]:
    """Describe a scene and its swapped form alike: caption i of both has the same words in another order.

    Args:
        scene: scene to describe.
        swapped: the scene after [`swap_attributes`].
        rng: generator of the wordings and synonyms.

    Returns:
        The five captions of `scene` and the five of `swapped`; the words differ at most in a/an.

    Raises:
        ValueError: the scenes have different layouts, for which there is no common wording.
    """
    if (scene.pair, scene.single) != (swapped.pair, swapped.single):
        raise ValueError("the two scenes must have the same layout")
    state = rng.getstate()
    captions = describe_scene(scene, rng)
    rng.setstate(state)
    return captions, describe_scene(swapped, rng)


def _name(item: SceneObject, words: dict[str, str], with_size: bool = False, article: str = "a") -> str:
    """An object's name, such as "a small red disc"; `words` maps words to the synonyms of this caption."""
    parts = [item.size, item.colour, item.shape] if with_size else [item.colour, item.shape]
    name = " ".join(words.get(part, part) for part in parts)
    if article == "a" and name[0] in "aeiou":
        article = "an"
    return f"{article} {name}"


def _ordered_pair(scene: Scene, flip: bool) -> tuple[SceneObject, str, SceneObject]:
    """The pair as (A, "left of", B) or, flipped, as (B, "right of", A)."""
    first, second = scene.objects[:2]
    return (second, OPPOSITES[scene.pair], first) if flip else (first, scene.pair, second)


def _sentence(scene: Scene, words: dict[str, str], flip: bool, with_size: bool) -> str:
    first, relation, second = _ordered_pair(scene, flip)
    verb = words["is"]
    text = f"{_name(first, words, with_size)} {verb} {words[relation]} {_name(second, words, with_size)}"
    if scene.single is not None:
        text += f", and {_name(scene.objects[2], words, with_size)} {verb} {words[scene.single]} {words['them']}"
    return text


def _phrase(scene: Scene, words: dict[str, str], flip: bool, with_size: bool) -> str:
    first, relation, second = _ordered_pair(scene, flip)
    text = f"{_name(first, words, with_size)} {words[relation]} {_name(second, words, with_size)}"
    if scene.single is not None:
        text += f", with {_name(scene.objects[2], words, with_size)} {words[scene.single]} {words['them']}"
    return text


def _listing(scene: Scene, words: dict[str, str], flip: bool, with_size: bool) -> str:
    first, relation, second = _ordered_pair(scene, flip)
    text = f"{_name(first, words, with_size)} and {_name(second, words, with_size)}"
    if scene.single is None:
        again, other = _name(first, words, article="the"), _name(second, words, article="the")
    else:
        # Naming only two of the three objects again would give a swapped scene different words.
        text = f"{_name(scene.objects[2], words, with_size)} {words[scene.single]} {text}"
        again, other = "the former", "the latter"
    return f"{text}, with {again} {words[relation]} {other}"


def _places(scene: Scene, words: dict[str, str], flip: bool, with_size: bool) -> str:
    places = LAYOUTS[scene.pair, scene.single]
    parts = [f"{_name(item, words, with_size)} {place}" for item, place in zip(scene.objects, places, strict=True)]
    if flip:
        parts.reverse()
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def validation_scenes(num_validation: int = 1000, seed: int = 0) -> list[Scene]:
    """The scenes of the validation split of [`build_scenes`], in its order, for any number of training scenes.

    Args:
        num_validation: number of validation scenes.
        seed: random seed of the dataset.

    Raises:
        ValueError: `num_validation` is negative or above one million.
    """
    # Validation scenes are drawn first, so that models trained on more or fewer scenes get the same test.
    return sample_scenes(num_validation, seed)


def build_scenes(
    num_train: int = 6000, num_validation: int = 1000, image_size: int = 64, seed: int = 0
) -> DatasetDict:
    """Build the dataset in memory, without the network and without the cache of Hugging Face.

    Args:
        num_train: number of training scenes.
        num_validation: number of validation scenes; none of them is also a training scene.
        image_size: width and height of the pictures in pixels, at least 32.
        seed: random seed of the scenes, pictures and captions. Take both splits from one call: the scenes of different
            seeds overlap.

    Returns:
        The splits `train` and `validation` with the columns `image` (PNG, RGB, decoded when read), `image_id` (such
        as "scene-000123.png", unique over both splits) and `captions` (five strings).

    Raises:
        ValueError: a number is negative, their sum is above one million, or `image_size` is below 32.
    """
    from datasets import DatasetDict

    if num_train < 0:
        raise ValueError(f"num_train must not be negative, got {num_train}")
    validation = validation_scenes(num_validation, seed)
    train = sample_scenes(num_validation + num_train, seed)[num_validation:]
    return DatasetDict(
        train=_build_split(train, num_validation, image_size, seed),
        validation=_build_split(validation, 0, image_size, seed),
    )


def _build_split(scenes: Sequence[Scene], start: int, image_size: int, seed: int) -> Dataset:
    """Render and describe `scenes`, numbered from `start` over both splits."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    images, captions = [], []
    for index, scene in enumerate(scenes, start):
        # One generator per scene and purpose, so that changes to the wording do not change the pictures.
        buffer = io.BytesIO()
        render(scene, Random(f"image-{seed}-{index}"), image_size).save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
        captions.append(describe_scene(scene, Random(f"captions-{seed}-{index}")))
    image_ids = [f"scene-{index:06d}.png" for index in range(start, start + len(scenes))]
    features = Features({"image": ImageFeature(), "image_id": Value("string"), "captions": [Value("string")]})
    return Dataset.from_dict({"image": images, "image_id": image_ids, "captions": captions}, features=features)
