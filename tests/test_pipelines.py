"""transformers' pipelines on an exported folder: what they return is what the model's own calls return."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_miniclip import MiniClipModel, MiniClipProcessor, classify, export
from tests.helpers.hubs import WITHOUT_PACKAGE, run
from tests.helpers.towers import tiny_model, tiny_processor, with_slow

LABELS = ["red dog", "white boat on a blue lake", "child"]
TEXTS = ["a red dog runs", "two children play with a yellow ball on the beach", "a boat"]
BATCHED = {"pool": True, "batch_size": 2}


@pytest.fixture(scope="module", params=with_slow([("resnet", "distilbert")], [(("vit", "bert"),)]), ids="-".join)
def folder(request: Any, tmp_path_factory: Any) -> Path:
    """An export. Its tokenizer is BERT's, which by itself gives token types, of no use to the model."""
    torch.manual_seed(0)
    model = tiny_model(*request.param, text_pooling="mean")
    return export(model, tiny_processor(), tmp_path_factory.mktemp("pipelines") / "export")


@pytest.fixture(scope="module")
def images(tmp_path_factory: Any) -> list[Path]:
    """Three photographs of noise, larger than the tower's input."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (50 + i, 70, 3), dtype=np.uint8)).save(path)
    return paths


@torch.no_grad()
def own_outputs(folder: Path, images: list[Path], template: str = "This is a photo of {}.") -> dict[str, Any]:
    """Embeddings and probabilities by the model and the processor, with the backend that pipelines select."""
    model = MiniClipModel.from_pretrained(folder)
    processor = MiniClipProcessor.from_pretrained(folder, backend="torchvision")
    pixels = processor(images=images, return_tensors="pt")
    labels = processor(text=[template.format(label) for label in LABELS], return_tensors="pt")
    return {
        "image": model(**pixels).image_embeds.numpy(),
        "text": np.stack([model(**processor(text=t, return_tensors="pt")).text_embeds[0].numpy() for t in TEXTS]),
        "probabilities": model(**pixels, **labels).logits_per_image.softmax(dim=-1).numpy(),
    }


def by_label(rows: list[list[dict[str, Any]]]) -> np.ndarray:
    """`[images, LABELS]` scores of a zero-shot pipeline's answer."""
    return np.array([[next(i["score"] for i in row if i["label"] == label) for label in LABELS] for row in rows])


@pytest.mark.parametrize("options", with_slow([{}, BATCHED], [{"pool": True}]))
def test_image_feature_extraction_returns_the_unit_norm_embedding(folder, images, options):
    extract = pipeline("image-feature-extraction", model=str(folder))
    assert type(extract.model) is MiniClipModel  # not the code in the folder
    expected = own_outputs(folder, images)["image"]
    for form in ([str(path) for path in images], [Image.open(path) for path in images]):
        found = np.array(extract(form, **options))
        assert found.shape == (3, 1, 16)
        np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    one = extract(str(images[1]), return_tensors=True, **options)
    assert one.shape == (1, 16)
    torch.testing.assert_close(one, torch.from_numpy(expected[1:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("options", with_slow([{"batch_size": 3}], [{}, {"truncation": True}]))
def test_feature_extraction_returns_unit_norm_text_embedding(folder, images, options):
    extract = pipeline("feature-extraction", model=str(folder))
    assert set(extract.preprocess("a dog")) == {"input_ids", "attention_mask"}
    found = np.array(extract(TEXTS, **options))
    assert found.shape == (3, 1, 16)
    np.testing.assert_allclose(found[:, 0], own_outputs(folder, images)["text"], atol=1e-5)
    assert extract("a dog", return_tensors=True).shape == (1, 16)


def test_feature_extraction_truncates_at_the_towers_limit(folder):
    extract = pipeline("feature-extraction", model=str(folder))
    processor = MiniClipProcessor.from_pretrained(folder)
    with pytest.warns(UserWarning, match="truncated to 24 tokens"), torch.no_grad():
        inputs = processor(text="a red dog " * 20, return_tensors="pt")
        expected = MiniClipModel.from_pretrained(folder)(**inputs).text_embeds
    found = extract("a red dog " * 20, truncation=True, return_tensors=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", ["This is a photo of {}.", "{}"])
def test_zero_shot_pipeline_equals_model_and_classify(folder, images, template):
    ask = pipeline("zero-shot-image-classification", model=str(folder))
    found = ask([str(path) for path in images], candidate_labels=LABELS, hypothesis_template=template)
    np.testing.assert_allclose(by_label(found), own_outputs(folder, images, template)["probabilities"], atol=1e-5)
    assert all([item["score"] for item in row] == sorted((i["score"] for i in row), reverse=True) for row in found)
    model = MiniClipModel.from_pretrained(folder)
    processor = MiniClipProcessor.from_pretrained(folder, backend="torchvision")
    ours = classify(model, images, LABELS, template, processor=processor)
    np.testing.assert_allclose(by_label(ours), by_label(found), atol=1e-5)
    if template == "This is a photo of {}.":  # is what the pipeline says unasked, and a set of templates of ours
        unasked = ask([str(path) for path in images], candidate_labels=LABELS)
        np.testing.assert_allclose(by_label(unasked), by_label(found), atol=1e-6)
        named = classify(model, images, LABELS, "pipeline", processor=processor)
        np.testing.assert_allclose(by_label(named), by_label(found), atol=1e-5)
    # With the processor's own PIL backend the pixels are up to 2 of 255 steps others, the answer hardly.
    np.testing.assert_allclose(by_label(classify(model, images, LABELS, template)), by_label(found), atol=0.05)


def test_pipeline_accepts_the_processors_backend(folder, images):
    processor = MiniClipProcessor.from_pretrained(folder)
    extract = pipeline("image-feature-extraction", model=str(folder), image_processor=processor.image_processor)
    with torch.no_grad():
        inputs = processor(images=images[0], return_tensors="pt")
        expected = MiniClipModel.from_pretrained(folder)(**inputs).image_embeds
    torch.testing.assert_close(extract(str(images[0]), return_tensors=True), expected, atol=1e-6, rtol=0)


def test_pipelines_run_in_half_precision(folder, images):
    expected = own_outputs(folder, images)
    extract = pipeline("image-feature-extraction", model=str(folder), dtype=torch.bfloat16)
    assert extract.model.dtype == torch.bfloat16
    np.testing.assert_allclose(np.array(extract(str(images[0])))[0], expected["image"][0], atol=0.05)
    ask = pipeline("zero-shot-image-classification", model=str(folder), dtype=torch.bfloat16)
    scores = by_label([ask(str(images[0]), candidate_labels=LABELS)])
    np.testing.assert_allclose(scores, expected["probabilities"][:1], atol=0.1)


def test_pooler_output_of_single_modality_is_its_embedding(folder, images):
    model, processor = MiniClipModel.from_pretrained(folder), MiniClipProcessor.from_pretrained(folder)
    both = processor(images=images, text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        image, text = model(pixel_values=both["pixel_values"]), model(both["input_ids"])
        assert image.pooler_output is image.image_embeds and text.pooler_output is text.text_embeds
        assert model(**both).pooler_output is None


PIPELINES = """
import json, sys
from transformers import pipeline
folder, images, texts, labels, options = json.loads(sys.argv[1])
extract = pipeline("image-feature-extraction", model=folder, **options)
found = {
    "class": type(extract.model).__module__,
    "image": [extract(image)[0] for image in images],
    "pooled": [extract(image, pool=True)[0] for image in images],
    "text": [row[0] for row in pipeline("feature-extraction", model=folder, **options)(texts)],
    "zero_shot": pipeline("zero-shot-image-classification", model=folder, **options)(images, candidate_labels=labels),
}
print("FOUND", json.dumps(found))
"""


def test_pipelines_run_without_the_package(tmp_path, images):
    torch.manual_seed(0)
    folder = export(tiny_model(text_pooling="mean"), tiny_processor(), tmp_path / "export")
    arguments = json.dumps([str(folder), [str(path) for path in images], TEXTS, LABELS, {"trust_remote_code": True}])
    done = run(WITHOUT_PACKAGE + PIPELINES, tmp_path, arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND", 1)[1])
    assert found["class"].startswith("transformers_modules")
    expected = own_outputs(folder, images)
    for name, key in (("image", "image"), ("pooled", "image"), ("text", "text")):
        np.testing.assert_allclose(np.array(found[name]), expected[key], atol=1e-5)
    np.testing.assert_allclose(by_label(found["zero_shot"]), expected["probabilities"], atol=1e-5)
