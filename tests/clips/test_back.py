"""A model back as a CLIP of transformers: after it came from one, and after training; what does not fit is refused."""

from pathlib import Path

import pytest

from modeling_miniclip import MiniClipModel, MiniClipProcessor, export, from_clip
from modeling_miniclip.cli import cli
from modeling_miniclip.clips.compare import check_copy
from modeling_miniclip.clips.convert import convert
from modeling_miniclip.errors import ModelError, UsageError
from tests.clips.comparison import differences, our_results, transformers_results
from tests.helpers.clips import load_in_this_process, save_clip, train_slightly
from tests.helpers.towers import tiny_model, tiny_processor, with_slow

pytestmark = pytest.mark.filterwarnings("ignore:.*truncated")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load copies in this process."""
    load_in_this_process(monkeypatch)


OTHERS = ["siglip2", "altclip", "chinese_clip"]


@pytest.mark.parametrize("family", with_slow(["clip", "siglip", "dual-encoder"], OTHERS))
def test_fine_tuned_model_goes_back_to_transformers(family: str, tmp_path: Path, in_this_process: None) -> None:
    model = from_clip(save_clip(family, tmp_path / "original"))
    train_slightly(model)
    export(model, model.processor, tmp_path / "tuned")
    done = convert(tmp_path / "tuned", tmp_path / "back", "transformers")
    assert done.difference is not None and done.difference < 1e-5
    assert not list((tmp_path / "back").glob("*.py"))
    theirs = transformers_results(tmp_path / "back")
    assert differences(our_results(model, model.processor), theirs) == {}


@pytest.mark.slow
def test_copy_is_loaded_by_a_fresh_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = save_clip("clip", tmp_path / "original")
    assert cli(["convert", str(original), str(tmp_path / "back"), "--to", "transformers"]) == 0
    assert "largest difference of the logits under transformers" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    with pytest.raises(ModelError, match="transformers cannot load the copy"):
        model = from_clip(original)
        check_copy(model, model.processor, tmp_path / "mine", "transformers", squares=False)


def test_command_writes_an_export_and_says_that_no_licence_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = save_clip("clip", tmp_path / "original")
    (original / "README.md").unlink()
    assert cli(["convert", str(original), str(tmp_path / "mine")]) == 0
    assert "states no licence: ask its authors" in capsys.readouterr().err
    model, processor = (one.from_pretrained(tmp_path / "mine") for one in (MiniClipModel, MiniClipProcessor))
    assert differences(our_results(model, processor), transformers_results(original)) == {}
    assert cli(["convert", str(original), str(tmp_path / "mine")]) == 2


def test_licence_is_kept(tmp_path: Path) -> None:
    original = save_clip("clip", tmp_path / "original")
    convert(original, tmp_path / "mine")
    assert "license: mit" in (tmp_path / "mine" / "README.md").read_text()


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    export(tiny_model(), tiny_processor(), tmp_path / "timm")
    with pytest.raises(ModelError, match="its image tower test_resnet is one of timm"):
        convert(tmp_path / "timm", tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()
    model = from_clip(save_clip("clip", tmp_path / "original"))
    model.config.projection_depth = 2
    deep = MiniClipModel(model.config)
    export(deep, model.processor, tmp_path / "deep")
    with pytest.raises(ModelError, match="its visual_projection has .*blocks.* linear heads without bias"):
        convert(tmp_path / "deep", tmp_path / "out", "transformers")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError):
        convert(tmp_path / "original", tmp_path / "full")


def test_copy_with_other_logits_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> None:
    original = save_clip("clip", tmp_path / "original")
    monkeypatch.setattr("modeling_miniclip.clips.compare.LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(ModelError, match="transformers computes other logits with the copy"):
        convert(original, tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()
