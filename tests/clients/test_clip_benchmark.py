"""CLIP_benchmark's own evaluation functions, on a model of the package, give the package's figures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modeling_miniclip import MiniClipModel, MiniClipProcessor, encode_texts, retrieval_metrics
from tests.clients.cases import Case

TEMPLATES = ["a picture of {c}", "{c}", "this image shows {c}"]


class Adapter:
    """A model as CLIP_benchmark calls it: `encode_image` of pixels, `encode_text` of what `tokenize` returns."""

    def __init__(self, case: Case):
        self.model = MiniClipModel.from_pretrained(case.export)
        self.processor = MiniClipProcessor.from_pretrained(case.export)

    def tokenize(self, texts: list[str]) -> Any:
        return self.processor(text=texts, return_tensors="pt")

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def encode_text(self, tokens: Any) -> Tensor:
        return self.model.get_text_features(**tokens).pooler_output


class Labelled(Dataset):
    """The images of a case with their pixels; which of `classes` an image shows is what its captions name."""

    classes = ["red", "blue", "green", "black", "dog", "man"]

    def __init__(self, case: Case, adapter: Adapter):
        self.pixels = adapter.processor(images=case.images, return_tensors="pt")["pixel_values"]
        named = [set(" ".join(row).lower().split()) for row in case.captions]
        self.classes = [name for name in self.classes if any(name in words for words in named)]
        self.labels = torch.tensor([[name in words for name in self.classes] for words in named]).float()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index], self.labels[index]


@pytest.fixture
def adapter(case: Case) -> Adapter:
    return Adapter(case)


def test_its_recall_is_that_of_retrieval_metrics(
    case: Case, adapter: Adapter, compared: Callable[[str], None]
) -> None:
    pixels = adapter.processor(images=case.images, return_tensors="pt")["pixel_values"]
    batches = list(zip(pixels.split(6), [case.captions[i : i + 6] for i in range(0, len(pixels), 6)], strict=True))
    theirs = zeroshot_retrieval.evaluate(adapter, batches, adapter.tokenize, "cpu", False, [1, 5, 10])
    ours = retrieval_metrics(case.image_embeds, case.text_embeds, case.rows)
    pairs = {
        f"{direction}_R@{k}": (ours[f"{direction}_R@{k}"], 100 * theirs[f"{name}_retrieval_recall@{k}"])
        for direction, name in (("text_to_image", "image"), ("image_to_text", "text"))
        for k in (1, 5, 10)
    }
    figures = ", ".join(f"{key} {our:.2f} / {their:.2f}" for key, (our, their) in pairs.items())
    compared(f"CLIP_benchmark retrieval, {len(pixels)} images, package / CLIP_benchmark: {figures}")
    assert len({our for our, _ in pairs.values()}) > 2  # figures that differ: equal ones could be all or nothing
    for our, their in pairs.values():
        assert our == pytest.approx(their, abs=1e-4)


def test_zero_shot_logits_and_precision_equal_own_computation(
    case: Case, adapter: Adapter, compared: Callable[[str], None]
) -> None:
    """Several classes an image: for one class its `accuracy` takes `float()` of an array, which numpy 2.4 refuses."""
    labelled = Labelled(case, adapter)
    loader = DataLoader(labelled, batch_size=6)
    arguments = (adapter.tokenize, labelled.classes, TEMPLATES, "cpu", False)
    classifier = zeroshot_classification.zero_shot_classifier(adapter, *arguments)
    logits, labels = zeroshot_classification.run_classification(adapter, classifier, loader, "cpu", False)
    theirs = zeroshot_classification.evaluate(adapter, loader, *arguments)["mean_average_precision"]
    prompts = [template.format(c=name) for name in labelled.classes for template in TEMPLATES]
    texts = encode_texts(adapter.model, prompts, adapter.processor, progress=False)
    means = torch.nn.functional.normalize(texts.unflatten(0, (-1, len(TEMPLATES))).mean(dim=1), dim=-1)
    cosines = case.image_embeds @ means.T  # [images, classes]
    ours = average_precision_score(labelled.labels.numpy(), cosines.numpy(), average="macro")
    difference = (100 * cosines - logits).abs().max().item()
    compared(
        f"CLIP_benchmark zero-shot, {len(labelled)} images, {len(labelled.classes)} classes: largest difference of "
        f"100 x cosine {difference:.1e}; mean average precision, package / CLIP_benchmark: {ours:.5f} / {theirs:.5f}"
    )
    assert len(labelled.classes) >= 4 and torch.equal(labels, labelled.labels)
    assert difference <= 1e-3
    assert theirs == pytest.approx(ours, abs=1e-5)
