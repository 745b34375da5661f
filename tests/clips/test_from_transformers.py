"""CLIPs of transformers as models of this package: features, logits, preprocessing and tokens of the original."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from modeling_miniclip import MiniClipModel, MiniClipProcessor, encode_images, encode_texts, export, from_clip
from modeling_miniclip.errors import ModelError
from tests.clips.comparison import FAULTS, differences, our_results, transformers_results
from tests.helpers.clips import FAMILIES, MEAN, TEXTS, pictures, save_clip
from tests.helpers.towers import with_slow

pytestmark = pytest.mark.filterwarnings("ignore:.*truncated")
FAST = ["clip", "siglip2", "dual-encoder"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny CLIP of a family; read-only."""
    folder = tmp_path_factory.mktemp("clips")

    def clip(family: str) -> Path:
        path = folder / family
        return path if path.exists() else save_clip(family, path)

    return clip


@pytest.mark.parametrize("family", with_slow(FAST, [name for name in FAMILIES if name not in FAST]))
def test_converted_model_computes_the_same(family: str, saved: Callable[[str], Path]) -> None:
    theirs = transformers_results(saved(family))
    model = from_clip(saved(family))
    assert theirs.keys() <= our_results(model, model.processor, family == "siglip2").keys()
    assert differences(our_results(model, model.processor, family == "siglip2"), theirs) == {}


@pytest.mark.parametrize("family", with_slow(["clip"], [name for name in FAMILIES if name != "clip"]))
def test_comparison_notices_each_fault(family: str, saved: Callable[[str], Path]) -> None:
    theirs, is_square = transformers_results(saved(family)), family == "siglip2"
    for name, fault in FAULTS.items():
        model = from_clip(saved(family))
        fault(model)
        assert differences(our_results(model, model.processor, is_square), theirs), name


def test_comparison_notices_how_margins_are_rounded(saved: Callable[[str], Path]) -> None:
    model = from_clip(saved("clip"))
    model.processor.image_processor.round_margins = True
    assert differences(our_results(model, model.processor), transformers_results(saved("clip")))


@pytest.mark.parametrize("family", with_slow(["siglip"], ["clip", "dual-encoder"]))
def test_export_of_a_converted_model(family: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = from_clip(saved(family))
    folder = export(model, model.processor, tmp_path / "export")
    again = MiniClipModel.from_pretrained(folder)
    theirs = transformers_results(saved(family))
    assert differences(our_results(again, MiniClipProcessor.from_pretrained(folder)), theirs) == {}


def test_encoders_find_the_processor_of_a_converted_model(saved: Callable[[str], Path]) -> None:
    model = from_clip(saved("clip"))
    images = encode_images(model, pictures(), progress=False)
    texts = encode_texts(model, TEXTS, progress=False)
    assert torch.allclose(
        transformers_results(saved("clip"))["logits"],
        model.inverse_temperature().detach() * images @ texts.T,
        atol=1e-4,
    )


def test_our_own_export_is_a_source(tiny_export: Path) -> None:
    assert from_clip(tiny_export).config.model_type == "miniclip"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharded_half_precision_checkpoint(dtype: torch.dtype, saved: Callable[[str], Path], tmp_path: Path) -> None:
    original: Any = AutoModel.from_pretrained(saved("clip"), dtype=dtype)
    for path in saved("clip").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = from_clip(tmp_path)
    assert model.dtype == torch.float32
    assert torch.equal(model.visual_projection.linear.weight, original.visual_projection.weight.float())


def broken(folder: Path, clip: Path, **config: Any) -> Path:
    """A copy of a CLIP with other values in its `config.json`; None removes one."""
    folder.mkdir()
    for path in clip.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({name: v for name, v in values.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "jina_clip", "auto_map": {"AutoModel": "modeling_x.X"}}, "code of its own .* never run here"),
        ({"model_type": "clip_vision_model"}, "type 'clip_vision_model', which is a single tower or no CLIP"),
        ({"model_type": None, "architecture": "resnet50"}, "single tower or no CLIP at all"),
        ({"model_type": "clipseg"}, "a model of type 'clipseg'"),
        ({"projection_dim": 17}, "cannot be converted"),
    ],
)
def test_what_is_no_clip_is_named(
    config: dict[str, Any], message: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        from_clip(broken(tmp_path / "broken", saved("clip"), **config))


@pytest.mark.parametrize("model_type", ["clip", "jina_clip"])
def test_code_next_to_a_clip_is_never_run(model_type: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = broken(tmp_path / "with_code", saved("clip"), model_type=model_type)
    (folder / "code_of_its_own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    classes = {"config.json": ["AutoConfig", "AutoModel"], "tokenizer_config.json": ["AutoTokenizer"],
               "preprocessor_config.json": ["AutoImageProcessor", "AutoProcessor"]}  # fmt: skip
    for name, auto in classes.items():
        values = json.loads((folder / name).read_text())
        of_class = {one: ["code_of_its_own.T", None] if "Token" in one else "code_of_its_own.T" for one in auto}
        (folder / name).write_text(json.dumps(values | {"auto_map": of_class}))
    if model_type == "clip":
        model = from_clip(folder)
        assert differences(our_results(model, model.processor), transformers_results(saved("clip"))) == {}
    else:
        with pytest.raises(ModelError, match="code of its own .* never run here"):
            from_clip(folder)
    assert not (tmp_path / "was_run").exists()


def test_images_that_the_tower_does_not_take_are_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = broken(tmp_path / "broken", saved("clip"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"crop_size": {"height": 40, "width": 40}}))
    with pytest.raises(ModelError, match=r"makes images of 40x40 pixels.* correct crop_size in preprocessor_config"):
        from_clip(folder)


def test_lacking_projection_weights_are_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = broken(tmp_path / "broken", saved("clip"))
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights: visual_projection.weight"):
        from_clip(folder)


def test_pickled_weights_are_refused_with_the_command(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = broken(tmp_path / "broken", saved("clip"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights .* convert them with python -c"):
        from_clip(folder)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        from_clip(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with warnings.catch_warnings(), pytest.raises(ModelError, match="this folder has no config.json"):
        from_clip(tmp_path / "empty")


def test_image_processor_that_does_more_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    folder = broken(tmp_path / "broken", saved("clip"))
    images = AutoImageProcessor.from_pretrained(folder)
    images.save_pretrained(folder)
    import json

    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text()) | {"do_pad": True, "pad_size": {"height": 48, "width": 48}}
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="something else than resize, crop the centre, rescale"):
        from_clip(folder)


def test_pixels_that_differ_a_little_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPImageProcessorPil

    from modeling_miniclip.clips.preprocessing import equal_image_processor

    other = CLIPImageProcessorPil(image_mean=MEAN)
    assert list(equal_image_processor(other).image_mean) == MEAN
    monkeypatch.setattr(other, "normalize", lambda image, mean, std: (image - mean[0] - 0.001) / std[0])
    other.image_mean, other.image_std = [0.5] * 3, [0.25] * 3
    with pytest.raises(ValueError, match="gives other pixels"):
        equal_image_processor(other)
