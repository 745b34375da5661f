"""Training runs that start from a CLIP of transformers."""

from pathlib import Path

import pytest

from modeling_miniclip import from_clip
from modeling_miniclip.errors import UsageError
from tests.clips.comparison import differences, our_results, transformers_results
from tests.helpers.clips import save_clip
from tests.helpers.runs import flags
from train_miniclip import main

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


def test_size_that_a_clip_does_not_take(tmp_path: Path) -> None:
    original = save_clip("clip", tmp_path / "original")
    with pytest.raises(UsageError, match="--image_size 40: .* takes no images of 40x40 pixels .* it takes: 32"):
        main(flags(tmp_path, preset=None, model_name_or_path=original, image_size=40))
