"""Exports and indexes written by earlier versions still load and give the same results (see `tests/fixtures`)."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from modeling_miniclip import ImageIndex, MiniClipModel, MiniClipProcessor, encode_images, encode_texts, update_index
from modeling_miniclip.cli import cli
from modeling_miniclip.errors import ModelError
from modeling_miniclip.hub.renew_code import check_code, renew_code
from modeling_miniclip.inference.loading import load_tower
from modeling_miniclip.search.fingerprints import fingerprint
from modeling_miniclip.utils.resources import PACKAGE
from tests.helpers.hubs import WITHOUT_PACKAGE, run
from tests.helpers.indexes import write_pictures

OLD = Path(__file__).parent / "fixtures" / "before_folders"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
KINDS = {"files": "float32", "thumbnails": "float16", "approximate": "float32"}


def assert_expected(image_embeddings: Any, text_embeddings: Any) -> None:
    np.testing.assert_allclose(image_embeddings, EXPECTED["image_embeddings"], atol=1e-5)
    np.testing.assert_allclose(text_embeddings, EXPECTED["text_embeddings"], atol=1e-5)


@pytest.mark.parametrize("classes", [(MiniClipModel, MiniClipProcessor), (AutoModel, AutoProcessor)])
def test_old_export_gives_same_embeddings(classes: tuple[Any, Any]) -> None:
    model, processor = (cls.from_pretrained(OLD / "export") for cls in classes)
    assert (type(model), type(processor)) == (MiniClipModel, MiniClipProcessor)
    assert_expected(
        encode_images(model, [OLD / "picture.png"], processor, progress=False),
        encode_texts(model, EXPECTED["texts"], processor, progress=False),
    )


def test_each_tower_of_old_export_loads() -> None:
    images, texts = load_tower(OLD / "export", "image"), load_tower(OLD / "export", "text")
    assert_expected(
        encode_images(images[0], [OLD / "picture.png"], images[1], progress=False),
        encode_texts(texts[0], EXPECTED["texts"], texts[1], progress=False),
    )


def test_old_export_loads_without_the_package(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.23", reason="the code in it needs it")
    code = f"""{WITHOUT_PACKAGE}
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
model, processor = (cls.from_pretrained({str(OLD / "export")!r}, trust_remote_code=True) for cls in
                    (AutoModel, AutoProcessor))
assert type(model).__module__.startswith("transformers_modules."), type(model)
image = Image.open({str(OLD / "picture.png")!r})
with torch.inference_mode():
    output = model(**processor(images=image, text={EXPECTED["texts"]!r}, padding=True, return_tensors="pt"))
torch.save([output.image_embeds, output.text_embeds], "embeddings.pt")
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_expected(*torch.load(tmp_path / "embeddings.pt"))


def test_old_export_is_pushed_with_new_code_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["push", str(OLD / "export"), "alice/clip"]) == 1
    (command,) = re.findall(r"`miniclip (.*)`", capsys.readouterr().err)
    words = shlex.split(command)
    new = words[-1] = str(tmp_path / "new")
    assert cli(words) == 0 and cli(words) == 2  # the second time, there is something in the folder
    for path in (OLD / "export").iterdir():
        source = PACKAGE / path.name if path.suffix == ".py" else path
        assert (Path(new) / path.name).read_bytes() == source.read_bytes()
    assert {path.name for path in Path(new).glob("*.py")} == {path.name for path in PACKAGE.glob("*_miniclip.py")}
    check_code(Path(new))
    with pytest.raises(ModelError, match="is not an export"):
        renew_code(OLD / "files.index", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_old_index_finds_same_images(kind: str) -> None:
    if kind == "approximate":
        pytest.importorskip("faiss")
    index = ImageIndex.open(OLD / f"{kind}.index", verify=True)
    assert index.manifest.dtype == KINDS[kind]
    assert (index.thumbnail(0) is None) == (kind != "thumbnails")
    for query, matches in zip(EXPECTED["text_embeddings"], EXPECTED["searches"][kind], strict=True):
        found = index.search(query, k=4)
        assert [match.name for match in found] == [name for name, _ in matches]
        assert [match.score for match in found] == pytest.approx([score for _, score in matches], abs=1e-5)


def test_old_index_encodes_only_the_new_images(tmp_path: Path) -> None:
    shutil.copytree(OLD / "thumbnails.index", tmp_path / "index")
    (new,) = write_pictures(tmp_path / "photos", "new.png")
    report = update_index(tmp_path / "index", [new.parent], OLD / "export", progress=False)
    assert (report.images, report.encoded) == (9, 1)
    assert fingerprint(OLD / "export") == ImageIndex.open(tmp_path / "index").manifest.fingerprint
