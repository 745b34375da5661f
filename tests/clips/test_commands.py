"""Every command takes a CLIP of another library: it is converted once, and computes what the original computes."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeling_miniclip import ImageIndex, classify, encode_images, encode_texts, find_matches, from_clip, update_index
from modeling_miniclip.cli import cli
from modeling_miniclip.clips import from_clip as conversion
from modeling_miniclip.clips.exported import as_export, export_folder
from modeling_miniclip.errors import ModelError
from modeling_miniclip.search.query import Query, search_index
from tests.helpers.clips import save_clip
from tests.helpers.indexes import write_pictures
from tests.helpers.runs import write_scene_folder
from tests.helpers.towers import with_slow

pytestmark = pytest.mark.filterwarnings("ignore:.*truncated", "ignore:.*states no licence")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The conversions of this file are kept in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setattr("huggingface_hub.constants.HF_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny CLIP of transformers; read-only."""
    return save_clip("clip", tmp_path_factory.mktemp("clips") / "tiny-clip")


def no_conversion(*names: str) -> Any:
    pytest.fail(f"{names} is converted again")


# --- the conversion that is kept ------------------------------------------------------------------------------------


def test_clip_is_converted_once(
    clip: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_folder(clip)
    assert folder.parent == own_cache / "miniclip" / "models"
    capsys.readouterr()
    monkeypatch.setattr(conversion, "load_clip", no_conversion)
    monkeypatch.chdir(clip.parent)
    assert export_folder(clip) == folder == export_folder("tiny-clip") == export_folder(f"{clip}/")
    assert capsys.readouterr().err == ""
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card and str(clip) not in card


def test_changed_clip_is_converted_again(clip: Path, tmp_path: Path) -> None:
    folder = save_clip("clip", tmp_path / "mine")
    before = export_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logit_scale_init_value": 2.5}))
    assert export_folder(folder) != before != export_folder(clip)


def test_other_names_stay_as_they_are(tiny_export: Path, tiny_towers: tuple[Path, Path], tmp_path: Path) -> None:
    for name in (str(tiny_export), str(tiny_towers[1]), str(tmp_path), "./nowhere", "no/such-model"):
        assert as_export(name, "MODEL") == name


def test_index_says_what_is_no_clip(tiny_towers: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a model of type 'distilbert'; expected an export, or another CLIP"):
        update_index(tmp_path / "index", [tmp_path], tiny_towers[1], progress=False)


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", with_slow(["clip"], ["siglip", "altclip", "dual-encoder"]))
def test_index_of_a_clip_finds_what_it_embeds(family: str, tmp_path: Path) -> None:
    source = save_clip(family, tmp_path / "original")
    names = [str(path) for path in write_pictures(tmp_path / "photos", "a.png b.png c.png d.png")]
    report = update_index(tmp_path / "index", [tmp_path / "photos"], source, progress=False)
    assert report.encoded == 4 and ImageIndex.open(tmp_path / "index").model == str(source)
    model = from_clip(source)
    images, text = encode_images(model, names, progress=False), encode_texts(model, ["a boat"], progress=False)
    index, found = search_index(tmp_path / "index", Query("a boat"), k=4)
    order = np.argsort(-(images @ text[0]).numpy())
    assert [index.entry(match.index)["path"] for match in found] == [names[i] for i in order]
    np.testing.assert_allclose([match.score for match in found], (images @ text[0]).numpy()[order], atol=1e-5)
    _, like = search_index(tmp_path / "index", Query(image=names[2]), k=1)
    assert index.entry(like[0].index)["path"] == names[2] and like[0].score == pytest.approx(1, abs=1e-5)
    matches = find_matches(model, images, "a boat", names, n=4)
    assert [match.name for match in matches] == [names[i] for i in order]


def test_deleted_conversion_is_made_again(tmp_path: Path) -> None:
    source = save_clip("clip", tmp_path / "original")
    write_pictures(tmp_path / "photos", "a.png b.png c.png")
    update_index(tmp_path / "index", [tmp_path / "photos"], source, progress=False)
    _, before = search_index(tmp_path / "index", Query("a boat"), k=3)
    shutil.rmtree(export_folder(source))
    _, after = search_index(tmp_path / "index", Query("a boat"), k=3)
    assert after == before


def test_index_notices_that_a_clip_has_changed(tmp_path: Path) -> None:
    source = save_clip("clip", tmp_path / "original")
    write_pictures(tmp_path / "photos", "a.png b.png")
    update_index(tmp_path / "index", [tmp_path / "photos"], source, progress=False)
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{source} has changed since .* rebuild the index: miniclip index {source}"):
        search_index(tmp_path / "index", Query("a boat"))


@pytest.mark.parametrize("family", with_slow(["clip"], ["siglip", "dual-encoder"]))
def test_recall_of_a_clip_and_its_conversion_is_the_same(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_clip(family, tmp_path / "original")
    scenes = write_scene_folder(tmp_path / "scenes", 12)
    mine = export_folder(source)
    capsys.readouterr()
    argv = ["eval", str(mine), str(scenes), "--split", "train", "--baseline", str(source), "--json"]
    assert cli(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"]["rsum"] > 0 and report["baseline_metrics"] == report["metrics"]


def test_classify_takes_a_converted_clip(clip: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "photos", "a.png b.png")
    found = classify(from_clip(clip), pictures, ["boat", "dog"])
    assert len(found) == 2


@pytest.mark.parametrize(
    ("argv", "module", "function", "result"),
    [
        (["push", "{clip}", "me/mine"], "hub.push", "push", "URL"),
        (["export", "{clip}", "--onnx", "{new}"], "hub.onnx_export", "export_onnx", {}),
    ],
)
def test_commands_pass_the_conversion_on(
    argv: list[str], module: str, function: str, result: Any, clip: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    called: list[str] = []

    def record(source: str, *args: Any, **options: Any) -> Any:
        called.append(source)
        return result

    place = importlib.import_module(f"modeling_miniclip.{module}")
    monkeypatch.setattr(place, function, record)
    if module == "hub.onnx_export":
        monkeypatch.setattr(place, "format_onnx_report", str)
    (tmp_path / "new").mkdir()
    assert cli([word.format(clip=clip, new=tmp_path / "new") for word in argv]) == 0
    assert called == [str(export_folder(clip))]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxscript") is None, reason="pip install onnx onnxscript onnxruntime")
@pytest.mark.parametrize("family", ["clip", "dual-encoder"])
def test_onnx_files_equal_a_clip(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, scenes = save_clip(family, tmp_path / "original"), write_scene_folder(tmp_path / "scenes", 20)
    assert cli(["export", str(original), "--onnx", str(tmp_path / "onnx"), "--dataset", str(scenes)]) == 0
    report = json.loads((tmp_path / "onnx" / "equality.json").read_text())
    assert max(report["largest_difference"].values()) < 1e-5


@pytest.mark.slow
def test_space_of_a_clip_holds_its_conversion(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_miniclip.search import space

    versions: Callable[[str], str] = space.version
    monkeypatch.setattr(space, "version", lambda name: "6.0.0" if name == "gradio" else versions(name))
    write_pictures(tmp_path / "photos", "a.png b.png")
    assert space.write_space(str(clip), tmp_path / "space", [tmp_path / "photos"]).images == 2
    assert json.loads((tmp_path / "space" / "model" / "config.json").read_text())["model_type"] == "miniclip"
    monkeypatch.chdir(tmp_path / "space")
    _, found = search_index("index", Query("a boat"), k=2)
    assert len(found) == 2
