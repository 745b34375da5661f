"""A batch that does not fit into memory is embedded in parts, with the same result."""

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from modeling_miniclip import DataError, MiniClipError, MiniClipModel, encode_images, encode_texts, update_index
from modeling_miniclip.inference import encode, fit
from modeling_miniclip.inference.fit import Parts, outputs_within
from modeling_miniclip.search.index import ImageIndex
from tests.helpers.indexes import write_pictures
from tests.helpers.towers import PIXELS, tiny_model, tiny_processor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> MiniClipModel:
    torch.manual_seed(0)
    return tiny_model()


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (PIXELS + i, PIXELS, 3), dtype=np.uint8) for i in range(count)]


def limit_forward(patch: pytest.MonkeyPatch, most: int) -> None:
    """Let the model's forward pass fail with more images or texts than `most`."""
    forward = MiniClipModel.forward

    @wraps(forward)
    def limited(self: Any, *args: Any, **inputs: Any) -> Any:
        output = forward(self, *args, **inputs)
        if max(len(rows) for rows in (*args, *inputs.values()) if isinstance(rows, Tensor)) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output

    patch.setattr(MiniClipModel, "forward", limited)


def embed_at_most(most: int, calls: list[int]) -> Callable[[list[int]], Tensor]:
    """A function that fails with more than `most` rows, and notes how many it was given."""

    def embed(rows: list[int]) -> Tensor:
        calls.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.as_tensor(rows)

    return embed


# --- parts -----------------------------------------------------------------------------------------------------------


def test_batch_is_halved_until_it_fits() -> None:
    calls: list[int] = []
    lines: list[str] = []
    parts = Parts("images", CPU, lines.append)
    embed = embed_at_most(3, calls)
    assert parts.of(list(range(10)), embed).tolist() == list(range(10))
    assert calls == [10, 5, 2, 3, 2, 3], "even parts, of 3 at most"
    assert parts.of([7, 8, 9, 6], embed).tolist() == [7, 8, 9, 6]
    assert calls[6:] == [2, 2], "the size is kept"
    assert lines == ["not enough memory for 10 images at a time: 3 from now on"]


def test_batch_that_fits_stays_whole() -> None:
    calls: list[int] = []
    parts = Parts("images", CPU, pytest.fail)
    assert parts.of(torch.arange(5), embed_at_most(5, calls)).tolist() == list(range(5))
    assert calls == [5]


def test_single_row_that_does_not_fit_is_an_error() -> None:
    calls: list[int] = []
    with pytest.raises(MiniClipError, match="not enough memory for one of the images: "):
        Parts("images", CPU, pytest.fail).of([1, 2, 3], embed_at_most(0, calls))
    assert calls == [3, 1, 1], "3 rows, the first of two parts, the first of three"


def test_other_errors_pass() -> None:
    def embed(rows: list[int]) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Parts("images", CPU).of([1, 2], embed)


# --- on a CPU, nothing fails -----------------------------------------------------------------------------------------


def test_large_outputs_are_stopped_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda: 10_000)  # of which 9,000 may be used
    tower = nn.Linear(4, 100)
    calls: list[int] = []

    def embed(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return tower(rows)  # 400 bytes per row, which is taken for 1,600

    parts, rows = Parts("rows", CPU, lambda line: None), torch.rand(8, 4)
    torch.testing.assert_close(parts.of(rows, embed), tower(rows))
    assert calls == [8, 4, 4], "8 rows would take 12,800, 4 rows 6,400"
    monkeypatch.setattr(fit, "free_memory", lambda: 0)
    parts.of(rows[:4], embed)
    assert calls[3:] == [4], "this size has fitted"
    assert len(Parts("rows", CPU, lambda line: None).of(rows, embed)) == 8
    assert calls[4:] == [8, 4, 2, *[1] * 8], "a single row is never stopped"


def test_other_threads_are_not_stopped() -> None:
    tower = nn.Linear(4, 4)
    found: list[Tensor] = []
    with outputs_within(1):
        thread = threading.Thread(target=lambda: found.append(tower(torch.rand(2, 4))))
        thread.start()
        thread.join()
        assert len(found) == 1
        with pytest.raises(MemoryError):
            tower(torch.rand(2, 4))
    tower(torch.rand(2, 4))


# --- what uses it ----------------------------------------------------------------------------------------------------


def test_embeddings_of_images_do_not_depend_on_parts(model: MiniClipModel, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(7)
    whole = encode_images(model, images, tiny_processor(), progress=False)
    limit_forward(monkeypatch, 2)
    with pytest.warns(UserWarning, match="not enough memory for 7 images at a time: 2 from now on"):
        parts = encode_images(model, images, tiny_processor(), progress=False)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_texts_keep_their_numbers_in_messages(model: MiniClipModel, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_forward(monkeypatch, 1)
    texts: list[Any] = ["a dog", "a cat", "a boat", 5]
    with pytest.warns(UserWarning, match="2 texts at a time: 1"), pytest.raises(DataError, match="text 3: expected"):
        encode_texts(model, texts, tiny_processor(), batch_size=2, progress=False)


def test_too_little_memory_is_not_the_images_fault(
    model: MiniClipModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(encode, "decode_picture", fail)
    with pytest.raises(MiniClipError, match="not enough memory for one of the images") as caught:
        encode_images(model, [tmp_path / "a.png"], tiny_processor(), progress=False)
    assert not isinstance(caught.value, DataError)


def test_one_photograph_at_a_time_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = tiny_processor()
    events: list[str] = []
    crop = processor.crop

    def note(image: Image.Image) -> np.ndarray:
        events.append("crop")
        return crop(image)

    def opened() -> Iterator[Image.Image]:
        for _ in range(3):
            events.append("open")
            yield Image.new("RGB", (40, 40))

    monkeypatch.setattr(type(processor), "crop", lambda self, image: note(image))
    assert encode._pixel_values(opened(), processor, CPU).shape == (3, 3, PIXELS, PIXELS)
    assert events == ["open", "crop"] * 3


def test_index_does_not_depend_on_parts(tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "photos", "a.png b.png c.png d.png e.png")
    update_index(tmp_path / "whole", [tmp_path / "photos"], tiny_export, progress=False)
    limit_forward(monkeypatch, 2)
    with pytest.warns(UserWarning, match="not enough memory for 5 images at a time: 2 from now on"):
        update_index(tmp_path / "parts", [tmp_path / "photos"], tiny_export, progress=False)
    whole, parts = (ImageIndex.open(tmp_path / name).embeddings for name in ("whole", "parts"))
    np.testing.assert_allclose(parts, whole, atol=1e-5)
