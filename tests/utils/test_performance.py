"""What makes a run faster changes no result."""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch._dynamo.testing import CompileCounterWithBackend

import train_miniclip
from modeling_miniclip.training import setup
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.utils.performance import allow_tf32, compile_towers, hide_advice_for_gpus, one_thread
from tests.helpers.runs import assert_same_log, flags, metrics_of
from tests.helpers.towers import CAPTIONS, tiny_model


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """In the place of the compiler: runs what it is given, and counts the graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def test_each_tower_is_compiled_and_text_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.nn.Module, dict[str, bool]]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: calls.append((module, options)))
    vision, text = torch.nn.Identity(), torch.nn.Identity()
    compile_towers(vision, text)
    assert calls == [(vision, {}), (text, {"dynamic": True})]


@pytest.mark.slow
@torch.no_grad()
def test_compiled_towers_serve_all_text_lengths(counter: CompileCounterWithBackend) -> None:
    model = tiny_model()
    pixels = torch.rand(3, 3, 32, 32)
    texts = [torch.randint(5, 200, (number, length)) for number, length in ((4, 7), (6, 9), (5, 12))]
    expected = [model(pixel_values=pixels, input_ids=ids).logits_per_image for ids in texts]
    names = list(model.state_dict())
    compile_towers(model.vision_model, model.text_model)
    graphs = set()
    for ids, logits in zip(texts, expected, strict=True):
        assert torch.equal(model(pixel_values=pixels, input_ids=ids).logits_per_image, logits)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1 and min(graphs) >= 2, graphs  # both towers, once for all lengths
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_run_with_compiled_towers_has_same_metrics(counter: CompileCounterWithBackend, tmp_path: Path) -> None:
    train_miniclip.main(flags(tmp_path, "plain", num_train_epochs=1))
    assert counter.frame_count == 0
    train_miniclip.main(flags(tmp_path, "compiled", num_train_epochs=1, compile_towers=True))
    assert counter.frame_count >= 2
    assert metrics_of(tmp_path / "plain")
    assert_same_log(tmp_path / "plain", tmp_path / "compiled")


def test_flag_compiles_towers_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parse_arguments(flags(tmp_path, compile_towers=True))
    splits = {"train": Dataset.from_dict({"captions": CAPTIONS})}
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(setup, "compile_towers", lambda *towers: compiled.extend(towers))
    model, _ = setup.build_model(splits, arguments, Accelerator(cpu=True))
    assert compiled == [model.vision_model, model.text_model]


def test_tf32_is_for_gpus_alone() -> None:
    before = torch.get_float32_matmul_precision()
    allow_tf32(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == before
    try:
        allow_tf32(torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_advice_for_gpus_is_hidden_without_one(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    logger = logging.getLogger("transformers.integrations.hub_kernels")
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        hide_advice_for_gpus()
        logger.warning("`f` is falling back to its reference PyTorch implementation because `g` is not installed.")
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().out == "something else\n"


def test_one_thread_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError), one_thread():
            assert torch.get_num_threads() == 1
            raise ValueError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
