"""Exports load anywhere, cards state what was measured, and pushes reach a Hub."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from modeling_miniclip import MiniClipModel, MiniClipProcessor, ModelError, export, push
from modeling_miniclip.hub import export as hub
from modeling_miniclip.hub.export import SENTENCE_FILES
from modeling_miniclip.hub.model_card import rename_card
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.publish import arguments_for_card
from modeling_miniclip.training.towers.create_model import create_model
from tests.helpers.hubs import WITHOUT_PACKAGE, add_repository, local_hub, run
from tests.helpers.runs import ROOT, flags, metrics_of
from tests.helpers.towers import CAPTIONS, save_towers, tiny_model, tiny_processor

CODE = tuple(f"{part}_miniclip.py" for part in ("configuration", "loss", "modeling", "pictures", "processing"))
FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *CODE,
    *SENTENCE_FILES,
}
# What somebody needs anyway who uses a timm tower with transformers.
ALLOWED = {"PIL", "huggingface_hub", "numpy", "timm", "torch", "transformers"}
TEXTS = [row[0] for row in CAPTIONS]
METRICS = {
    "loss": 1.23456, "text_to_image_R@1": 12.34, "text_to_image_R@5": 45.67, "text_to_image_R@10": 78.9,
    "text_to_image_median_rank": 3.0, "image_to_text_R@1": 21.04, "image_to_text_R@5": 54.0,
    "image_to_text_R@10": 87.0, "image_to_text_median_rank": 2.5, "rsum": 298.95,
}  # fmt: skip
SPLITS = {"train": {"images": 6000, "captions": 30000}, "validation": {"images": 1000, "captions": 5000}}
CARD = {
    "name": "alice/birds",
    "metrics": METRICS,
    "intervals": {"text_to_image_R@1": (10.04, 14.96), "rsum": (290.0, 307.25)},
    "command": "python train_miniclip.py --dataset=captions.csv",
    "arguments": {"dataset": "captions.csv", "learning_rate": 1e-05, "augmentation": '[{"name": "A|B"}]',
                  "best_metric": "rsum"},
    "data": {"name": "captions.csv", "splits": SPLITS},
}  # fmt: skip


AUTO_MODELS = ("AutoModel", "AutoModelForZeroShotImageClassification")
MODEL_MAP = {"AutoConfig": "configuration_miniclip.MiniClipConfig"} | dict.fromkeys(
    AUTO_MODELS, "modeling_miniclip.MiniClipModel"
)
PROCESSOR_MAP = {"AutoProcessor": "processing_miniclip.MiniClipProcessor"}
# Loads SOURCE (at REVISION) by each Auto class, leaves logits and saves again; then the same with what was saved.
LOAD_AND_SAVE_AGAIN = f"""
import os, torch, transformers
from PIL import Image
from transformers import AutoProcessor
there = {{"trust_remote_code": True}} | ({{"revision": os.environ["REVISION"]}} if "REVISION" in os.environ else {{}})
for name in {AUTO_MODELS!r}:
    for source, how, target in ((os.environ["SOURCE"], there, name), (name, {{"trust_remote_code": True}}, None)):
        model = getattr(transformers, name).from_pretrained(source, **how)
        processor = AutoProcessor.from_pretrained(source, **how)
        for part in (model, model.config, processor):
            assert type(part).__module__.startswith("transformers_modules."), type(part)
        inputs = processor(images=Image.open("photo.jpg"), text={TEXTS!r}, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits_per_image
        if target is None:
            assert torch.equal(logits, torch.load(name + ".pt"))
        else:
            torch.save(logits, name + ".pt")
            model.save_pretrained(name)
            processor.save_pretrained(name)
try:
    import modeling_miniclip
except ImportError:
    print("alone")
"""


@pytest.fixture(scope="module")
def model() -> MiniClipModel:
    torch.manual_seed(0)
    return tiny_model()


@pytest.fixture(scope="module")
def exported(model: MiniClipModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tiny_processor(), tmp_path_factory.mktemp("run") / "export", CARD)


@pytest.fixture
def alices_hub(tmp_path: Path) -> Iterator[Any]:
    with local_hub(tmp_path / "hub") as running:
        yield running


def read_card(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and Markdown of a card."""
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def logits_of(model: MiniClipModel, photo: Path) -> torch.Tensor:
    inputs = tiny_processor()(images=Image.open(photo), text=TEXTS, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits_per_image


def paint(folder: Path) -> Path:
    """`photo.jpg`, a picture whose pixels all matter."""
    colours = [(13 * i % 256, 7 * i % 256, 5 * i % 256) for i in range(48 * 40)]
    image = Image.new("RGB", (48, 40))
    image.putdata(colours)
    image.save(folder / "photo.jpg")
    return folder / "photo.jpg"


# --- the folder ------------------------------------------------------------------------------------------------------


def test_an_export_holds_exactly_these_files(exported: Path) -> None:
    assert {path.name for path in exported.rglob("*")} == FILES


@pytest.mark.parametrize("name", CODE)
def test_exported_code_imports_only_siblings_and_usual_libraries(exported: Path, name: str) -> None:
    assert (exported / name).read_bytes() == (ROOT / "modeling_miniclip" / name).read_bytes()
    siblings = {path.removesuffix(".py") for path in CODE}
    imported: set[str] = set()
    for node in ast.walk(ast.parse((exported / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` is not followed by transformers, `from .folder.x import y` breaks it.
            assert (node.level, node.module) in {(1, sibling) for sibling in siblings}
    assert imported - set(sys.stdlib_module_names) <= ALLOWED
    # transformers finds imports with regular expressions, also in docstrings.
    assert set(get_relative_imports(exported / name)) <= siblings
    assert set(get_imports(exported / name)) - set(sys.stdlib_module_names) <= ALLOWED


def test_the_export_says_which_code_is_which_class(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["MiniClipModel"]
    assert config["auto_map"] == MODEL_MAP
    processor = json.loads((exported / "processor_config.json").read_text())
    assert processor["auto_map"] == PROCESSOR_MAP


@pytest.mark.parametrize("part", ["model", "processor", "card"])
def test_an_export_that_fails_leaves_the_one_before(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    target = export(tiny_model(), tiny_processor(), tmp_path / "export", {"name": "first"})
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    owner = {"model": (MiniClipModel, "save_pretrained"), "processor": (MiniClipProcessor, "save_pretrained")}
    monkeypatch.setattr(*owner.get(part, (hub, "write_card")), fail)
    with pytest.raises(OSError, match="No space"):
        export(tiny_model(), tiny_processor(), target, {"name": "second"})
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("wrong", ["compiled", "missing", "resized"])
def test_weights_of_another_model_are_not_exported(tmp_path: Path, wrong: str) -> None:
    model, processor = tiny_model(), tiny_processor()
    target = export(model, processor, tmp_path / "export", {"name": "first"})
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    weights = model.state_dict()
    if wrong == "compiled":
        weights = cast(Any, torch.compile(model)).state_dict()
        expected = r"\d+ missing, such as logit_scale; \d+ that the model does not have, such as _orig_mod.logit_scale"
    elif wrong == "missing":
        del weights["logit_scale"]
        expected = "configuration: 1 missing, such as logit_scale; pass the model itself"
    else:
        weights["logit_scale"] = torch.zeros(2)
        expected = "configuration: 1 of another shape, such as logit_scale; pass the model itself"
    with pytest.raises(ModelError, match=f"not exported: .*{expected}"):
        export(model, processor, target, {"name": "second"}, weights)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_wrapped_model_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not exported: .*_orig_mod.*accelerator.unwrap_model"):
        export(torch.compile(tiny_model()), tiny_processor(), tmp_path / "export")  # type: ignore[arg-type]
    assert not (tmp_path / "export").exists()


def test_export_contains_no_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision, text = save_towers(tmp_path / "private-folder")
    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments(
        recipe=str(tmp_path / "my.yaml"),
        dataset=str(vision / "config.json"),
        image_dir=str(tmp_path),
        vision_model=str(vision),
        text_model="private-folder/" + text.name,
        output_dir=str(tmp_path / "out"),
    )
    model, processor = create_model(arguments, CAPTIONS)
    for _ in range(2):  # nor after further training and a second export
        card = {"name": "out", "arguments": arguments_for_card(arguments), "data": {"name": "config.json"}}
        target = export(model, processor, tmp_path / "export", card)
        for path in target.iterdir():
            assert b"private-folder" not in path.read_bytes(), path
            assert str(tmp_path).encode() not in path.read_bytes(), path
        arguments = replace(arguments, model_name_or_path=str(target), vision_model=None, text_model=None)
        model, processor = create_model(arguments, CAPTIONS)
    metadata, body = read_card((target / "README.md").read_text())
    assert "base_model" not in metadata
    assert "| `model_name_or_path` | `export` |" in body
    assert "local_files_only" not in (target / "tokenizer_config.json").read_text()


def own_lines(output: str) -> list[str]:
    """The lines of an output without the log of DeepSpeed, which transformers imports where it is installed."""
    return [line for line in output.splitlines() if not line.startswith("[20")]


def test_export_loads_and_saves_bit_equal_without_the_package(
    exported: Path, model: MiniClipModel, tmp_path: Path
) -> None:
    photo = paint(tmp_path)
    done = run(WITHOUT_PACKAGE + LOAD_AND_SAVE_AGAIN, tmp_path, HF_HUB_OFFLINE="1", SOURCE=str(exported))
    assert own_lines(done.stdout) == ["alone"], done.stderr
    wanted = logits_of(model, photo)
    for auto in AUTO_MODELS:
        assert torch.equal(torch.load(tmp_path / f"{auto}.pt"), wanted)
        check_saved_again(tmp_path / auto, exported)


def test_any_public_name_registers_the_auto_classes(exported: Path, tmp_path: Path) -> None:
    code = f"""
from modeling_miniclip import DataError  # a name that needs no model
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, pipeline
path = {str(exported)!r}
loaded = [getattr(transformers, name).from_pretrained(path) for name in {AUTO_MODELS!r}]
loaded += [AutoConfig.from_pretrained(path), AutoProcessor.from_pretrained(path)]
loaded.append(pipeline("zero-shot-image-classification", path).model)
AutoTokenizer.from_pretrained(path)
print(*(f"{{type(part).__module__}}.{{type(part).__name__}}" for part in loaded), sep="\\n")
"""
    done = run(code, tmp_path, HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))  # a question would end at the closed stdin
    model, config = "modeling_miniclip.modeling_miniclip.MiniClipModel", "configuration_miniclip.MiniClipConfig"
    processor = "modeling_miniclip.processing_miniclip.MiniClipProcessor"
    assert done.stdout.split() == [model, model, f"modeling_miniclip.{config}", processor, model], done.stderr
    assert not list(tmp_path.rglob("transformers_modules/*/*.py"))


def check_saved_again(folder: Path, source: Path) -> None:
    """What the Auto classes read, with the same code and weights, and maps that point into the folder itself."""
    assert {path.name for path in folder.iterdir()} == FILES - {"README.md", *SENTENCE_FILES}
    for name in CODE:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    saved, wanted = (load_file(path / "model.safetensors") for path in (folder, source))  # the checksum is left out
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == MODEL_MAP
    assert json.loads((folder / "processor_config.json").read_text())["auto_map"] == PROCESSOR_MAP


# --- the card --------------------------------------------------------------------------------------------------------


def test_card_shows_measured_metrics(exported: Path) -> None:
    metadata, body = read_card((exported / "README.md").read_text())
    assert "| text to image | 12.3 (10.0 to 15.0) | 45.7 | 78.9 | 3 |" in body
    assert "95 % confidence intervals" in body
    assert "| image to text | 21.0 | 54.0 | 87.0 | 2.5 |" in body
    assert re.search(r"rsum, is 29(8\.9|9\.0) \(290\.0 to 307\.2\)\.", body)
    assert "1.2346 nats" in body
    assert "by `rsum`" in body
    assert "all 1,000 images and each image among all 5,000 captions" in body
    (entry,) = metadata["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "captions.csv", "type": "unknown", "split": "validation"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {name: value for name, value in METRICS.items() if "R@" in name or name == "rsum"}


def test_card_says_that_validation_images_are_a_sample(tmp_path: Path, model: MiniClipModel) -> None:
    sample = {"images": 5000, "captions": 25000, "drawn_from": 41000, "seed": 3}
    hub.write_card(tmp_path / "README.md", model, {**CARD, "data": {"name": "a", "splits": {"validation": sample}}})
    _, body = read_card((tmp_path / "README.md").read_text())
    assert "The validation images are a sample: 5,000 of 41,000, drawn with seed 3." in body
    assert "Retrieval on this sample of the validation split, each text among all 5,000 images" in body


def test_card_shows_recall_with_shared_captions(tmp_path: Path, model: MiniClipModel) -> None:
    counted = {name: value + 1.5 for name, value in METRICS.items()} | {"rsum": 300.25}
    hub.write_card(tmp_path / "README.md", model, {**CARD, "with_shared": {"texts": 1234, "metrics": counted}})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| text to image, shared captions right | 13.8 | 47.2 | 80.4 | 4.5 |\n" in card
    assert "| image to text, shared captions right | 22.5 | 55.5 | 88.5 | 4 |\n\nThe sum of" in card
    assert " 1,234 captions belong to several images" in card and "counted as right, rsum is 300.2." in card


def test_card_shows_data_arguments_and_versions(exported: Path, model: MiniClipModel) -> None:
    _, body = read_card((exported / "README.md").read_text())
    assert "| train | 6,000 | 30,000 |" in body
    assert "| `learning_rate` | `1e-05` |" in body
    assert '| `augmentation` | `[{"name": "A\\|B"}]` |' in body
    assert f"torch {torch.__version__.split('+')[0]}" in body
    assert re.search(r"Versions: torch \S+, transformers \S+, timm \S+, datasets \S+, accelerate \S+, albumen", body)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in body
    assert "16 dimensions" in body
    assert "\n```bash\npython train_miniclip.py --dataset=captions.csv\n```\n" in body


def test_card_metadata_is_valid_on_the_hub(exported: Path, tmp_path: Path, model: MiniClipModel) -> None:
    metadata, body = read_card((exported / "README.md").read_text())
    assert metadata["license"] == "unknown" and "Its author states no licence" in body
    assert metadata["metrics"] == ["recall"]
    (widget,) = metadata["widget"]
    assert set(widget) == {"src", "candidate_labels", "example_title"}
    assert ModelCard((exported / "README.md").read_text()).data.to_dict() == metadata  # the client's own classes
    hub.write_card(tmp_path / "README.md", model, {**CARD, "license": "mit"})
    metadata, body = read_card((tmp_path / "README.md").read_text())
    assert metadata["license"] == "mit" and "Its licence is `mit`" in body


def test_card_has_short_sample_limits_and_biases(exported: Path) -> None:
    _, body = read_card((exported / "README.md").read_text())
    (sample,) = re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
    assert len(sample.split("\n\n")[0].splitlines() + sample.split("\n\n")[1].splitlines()) <= 10
    assert re.search(r"\n## Limits and biases\n\n.*\bbiases\b", body)


def test_the_card_names_the_loss(tmp_path: Path) -> None:
    for loss_type, words in {"softmax_mean": "mean of the log-prob", "sigmoid": "sigmoid loss of SigLIP"}.items():
        hub.write_card(tmp_path / "README.md", tiny_model(loss_type=loss_type), CARD)
        assert words in (tmp_path / "README.md").read_text()


def test_card_lists_both_hub_towers_as_base_models(alices_hub: Any, tmp_path: Path) -> None:
    vision, text = save_towers(tmp_path / "towers")
    for repo_id, folder in (("timm/test_resnet.r160_in1k", vision), ("alice/bert", text)):
        add_repository(alices_hub, repo_id, {path.name: path for path in folder.iterdir()})
    code = """
from modeling_miniclip import export
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.towers.create_model import create_model
arguments = TrainingArguments(vision_model="test_resnet.r160_in1k", text_model="alice/bert")
for folder in ("first", "second"):  # trained on, it is still of these towers
    export(*create_model(arguments, [["a dog"]]), folder)
    arguments = TrainingArguments(model_name_or_path=folder)
"""
    done = run(code, tmp_path, PYTHONPATH=str(ROOT), **alices_hub.client_env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    for folder in ("first", "second"):
        metadata, _ = read_card((tmp_path / folder / "README.md").read_text())
        assert metadata["base_model"] == ["timm/test_resnet.r160_in1k", "alice/bert"]


def test_card_without_values_is_complete_and_says_so(tmp_path: Path, model: MiniClipModel) -> None:
    hub.write_card(tmp_path / "README.md", model, {})
    metadata, body = read_card((tmp_path / "README.md").read_text())
    for said in ("The training data was not recorded.", "Nothing was measured.", "The arguments were not recorded."):
        assert said in body
    assert "model-index" not in metadata
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "zero-shot-image-classification"


def test_card_works_without_a_loss(tmp_path: Path, model: MiniClipModel) -> None:
    metrics = {name: value for name, value in METRICS.items() if name != "loss"}
    hub.write_card(tmp_path / "README.md", model, {"metrics": metrics})
    text = (tmp_path / "README.md").read_text()
    assert "12.3" in text and "nats" not in text


def test_a_card_links_what_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.config.vision_config.name_or_path = "timm/test_resnet.r160_in1k"
    model.config.text_config.name_or_path = "distilbert-base-uncased"
    data = {"name": "bob/pictures", "hub_ids": ["bob/pictures"], "splits": SPLITS}
    hub.write_card(tmp_path / "README.md", model, {"metrics": METRICS, "data": data})
    metadata, body = read_card((tmp_path / "README.md").read_text())
    assert metadata["base_model"] == ["timm/test_resnet.r160_in1k", "distilbert-base-uncased"]
    assert metadata["datasets"] == ["bob/pictures"]
    assert metadata["model-index"][0]["results"][0]["dataset"]["type"] == "bob/pictures"
    assert "(https://huggingface.co/datasets/bob/pictures)" in body
    assert "(https://huggingface.co/distilbert-base-uncased)." in body
    (tmp_path / "distilbert-base-uncased").mkdir()  # a local tower of that name is not the one on the Hub
    hub.write_card(tmp_path / "README.md", model, {})
    assert read_card((tmp_path / "README.md").read_text())[0]["base_model"] == ["timm/test_resnet.r160_in1k"]


@pytest.mark.parametrize(
    "values",
    [
        CARD,
        {},
        {**CARD, "data": {"name": "scenes", "splits": SPLITS}},
        {**CARD, "at_start": METRICS, "with_shared": {"texts": 2, "metrics": METRICS}},
    ],
)
def test_the_markdown_of_a_card_is_well_formed(tmp_path: Path, model: MiniClipModel, values: dict[str, Any]) -> None:
    hub.write_card(tmp_path / "README.md", model, values)
    _, body = read_card((tmp_path / "README.md").read_text())
    assert "{{" not in body and "{%" not in body and "github.com" not in body and "None" not in body
    assert not re.search(r"\n\n\n", body), "blank lines in a row"
    lines = body.split("\n")
    for i, line in enumerate(lines):
        if line.startswith("#"):
            assert lines[i - 1] == "" and lines[i + 1] == ""
        if line.startswith("|") and not lines[i - 1].startswith("|"):
            assert lines[i - 1] == "", f"a table needs a blank line before it: {line}"
            assert re.fullmatch(r"(\|-+:?)+\|", lines[i + 1])
        if line.startswith("|") and lines[i + 1].startswith("|"):
            columns = [len(re.findall(r"(?<!\\)\|", row)) for row in (line, lines[i + 1])]
            assert columns[0] == columns[1], line
        elif line.startswith("|"):
            assert lines[i + 1] == "", f"a table ends with a blank line: {line}"


def test_rename_changes_title_metadata_and_sample_only(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    assert rename_card(text, "alice/birds") == text
    renamed = rename_card(text, "bob/crows")
    old, new = text.splitlines(), renamed.splitlines()
    assert [(a, b) for a, b in zip(old, new, strict=True) if a != b] == [
        ("- name: birds", "- name: crows"),
        ("# birds", "# crows"),
        ('repository = "alice/birds"', 'repository = "bob/crows"'),
    ]
    assert rename_card("# My own words\n", "bob/crows") == "# My own words\n"


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_push_is_one_commit_that_loads_everywhere(
    exported: Path, model: MiniClipModel, alices_hub: Any, tmp_path: Path
) -> None:
    photo = paint(tmp_path)
    wanted = logits_of(model, photo)
    use = f"""
import torch
from PIL import Image
with torch.inference_mode():
    inputs = processor(images=Image.open("photo.jpg"), text={TEXTS!r}, return_tensors="pt")
    torch.save(model(**inputs).logits_per_image, "logits.pt")
"""
    pushing = f"""
import runpy, subprocess, sys
from modeling_miniclip import MiniClipModel, MiniClipProcessor, push
from modeling_miniclip.hub.push import prepare_push
# Verify in this process. The slow tests start another one, as `push` does.
def verify(argv, **options):
    sys.argv = argv[2:]
    runpy.run_module(argv[2], run_name="__main__")  # exits if the models differ
    return subprocess.CompletedProcess(argv, 0)
subprocess.run = verify
print(prepare_push(None, "/somewhere/crows", private=True))
print(prepare_push("alice/crows", "out"))
print(push({str(exported)!r}, "crows", message="The first"))
model, processor = MiniClipModel.from_pretrained("alice/crows"), MiniClipProcessor.from_pretrained("alice/crows")
{use}"""
    env = alices_hub.client_env(tmp_path / "home")
    done = run(pushing, tmp_path, PYTHONPATH=str(ROOT), **env)
    assert done.returncode == 0, done.stderr
    commit = alices_hub.store.repo("model", "alice/crows")["refs"]["refs/heads/main"]
    assert done.stdout.split("\n")[:3] == [
        "alice/crows",
        "alice/crows",
        f"{alices_hub.url}/alice/crows/commit/{commit}",
    ]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)

    assert alices_hub.store.repo("model", "alice/crows")["private"]
    assert set(alices_hub.files("alice/crows")) == FILES | {".gitattributes"}
    pushed = alices_hub.store.at(alices_hub.store.repo("model", "alice/crows"), commit)
    assert pushed["title"] == "The first"
    parent = alices_hub.store.at(alices_hub.store.repo("model", "alice/crows"), pushed["parent"])
    assert set(parent["files"]) == {".gitattributes"}, "preparing a push writes nothing"
    for name in FILES - {"README.md"}:
        assert alices_hub.read("alice/crows", name) == (exported / name).read_bytes()
    validated = alices_hub.requests("/api/validate-yaml", "POST")
    assert {request["status"] for request in validated} == {200}

    # The sample of the card, word for word, then the same model again for its numbers.
    card = alices_hub.read("alice/crows", "README.md").decode()
    (sample,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert 'repository = "alice/crows"' in sample
    (tmp_path / "logits.pt").unlink()
    done = run(WITHOUT_PACKAGE + sample + use, tmp_path, **alices_hub.client_env(tmp_path / "home2"))
    assert done.returncode == 0, done.stderr
    assert set(ast.literal_eval(done.stdout.strip())) == {"two dogs in the snow", "a bowl of soup"}
    assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)


def test_revision_pins_weights_processor_and_code(
    exported: Path, model: MiniClipModel, alices_hub: Any, tmp_path: Path
) -> None:
    photo = paint(tmp_path)
    files = {path.name: path for path in exported.iterdir()}
    add_repository(alices_hub, "alice/birds", files)
    repository = alices_hub.store.repo("model", "alice/birds")
    first = repository["refs"]["refs/heads/main"]
    later = {"model.safetensors": torch.randn(3).numpy().tobytes(), "tokenizer.json": b"{", "config.json": b"{}"}
    later |= {name: b"raise RuntimeError('code of another revision')" for name in CODE}
    entries = {name: alices_hub.store.regular(content) for name, content in later.items()}
    alices_hub.store.commit(repository, "refs/heads/main", first, entries, "alice", "break everything")
    env = alices_hub.client_env(tmp_path / "home") | {"SOURCE": "alice/birds"}
    main_is_broken = """
from transformers import AutoProcessor
try:
    AutoProcessor.from_pretrained("alice/birds", trust_remote_code=True)
except Exception:
    print("broken")
"""
    done = run(WITHOUT_PACKAGE + main_is_broken + LOAD_AND_SAVE_AGAIN, tmp_path, **env, REVISION=first)
    assert own_lines(done.stdout) == ["broken", "alone"], done.stderr
    for auto in AUTO_MODELS:
        assert torch.equal(torch.load(tmp_path / f"{auto}.pt"), logits_of(model, photo))
        check_saved_again(tmp_path / auto, exported)


REFUSED = {
    "the connection breaks": ("hf_alice", "alice/new", "Server disconnected"),
    "no token": ("", "alice/new", "there is no token; .*hf auth login"),
    "an unknown token": ("hf_stranger", "alice/new", "401"),
    "a token that no header can hold": (
        "hf_al\u000bice",
        "alice/new",
        r"written: Illegal header value .*Bearer \*\*\*",
    ),
    "a token with an accent": ("hf_alicé", "alice/new", "written: 'ascii' codec can't encode"),
    "a read-only token and a new repository": ("hf_reader", "alice/new", "403"),
    "a read-only token and an old repository": ("hf_reader", "alice/old", "403"),
    "a new repository of somebody else": ("hf_alice", "bob/new", "403.*namespace"),
    "an old repository of somebody else": ("hf_alice", "bob/old", "403"),
    "a private repository of somebody else": ("hf_alice", "bob/private", "403"),
    "a repository id with too many parts": ("hf_alice", "a/b/c", "Repo id must be"),
    "a repository id with blanks": ("hf_alice", "alice/my birds", "Repo id must"),
}


def test_impossible_push_ends_the_run_before_training(alices_hub: Any, tmp_path: Path) -> None:
    for repo_id in ("alice/old", "bob/old"):
        add_repository(alices_hub, repo_id)
    add_repository(alices_hub, "bob/private", private=True)
    alices_hub.fault(path="/api/repos/create", drop=-1)  # the first one
    cases = [(token, repo_id) for token, repo_id, _ in REFUSED.values()]
    code = f"""
import os, sys, train_miniclip
train_miniclip.setup.load_splits = lambda *args: sys.exit("reached the data")
for i, (token, repo_id) in enumerate({cases!r}):
    os.environ["HF_TOKEN"] = token
    sys.argv[1:] = ["--push_to_hub", "--hub_model_id", repo_id, "--output_dir", f"out-{{i}}"]
    print("exit code", train_miniclip.cli(), file=sys.stderr)
os.environ["HF_TOKEN"] = "hf_alice"
sys.argv[1:] = ["--push_to_hub", "--hub_model_id", "alice/old", "--output_dir", "out"]
train_miniclip.cli()
"""
    done = run(code, tmp_path, PYTHONPATH=str(ROOT), **alices_hub.client_env(tmp_path / "home"))
    messages = done.stderr.split("exit code 1\n")
    assert messages[-1].strip().endswith("reached the data"), done.stderr
    assert len(messages) == len(REFUSED) + 1
    for (case, (_, repo_id, message)), text in zip(REFUSED.items(), messages, strict=False):
        assert re.search(rf"error: --push_to_hub: .*{message}", text), f"{case}: {text}"
        assert repo_id in text and "train without --push_to_hub" in text, case
        assert "Traceback" not in text, case
    for token in ("hf_al", "hf_reader", "hf_stranger", "Bearer hf_"):
        assert token not in done.stdout + done.stderr
    assert not any(any(path.iterdir()) for path in tmp_path.glob("out*"))


def test_something_that_is_no_export_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not an export: it has no config.json"):
        push(tmp_path, "alice/birds")


@pytest.mark.slow
def test_run_pushes_best_model_with_repository_in_card(alices_hub: Any, tmp_path: Path) -> None:
    argv = [str(ROOT / "train_miniclip.py"), *flags(tmp_path, "crows"), "--push_to_hub", "--num_workers=0"]
    alices_hub.fault(path="/commit/upload-", method="POST", status=403)  # the first best model does not get there
    done = run([*argv, "--hub_strategy=every_save"], tmp_path, **alices_hub.client_env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    bests = re.findall(r"^epoch .*\*$|^(pushed|not pushed): ", done.stdout, flags=re.MULTILINE)
    assert bests[:2] == ["", "not pushed"] and bests[-1] == "pushed"
    assert f"pushed: {alices_hub.url}/alice/crows/commit/" in done.stdout
    metadata, body = read_card(alices_hub.read("alice/crows", "README.md").decode())
    assert 'repository = "alice/crows"' in body and "\n# crows\n" in body
    assert str(tmp_path) not in body and "captions.csv" in body
    validations = [row for row in metrics_of(tmp_path / "crows") if row["split"] == "validation"]
    best = min(validations, key=lambda row: row["loss"])
    values = {metric["type"]: metric["value"] for metric in metadata["model-index"][0]["results"][0]["metrics"]}
    assert values == pytest.approx({name: best[name] for name in values}, abs=0.01)
    assert f"{best['loss']:.4f} nats" in body
    assert "hf_alice" not in done.stdout + done.stderr
    assert not any(b"hf_alice" in path.read_bytes() for path in (tmp_path / "crows").rglob("*") if path.is_file())


@pytest.mark.slow
def test_failed_push_after_training_names_the_saved_model(alices_hub: Any, tmp_path: Path) -> None:
    alices_hub.fault(path="/commit/", method="POST", status=403, times=-1)
    argv = [str(ROOT / "train_miniclip.py"), *flags(tmp_path, "crows"), "--push_to_hub", "--max_steps=1"]
    done = run(argv, tmp_path, **alices_hub.client_env(tmp_path / "home"))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"error: .*crows/export cannot be uploaded to alice/crows, .*The model is safe in", done.stderr)
    assert (tmp_path / "crows" / "export" / "model.safetensors").is_file()
