"""Training under FSDP: two processes joined by gloo, each with its part of every parameter, train as one does."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from modeling_miniclip import MiniClipModel
from tests.helpers.runs import ROOT, assert_blended, assert_same_log, command, environment, flags
from train_miniclip import main

SAME = {"dropout": 0, "freeze_batch_norm": True, "batch_size": 8, "captions_per_image": 2, "loss_type": "sigmoid"}


def train_sharded(argv: list[str]) -> str:
    line = command(argv, processes=2, script=str(ROOT / "tests" / "helpers" / "fsdp_on_cpu.py"))
    result = subprocess.run(line, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "on 2 x cpu" in result.stdout
    return result.stdout


@pytest.mark.slow
def test_sharded_training_equals_training_in_one_process(tmp_path: Path) -> None:
    main(flags(tmp_path, "one", **SAME))
    output = train_sharded(flags(tmp_path, "sharded", **SAME))
    assert re.findall("parameters: (.*)", output) == ["['DTensor']"]
    assert re.findall("sharded separately: (.*)", output) == [
        "['Embedding', 'MiniClipModel', 'MiniClipVisionModel', 'ProjectionHead']"
    ]

    assert_same_log(tmp_path / "one", tmp_path / "sharded")
    one, sharded = tmp_path / "one" / "export", tmp_path / "sharded" / "export"
    assert {path.name for path in sharded.iterdir()} == {path.name for path in one.iterdir()}
    assert (sharded / "config.json").read_text() == (one / "config.json").read_text()
    for code in one.glob("*.py"):
        assert (sharded / code.name).read_text() == code.read_text()
    expected_weights, weights = load_file(one / "model.safetensors"), load_file(sharded / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        # Keys' biases have no gradient but rounding, which AdamW turns into whole steps: the bound is a step's length.
        torch.testing.assert_close(tensor, expected_weights[name], rtol=1e-3, atol=4e-3, msg=name)
    loaded, info = MiniClipModel.from_pretrained(sharded, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.logit_bias is not None


@pytest.mark.slow
def test_sharded_training_in_chunks_can_be_resumed(tmp_path: Path) -> None:
    main(flags(tmp_path, "one", **SAME))
    train_sharded(flags(tmp_path, "sharded", max_steps=3, chunk_size=2, **SAME))
    train_sharded(flags(tmp_path, "sharded", resume_from_checkpoint="latest", chunk_size=2, **SAME))
    assert_same_log(tmp_path / "one", tmp_path / "sharded")


@pytest.mark.slow
def test_sharded_run_exports_weights_in_between(tiny_run: Path, tmp_path: Path) -> None:
    start = tiny_run / "export"
    same: dict[str, Any] = {"preset": None, "model_name_or_path": start, "max_steps": 2, "dropout": 0}
    for name, blend in (("plain", {}), ("blended", {"blend": 0.4})):
        train_sharded(flags(tmp_path, name, **same, **blend))
    assert_blended(start, tmp_path / "plain" / "export", tmp_path / "blended" / "export", 0.4, 1e-6)


@pytest.mark.long
def test_sharded_adapters_are_saved_resumed_and_blended(tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT comes with the extra lora")
    start = tiny_run / "export"
    same: dict[str, Any] = {"preset": None, "model_name_or_path": start, "lora_rank": 2, "blend": "auto", "dropout": 0}
    same["retention_dataset"] = tiny_run.parent / "scenes" / "captions.csv"
    main(flags(tmp_path, "one", **same))
    sharded = flags(tmp_path, "sharded", **same)
    train_sharded([*sharded, "--max_steps=4"])
    folder = tmp_path / "sharded" / "checkpoints" / "step-00000004" / "pytorch_model_fsdp_0"
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    towers = {name for name in saved if name.startswith(("model.vision_model.", "model.text_model."))}
    assert len(saved) > len(towers) > 0 and all(".lora_" in name for name in towers), "what is trained"
    train_sharded([*sharded, "--resume_from_checkpoint=latest"])
    assert_same_log(tmp_path / "one", tmp_path / "sharded")
    expected_weights = load_file(tmp_path / "one" / "export" / "model.safetensors")
    weights = load_file(tmp_path / "sharded" / "export" / "model.safetensors")
    assert weights.keys() == expected_weights.keys() == load_file(start / "model.safetensors").keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=1e-3, atol=4e-3, msg=name)
