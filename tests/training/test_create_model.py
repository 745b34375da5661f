"""Models and processors from presets, towers and exports, and the flags that change them."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoProcessor, AutoTokenizer, BertTokenizer

from modeling_miniclip import (
    MiniClipError,
    MiniClipModel,
    MiniClipProcessor,
    ModelError,
    UsageError,
    encode_texts,
    export,
)
from modeling_miniclip.configuration_miniclip import declared_pooling
from modeling_miniclip.data.tables.row_blocks import Captions
from modeling_miniclip.inference.loading import model_folder
from modeling_miniclip.modeling_miniclip import MiniClipVisionModel
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.setup import describe_truncated
from modeling_miniclip.training.towers import try_towers as try_towers_module
from modeling_miniclip.training.towers.create_model import create_model, read_preset, set_dropout, train_tokenizer
from modeling_miniclip.training.towers.try_towers import try_towers
from tests.helpers.runs import ROOT, environment, write_preset
from tests.helpers.towers import (
    CAPTIONS,
    PIXELS,
    TEXT,
    VISION,
    save_decoder,
    save_towers,
    tiny_model,
    tiny_processor,
)

COMMIT = "0123456789" * 4  # of a repository in a cache
TEXTS = [caption for row in CAPTIONS for caption in row]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Flags of two pretrained towers in local folders."""
    vision, text = save_towers(tmp_path_factory.mktemp("towers"))
    return {"vision_model": str(vision), "text_model": str(text)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny export."""
    return str(export(tiny_model(), tiny_processor(), tmp_path_factory.mktemp("exported") / "run" / "export"))


def build(**flags: Any) -> tuple[MiniClipModel, MiniClipProcessor]:
    return create_model(TrainingArguments(**flags), CAPTIONS)


def inputs_of(processor: MiniClipProcessor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    size = processor.image_processor.crop_size["height"]
    pixels = torch.randn(4, 3, size, size)
    return {"pixel_values": pixels, **processor(text=TEXTS[:4], return_tensors="pt")}


@pytest.mark.parametrize("source", ["towers", "preset", "export"])
def test_crop_flag_applies_to_each_model_source(
    source: str, towers: dict[str, str], exported: str, tmp_path: Path
) -> None:
    flags = {"towers": towers, "preset": {"preset": str(write_preset(tmp_path))},
             "export": {"model_name_or_path": exported}}[source]  # fmt: skip
    images = build(**flags, crop_pct=0.5)[1].image_processor
    assert (images.size["shortest_edge"], images.crop_size["height"]) == (2 * PIXELS, PIXELS)


def test_larger_images_keep_the_crop_of_the_trained_model(exported: str, tmp_path: Path) -> None:
    for share in (0.5, 0.8, 1.0):
        model, processor = build(model_name_or_path=exported, crop_pct=share)
        source = export(model, processor, tmp_path / f"{share}" / "export")
        images = build(model_name_or_path=str(source), image_size=2 * PIXELS)[1].image_processor
        assert (images.size["shortest_edge"], images.crop_size["height"]) == (2 * PIXELS / share, 2 * PIXELS)


def test_heads_and_towers_have_separate_dropout(towers: dict[str, str]) -> None:
    model, _ = build(**towers, dropout=0.2, projection_dropout=0.6)
    found = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    heads = {name for name in found if "projection" in name}
    assert heads and heads != set(found)
    assert all(p == (0.6 if name in heads else 0.2) for name, p in found.items())
    assert model.config.projection_dropout == 0.6


def test_fixed_size_tower_rejects_other_sizes(tmp_path: Path) -> None:
    preset = write_preset(tmp_path, vision_config={"model_type": "timm_wrapper", **VISION["vit"],
                                                   "pretrained_cfg": {"input_size": [3, PIXELS, PIXELS],
                                                                      "fixed_input_size": True}})  # fmt: skip
    build(preset=str(preset), train_image_size=PIXELS)
    with pytest.raises(ModelError, match="takes images of 32x32 pixels only, not image_size 64"):
        build(preset=str(preset), train_image_size=64)


# --- three sources ---------------------------------------------------------------------------------------------------


def test_model_from_towers_has_their_weights(towers: dict[str, str]) -> None:
    flags = {"projection_dim": 24, "projection_depth": 1, "text_pooling": "mean", "max_length": 20, "image_size": 48}
    model, processor = build(**towers, **flags)
    config = model.config
    assert (config.projection_dim, config.projection_depth, config.text_pooling) == (24, 1, "mean")
    assert processor.tokenizer.model_max_length == 20
    assert processor.image_processor.crop_size == {"height": 48, "width": 48}
    output = model(**inputs_of(processor))
    assert output.image_embeds.shape == output.text_embeds.shape == (4, 24)
    saved = load_file(Path(towers["text_model"]) / "model.safetensors")
    own = model.text_model.state_dict()
    assert saved.keys() == own.keys()
    assert all(torch.equal(own[name], saved[name]) for name in saved)


def test_default_towers_are_used_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(MiniClipProcessor, "from_towers", lambda *args: asked.append(args))
    monkeypatch.setattr(MiniClipModel, "from_towers", lambda *args: asked.append(args))
    monkeypatch.setattr("modeling_miniclip.training.towers.create_model.try_towers", lambda *args: None)
    create_model(parse_arguments(["--dataset=any.csv"]), CAPTIONS)
    names = ("resnet50.a1_in1k", "distilbert-base-uncased")
    assert asked == [(*names, None, None, None), names]


def test_preset_gives_random_weights_and_a_new_vocabulary(tmp_path: Path) -> None:
    preset = str(write_preset(tmp_path))
    torch.manual_seed(0)
    model, processor = build(preset=preset, projection_dim=8, max_length=10, image_size=64)
    assert model.config.projection_dim == 8
    assert processor.tokenizer.model_max_length == 10
    assert processor.image_processor.crop_size == {"height": 64, "width": 64}
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size
    assert model(**inputs_of(processor)).text_embeds.shape == (4, 8)
    torch.manual_seed(0)
    again, _ = build(preset=preset, projection_dim=8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_preset_length_is_limited_by_its_position_table(tmp_path: Path) -> None:
    _, processor = build(preset=str(write_preset(tmp_path)))
    assert processor.tokenizer.model_max_length == 48


@pytest.mark.parametrize("family", ["roberta", "modernbert", "t5"])
def test_preset_text_tower_uses_the_padding_of_the_vocabulary(tmp_path: Path, family: str) -> None:
    preset = write_preset(tmp_path, text_config={"model_type": family, **TEXT[family]})
    model, processor = build(preset=str(preset))
    assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id == 0
    assert model.get_input_embeddings().padding_idx in (0, None)
    together = processor(text=["a dog", "a white boat on a blue lake"], return_tensors="pt")
    alone = processor(text="a dog", return_tensors="pt")
    with torch.inference_mode():
        assert torch.allclose(model(**together).text_embeds[0], model(**alone).text_embeds[0], atol=1e-5)


def test_export_is_loaded_with_weights_and_processor(exported: str) -> None:
    model, processor = build(model_name_or_path=exported)
    reference = MiniClipModel.from_pretrained(exported)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert processor.tokenizer.model_max_length == 24
    assert processor.image_processor.crop_size == {"height": PIXELS, "width": PIXELS}


def test_export_accepts_shorter_texts_and_other_image_sizes(exported: str) -> None:
    model, processor = build(model_name_or_path=exported, max_length=8, image_size=64, projection_dim=16)
    assert processor.tokenizer.model_max_length == 8
    assert processor.image_processor.crop_size == {"height": 64, "width": 64}
    assert model(**inputs_of(processor)).image_embeds.shape == (4, 16)


def test_an_export_in_half_precision_is_trained_in_full(tmp_path: Path) -> None:
    export(tiny_model().half(), tiny_processor(), tmp_path / "export")
    model, _ = build(model_name_or_path=str(tmp_path / "export"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --- decoders and declared poolings ----------------------------------------------------------------------------------


def test_decoder_without_padding_token_pads_with_its_end(towers: dict[str, str], tmp_path: Path) -> None:
    text = str(save_decoder(tmp_path / "gpt2", eos_token="<|endoftext|>"))
    model, processor = build(vision_model=towers["vision_model"], text_model=text)
    assert (model.config.text_pooling, processor.tokenizer.pad_token) == ("last", "<|endoftext|>")
    exported = MiniClipModel.from_pretrained(export(model, processor, tmp_path / "export"))
    texts = [*TEXTS, "", "a", "a a a"]
    found = encode_texts(exported, texts, progress=False)
    alone = torch.cat([encode_texts(model, [text], processor, progress=False) for text in texts])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    assert (found @ found.T).fill_diagonal_(0).max() < 0.999  # all embeddings differ


def test_unusable_decoders_are_rejected(towers: dict[str, str], tmp_path: Path) -> None:
    flags = {"vision_model": towers["vision_model"], "text_model": str(save_decoder(tmp_path / "gpt2"))}
    with pytest.raises(ModelError, match="neither a padding token nor an end-of-text token"):
        build(**flags)
    save_decoder(tmp_path / "gpt2", eos_token="<|endoftext|>")
    with pytest.raises(ModelError, match="text_pooling 'cls' takes the first token.*choose last or mean"):
        build(**flags, text_pooling="cls")


def declare(folder: str, pooling: dict[str, Any], place: str = "1_Pooling") -> None:
    """Write the files in which sentence-transformers keeps a pooling."""
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"},
               {"path": place, "type": "sentence_transformers.models.Pooling"}]  # fmt: skip
    (Path(folder) / place).mkdir(exist_ok=True)
    (Path(folder) / "modules.json").write_text(json.dumps(modules))
    (Path(folder) / place / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_declared_pooling_is_the_default(
    towers: dict[str, str], tmp_path: Path, declared: dict[str, Any], expected: str
) -> None:
    text = str(shutil.copytree(towers["text_model"], tmp_path / "text"))
    declare(text, declared)
    assert build(vision_model=towers["vision_model"], text_model=text)[0].config.text_pooling == expected
    assert (
        build(vision_model=towers["vision_model"], text_model=text, text_pooling="mean")[0].config.text_pooling
        == "mean"
    )


@pytest.mark.parametrize(
    ("declared", "name"),
    [
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, r"mean_tokens\+cls_token"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
    ],
)
def test_unsupported_declared_pooling_is_named(
    towers: dict[str, str], tmp_path: Path, declared: dict[str, Any], name: str
) -> None:
    text = str(shutil.copytree(towers["text_model"], tmp_path / "text"))
    declare(text, declared, "0_Pool")
    with pytest.raises(
        ModelError, match=f"pooling '{name}' .0_Pool/config.json.*set text_pooling to one of cls, mean"
    ):
        build(vision_model=towers["vision_model"], text_model=text)
    assert (
        build(vision_model=towers["vision_model"], text_model=text, text_pooling="cls")[0].config.text_pooling == "cls"
    )


def cache_repository(cache: Path, repo_id: str, folder: Path, absent: tuple[str, ...] = ()) -> None:
    """Store a folder as a download of a repository; `absent` files are known not to be in it."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / COMMIT)
    for path in (root / "refs" / "main", *(root / ".no_exist" / COMMIT / name for name in absent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMMIT)


def test_pooling_declared_on_the_hub_is_the_default(
    towers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    text = shutil.copytree(towers["text_model"], tmp_path / "text")
    cache_repository(tmp_path / "cache", "alice/plain", text, absent=("modules.json",))
    declare(str(text), {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True})
    cache_repository(tmp_path / "cache", "alice/sentences", text)
    for name, expected in (("alice/plain", "cls"), ("alice/sentences", "last")):
        model, _ = build(vision_model=towers["vision_model"], text_model=name)
        assert model.config.text_pooling == expected
    declare(str(text), {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False})
    cache_repository(tmp_path / "cache", "alice/max", text)
    with pytest.raises(ModelError, match="alice/max declares the pooling 'max_tokens' .1_Pooling/config.json"):
        build(vision_model=towers["vision_model"], text_model="alice/max")


@pytest.mark.parametrize("missing", ["modules.json", "1_Pooling/config.json"])
def test_unknown_pooling_is_a_warning_on_the_hub_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    declare(str(tmp_path / "text"), {})
    (tmp_path / "text" / missing).unlink()
    assert declared_pooling(tmp_path / "text") is None
    cache_repository(tmp_path / "cache", "alice/known", tmp_path / "text", absent=(missing,))
    assert declared_pooling("alice/known") is None and not recwarn
    cache_repository(tmp_path / "cache", "alice/unknown", tmp_path / "text")
    with pytest.warns(UserWarning, match=f"alice/unknown: {missing} cannot be read from the Hub"):
        assert declared_pooling("alice/unknown") is None


# --- towers tried before any work ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picky(tmp_path_factory: pytest.TempPathFactory, towers: dict[str, str]) -> dict[str, str]:
    """Towers of which the image tower takes only multiples of 32 pixels, which timm does not know."""
    folder = Path(shutil.copytree(towers["vision_model"], tmp_path_factory.mktemp("picky") / "dla"))
    tower = timm.create_model("dla46_c", num_classes=10)
    save_file(tower.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architecture": "dla46_c"}
    (folder / "config.json").write_text(json.dumps(config))
    return towers | {"vision_model": str(folder)}


@pytest.mark.parametrize("flag", ["image_size", "train_image_size"])
def test_image_size_that_a_tower_cannot_take_names_others(picky: dict[str, str], flag: str) -> None:
    build(**picky, **{flag: 96})
    with pytest.raises(UsageError, match=f"--{flag} 100: dla46_c takes no images of 100x100.*it takes: 32, 96, 128$"):
        build(**picky, **{flag: 100})


def test_image_tower_that_cannot_be_used_is_rejected(towers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MiniClipVisionModel, "pooled_size", 7)
    with pytest.raises(
        ModelError, match=r"an image of 32x32 pixels: its features have the shape \[1, \d+\] instead of"
    ):
        build(**towers)
    monkeypatch.undo()
    model, processor = build(**towers)
    next(iter(model.vision_model.parameters())).data[0] = torch.nan
    with pytest.raises(ModelError, match="cannot embed an image of 32x32 pixels: its features are NaN or infinite"):
        try_towers(model, processor, TrainingArguments())


def test_text_tower_that_cannot_be_used_is_rejected(towers: dict[str, str]) -> None:
    model, processor = build(**towers)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    try_towers(model, processor, TrainingArguments())
    assert torch.equal(torch.rand(2), expected) and not model.training  # nothing of the run has changed
    processor.tokenizer.model_max_length = 64  # the table has 24 positions
    with pytest.raises(
        UsageError, match="--max_length 64: text tower distilbert takes no texts of 64 tokens.*set --max_length 16"
    ):
        try_towers(model, processor, TrainingArguments())
    processor.tokenizer.model_max_length = 24
    processor.tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    model.set_input_embeddings(nn.Embedding(len(processor.tokenizer) - 1, 32))
    with pytest.raises(ModelError, match=r"cannot embed a short text: .*token \d+ of its tokenizer, but a table of"):
        try_towers(model, processor, TrainingArguments())


def test_causal_tower_in_disguise_needs_another_pooling(towers: dict[str, str]) -> None:
    model, processor = build(**towers)
    decoder = tiny_model(text="bert", text_pooling="cls")
    decoder.config.text_config.is_decoder = True
    decoder = MiniClipModel(decoder.config).eval()
    with pytest.raises(UsageError, match="--text_pooling cls: text tower bert gives all texts .* choose last or mean"):
        try_towers(decoder, processor, TrainingArguments())
    decoder.config.text_pooling = "last"
    try_towers(decoder, processor, TrainingArguments())


def test_towers_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, tried = tmp_path / "cache", list[str]()
    plain = try_towers_module._try_texts
    monkeypatch.setattr(try_towers_module, "_try_texts", lambda *args: (tried.append("texts"), plain(*args)))

    def is_tried(
        model: MiniClipModel, processor: MiniClipProcessor, cache: Path | None = cache, **fields: Any
    ) -> bool:
        tried.clear()
        try_towers(model, processor, TrainingArguments(**fields), cache)
        return bool(tried)

    torch.manual_seed(0)
    model, processor = tiny_model(), tiny_processor()
    assert is_tried(model, processor) and not is_tried(model, processor)
    assert is_tried(model, processor, None), "without a cache each time"
    assert is_tried(model, processor, train_image_size=48) and not is_tried(model, processor, train_image_size=48)
    torch.manual_seed(0)
    same = tiny_model()  # another run
    assert not is_tried(same, tiny_processor())
    for tower in (same.vision_model, same.text_model):
        with torch.no_grad():
            next(tower.parameters()).flatten()[0] += 1e-6
        assert is_tried(same, processor), "a weight has changed"
    same.config.text_pooling = "mean"
    assert is_tried(same, processor)
    processor.tokenizer.model_max_length -= 1
    assert is_tried(same, processor)
    processor.image_processor.crop_size = {"height": 40, "width": 40}
    assert is_tried(same, processor)
    processor.tokenizer.pad_token = "[SEP]"
    assert is_tried(same, processor) and not is_tried(same, processor)
    monkeypatch.setattr(timm, "__version__", "0")
    assert is_tried(same, processor)


def test_towers_that_fail_are_tried_each_time(tmp_path: Path) -> None:
    model, processor = tiny_model(), tiny_processor()
    next(iter(model.vision_model.parameters())).data[0] = torch.nan
    for _ in range(2):
        with pytest.raises(ModelError, match="its features are NaN or infinite"):
            try_towers(model, processor, TrainingArguments(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_trained_towers_keep_no_trial(towers: dict[str, str], tmp_path: Path) -> None:
    build(**towers, freeze="none", feature_cache_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
    build(**towers, freeze="text", feature_cache_dir=str(tmp_path))
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["tried"]


# --- pickled weights -------------------------------------------------------------------------------------------------


def pickle_weights(folder: Path, shards: int = 1) -> None:
    """Replace the safetensors of a model by pickles with the same weights."""
    weights = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-0000{i + 1}-of-0000{shards}.bin"
        torch.save(dict(weights[i::shards]), folder / name)


@pytest.mark.parametrize(("part", "shards"), [("vision_model", 1), ("text_model", 1), ("text_model", 2)])
def test_pickled_tower_names_the_command_that_converts_it(
    towers: dict[str, str], tmp_path: Path, part: str, shards: int
) -> None:
    folder = Path(shutil.copytree(towers[part], tmp_path / "it's a tower"))
    pickle_weights(folder, shards)
    flags = towers | {part: str(folder)}
    with pytest.raises(
        ModelError, match=rf"--{part} .*: pickled weights \(pytorch_model.*bin\) are not read"
    ) as raised:
        build(**flags)
    words = shlex.split(str(raised.value).partition("convert them with ")[2])
    assert words[:2] == ["python", "-c"] and len(words) == 3
    exec(words[2], {})  # noqa: S102
    torch.manual_seed(0)
    converted = build(**flags)[0].state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(value, converted[name]) for name, value in build(**towers)[0].state_dict().items())


def test_pickled_export_and_file_of_weights_are_rejected(
    exported: str, towers: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    pickle_weights(folder)
    with pytest.raises(ModelError, match="--model_name_or_path .*pickled weights.*python -c"):
        build(model_name_or_path=str(folder))
    with pytest.raises(ModelError, match="model .*export: pickled weights.*python -c"):
        model_folder(folder)
    with pytest.raises(ModelError, match="pytorch_model.bin: a file; expected a folder with config.json"):
        build(**towers | {"vision_model": str(folder / "pytorch_model.bin")})


# --- dropout ---------------------------------------------------------------------------------------------------------


def training_passes(model: MiniClipModel) -> list[Any]:
    """Two forward passes in training mode, but for batch norm, over the same batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    torch.manual_seed(0)
    batch = {"pixel_values": torch.randn(4, 3, PIXELS, PIXELS), "input_ids": torch.randint(5, 150, (4, 12))}
    with torch.no_grad():
        return [model(**batch) for _ in range(2)]


@pytest.mark.parametrize(
    ("vision", "text"), [*((v, "distilbert") for v in VISION), *(("resnet", t) for t in TEXT if t != "distilbert")]
)
def test_dropout_makes_training_passes_differ(vision: str, text: str) -> None:
    model = tiny_model(vision, text)
    set_dropout(model, 0.0)
    first, second = training_passes(model)
    assert torch.equal(first.logits_per_image, second.logits_per_image)
    assert model.config.projection_dropout == 0.0

    set_dropout(model, 0.5)
    first, second = training_passes(model)
    assert not torch.equal(first.text_model_output.pooler_output, second.text_model_output.pooler_output)
    pooled = first.vision_model_output.pooler_output, second.vision_model_output.pooler_output
    assert not torch.equal(*pooled)
    heads = [model.visual_projection.train()(pooled[0]) for _ in range(2)]
    assert not torch.equal(*heads)


def test_text_towers_keep_their_dropout_without_the_flag() -> None:
    first, second = training_passes(tiny_model("resnet", "bert", projection_dropout=0.0))
    assert not torch.equal(first.text_embeds, second.text_embeds)
    assert torch.equal(first.image_embeds, second.image_embeds)


@pytest.mark.parametrize("source", ["towers", "preset", "export"])
def test_the_dropout_flag_reaches_every_module_from_each_source(
    tmp_path: Path, towers: dict[str, str], exported: str, source: str
) -> None:
    flags = {"towers": towers, "preset": {}, "export": {"model_name_or_path": exported}}[source]
    if source == "preset":
        flags = {"preset": str(write_preset(tmp_path))}
    model, _ = build(**flags, dropout=0.25)
    probabilities = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(probabilities) > 4
    assert set(probabilities) == {0.25}
    assert model.vision_model.timm_model.drop_rate == 0.25
    assert model.config.projection_dropout == 0.25


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vision_model": "resnet5O"}, "'resnet5O' is neither a folder nor a timm model.*similar names: .*resnet50"),
        ({"vision_model": "./nowhere"}, "--vision_model ./nowhere: no such folder"),
        ({"text_model": "/nowhere/bert"}, "--text_model /nowhere/bert: no such folder"),
        ({"text_model": "no-such-text-tower"}, "--text_model no-such-text-tower: .*connect"),
        ({"max_length": 25}, r"max_length must be in 1\.\.24"),
        ({"projection_dim": 0}, "projection_dim must be at least 1, not 0"),
        ({"projection_depth": -1}, "projection_depth must be at least 0"),
        (
            {"projection_depth": 0},
            "leaves a tower's 96 features as they are: set projection_dim 96",
        ),
    ],
)
def test_wrong_towers_and_sizes_are_rejected(towers: dict[str, str], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(MiniClipError, match=message) as raised:
        build(**(towers | flags))
    assert str(raised.value).startswith("cannot create a model from --vision_model ")


def test_tower_in_the_wrong_place_is_rejected(towers: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="transformers has no image encoder for a DistilBertConfig"):
        build(vision_model=towers["text_model"], text_model=towers["text_model"])
    with pytest.raises(ModelError, match="cannot create a model from .*--text_model .*vision-resnet"):
        build(vision_model=towers["vision_model"], text_model=towers["vision_model"])


def test_a_tower_of_fixed_size_refuses_another_image_size(tmp_path: Path) -> None:
    vision, text = save_towers(tmp_path, vision="vit")
    config = json.loads((vision / "config.json").read_text())
    config["pretrained_cfg"]["fixed_input_size"] = True
    (vision / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="takes images of 32x32 pixels only, not image_size 64"):
        build(vision_model=str(vision), text_model=str(text), image_size=64)


def test_foreign_model_is_rejected_with_its_type(towers: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="a model of type 'distilbert', which is a single tower or no CLIP at all"):
        build(model_name_or_path=towers["text_model"])


@pytest.mark.slow
def test_new_process_loads_an_export_without_remote_code(exported: str) -> None:
    code = f"from modeling_miniclip.inference.loading import load_export; load_export({exported!r}, '--model')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, input=""
    )
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout + done.stderr


def test_folder_without_a_model_names_the_export_inside(exported: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"run: this folder has no config.json; did you mean .*run/export\?"):
        build(model_name_or_path=str(Path(exported).parent))
    with pytest.raises(ModelError, match="this folder has no config.json$"):
        build(model_name_or_path=str(tmp_path))
    with pytest.raises(ModelError, match="--model_name_or_path ./nowhere: no such folder"):
        build(model_name_or_path="./nowhere")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"projection_dim": 32}, "--projection_dim 32 cannot change a trained model: .* has 16"),
        ({"projection_depth": 1}, "--projection_depth 1 cannot change"),
        ({"text_pooling": "mean"}, "--text_pooling mean cannot change .* has cls"),
        ({"loss_type": "sigmoid"}, "--loss_type sigmoid cannot change .* has softmax_sum"),
        ({"max_length": 25}, r"--max_length must be in 1\.\.24"),
    ],
)
def test_fixed_settings_of_a_trained_model_are_rejected(exported: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(model_name_or_path=exported, **flags)


def test_export_that_lacks_a_weight_is_rejected(exported: str, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "export")
    weights = load_file(tmp_path / "export" / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights: logit_scale"):
        build(model_name_or_path=str(tmp_path / "export"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"projection_dims": 3}', r"preset.json: unknown key 'projection_dims'; did you mean projection_dim\?"),
        ('{"projection_dim": "3"}', "projection_dim"),
        ('{"projection_dim": 3', "preset.json: not JSON"),
        ("[]", "preset.json: expected the fields of a MiniClipConfig, found list"),
        ('{"text_pooling": "max"}', "text_pooling must be one of cls, mean"),
    ],
)
def test_wrong_preset_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "preset.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        build(preset=str(tmp_path / "preset.json"))


def test_unknown_preset_lists_the_packaged_ones() -> None:
    with pytest.raises(UsageError, match="scenes_tinny: neither a file nor .*scenes_tiny"):
        build(preset="scenes_tinny")


def test_given_fields_override_the_preset(tmp_path: Path) -> None:
    config = read_preset(write_preset(tmp_path, projection_depth=3), {"projection_dim": 99})
    assert (config.projection_dim, config.projection_depth) == (99, 3)
    assert config.vision_config.architecture == VISION["resnet"]["architecture"]


def test_scenes_tiny_tells_the_order_of_words_and_ignores_padding() -> None:
    torch.manual_seed(0)
    model, processor = create_model(TrainingArguments(dataset=["scenes"], preset="scenes_tiny"), CAPTIONS)
    texts = ["a red dog and a yellow ball", "a yellow dog and a red ball", "a boat"]
    alone = [encode_texts(model, [text], processor, progress=False)[0] for text in texts]
    torch.testing.assert_close(encode_texts(model, texts, processor, progress=False), torch.stack(alone))
    processor.tokenizer.padding_side = "left"
    torch.testing.assert_close(encode_texts(model, texts, processor, progress=False), torch.stack(alone))
    assert (alone[0] - alone[1]).norm() > 0.01


# --- vocabulary ------------------------------------------------------------------------------------------------------

ODD_CAPTIONS = [
    ["Ein Café in Köln, 5°C – “schön”!", "日本の犬 on the beach"],
    ["a dog 🐕 runs", "ＦＵＬＬ width", "x" * 90],
    ["Привет мир", "don't re-use the t-shirt..."],
]


def test_vocabulary_is_learned_from_a_split_as_from_lists() -> None:
    rows = Dataset.from_dict({"captions": CAPTIONS})
    assert train_tokenizer(Captions(rows), 200).get_vocab() == train_tokenizer(CAPTIONS, 200).get_vocab()


def test_truncated_captions_are_counted_in_a_sample_of_many() -> None:
    rows, processor = (
        Dataset.from_dict({"captions": [["a dog"], ["a dog " * 30, "a dog " * 40], ["b"]]}),
        tiny_processor(),
    )
    assert describe_truncated(rows, rows, processor) == "2 of 4 training captions will be truncated to 24 tokens"
    sample = rows.select([1])
    assert describe_truncated(rows, sample, processor) == (
        "2 of 2 sampled training captions will be truncated to 24 tokens"
    )
    assert describe_truncated(rows, rows.select([0, 2]), processor) is None


def test_truncated_captions_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(last: str = "b", longest: int = 24) -> tuple[str | None, bool]:
        rows, processor, counted = Dataset.from_dict({"captions": [["a dog " * 30], [last]]}), tiny_processor(), []
        processor.tokenizer.model_max_length = longest
        plain = processor.count_truncated
        monkeypatch.setattr(processor, "count_truncated", lambda texts: (counted.append(1), plain(texts))[1])
        return describe_truncated(rows, rows, processor, tmp_path), bool(counted)

    expected = "1 of 2 training captions will be truncated to 24 tokens"
    assert line() == (expected, True) and line() == (expected, False)
    assert line("a dog " * 20) == (expected.replace("1 of", "2 of"), True)
    assert line(longest=23) == (expected.replace("24", "23"), True)
    assert line(longest=100) == (None, True) and line(longest=100) == (None, False)
    for path in tmp_path.iterdir():
        path.write_text("[]", encoding="utf-8")  # damaged
    assert line() == (expected, True)


@pytest.mark.parametrize("captions", [CAPTIONS, ODD_CAPTIONS])
def test_the_vocabulary_knows_every_caption_and_spells_it_again(captions: list[list[str]]) -> None:
    tokenizer = train_tokenizer(captions, 400)
    assert len(tokenizer) <= 400
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for text in (text for row in captions for text in row):
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert tokenizer.unk_token_id not in ids
        normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        assert tokenizer.decode(ids[1:-1]).replace(" ", "") == normal.replace(" ", "")


def test_rare_words_are_spelled_from_known_letters() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 200)
    assert tokenizer.tokenize("the dog children") == ["the", "dog", "children"]
    assert len(tokenizer.tokenize("godlike")) > 1
    assert tokenizer.tokenize("€") == ["[UNK]"]


@pytest.mark.slow
def test_the_vocabulary_is_the_same_in_every_process() -> None:
    code = "from tests.helpers.towers import *; print(train_tokenizer(CAPTIONS, 160).get_vocab())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT).stdout
    own = train_tokenizer(CAPTIONS, 160).get_vocab()
    assert eval(other) == own  # noqa: S307
    assert all(train_tokenizer(CAPTIONS, 160).get_vocab() == own for _ in range(5))


def test_too_many_characters_for_the_vocabulary_are_rejected(tmp_path: Path) -> None:
    captions = [["".join(chr(0x4E00 + i) for i in range(300))]]
    with pytest.raises(ValueError, match="the captions need 305 tokens .* vocab_size 200 .*raise it"):
        train_tokenizer(captions, 200)
    with pytest.raises(ModelError, match="vocab_size 200"):
        create_model(TrainingArguments(preset=str(write_preset(tmp_path))), captions)
    assert tiny_processor().tokenizer.unk_token_id not in train_tokenizer(captions, 305)(captions[0])["input_ids"][0]


def test_reloaded_tokenizer_has_the_same_class_and_ids(exported: str) -> None:
    own = tiny_processor().tokenizer
    for tokenizer in (
        AutoTokenizer.from_pretrained(exported),
        AutoProcessor.from_pretrained(exported).tokenizer,
        MiniClipProcessor.from_pretrained(exported).tokenizer,
    ):
        assert type(tokenizer) is type(own) is BertTokenizer
        assert tokenizer.get_vocab() == own.get_vocab()
        assert tokenizer.model_max_length == 24
        assert tokenizer(TEXTS)["input_ids"] == own(TEXTS)["input_ids"]
        assert tokenizer.special_tokens_map == own.special_tokens_map
