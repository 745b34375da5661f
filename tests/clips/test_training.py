"""Training runs that start from a CLIP of transformers."""

from pathlib import Path

import pytest
import torch

from modeling_miniclip import from_clip
from modeling_miniclip.errors import UsageError
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.towers.create_model import create_model
from tests.clips.comparison import differences, our_results, transformers_results
from tests.helpers.clips import TEXTS, save_clip
from tests.helpers.runs import flags
from tests.helpers.towers import with_slow
from train_miniclip import main, prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*truncated")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_run_starts_from_a_clip(family: str, tmp_path: Path, without_figures: None) -> None:
    original = save_clip(family, tmp_path / "original")
    options = {"preset": None, "model_name_or_path": original, "max_steps": 2, "batch_size": 4}
    tuned = from_clip(main(flags(tmp_path, **options)))
    assert tuned.config.text_pooling == from_clip(original).config.text_pooling
    assert differences(our_results(tuned, tuned.processor), transformers_results(original)).keys() >= {"logits"}
    still = options | {"learning_rate": 1e-12, "weight_decay": 0.0}
    same = from_clip(main(flags(tmp_path, "still", **still)))
    assert differences(our_results(same, same.processor), transformers_results(original)) == {}


def test_licence_of_the_clip_is_kept_or_missed(
    tmp_path: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    original = save_clip("clip", tmp_path / "original")
    options = {"preset": None, "model_name_or_path": original, "max_steps": 1, "batch_size": 4}
    tuned = main(flags(tmp_path, **options))
    assert "\nlicense: mit\n" in (tuned / "README.md").read_text()
    assert "states no licence" not in capsys.readouterr().out
    (original / "README.md").unlink()
    (tmp_path / "second").mkdir()
    run = prepare(parse_arguments(flags(tmp_path, "second", **options)))
    assert f"warning: {original} states no licence: ask its authors" in capsys.readouterr().out
    assert run.card_data["license"] is None
    (tmp_path / "third").mkdir()
    run = prepare(parse_arguments(flags(tmp_path, "third", **options, hub_license="apache-2.0")))
    assert "states no licence" not in capsys.readouterr().out and run.card_data["license"] == "apache-2.0"


def test_size_that_a_clip_does_not_take(tmp_path: Path) -> None:
    original = save_clip("clip", tmp_path / "original")
    with pytest.raises(UsageError, match="--image_size 4: .* takes no images of 4x4 pixels .* it takes: 32"):
        main(flags(tmp_path, preset=None, model_name_or_path=original, image_size=4))


@pytest.mark.parametrize("family", with_slow(["siglip"], ["clip", "dual-encoder"]))
def test_flags_take_one_tower_out_of_a_clip(family: str, tmp_path: Path, tiny_towers: tuple[Path, Path]) -> None:
    original = save_clip(family, tmp_path / "original")
    theirs, clip = transformers_results(original), from_clip(original)
    for flags_ in (
        ["--vision_model", str(original), "--text_model", str(tiny_towers[1])],
        ["--vision_model", str(tiny_towers[0]), "--text_model", str(original)],
    ):
        argv = ["--output_dir", str(tmp_path / "run"), "--projection_dim", "16", *flags_]
        model, processor = create_model(parse_arguments(argv), [])
        for side in ("vision", "text"):
            if flags_[flags_.index(f"--{side}_model") + 1] == str(original):
                theirs_, ours = (dict(getattr(one, f"{side}_model").named_parameters()) for one in (clip, model))
                assert ours.keys() == theirs_.keys() and all(torch.equal(ours[name], theirs_[name]) for name in ours)
                assert getattr(model.config, f"{side}_pooling") == getattr(clip.config, f"{side}_pooling")
                assert getattr(model.config, f"{side}_config").name_or_path == str(original)
        if flags_[-1] == str(original):
            assert torch.equal(processor(text=TEXTS, return_tensors="pt")["input_ids"], theirs["tokens"])


def test_image_tower_of_a_clip_is_trained(
    tmp_path: Path, tiny_towers: tuple[Path, Path], without_figures: None
) -> None:
    original = save_clip("clip", tmp_path / "original")
    options = {"preset": None, "vision_model": original, "text_model": tiny_towers[1], "projection_dim": 16}
    options |= {"frozen_vision_fraction": 0.5, "layer_decay": 0.9, "max_steps": 2}
    trained, before = from_clip(main(flags(tmp_path, **options))), from_clip(original)
    assert (trained.config.vision_config.model_type, trained.config.vision_pooling) == ("clip_vision_model", "pooler")
    parts = [dict(model.vision_model.named_parameters()) for model in (trained, before)]
    changed = {name for name, value in parts[0].items() if not torch.equal(value, parts[1][name])}
    assert not any(".layers.0." in name or "embeddings" in name for name in changed)
    assert all(name in changed for name in parts[0] if ".layers.1." in name and name.endswith("weight"))
