"""Training under FSDP: two processes joined by gloo, each with its part of every parameter, train as one does."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_miniclip import MiniClipModel
from tests.helpers.runs import ROOT, assert_same_log, command, environment, flags
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
