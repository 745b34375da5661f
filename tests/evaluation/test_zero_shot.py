"""Zero-shot classification: class embeddings, scores, accuracy and errors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_miniclip import (
    DataError,
    MiniClipModel,
    MiniClipProcessor,
    UsageError,
    classify,
    encode_images,
    encode_texts,
    zero_shot_accuracy,
    zero_shot_weights,
)
from modeling_miniclip.evaluation.zero_shot import PROMPT_TEMPLATES
from tests.helpers.towers import PIXELS, tiny_model, tiny_processor

NAMES = ["red dog", "boat", "yellow ball", "rock", "child", "lake", "beach"]


@pytest.fixture(scope="module")
def model() -> MiniClipModel:
    torch.manual_seed(0)
    return tiny_model(text_pooling="mean")


@pytest.fixture(scope="module")
def processor() -> MiniClipProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (PIXELS + i, 40, 3), dtype=np.uint8)) for i in range(9)]


def axes(count: int, dim: int = 16) -> torch.Tensor:
    """The first basis vectors, as embeddings of `count` classes."""
    return torch.eye(count, dim)


class Embeds(torch.nn.Module):
    """Stand-in for a model that embeds vectors as themselves, with temperature 1/10."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.config = type("Config", (), {"projection_dim": dim, "name_or_path": ""})
        self.device = torch.device("cpu")

    def inverse_temperature(self) -> torch.Tensor:
        return torch.tensor([10.0])


@pytest.fixture
def given_embeddings(monkeypatch: pytest.MonkeyPatch) -> Embeds:
    """A stand-in model, and `encode_images` that returns the images as embeddings."""
    monkeypatch.setattr(
        "modeling_miniclip.evaluation.zero_shot.encode_images", lambda model, images, *rest: torch.stack([*images])
    )
    return Embeds()


# --- class embeddings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("templates", PROMPT_TEMPLATES)
def test_class_is_normalised_mean_of_its_sentences(
    model: MiniClipModel, processor: MiniClipProcessor, templates: Any
) -> None:
    weights = zero_shot_weights(model, NAMES, templates, processor)
    assert weights.shape == (7, 16) and weights.dtype == torch.float32
    for name, found in zip(NAMES, weights.double().numpy(), strict=True):
        total = np.zeros(16)
        for sentence in PROMPT_TEMPLATES[templates]:
            with torch.no_grad():
                text = processor(text=sentence.replace("{}", name), return_tensors="pt")
                feature = model.get_text_features(**text).pooler_output[0].double().numpy()
            total += feature / np.linalg.norm(feature)
        np.testing.assert_allclose(found, total / np.linalg.norm(total), atol=1e-5)


def test_one_template_gives_plain_text_embeddings(model: MiniClipModel, processor: MiniClipProcessor) -> None:
    plain = encode_texts(model, [f"a photo of a {name}." for name in NAMES], processor, progress=False)
    for templates in ("photo", "a photo of a {}.", ["a photo of a {}."], ("a photo of a {}.",) * 3):
        found = zero_shot_weights(model, NAMES, templates, processor, batch_size=3)
        torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)


def test_rows_follow_classes_whatever_the_template_order(model: MiniClipModel, processor: MiniClipProcessor) -> None:
    weights = zero_shot_weights(model, NAMES, "ensemble", processor)
    turned = zero_shot_weights(model, NAMES[::-1], PROMPT_TEMPLATES["ensemble"][::-1], processor)
    torch.testing.assert_close(turned, weights.flip(0), atol=1e-6, rtol=0)
    assert not torch.allclose(weights, zero_shot_weights(model, NAMES, "photo", processor), atol=1e-3)


def test_built_in_templates_are_valid_and_distinct() -> None:
    for name, sentences in PROMPT_TEMPLATES.items():
        assert len(sentences) == len(set(sentences)) >= 1, name
        assert all(sentence.count("{}") == 1 and sentence.format("dog") for sentence in sentences)
    assert len(PROMPT_TEMPLATES["ensemble"]) > 3


def test_braces_in_a_class_name_stay(model: MiniClipModel, processor: MiniClipProcessor) -> None:
    found = zero_shot_weights(model, ["{x}", "b{}"], "a {}", processor)
    assert torch.equal(found, zero_shot_weights(model, ["a {x}", "a b{}"], "{}", processor))


# --- classify -------------------------------------------------------------------------------------------------------


def test_scores_are_sorted_softmax_over_all_classes(
    model: MiniClipModel, processor: MiniClipProcessor, images: list[Image.Image]
) -> None:
    with torch.no_grad():
        inputs = processor(images=images, text=[f"a photo of a {n}." for n in NAMES], return_tensors="pt")
        expected = model(**inputs).logits_per_image.softmax(dim=-1).numpy()
    found = classify(model, images, NAMES, "photo", processor=processor, top_k=3, batch_size=4)
    assert len(found) == len(images)
    for row, probabilities in zip(found, expected, strict=True):
        best = np.argsort(-probabilities, kind="stable")[:3]
        assert [item["label"] for item in row] == [NAMES[i] for i in best]
        assert [item["score"] for item in row] == pytest.approx(probabilities[best].tolist(), abs=1e-5)
        assert all(type(item["score"]) is float for item in row)
    everything = classify(model, images, NAMES, "photo", processor=processor, top_k=99)
    assert all(sum(item["score"] for item in row) == pytest.approx(1) for row in everything)
    assert {len(row) for row in everything} == {7}
    assert {len(row) for row in classify(model, images[:2], NAMES, processor=processor)} == {5}


def test_scores_worked_by_hand(given_embeddings: Embeds) -> None:
    # cosines 0.6, 0.8 and 0 times the inverse temperature 10: exp(6), exp(8), exp(0)
    image = 0.6 * axes(3)[0] + 0.8 * axes(3)[1]
    found = classify(given_embeddings, [image], ["a", "b", "c"], weights=axes(3))
    total = math.exp(6) + math.exp(8) + 1
    assert [item["label"] for item in found[0]] == ["b", "a", "c"]
    assert [item["score"] for item in found[0]] == pytest.approx([math.exp(8) / total, math.exp(6) / total, 1 / total])


def test_weights_can_be_reused(
    model: MiniClipModel, processor: MiniClipProcessor, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = zero_shot_weights(model, NAMES, "ensemble", processor)
    expected = classify(model, images, NAMES, "ensemble", processor=processor)
    monkeypatch.setattr("modeling_miniclip.evaluation.zero_shot.encode_texts", None)
    assert classify(model, images, NAMES, weights=weights, processor=processor) == expected


def test_ties_keep_the_class_order(given_embeddings: Embeds) -> None:
    names = [f"class {i}" for i in range(40)]
    found = classify(given_embeddings, [axes(1)[0]], names, weights=axes(1).expand(40, 16), top_k=40)
    assert [item["label"] for item in found[0]] == names


def test_model_stays_in_its_mode(processor: MiniClipProcessor, images: list[Image.Image]) -> None:
    model = tiny_model(projection_depth=2, projection_dropout=0.5).train()
    first = classify(model, images, NAMES, processor=processor)
    assert first == classify(model, images, NAMES, processor=processor)
    assert all(module.training for module in model.modules())


# --- accuracy -------------------------------------------------------------------------------------------------------


def test_accuracy_worked_by_hand(given_embeddings: Embeds) -> None:
    names = list("abcdefg")
    # similarity to class i falls with i: a is first, g is seventh
    image = torch.linspace(1, 0.1, 16)
    labels = ["a", "b", "c", "e", "f", "g", "a", "d"]  # two are first, six among the first five
    found = zero_shot_accuracy(given_embeddings, [image] * 8, labels, names, weights=axes(7))
    assert found == pytest.approx({"top-1": 25.0, "top-5": 75.0})
    indices = [names.index(label) for label in labels]
    for form in (indices, np.array(indices), torch.tensor(indices)):
        assert zero_shot_accuracy(given_embeddings, [image] * 8, form, names, weights=axes(7)) == found
    other = zero_shot_accuracy(given_embeddings, [image] * 8, labels, names, weights=axes(7), top_k=(2, 6))
    assert other == pytest.approx({"top-2": 37.5, "top-6": 87.5})


def test_accuracy_equals_counting_ranks(
    model: MiniClipModel, processor: MiniClipProcessor, images: list[Image.Image]
) -> None:
    rng = np.random.default_rng(1)
    labels = [NAMES[i] for i in rng.integers(0, 7, len(images))]
    found = zero_shot_accuracy(model, images, labels, NAMES, "photo", processor=processor, progress=False)
    ranked = classify(model, images, NAMES, "photo", processor=processor, top_k=7)
    places = [[item["label"] for item in row].index(label) for row, label in zip(ranked, labels, strict=True)]
    expected = {f"top-{k}": 100 * sum(place < k for place in places) / len(places) for k in (1, 5)}
    assert found == pytest.approx(expected) and 0 < found["top-5"] < 100


def test_ties_and_nan_count_against_the_model(given_embeddings: Embeds) -> None:
    names = list("abcdefg")
    alike = axes(1).expand(7, 16)  # all classes are equal
    assert zero_shot_accuracy(given_embeddings, [axes(1)[0]] * 3, [0, 3, 6], names, weights=alike) == {
        "top-1": 0.0,
        "top-5": 0.0,
    }
    pair = torch.cat([axes(6), axes(1)])  # a and g tie before all others: each is second
    found = zero_shot_accuracy(given_embeddings, [axes(1)[0]] * 2, ["a", "g"], names, weights=pair, top_k=(1, 2))
    assert found == {"top-1": 0.0, "top-2": 100.0}
    broken = torch.full((16,), torch.nan)
    assert zero_shot_accuracy(given_embeddings, [broken], ["a"], names, weights=axes(7))["top-5"] == 0


@pytest.mark.parametrize(("classes", "keys"), [(2, ["top-1"]), (5, ["top-1"]), (6, ["top-1", "top-5"])])
def test_top_5_needs_more_than_five_classes(given_embeddings: Embeds, classes: int, keys: list[str]) -> None:
    names = [f"class {i}" for i in range(classes)]
    found = zero_shot_accuracy(given_embeddings, [axes(1)[0]], [0], names, weights=axes(classes))
    assert list(found) == keys and set(found.values()) == {100.0}


def test_data_set_split_gives_images_and_labels(
    model: MiniClipModel, processor: MiniClipProcessor, images: list[Image.Image]
) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    split = Dataset.from_dict({"image": images, "label": [i % 7 for i in range(9)]}, features=features)
    names = split.features["label"].names
    found = zero_shot_accuracy(model, split, split["label"], names, processor=processor, progress=False)
    expected = zero_shot_accuracy(model, images, [NAMES[i % 7] for i in range(9)], NAMES, processor=processor)
    assert found == expected


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        ([], "at least one name"),
        ("dog", "list of at least one name.*'dog'"),
        (["dog", 5], "list of at least one name"),
        (["dog", " "], r"class_names\[1\] is empty"),
        (["dog", "cat", "dog"], "'dog' more than once"),
    ],
)
def test_bad_class_names_fail_before_encoding(model: MiniClipModel, class_names: Any, message: str) -> None:
    for call in (
        lambda: zero_shot_weights(model, class_names),  # without a processor nothing can be encoded
        lambda: classify(model, ["no.png"], class_names),
        lambda: zero_shot_accuracy(model, ["no.png"], [0], class_names),
    ):
        with pytest.raises(UsageError, match=message):
            call()


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("a photo", "'a photo': expected a sentence with one {}.*photo, pipeline, ensemble"),
        ("a {} and a {}", "one {}"),
        ("a {name}", "one {}"),
        ("a {0}", "one {}"),
        ("a {", "one {}"),
        (["a {}", "ensemble"], "'ensemble'"),
        ([lambda name: name], "one {}"),
        ([], "templates is empty"),
    ],
)
def test_bad_templates_are_rejected(model: MiniClipModel, templates: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        zero_shot_weights(model, NAMES, templates)
    with pytest.raises(UsageError, match=message):
        classify(model, ["no.png"], NAMES, templates)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": ["a", "x"]}, DataError, r"labels\[1\] is 'x'.*from 0 to 5"),
        ({"labels": [0, -1]}, DataError, r"labels\[1\] is -1"),
        ({"labels": [6, 0]}, DataError, r"labels\[0\] is 6"),
        ({"labels": ["a"]}, DataError, "2 images but 1 labels"),
        ({"images": (v for v in axes(2)), "labels": ["a"] * 3}, DataError, "2 images but 3 labels"),
        ({"top_k": (0, 1)}, UsageError, r"top_k \(0, 1\) with 6 classes"),
        ({"top_k": (6,)}, UsageError, r"top_k \(6,\) with 6 classes"),
        ({"top_k": ()}, UsageError, r"top_k \(\) with 6 classes"),
        ({"weights": axes(5)}, UsageError, r"\(5, 16\).*6 classes.*\(6, 16\)"),
        ({"weights": axes(6, 9)}, UsageError, r"\(6, 9\).*zero_shot_weights"),
    ],
)
def test_accuracy_rejects_bad_arguments(
    given_embeddings: Embeds, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"images": list(axes(2)), "labels": ["a", "b"], "class_names": list("abcdef"), "weights": axes(6)}
    with pytest.raises(error, match=message):
        zero_shot_accuracy(given_embeddings, **(given | arguments))


def test_classify_rejects_bad_arguments(
    model: MiniClipModel, processor: MiniClipProcessor, images: list[Image.Image]
) -> None:
    with pytest.raises(UsageError, match="top_k must be at least 1, not 0"):
        classify(model, images, NAMES, processor=processor, top_k=0)
    with pytest.raises(DataError, match=r"no\.png"):
        classify(model, ["no.png"], NAMES, processor=processor)
    with pytest.raises(ValueError, match="pass processor="):
        classify(model, images, NAMES)


def test_classify_embeds_images_like_encode_images(
    model: MiniClipModel, processor: MiniClipProcessor, images: list[Image.Image]
) -> None:
    weights = torch.nn.functional.normalize(encode_images(model, images, processor, progress=False)[:7], dim=-1)
    found = classify(model, images[:7], NAMES, weights=weights, top_k=1, processor=processor)
    assert [row[0]["label"] for row in found] == NAMES  # each image is most similar to itself


def test_weights_and_labels_may_be_arrays_lists_or_tensors(
    model: MiniClipModel, processor: MiniClipProcessor, images: list[Image.Image]
) -> None:
    weights, given = zero_shot_weights(model, NAMES, processor=processor), {"processor": processor, "progress": False}
    expected = classify(model, images, NAMES, weights=weights, **given)
    labels = [i % len(NAMES) for i in range(len(images))]
    accuracy = zero_shot_accuracy(model, images, labels, NAMES, weights=weights, **given)
    for form in (weights.numpy(), weights.tolist(), list(weights)):
        assert classify(model, images, NAMES, weights=form, **given) == expected
        for same in (np.array(labels), torch.tensor(labels), list(torch.tensor(labels)), [NAMES[i] for i in labels]):
            assert zero_shot_accuracy(model, images, same, NAMES, weights=form, **given) == accuracy


def test_classes_and_images_may_be_cut_short(
    model: MiniClipModel, processor: MiniClipProcessor, images: list[Image.Image]
) -> None:
    given: dict[str, Any] = {"processor": processor, "progress": False, "truncate_dim": 5}
    weights = zero_shot_weights(model, NAMES, "photo", **given)
    texts = encode_texts(model, [f"a photo of a {name}." for name in NAMES], **given)
    torch.testing.assert_close(weights, texts)
    best = (encode_images(model, images, **given) @ weights.T).argmax(dim=1).tolist()
    found = classify(model, images, NAMES, weights=weights, top_k=1, **given)
    assert [row[0]["label"] for row in found] == [NAMES[i] for i in best]
    assert classify(model, images, NAMES, "photo", top_k=1, **given) == found
    assert zero_shot_accuracy(model, images, best, NAMES, weights=weights, **given)["top-1"] == 100
    with pytest.raises(UsageError, match=r"\(7, 16\).*the same truncate_dim"):
        classify(model, images, NAMES, weights=weights, processor=processor)
