"""`--image_size` of a trained model whose image tower takes images of one size only."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor
from torch.nn.functional import interpolate

from modeling_miniclip import MiniClipModel, export, from_clip
from modeling_miniclip.processing_miniclip import image_processor_from_timm
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.towers.create_model import create_model
from modeling_miniclip.training.towers.image_size import _resized_positions, with_image_size
from tests.helpers.clips import save_clip
from tests.helpers.towers import PIXELS, tiny_config, tiny_model, tiny_processor, with_slow
from tests.test_model import shake

LARGE = 48  # pixels: 6 x 6 patches of 8 instead of 4 x 4


def created(source: Path, image_size: int) -> tuple[MiniClipModel, Any]:
    argv = ["--dataset=a.csv", f"--model_name_or_path={source}", f"--image_size={image_size}"]
    return create_model(parse_arguments(argv), [])


def resized(table: Tensor, others: int) -> Tensor:
    """Position embeddings `[others + 16, width]` for 36 patches, by torch alone."""
    grid = table[others:].T.reshape(1, -1, 4, 4)
    grid = interpolate(grid, size=(6, 6), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:others], grid[0].flatten(1).T])


@pytest.mark.parametrize(("family", "others"), with_slow([("clip", 1)], [("siglip", 0), ("dual-encoder", 1)]))
def test_positions_of_a_clip_are_resized(family: str, others: int, tmp_path: Path) -> None:
    original = save_clip(family, tmp_path / "original")
    before = from_clip(original).state_dict()
    model, processor = created(original, LARGE)
    after = model.state_dict()
    (name,) = [name for name in before if before[name].shape != after[name].shape]
    assert "position_embedding" in name
    width = before[name].shape[-1]
    expected = resized(before[name].reshape(-1, width), others)
    torch.testing.assert_close(after[name].reshape(-1, width), expected)
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)
    assert model.config.vision_config.image_size == LARGE
    assert processor.image_processor.crop_size == {"height": LARGE, "width": LARGE}

    loaded = MiniClipModel.from_pretrained(export(model, processor, tmp_path / "export"))
    pixels = torch.randn(2, 3, LARGE, LARGE)
    with torch.no_grad():
        features = [one.get_image_features(pixels).pooler_output for one in (model, loaded)]
    assert torch.equal(*features)
    assert created(tmp_path / "export", PIXELS)[0].config.vision_config.image_size == PIXELS


def rigid_vit() -> MiniClipModel:
    """A model with a timm ViT that does not resize its position embeddings by itself."""
    config = tiny_config("vit")
    config.vision_config.model_args = {"img_size": PIXELS, "patch_size": 8, "dynamic_img_size": False}
    config.vision_config.pretrained_cfg = config.vision_config.pretrained_cfg | {"fixed_input_size": True}
    model = MiniClipModel(config).eval()
    shake(model)
    return model


def test_positions_of_a_timm_tower_are_resized(tmp_path: Path) -> None:
    model, processor = rigid_vit(), tiny_processor()
    processor.image_processor = image_processor_from_timm(model.config.vision_config)
    processor.image_processor.image_mean = [0.3, 0.4, 0.5]  # of a CLIP of open_clip
    export(model, processor, tmp_path / "export")
    found, prepared = created(tmp_path / "export", LARGE)
    options = model.config.vision_config.model_args | {"img_size": LARGE}
    reference = timm.create_model(model.config.vision_config.architecture, num_classes=0, **options).eval()
    reference.load_state_dict(checkpoint_filter_fn(model.vision_model.timm_model.state_dict(), reference))
    pixels = torch.randn(2, 3, LARGE, LARGE)
    with torch.no_grad():
        expected = reference(pixels)
        torch.testing.assert_close(found.pool_images(pixels).pooler_output, expected, rtol=1e-5, atol=1e-5)
    assert prepared.image_processor.crop_size == {"height": LARGE, "width": LARGE}
    assert list(prepared.image_processor.image_mean) == [0.3, 0.4, 0.5]
    loaded = MiniClipModel.from_pretrained(export(found, prepared, tmp_path / "resized"))
    with torch.no_grad():
        assert torch.equal(loaded.pool_images(pixels).pooler_output, found.pool_images(pixels).pooler_output)


def test_tower_that_takes_any_size_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("resnet")
    model.config.vision_config.pretrained_cfg["fixed_input_size"] = True  # as a converted open_clip has it
    export(model, tiny_processor(), tmp_path / "export")
    found, prepared = created(tmp_path / "export", LARGE)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert prepared.image_processor.crop_size == {"height": LARGE, "width": LARGE}


def test_model_is_not_changed_and_others_cannot_be_resized() -> None:
    model = rigid_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_image_size(model, LARGE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.vision_config.model_args["img_size"] == PIXELS
    with pytest.raises(ValueError, match="timm cannot resize test_resnet"):
        with_image_size(tiny_model("resnet"), LARGE)
    for name, shape in (("relative_position_bias_table", (49, 4)), ("embeddings.position_embedding.weight", (15, 4))):
        with pytest.raises(ValueError, match=f"{name} cannot be resized"):
            _resized_positions(name, torch.zeros(shape), torch.zeros(36, 4), 4, 6)
