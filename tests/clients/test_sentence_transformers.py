"""sentence-transformers loads an export and gives the package's own embeddings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modeling_miniclip import MiniClipModel, MiniClipProcessor, encode_images, encode_texts
from modeling_miniclip.inference.encode import truncate_embeddings
from tests.clients.cases import Case
from tests.helpers.hubs import WITHOUT_PACKAGE, run
from tests.helpers.runs import ROOT

# Batches of another size than the package's own, and sorted by length: sums are taken in another order.
TOLERANCE = 1e-5
# A process that uses the package, and one that cannot import it; who provides the model's class; trusted code or not.
PROCESSES = {
    "with the package": ("from modeling_miniclip import encode_images\n", "modeling_miniclip", False),
    "without the package": (WITHOUT_PACKAGE, "transformers_modules", True),
}
# Reads `images/*.png` and `texts.json`, leaves `out.pt` and what was saved again in `saved`.
ENCODE = """
import json, os, torch
from pathlib import Path
from PIL import Image
from sentence_transformers import SentenceTransformer
trust = {"trust_remote_code": True} if json.loads(os.environ["TRUST"]) else {}
model = SentenceTransformer(os.environ["SOURCE"], device="cpu", **trust)
images = [Image.open(path) for path in sorted(Path("images").iterdir())]
texts = json.loads(Path("texts.json").read_text())
found = {"images": model.encode(images, batch_size=7), "texts": model.encode(texts, batch_size=9)}
found["one image"], found["one text"] = model.encode(images[0]), model.encode(texts[0])
found["similarity"] = model.similarity(found["texts"], found["images"])
model.save("saved")
found["again"] = SentenceTransformer("saved", device="cpu", **trust).encode(texts)
short = SentenceTransformer(os.environ["SOURCE"], device="cpu", truncate_dim=5, **trust)
found |= {"short": short.encode(texts, normalize_embeddings=True), "short images": short.encode(images)}
try:
    model.encode([images[0], texts[0]])
except ValueError as error:
    found["mixed"] = str(error)
found["class"] = type(model[0].model).__module__
found = {key: value if isinstance(value, str) else torch.as_tensor(value) for key, value in found.items()}
torch.save(found, "out.pt")
"""


@pytest.fixture(scope="module", params=PROCESSES)
def encoded(
    request: pytest.FixtureRequest, case: Case, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any]]:
    """Name of the process, its folder, and what sentence-transformers made there of a case."""
    folder = tmp_path_factory.mktemp("process")
    before, _, trust = PROCESSES[request.param]
    (folder / "images").mkdir()
    for i, image in enumerate(pictures(case)):
        image.save(folder / "images" / f"{i:03d}.png")
    (folder / "texts.json").write_text(json.dumps(sentences(case)))
    env = {"SOURCE": str(case.export), "TRUST": json.dumps(trust), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = run(before + ENCODE, folder, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder, torch.load(folder / "out.pt")


def pictures(case: Case) -> list[Image.Image]:
    """The images of a case, and one each in grey, with a palette and half transparent."""
    first = case.images[0]
    transparent = first.convert("RGBA")
    transparent.putalpha(128)
    return [*case.images, first.convert("L"), first.convert("P"), transparent]


def sentences(case: Case) -> list[str]:
    """The captions of a case, and one that is longer than the text tower takes."""
    return [*case.texts, " and ".join(case.texts)]


def test_embeddings_and_similarity_equal_encode_functions(
    encoded: tuple[str, Path, dict[str, Any]], case: Case, compared: Callable[[str], None]
) -> None:
    process, _, found = encoded
    model, processor = MiniClipModel.from_pretrained(case.export), MiniClipProcessor.from_pretrained(case.export)
    wanted = {"images": encode_images(model, pictures(case), processor, progress=False)}
    with pytest.warns(UserWarning, match="1 of .* captions were truncated"):
        wanted["texts"] = encode_texts(model, sentences(case), processor, progress=False)
    torch.testing.assert_close(wanted["texts"][:-1], case.text_embeds, atol=TOLERANCE, rtol=0)
    wanted["similarity"] = wanted["texts"] @ wanted["images"].T
    wanted["short"] = truncate_embeddings(wanted["texts"], 5)
    wanted["short images"] = wanted["images"][:, :5]  # not normalised without normalize_embeddings=True
    wanted |= {"one image": wanted["images"][0], "one text": wanted["texts"][0], "again": wanted["texts"]}
    differences = {key: (found[key] - value).abs().max().item() for key, value in wanted.items()}
    report = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
    compared(f"sentence-transformers {process}, largest difference of {report}")
    assert max(differences.values()) <= TOLERANCE
    for key in ("images", "texts"):
        torch.testing.assert_close(found[key].norm(dim=1), torch.ones(len(found[key])), atol=TOLERANCE, rtol=0)
    assert found["class"].split(".")[0] == PROCESSES[process][1]


def test_mixed_modalities_raise(
    encoded: tuple[str, Path, dict[str, Any]],
) -> None:
    assert "Encode each modality separately" in encoded[2]["mixed"]


def test_saved_model_loads_with_the_package(encoded: tuple[str, Path, dict[str, Any]], case: Case) -> None:
    saved = encoded[1] / "saved"
    model, processor = MiniClipModel.from_pretrained(saved), MiniClipProcessor.from_pretrained(saved)
    embeds = encode_images(model, case.images, processor, progress=False)
    torch.testing.assert_close(embeds, case.image_embeds, atol=TOLERANCE, rtol=0)
