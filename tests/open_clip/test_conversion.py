"""Models of open_clip as models of this package, and back, with open_clip's own classes, vocabulary and transforms."""

import copy
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling_miniclip import MiniClipModel, MiniClipProcessor, export, from_clip
from modeling_miniclip.clips.convert import convert
from modeling_miniclip.errors import MiniClipError, ModelError, UsageError
from modeling_miniclip.evaluation.encoders import open_encoder
from modeling_miniclip.evaluation.eval_sets import load_eval_set
from modeling_miniclip.evaluation.evaluate import evaluate_model
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.towers.create_model import create_model
from tests.clips.comparison import FAULTS, differences, our_results
from tests.helpers.clips import (
    TEXTS,
    clip_tokenizer,
    load_in_this_process,
    pictures,
    randomise,
    save_clip,
    train_slightly,
    unigram_tokenizer,
)
from tests.helpers.runs import flags, write_scene_folder
from train_miniclip import main

pytestmark = pytest.mark.filterwarnings("ignore:.*truncated", "ignore:.*states no licence")

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = {
    "context_length": 24, "width": 32, "heads": 2, "layers": 2, "no_causal_mask": True, "proj_bias": True,
    "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
    "hf_tokenizer_name": "./", "tokenizer_kwargs": {"clean": "canonicalize"},
}  # fmt: skip
TIMM = {"timm_model_pretrained": False, "image_size": 160}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VISION, "text_cfg": TEXT},
    "vit-quick-gelu": {"vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True, "custom_text": True},
    "vit-bias": {"vision_cfg": VISION, "text_cfg": TEXT, "init_logit_bias": -10},
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [3, 4, 6, 3], "width": 8}, "text_cfg": TEXT},
    "siglip": {
        "embed_dim": 64, "init_logit_bias": -10, "custom_text": True, "text_cfg": SIGLIP_TEXT,
        "vision_cfg": TIMM | {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    },
    "timm-linear": {
        "vision_cfg": TIMM | {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "timm-classifier": {
        "vision_cfg": TIMM | {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None},
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 49407, "proj_bias": True}, "custom_text": True,
    },
    "bert": {"vision_cfg": VISION, "text_cfg": {"hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"}},
    "roberta": {"vision_cfg": VISION, "text_cfg": {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}},
    "roberta-mlp": {"vision_cfg": VISION, "text_cfg": {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}},
    "bert-cls": {
        "vision_cfg": VISION, "quick_gelu": True,
        "text_cfg": {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"},
    },
    "timm-mlp": {
        "vision_cfg": TIMM | {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"},
        "text_cfg": TEXT,
    },
    "timm-mlp-bias": {
        "vision_cfg": TIMM | {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "mlp",
                              "timm_proj_bias": True},
        "text_cfg": TEXT,
    },
}  # fmt: skip
PREPROCESSING = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
HUGGING_FACE = ("bert", "roberta", "roberta-mlp", "bert-cls")


def hugging_face_text(kind: str, folder: Path) -> dict[str, Any]:
    """Save configuration and tokenizer of a text tower; what `text_cfg` says of it."""
    from transformers import BertConfig, RobertaConfig

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config_class = RobertaConfig if kind.startswith("roberta") else BertConfig
    config_class(**small, vocab_size=130, max_position_embeddings=40, pad_token_id=1).save_pretrained(folder / "text")
    return {"hf_model_name": str(folder / "text"), "hf_tokenizer_name": "./", "context_length": 24,
            "tokenizer_kwargs": {"clean": "whitespace"}}  # fmt: skip


def save_open_clip(kind: str, folder: Path, **changes: Any) -> Path:
    """Save a tiny model as open_clip lays it out on the Hub. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {"embed_dim": 16, **copy.deepcopy(MODELS[kind]), **changes}
    if kind in HUGGING_FACE:
        cfg["text_cfg"] |= hugging_face_text(kind, folder)
    if "hf_tokenizer_name" in cfg["text_cfg"]:
        tokenizer = unigram_tokenizer(start=kind != "siglip")
        tokenizer.save_pretrained(folder)
        if kind == "siglip":
            cfg["text_cfg"]["vocab_size"] = len(tokenizer)
    content = {"model_cfg": cfg, "preprocess_cfg": PREPROCESSING | (
        {"resize_mode": "squash", "interpolation": "bilinear"} if kind == "siglip" else {})}  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    weights = randomise(model, 4.8 if kind == "siglip" else None).state_dict()
    save_file({name: value.clone() for name, value in weights.items()}, folder / "open_clip_model.safetensors")
    return folder


def open_clip_results(name: str, **options: Any) -> dict[str, Tensor]:
    """Pixels, features and logits of a model of open_clip, with its own transform and tokenizer."""
    model, _, transform = open_clip.create_model_and_transforms(name, **options)
    model.eval()
    pixels = torch.stack([transform(image) for image in pictures()])
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    with torch.no_grad():
        results = {
            "image features": model.encode_image(pixels),
            "text features": model.encode_text(tokens),
            "logits": model.get_logits(pixels, tokens)[0],
            "temperature": model.logit_scale.exp().reshape(1),
            "pixels": pixels,
        }
    return results | ({"bias": model.logit_bias.detach().reshape(1)} if model.logit_bias is not None else {})


@pytest.mark.parametrize("kind", MODELS)
def test_converted_model_computes_the_same(kind: str, tmp_path: Path) -> None:
    folder = save_open_clip(kind, tmp_path / "original")
    theirs, model = open_clip_results(f"local-dir:{folder}"), from_clip(folder)
    assert differences(our_results(model, model.processor), theirs) == {}
    written = export(model, model.processor, tmp_path / "export")
    again, processor = MiniClipModel.from_pretrained(written), MiniClipProcessor.from_pretrained(written)
    assert differences(our_results(again, processor), theirs) == {}


@pytest.mark.parametrize("kind", ["vit", "siglip", "resnet", "bert"])
def test_comparison_notices_each_fault(kind: str, tmp_path: Path) -> None:
    folder = save_open_clip(kind, tmp_path)
    theirs = open_clip_results(f"local-dir:{folder}")
    is_timm = from_clip(folder).config.vision_config.model_type == "timm_wrapper"  # with the activation in its name
    for name, fault in FAULTS.items():
        if name == "activation" and is_timm:
            continue
        model = from_clip(folder)
        fault(model)
        try:
            assert differences(our_results(model, model.processor), theirs), name
        except RuntimeError:  # a mean of states is narrower than SigLIP's projection
            assert (kind, name) == ("siglip", "pooling")


@pytest.mark.parametrize("kind", MODELS)
def test_model_goes_back_to_open_clip(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_in_this_process(monkeypatch)
    folder = source = save_open_clip(kind, tmp_path / "original")
    if kind not in HUGGING_FACE:  # an export does not keep that such a tower came from a folder
        source = export(from_clip(folder), from_clip(folder).processor, tmp_path / "export")
    done = convert(source, tmp_path / "back", "open_clip")
    assert done.difference is not None and done.difference < 1e-5 and not done.rounds
    theirs, back = open_clip_results(f"local-dir:{folder}"), open_clip_results(f"local-dir:{tmp_path / 'back'}")
    assert differences(back, theirs) == {}


@pytest.mark.parametrize("kind", ["vit", "resnet", "siglip", "timm-linear"])
def test_fine_tuned_model_goes_back_to_open_clip(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_in_this_process(monkeypatch)
    model = from_clip(save_open_clip(kind, tmp_path / "original"))
    train_slightly(model)
    export(model, model.processor, tmp_path / "tuned")
    done = convert(tmp_path / "tuned", tmp_path / "back", "open_clip")
    assert done.difference is not None and done.difference < 1e-5
    theirs = open_clip_results(f"local-dir:{tmp_path / 'back'}")
    assert differences(our_results(model, model.processor), theirs) == {}


def test_text_tower_without_a_name_does_not_go_back(tmp_path: Path) -> None:
    folder = save_open_clip("roberta", tmp_path / "original")
    export(from_clip(folder), from_clip(folder).processor, tmp_path / "export")
    with pytest.raises(ModelError, match="builds a text tower such as roberta by its name on the Hub"):
        convert(tmp_path / "export", tmp_path / "back", "open_clip")
    assert not (tmp_path / "back").exists()


def test_model_in_its_layout_is_evaluated(tmp_path: Path) -> None:
    folder = save_open_clip("vit", tmp_path / "original")
    model = from_clip(folder)
    export(model, model.processor, tmp_path / "mine")
    data = load_eval_set(str(write_scene_folder(tmp_path / "scenes", 12)), "train")
    report = evaluate_model(str(tmp_path / "mine"), data, baseline=str(folder))
    assert report["baseline_metrics"] == report["metrics"]


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether both have the same weights under the same names."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_run_takes_a_clip_or_one_of_its_towers(kind: str, tmp_path: Path, without_figures: None) -> None:
    folder = save_open_clip(kind, tmp_path / "original")
    model, theirs = from_clip(folder), open_clip_results(f"local-dir:{folder}")
    still: dict[str, Any] = {"max_steps": 1, "batch_size": 4, "learning_rate": 1e-12, "weight_decay": 0.0}
    same = from_clip(main(flags(tmp_path, preset=None, model_name_or_path=folder, **still)))
    assert differences(our_results(same, same.processor), theirs) == {}
    other = save_clip("clip", tmp_path / "other")
    argv = ["--output_dir", str(tmp_path / "new"), "--projection_dim", "16"]
    taken, processor = create_model(
        parse_arguments([*argv, "--vision_model", str(other), "--text_model", str(folder)]), []
    )
    assert same_weights(taken.text_model, model.text_model)
    assert taken.config.text_pooling == model.config.text_pooling
    tokens = [one(text=TEXTS, return_tensors="pt")["input_ids"] for one in (processor, model.processor)]
    assert torch.equal(*tokens)
    towers = [*argv, "--vision_model", str(folder), "--text_model", str(other)]
    if kind == "siglip":
        with pytest.raises(ModelError, match="its image tower is timm's test_vit; name one of timm"):
            create_model(parse_arguments(towers), [])
    else:
        taken, _ = create_model(parse_arguments(towers), [])
        assert same_weights(taken.vision_model, model.vision_model)


def test_run_learns_from_a_clip(tmp_path: Path, without_figures: None) -> None:
    folder = save_open_clip("vit", tmp_path / "teacher")
    main(flags(tmp_path, teacher=folder, max_steps=2))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["teacher_divergence"] > 0


def test_clip_of_transformers_goes_to_open_clip(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    folder = save_clip("clip", tmp_path / "original")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    done = convert(folder, tmp_path / "back", "open_clip")
    assert done.difference is not None and done.difference < 1e-5 and done.rounds


def test_open_clip_goes_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_in_this_process(monkeypatch)
    done = convert(save_open_clip("vit", tmp_path / "original"), tmp_path / "back", "transformers")
    assert done.difference is not None and done.difference < 1e-5 and done.rounds


CAPTIONS = [
    "", " ", "It’s a “big” dog &amp; a ﬁsh…", "A  Photo\tof\na CAFÉ 123 cafe\u0301", "x " * 200,
    "日本語 ½ ☃ 🎉 ＡＢＣ", "dogs' the_cat's 3,000 naïve don't &lt;b&gt;", "a\x00b\x1bc",
    "the " * 74 + "end", "the " * 75 + "end", "the " * 76,
]  # fmt: skip


def test_tokens_with_the_real_vocabulary(tmp_path: Path) -> None:
    processor = from_clip(save_open_clip("vit", tmp_path)).processor
    tokens = open_clip.SimpleTokenizer()(CAPTIONS)
    ours = processor(text=CAPTIONS, padding="max_length", return_tensors="pt")
    assert torch.equal(ours["input_ids"] * ours["attention_mask"], tokens)


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_tokens_of_a_hugging_face_tokenizer(clean: str, tmp_path: Path) -> None:
    from modeling_miniclip.clips.open_clip_tokenizer import cleaning_first

    tokenizer = unigram_tokenizer(start=False)
    tokenizer.save_pretrained(tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=24, clean=clean)(CAPTIONS)
    ours = cleaning_first(tokenizer, clean)(
        CAPTIONS, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )
    assert torch.equal(ours["input_ids"], theirs)


def test_architecture_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_open_clip("vit", tmp_path / "original")
    (tmp_path / "ViT-Tiny-Conversion.json").write_text(json.dumps({"embed_dim": 16, **MODELS["vit"]}))
    open_clip.add_model_config(tmp_path)
    weights = folder / "open_clip_model.safetensors"
    theirs = open_clip_results("ViT-Tiny-Conversion", pretrained=str(weights))
    model = from_clip(f"open_clip:ViT-Tiny-Conversion/{weights}")
    assert differences(our_results(model, model.processor), theirs) == {}
    torch.save(open_clip.create_model("ViT-Tiny-Conversion").state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        from_clip(f"open_clip:ViT-Tiny-Conversion/{tmp_path / 'tiny.pt'}")
    with pytest.raises(UsageError, match="has no architecture 'ViT-Z'"):
        from_clip("open_clip:ViT-Z/openai")
    with pytest.raises(ModelError, match="neither a file nor one of the checkpoints"):
        from_clip("open_clip:ViT-Tiny-Conversion/nothing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_open_clip("vit", tmp_path)
    weights = load_file(folder / "open_clip_model.safetensors")
    save_file({name: value.to(dtype) for name, value in weights.items()}, folder / "open_clip_model.safetensors")
    model = from_clip(folder)
    assert model.dtype == torch.float32
    assert differences(our_results(model, model.processor), open_clip_results(f"local-dir:{folder}")) == {}


def test_pickled_weights_are_converted_by_the_command_in_the_error(tmp_path: Path) -> None:
    folder = save_open_clip("vit", tmp_path / "original")
    theirs = open_clip_results(f"local-dir:{folder}")
    weights = folder / "open_clip_model.safetensors"
    torch.save(load_file(weights), folder / "open_clip_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="pickled weights .* are not read") as error:
        from_clip(folder)
    command = shlex.split(str(error.value).partition("convert them with ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    model = from_clip(folder)
    assert differences(our_results(model, model.processor), theirs) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": VISION | {"pool_type": "avg"}}, "pool_type 'avg' of its image tower"),
        ({"vision_cfg": VISION | {"no_ln_pre": True}}, "no_ln_pre True in its vision_cfg"),
        ({"text_cfg": TEXT | {"embed_cls": True}}, "embed_cls True in its text_cfg"),
        ({"text_cfg": TEXT | {"tokenizer_kwargs": {"reduction_mask": "simple"}}}, "reduction_mask"),
    ],
)
def test_what_has_no_counterpart_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_open_clip("vit", tmp_path, **copy.deepcopy(changes))
    with pytest.raises(ModelError, match=message):
        from_clip(folder)


@pytest.mark.parametrize(
    ("kind", "part", "changes", "message"),
    [
        ("vit", "", {"multimodal_cfg": {}}, "a CoCa, whose text decoder has no counterpart"),
        ("vit", "vision_cfg", {"image_size": [32, 48]}, r"images of \[32, 48\] pixels are no squares"),
        ("vit", "text_cfg", {"no_causal_mask": True}, "without a causal mask is not SigLIP's"),
        ("vit", "text_cfg", {"pool_type": "first"}, "pool_type 'first' of its text tower"),
        ("resnet", "vision_cfg", {"layers": [2, 2, 2, 2]}, r"no ResNet of CLIP with layers \[2, 2, 2, 2\]"),
        ("timm-linear", "vision_cfg", {"timm_pool": "abs_attn"}, "timm_pool 'abs_attn' of its image tower"),
        ("timm-linear", "vision_cfg", {"timm_model_name": "test_vit_of_mars"}, "no image tower 'test_vit_of_mars'"),
        ("bert", "text_cfg", {"hf_pooler_type": "max_pooler"}, "hf_pooler_type 'max_pooler' has no counterpart"),
        ("preprocessing", "preprocess_cfg", {"resize_mode": "longest"}, "resize_mode 'longest' pads pictures"),
    ],
)
def test_what_the_description_asks_for_and_has_no_counterpart(
    kind: str, part: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_open_clip("vit" if kind == "preprocessing" else kind, tmp_path)
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    (content if part == "preprocess_cfg" else content["model_cfg"]).setdefault(part, {}).update(changes)
    content["model_cfg"] |= {} if part else changes
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        from_clip(folder)


WIDTH = 32  # of the features, too, so that a model without a projection would load


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("vit", ["visual.proj"], "visual.proj"),
        ("vit", ["text_projection"], "text_projection"),
        ("vit-quick-gelu", ["text.text_projection"], "text_projection"),
        ("resnet", ["visual.attnpool.c_proj.weight"], "visual.attnpool.c_proj"),
        ("siglip", ["text.text_projection.bias"], "text_projection"),
        ("timm-linear", ["visual.head.proj.weight"], "visual.head"),
        ("timm-mlp", ["visual.head.mlp.fc1.weight", "visual.head.mlp.fc1.bias"], "visual.head"),
        ("timm-classifier", ["visual.trunk.head.weight"], "visual.trunk.head"),
        ("roberta", ["text.proj.weight"], "text.proj"),
        ("roberta-mlp", ["text.proj.0.weight"], "text.proj"),
    ],
)
def test_lacking_projection_is_named(kind: str, names: list[str], message: str, tmp_path: Path) -> None:
    folder = save_open_clip(kind, tmp_path, embed_dim=MODELS[kind].get("embed_dim", WIDTH))
    path = folder / "open_clip_model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name not in names}, path)
    assert weights.keys() >= set(names)
    with pytest.raises(ModelError, match=rf"lacks the weights of the projection {message}; choose a complete model"):
        from_clip(folder)


def test_open_clip_is_named_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_open_clip("vit", tmp_path / "original")
    with monkeypatch.context() as patch:
        for part in ("clips.open_clip_tokenizer", "clips.to_open_clip", "evaluation.encoders"):
            patch.setattr(f"modeling_miniclip.{part}.find_spec", lambda name: None)
        for call in (lambda: from_clip(folder), lambda: from_clip("open_clip:ViT-B-32/openai")):
            with pytest.raises(MiniClipError, match="pip install open-clip-torch"):
                call()
        clip_tokenizer().save_pretrained(folder)  # with the vocabulary in the folder it is not needed
        assert from_clip(folder).processor.tokenizer.model_max_length == 77


def test_recall_of_a_clip_and_its_conversion_is_the_same(tmp_path: Path) -> None:
    folder = save_open_clip("vit", tmp_path / "original")
    (tmp_path / "ViT-Tiny-Recall.json").write_text(json.dumps({"embed_dim": 16, **MODELS["vit"]}))
    open_clip.add_model_config(tmp_path)
    model = from_clip(folder)
    model.processor.image_processor.image_mean = list(open_clip.OPENAI_DATASET_MEAN)  # of a bare checkpoint
    model.processor.image_processor.image_std = list(open_clip.OPENAI_DATASET_STD)
    export(model, model.processor, tmp_path / "mine")
    data = load_eval_set(str(write_scene_folder(tmp_path / "scenes", 12)), "train")
    name = f"open_clip:ViT-Tiny-Recall/{folder / 'open_clip_model.safetensors'}"
    assert open_encoder(name, "--baseline")
    report = evaluate_model(str(tmp_path / "mine"), data, baseline=name)
    assert report["baseline_metrics"] == report["metrics"]
