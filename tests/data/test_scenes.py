"""The built-in dataset of small captioned scenes."""

import hashlib
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from modeling_miniclip.data import scenes as scenes_module
from modeling_miniclip.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    SHAPES,
    Scene,
    SceneObject,
    build_scenes,
    describe_pair,
    describe_scene,
    render,
    sample_scenes,
    swap_attributes,
    validation_scenes,
)

NUM_TRAIN, NUM_VALIDATION = 60, 40
# What captions may say, spelled out here again so that a slip in the module's own tables is noticed.
COLOUR_WORDS = {colour: colour for colour in COLOURS} | {"violet": "purple"}
SHAPE_WORDS = {shape: shape for shape in SHAPES} | {"disc": "circle", "hoop": "ring"}
SIZE_WORDS = {"small": "small", "tiny": "small", "little": "small", "large": "large", "big": "large"}
RELATION_WORDS = {
    "left of": "left of",
    "to the left of": "left of",
    "on the left of": "left of",
    "right of": "right of",
    "to the right of": "right of",
    "on the right of": "right of",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
    "beneath": "below",
}


def _any(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


MENTION = re.compile(rf"(an?|the) (?:({_any(SIZE_WORDS)}) )?({_any(COLOUR_WORDS)}) ({_any(SHAPE_WORDS)})\b")
RELATION = rf"(?:(?:is|sits|lies) )?({_any(RELATION_WORDS)})"


@pytest.fixture(scope="module")
def dataset():
    return build_scenes(NUM_TRAIN, NUM_VALIDATION, seed=3)


@pytest.fixture(scope="module")
def sample() -> list[Scene]:
    return sample_scenes(200, seed=5)


def _masks(scene: Scene, image: Image.Image) -> list[np.ndarray]:
    """Boolean masks (height, width) of the pixels that have nearly the colour of each object."""
    pixels = np.asarray(image, dtype=np.int64)
    return [np.abs(pixels - np.array(COLOURS[item.colour])).sum(axis=2) < 30 for item in scene.objects]


def _extent(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a mask in pixels."""
    rows, columns = np.nonzero(mask)
    return columns.min(), columns.max(), rows.min(), rows.max()


def _lies(first: np.ndarray, relation: str, second: np.ndarray) -> bool:
    """Whether the whole of one mask lies on the named side of the whole of another one."""
    before, after = (second, first) if relation in ("right of", "below") else (first, second)
    axis = 1 if relation in ("left of", "right of") else 0
    return np.nonzero(before)[axis].max() < np.nonzero(after)[axis].min()


# --- the set of scenes ---


def test_sampled_scenes_differ_and_cover_everything(sample):
    assert len(sample) == 200
    assert len(set(sample)) == 200
    for scene in sample:
        assert len({item.colour for item in scene.objects}) == len(scene.objects)
        assert len({item.shape for item in scene.objects}) == len(scene.objects)
    assert {len(scene.objects) for scene in sample} == {2, 3}
    assert {(scene.pair, scene.single) for scene in sample} == set(LAYOUTS)
    assert {scene.background for scene in sample} == set(BACKGROUNDS)
    items = [item for scene in sample for item in scene.objects]
    assert {item.colour for item in items} == set(COLOURS)
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.size for item in items} == {"small", "large"}


def test_repeated_draws_are_dropped():
    scenes = sample_scenes(5000, seed=0)  # about forty repetitions without the check
    assert len(scenes) == len(set(scenes)) == 5000


def test_a_sample_begins_like_a_longer_one():
    assert sample_scenes(10, seed=1) == sample_scenes(30, seed=1)[:10]
    assert sample_scenes(10, seed=1) != sample_scenes(10, seed=2)


def test_each_arrangement_has_one_form():
    objects = (SceneObject("red", "circle", "small"), SceneObject("blue", "square", "large"))
    assert Scene(objects, "left of", None, "white") == Scene(objects, "left of", None, "white")
    for pair, single in (("right of", None), ("below", None), ("left of", "above"), ("left of", "left of")):
        with pytest.raises(ValueError, match="layout"):
            Scene(objects, pair, single, "white")
    with pytest.raises(ValueError, match="background"):
        Scene(objects, "left of", None, "red")
    with pytest.raises(ValueError, match="unknown colour"):
        SceneObject("pink", "circle", "small")


@pytest.mark.parametrize("count", [-1, 10**9])
def test_impossible_counts_are_errors(count):
    with pytest.raises(ValueError, match="count"):
        sample_scenes(count, seed=0)
    with pytest.raises(ValueError):
        build_scenes(num_train=count, num_validation=2)


# --- pictures ---


@pytest.mark.parametrize("image_size", [48, 64])
def test_pictures_show_what_the_scene_says(sample, image_size):
    for index, scene in enumerate(sample):
        image = render(scene, random.Random(index), image_size)
        assert image.mode == "RGB" and image.size == (image_size, image_size)
        masks = _masks(scene, image)
        areas = [mask.sum() for mask in masks]
        assert min(areas) >= 3, scene
        assert _lies(masks[0], scene.pair, masks[1]), scene
        if scene.single is not None:
            assert _lies(masks[2], scene.single, masks[0]) and _lies(masks[2], scene.single, masks[1]), scene
        for item, area in zip(scene.objects, areas, strict=True):
            for other, other_area in zip(scene.objects, areas, strict=True):
                if item.size == "large" and other.size == "small":
                    assert area > 1.15 * other_area, scene


def test_nothing_touches_the_border_or_another_object(sample):
    for index, scene in enumerate(sample):
        pixels = np.asarray(render(scene, random.Random(index)), dtype=np.int64)
        painted = np.abs(pixels - np.array(BACKGROUNDS[scene.background])).sum(axis=2) > 0
        assert painted.any()
        assert not (painted[0].any() or painted[-1].any() or painted[:, 0].any() or painted[:, -1].any()), scene
        assert _count_blobs(painted) == len(scene.objects), scene


def _count_blobs(mask: np.ndarray) -> int:
    """Counts the connected parts (also over corners) of a mask."""
    left = {(int(row), int(column)) for row, column in zip(*np.nonzero(mask), strict=True)}
    blobs = 0
    while left:
        blobs += 1
        stack = [left.pop()]
        while stack:
            row, column = stack.pop()
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
    return blobs


def test_shapes_look_different():
    """Each shape, drawn at the same place, differs from each other one in many pixels."""
    pictures = []
    for shape in SHAPES:
        other = SceneObject("blue", "square", "small")
        scene = Scene((SceneObject("red", shape, "small"), other), "left of", None, "white")
        pictures.append(_masks(scene, render(scene, random.Random(0)))[0])
    for i in range(len(SHAPES)):
        for j in range(i):
            differing = (pictures[i] != pictures[j]).sum()
            assert differing > 0.15 * max(pictures[i].sum(), pictures[j].sum()), (SHAPES[i], SHAPES[j])


def test_jitter_comes_from_the_generator(sample):
    scene = sample[0]
    first, again, other = (render(scene, random.Random(seed)).tobytes() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_too_small_pictures_are_an_error(sample):
    with pytest.raises(ValueError, match="at least 32"):
        render(sample[0], random.Random(0), 31)


# --- captions ---


def _mentions(caption: str) -> list[tuple[str | None, str, str]]:
    """The objects a caption names, as (size or None, colour, shape) in canonical words."""
    return [
        (SIZE_WORDS.get(size), COLOUR_WORDS[colour], SHAPE_WORDS[shape])
        for _, size, colour, shape in MENTION.findall(caption)
    ]


def test_five_different_captions_name_every_object(sample):
    for index, scene in enumerate(sample):
        captions = describe_scene(scene, random.Random(index))
        assert len(captions) == 5 and len(set(captions)) == 5
        with_sizes = with_background = 0
        name = re.compile(scene.background.replace("pale", "(pale|light)"))
        for caption in captions:
            assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", caption), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
            mentions = _mentions(caption)
            named = {(colour, shape) for _, colour, shape in mentions}
            assert named == {(item.colour, item.shape) for item in scene.objects}, caption
            sizes = {(size, colour, shape) for size, colour, shape in mentions if size}
            expected = {(item.size, item.colour, item.shape) for item in scene.objects}
            assert not sizes or sizes == expected, caption
            with_sizes += bool(sizes)
            assert ("background" in caption) == bool(name.search(caption)), caption
            with_background += "background" in caption
        assert (with_sizes, with_background) == (4, 4)


def _claims(caption: str) -> tuple[dict[str, tuple[str, str]], list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Reads a caption: objects by letter, relations as (letter, relation, letter) and places as (letter, place)."""
    letters: dict[tuple[str, str], str] = {}

    def to_letter(match: re.Match) -> str:
        key = (COLOUR_WORDS[match[3]], SHAPE_WORDS[match[4]])
        return letters.setdefault(key, "ABCD"[len(letters)])

    text = MENTION.sub(to_letter, caption)
    relations = []
    for first, relation, second, third in re.findall(rf"([ABC]) {RELATION} ([ABC])(?: and ([ABC]))?", text):
        relations += [(first, RELATION_WORDS[relation], other) for other in (second, third) if other]
    for first, second, relation in re.findall(rf"([ABC]) and ([ABC]), with the former {RELATION} the latter", text):
        relations.append((first, RELATION_WORDS[relation], second))
    for first, relation in re.findall(rf"([ABC]) {RELATION} (?:them|both)", text):
        relations += [(first, RELATION_WORDS[relation], other) for other in letters.values() if other != first]
    # "on the left of" is a relation, "on the left" a place
    places = re.findall(r"([ABC]) (?:on|at) the ((?:top |bottom )?(?:left|right)|top|bottom)\b(?! of)", text)
    return {letter: key for key, letter in letters.items()}, relations, places


def test_what_captions_say_is_true_of_the_pixels(sample):
    for index, scene in enumerate(sample):
        masks = _masks(scene, render(scene, random.Random(index)))
        by_name = {(item.colour, item.shape): mask for item, mask in zip(scene.objects, masks, strict=True)}
        for caption in describe_scene(scene, random.Random(index)):
            objects, relations, places = _claims(caption)
            for first, relation, second in relations:
                assert _lies(by_name[objects[first]], relation, by_name[objects[second]]), caption
            for letter, place in places:
                left, right, top, bottom = _extent(by_name[objects[letter]])
                sides = {"left": left + right < 63, "right": left + right > 63}
                sides |= {"top": top + bottom < 63, "bottom": top + bottom > 63}
                assert all(sides[word] for word in place.split()), caption
            # the whole arrangement: one relation for two objects, three for three, or a place for each object
            assert len(places) == len(objects) or len(set(relations)) == (1 if len(objects) == 2 else 3), caption


def test_captions_tell_scenes_apart(sample):
    captions = [
        caption for index, scene in enumerate(sample) for caption in describe_scene(scene, random.Random(index))
    ]
    assert len(set(captions)) == len(captions)


# --- swapped scenes ---


def test_swap_changes_captions_and_picture_but_no_words(sample):
    for index, scene in enumerate(sample):
        swapped = swap_attributes(scene, random.Random(index))
        assert swapped != scene
        assert render(swapped, random.Random(0)).tobytes() != render(scene, random.Random(0)).tobytes()
        true, false = describe_pair(scene, swapped, random.Random(index))
        assert true == describe_scene(scene, random.Random(index))
        assert false == describe_scene(swapped, random.Random(index))
        for caption, wrong in zip(true, false, strict=True):
            assert caption != wrong
            bags = [
                Counter("a" if word == "an" else word for word in re.findall("[a-z]+", s)) for s in (caption, wrong)
            ]
            assert bags[0] == bags[1], (caption, wrong)
            assert set(_mentions(caption)) != set(_mentions(wrong)), (caption, wrong)


def test_swap_exchanges_the_colours_of_two_objects():
    red, blue = SceneObject("red", "circle", "small"), SceneObject("blue", "square", "large")
    scene = Scene((red, blue), "left of", None, "white")
    swapped = swap_attributes(scene, random.Random(0))
    assert swapped.objects == (SceneObject("blue", "circle", "small"), SceneObject("red", "square", "large"))
    assert (swapped.pair, swapped.single, swapped.background) == ("left of", None, "white")


def test_swap_falls_back_to_shapes_and_sizes():
    item = SceneObject("red", "circle", "small")
    for change in ({"shape": "star"}, {"size": "large"}):
        scene = Scene((item, replace(item, **change)), "above", None, "white")
        assert swap_attributes(scene, random.Random(0)).objects == scene.objects[::-1]
    with pytest.raises(ValueError, match="alike"):
        swap_attributes(Scene((item, item), "above", None, "white"), random.Random(0))


def test_describe_pair_needs_equal_layouts(sample):
    other = next(scene for scene in sample if scene.pair != sample[0].pair)
    with pytest.raises(ValueError, match="layout"):
        describe_pair(sample[0], other, random.Random(0))


# --- the dataset ----


def test_columns_and_features(dataset):
    import datasets

    assert list(dataset) == ["train", "validation"]
    assert (len(dataset["train"]), len(dataset["validation"])) == (NUM_TRAIN, NUM_VALIDATION)
    image_ids = []
    for split in dataset.values():
        assert split.column_names == ["image", "image_id", "captions"]
        assert split.features["image"] == datasets.Image()
        assert split.features["image_id"] == datasets.Value("string")
        assert split.features["captions"].feature == datasets.Value("string")
        assert all(len(captions) == 5 for captions in split["captions"])
        image_ids += split["image_id"]
        assert split.cache_files == []  # in memory, nothing on disk
    assert len(set(image_ids)) == NUM_TRAIN + NUM_VALIDATION
    assert all(re.fullmatch(r"scene-\d{6}\.png", image_id) for image_id in image_ids)


def test_images_are_png_bytes_decoded_lazily(dataset):
    import datasets

    stored = dataset["train"].cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert stored["bytes"].startswith(b"\x89PNG")
    image = dataset["train"][0]["image"]
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB" and image.size == (64, 64)
    assert build_scenes(1, 1, image_size=48)["train"][0]["image"].size == (48, 48)


def test_splits_share_no_scene(dataset):
    """Reads the scenes back from the captions, so that a mistake in assembling the splits would show."""
    scenes = sample_scenes(NUM_TRAIN + NUM_VALIDATION, seed=3)
    validation = validation_scenes(NUM_VALIDATION, seed=3)
    assert not set(validation) & set(scenes[NUM_VALIDATION:])
    rows = list(dataset["validation"]) + list(dataset["train"])
    for scene, row in zip(validation + scenes[NUM_VALIDATION:], rows, strict=True):
        for caption in row["captions"]:
            named = {(colour, shape) for _, colour, shape in _mentions(caption)}
            assert named == {(item.colour, item.shape) for item in scene.objects}
        masks = _masks(scene, row["image"])
        assert _lies(masks[0], scene.pair, masks[1])
    images = [{row["image"].tobytes() for row in dataset[split]} for split in ("train", "validation")]
    assert not images[0] & images[1]


def test_validation_ignores_the_number_of_training_scenes(dataset):
    other = build_scenes(5, NUM_VALIDATION, seed=3)
    assert _digest(other["validation"]) == _digest(dataset["validation"])
    assert other["train"]["captions"][:] == dataset["train"]["captions"][:5]
    assert _digest(build_scenes(5, NUM_VALIDATION, seed=4)["validation"]) != _digest(dataset["validation"])


def _digest(split) -> str:
    digest = hashlib.sha256()
    for row in split:
        digest.update(row["image"].tobytes() + repr((row["image_id"], row["captions"])).encode())
    return digest.hexdigest()


# The module alone, on a stand-in for `datasets` that keeps the columns: importing the library takes a second.
CHILD = """
import hashlib, importlib.util, sys
from types import SimpleNamespace
columns = SimpleNamespace(from_dict=lambda columns, features: columns)
library = {"Dataset": columns, "DatasetDict": dict, "Features": dict, "Image": object, "Value": str}
sys.modules["datasets"] = SimpleNamespace(**library)
spec = importlib.util.spec_from_file_location("scenes_alone", sys.argv[1])
module = sys.modules["scenes_alone"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules, "importing the module imports torch"
tables = list(module.build_scenes(4, 2, seed=7).values())
print(hashlib.sha256(repr(tables).encode()).hexdigest())
"""


def test_same_bytes_in_every_process():
    """The other process has another hash seed, and so another order of sets."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(scenes_module.__file__)],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    tables = [split.data.to_pydict() for split in build_scenes(4, 2, seed=7).values()]
    assert child.stdout.strip() == hashlib.sha256(repr(tables).encode()).hexdigest()
