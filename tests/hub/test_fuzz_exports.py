"""Damaged exports and presets: what loads equals the saved model, and anything else raises."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_miniclip import MiniClipModel, ModelError, encode_texts, export
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.towers.create_model import create_model
from modeling_miniclip.utils.checksums import KEY, check_weights, seal_weights
from tests.helpers.fuzzing import VALUES, cases, damaged, fuzz, result_or_error
from tests.helpers.runs import ROOT
from tests.helpers.towers import CAPTIONS, tiny_model, tiny_processor

WEIGHTS = "model.safetensors"
TEXTS = [caption for row in CAPTIONS for caption in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export(tiny_model(), tiny_processor(), tmp_path_factory.mktemp("whole") / "export")


@pytest.fixture(scope="module")
def state(whole: Path) -> dict[str, torch.Tensor]:
    return load_file(whole / WEIGHTS)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "export"))


def load(folder: Path) -> Any:
    return create_model(TrainingArguments(dataset="scenes", model_name_or_path=str(folder)), [])


def assert_same_weights(model: MiniClipModel, state: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@cases(25, 600)
def test_flipped_or_truncated_weights_raise(
    copy: Path, whole: Path, state: dict[str, torch.Tensor], record_property: Any, count: int
) -> None:
    original = (whole / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    places = st.one_of(st.integers(0, 63), st.integers(0, 8 * header - 1), st.integers(0, 8 * len(original) - 1))

    @fuzz(count, record_property)
    @given(bit=places, length=st.none() | st.integers(0, len(original) - 1))
    @example(bit=8 * (len(original) - 4) + 3, length=None)  # the least that can happen to one weight
    def check(bit: int, length: int | None) -> None:
        content = bytearray(original if length is None else original[:length])
        if length is None:
            content[bit // 8] ^= 1 << bit % 8
        (copy / WEIGHTS).write_bytes(content)
        loaded, message = result_or_error(load, copy)
        if loaded is None:
            assert str(copy) in message
        else:  # only a bit of what the format does not look at
            assert_same_weights(loaded[0], state)

    check()


@cases(20, 500)
def test_damaged_weights_raise_or_load_unchanged(
    copy: Path, whole: Path, state: dict[str, torch.Tensor], record_property: Any, count: int
) -> None:
    original = (whole / WEIGHTS).read_bytes()

    @fuzz(count, record_property)
    @given(head=damaged(st.just(original[:4096])))
    def check(head: bytes) -> None:
        (copy / WEIGHTS).write_bytes(head + original[4096:])
        loaded, message = result_or_error(load, copy)
        assert str(copy) in message if loaded is None else assert_same_weights(loaded[0], state) is None

    check()


FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")


@pytest.mark.filterwarnings("ignore")
@cases(20, 500)
def test_damaged_configuration_raises_or_embeds(copy: Path, whole: Path, record_property: Any, count: int) -> None:
    present = [name for name in FILES if (whole / name).exists()]
    assert "config.json" in present and len(present) >= 3

    @fuzz(count, record_property)
    @given(name=st.sampled_from(present), data=st.data())
    def check(name: str, data: Any) -> None:
        (copy / name).write_bytes(data.draw(damaged(st.just((whole / name).read_bytes())), label="content"))
        loaded, message = result_or_error(load, copy)
        shutil.copy(whole / name, copy / name)
        assert loaded is not None or str(copy) in message

    check()


def largest(value: Any) -> float:
    """The largest whole number within a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max([value if isinstance(value, int) else 0, *map(largest, inner)])


# A model of a billion layers is not hard to describe, but takes as long as it says.
SMALL = VALUES.filter(lambda value: largest(value) < 1000)


def paths(tree: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where every value of nested dictionaries is."""
    if not isinstance(tree, dict):
        return [prefix]
    return [prefix] * bool(prefix) + [path for key, value in tree.items() for path in paths(value, (*prefix, key))]


def with_value(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    return value if not path else tree | {path[0]: with_value(tree[path[0]], path[1:], value)}


@pytest.mark.filterwarnings("ignore")
@cases(25, 600)
def test_any_configuration_value_raises_or_embeds(copy: Path, whole: Path, record_property: Any, count: int) -> None:
    config = json.loads((whole / "config.json").read_text())

    @fuzz(count, record_property)
    @given(path=st.sampled_from(paths(config)), value=SMALL)
    def check(path: tuple[str, ...], value: Any) -> None:
        (copy / "config.json").write_text(json.dumps(with_value(config, path, value)), encoding="utf-8")
        loaded, message = result_or_error(load, copy)
        if loaded is None:
            assert str(copy) in message
        else:
            embeddings = encode_texts(loaded[0], TEXTS[:2], loaded[1], progress=False)
            torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))

    check()


@pytest.mark.filterwarnings("ignore")
@cases(15, 300)
def test_any_preset_value_raises_or_builds_a_model(tmp_path: Path, record_property: Any, count: int) -> None:
    preset = json.loads((ROOT / "configuration" / "presets" / "scenes_tiny.json").read_text(encoding="utf-8"))
    path = tmp_path / "preset.json"

    @fuzz(count, record_property)
    @given(where=st.sampled_from(paths(preset)), value=SMALL)
    def check(where: tuple[str, ...], value: Any) -> None:
        path.write_text(json.dumps(with_value(preset, where, value)), encoding="utf-8")
        built, message = result_or_error(create_model, TrainingArguments(dataset="scenes", preset=str(path)), CAPTIONS)
        assert built is not None or str(path) in message

    check()


def test_pickled_weights_are_never_opened(copy: Path, state: dict[str, torch.Tensor]) -> None:
    (copy / WEIGHTS).unlink()
    torch.save(state, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(copy)


def test_checksum_covers_file_that_other_programs_read(whole: Path, tmp_path: Path) -> None:
    import hashlib

    content = (whole / WEIGHTS).read_bytes()
    with safe_open(whole / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    blanked = content.replace(metadata[KEY].encode(), b"0" * 64)
    assert metadata == {"format": "pt", KEY: hashlib.sha256(blanked).hexdigest()} and blanked != content
    seal_weights(whole / WEIGHTS)
    assert (whole / WEIGHTS).read_bytes() == content, "sealing again changes nothing"

    save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors")
    check_weights(tmp_path / "other.safetensors")  # without a checksum nothing can be said
