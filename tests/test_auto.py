"""Lazy package, registration with the Auto classes, and saved models that bring their own code."""

import ast
import doctest
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from modeling_miniclip import MiniClipConfig, MiniClipModel, MiniClipProcessor
from tests.helpers.hubs import run
from tests.helpers.towers import tiny_config, tiny_model, tiny_processor

ROOT = Path(__file__).resolve().parents[1]
TRAVELLING = sorted(path.stem for path in (ROOT / "modeling_miniclip").glob("*_miniclip.py"))


def test_package_import_loads_no_heavy_library(tmp_path):
    code = """
import os, sys
before = list(sys.meta_path), list(sys.path_hooks), sys.modules["builtins"].__import__, set(sys.modules)
environment = dict(os.environ)
import modeling_miniclip
import modeling_miniclip.training.command_line.arguments
loaded = set(sys.modules) - before[3]
heavy = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"modeling_miniclip"}
assert not heavy, heavy
assert loaded & {"modeling_miniclip.auto", "modeling_miniclip.modeling_miniclip"} == set()
assert (sys.meta_path, sys.path_hooks, sys.modules["builtins"].__import__) == before[:3]
assert {"MiniClipModel", "load_captions", "__version__"} <= set(dir(modeling_miniclip))
assert os.environ == environment
"""
    done = run(["-c", code], tmp_path, PYTHONPATH=str(ROOT))  # a new Python, which has imported nothing yet
    assert done.returncode == 0, done.stderr


def test_each_public_name_registers_the_auto_classes(tmp_path):
    code = """
import sys
import modeling_miniclip
names = [name for name in modeling_miniclip.__all__ if name != "__version__"]
assert len(names) == len(set(names)) > 10
for name in names:
    sys.modules.pop("modeling_miniclip.auto", None)
    vars(modeling_miniclip).pop(name, None)
    assert getattr(modeling_miniclip, name).__name__ == name
    assert "modeling_miniclip.auto" in sys.modules, name
from transformers import AutoConfig
assert type(AutoConfig.for_model("miniclip")) is modeling_miniclip.MiniClipConfig
print("all", len(names))
"""
    done = run(code, tmp_path, PYTHONPATH=str(ROOT))
    assert done.stdout.startswith("all"), done.stderr


def test_auto_classes_make_miniclip(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MiniClipConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MiniClipProcessor
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is MiniClipModel and not any(info.values())
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert type(AutoModel.from_config(tiny_config("vit", "bert"))) is MiniClipModel
    assert AutoModel.from_config(tiny_config(), dtype=torch.bfloat16).text_model.dtype == torch.bfloat16


def test_saved_folder_loads_without_the_package(tmp_path):
    model = tiny_model("vit", "roberta", text_pooling="mean")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor = tiny_processor()
    processor.save_pretrained(folder)
    assert {f"{name}.py" for name in TRAVELLING} == {path.name for path in folder.glob("*.py")}
    image = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 20).convert("RGB")
    image.save(tmp_path / "image.png")
    inputs = processor(images=[image], text=["a red dog", "a boat"], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    code = """
import importlib.util, sys, torch
from PIL import Image
sys.modules["modeling_miniclip"] = None  # not to be imported even where it is installed
assert importlib.util.find_spec("modeling_miniclip") is None
from transformers import AutoModel, AutoProcessor
model, info = AutoModel.from_pretrained("model", trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules") and type(model).__name__ == "MiniClipModel"
assert processor.image_processor.backend == "pil"
inputs = processor(images=[Image.open("image.png")], text=["a red dog", "a boat"], return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits_per_image, "logits.pt")
model.save_pretrained("again")
"""
    done = run(code, tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]["AutoModel"]


@pytest.mark.parametrize("name", TRAVELLING)
def test_travelling_files_are_small_and_import_little(name):
    source = (ROOT / "modeling_miniclip" / f"{name}.py").read_text()
    assert len(source) < 36_000
    absolute = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            # transformers finds siblings by `from .x import`, and neither `from . import x` nor `from .x.y import`
            assert node.level == 1 and node.module in TRAVELLING
    allowed = {"torch", "timm", "transformers", "huggingface_hub", "numpy", "PIL"}
    assert absolute - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("name", TRAVELLING)
def test_examples_in_the_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(f"modeling_miniclip.{name}"))
    assert result.attempted > 0 and result.failed == 0
