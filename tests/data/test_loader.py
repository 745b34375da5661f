"""Batches: their rows, captions and pixels, collation, and the loader processes."""

import gc
import io
import os
import pickle
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_miniclip import DataError, MiniClipError, UsageError, load_captions
from modeling_miniclip.data.loading import dataset
from modeling_miniclip.data.loading.augmentation import DEFAULT_AUGMENTATION, build_augmentation, pixels_of
from modeling_miniclip.data.loading.batches import GlobalBatches
from modeling_miniclip.data.loading.collation import BY_VALUE, Batch, Collator
from modeling_miniclip.data.loading.dataset import FILLER, CaptionRows
from modeling_miniclip.data.loading.loader import BatchLoader, readable_worker_errors
from modeling_miniclip.data.loading.order import InOrder, Shuffled
from modeling_miniclip.data.picture_formats import decode_row
from modeling_miniclip.errors import Problem
from modeling_miniclip.processing_miniclip import MiniClipProcessor
from modeling_miniclip.utils import processes
from modeling_miniclip.utils.processes import ended_children, forks_processes
from tests.helpers.towers import CAPTIONS, PIXELS, tiny_processor

SIZE = (PIXELS, PIXELS)
needs_fork = pytest.mark.skipif(not forks_processes(), reason="loader processes are not forked")


def as_tiff(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    return buffer.getvalue()


class Rows(list):
    """Rows in memory, with the part of a `datasets` split that `CaptionRows` uses."""

    def __init__(self, rows):
        super().__init__(row | {"image": {"bytes": as_tiff(row["image"]), "path": None}} for row in rows)

    def select_columns(self, names):
        return self

    def cast_column(self, name, feature):
        return self

    def __getitem__(self, key):
        if isinstance(key, list):
            return {name: [self[i][name] for i in key] for name in self[0]}
        return [row[key] for row in self] if isinstance(key, str) else list.__getitem__(self, key)


def noise_rows(count: int, captions: int = 5) -> Rows:
    rng = np.random.default_rng(0)
    return Rows(
        {
            "image": Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)),
            "image_id": f"{i}.png",
            "captions": [f"a dog number {i} {' runs' * k}" for k in range(captions)],
        }
        for i in range(count)
    )


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def training_rows(processor, count: int = 10, seed: int = 0, captions_per_image: int | None = 2) -> CaptionRows:
    return CaptionRows(noise_rows(count), processor, build_augmentation(DEFAULT_AUGMENTATION, SIZE),
                       captions_per_image, seed)  # fmt: skip


def rows_seen(rows: CaptionRows, batch_size: int, epochs=(0,), num_workers=0, rank=0, world_size=1, seed=0):
    """(epoch, row) -> (pixels, token ids of its captions), from all batches of this process's loader."""
    batches = GlobalBatches(Shuffled(len(rows), seed), batch_size, rank, world_size)
    loader = BatchLoader(rows, batches, num_workers)
    seen = {}
    for epoch in epochs:
        batches.epoch = epoch
        for batch in loader:
            for image_id, pixels in zip(batch["image_id"].tolist(), batch["pixel_values"], strict=True):
                texts = batch["input_ids"][batch["text_image_id"] == image_id]
                seen[epoch, image_id] = (pixels, sorted(tuple(i for i in text if i) for text in texts.tolist()))
    return seen


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, (pixels, texts) in first.items():
        assert torch.equal(pixels, second[key][0]) and texts == second[key][1], key


# --- randomness ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(processor):
    return rows_seen(training_rows(processor), 4, epochs=(0, 1))


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_worker_processes_change_nothing(processor, reference, num_workers):
    assert_same(reference, rows_seen(training_rows(processor), 4, epochs=(0, 1), num_workers=num_workers))


def test_process_count_and_batch_size_change_nothing(processor, reference):
    for world_size, batch_size in ((2, 4), (3, 10), (1, 7)):
        union = {}
        for rank in range(world_size):
            part = rows_seen(training_rows(processor), batch_size, (0, 1), rank=rank, world_size=world_size)
            union |= {key: value for key, value in part.items() if key[1] >= 0}
        assert_same(reference, union)


def test_seed_and_epoch_change_captions_and_pixels(processor, reference):
    other = rows_seen(training_rows(processor, seed=1), 4)
    for row in range(10):
        assert not torch.equal(reference[0, row][0], reference[1, row][0])
        assert not torch.equal(reference[0, row][0], other[0, row][0])
    for epoch_or_seed in ({key: reference[1, key[1]] for key in other}, other):
        assert sum(reference[key][1] != value[1] for key, value in epoch_or_seed.items()) >= 5


def test_a_loader_leaves_the_random_state_of_dropout(processor):
    rows = training_rows(processor, count=3)
    before = torch.random.get_rng_state()
    assert len(list(BatchLoader(rows, GlobalBatches(Shuffled(3), 2), 0))) == 2
    assert torch.equal(before, torch.random.get_rng_state())


def test_transforms_draw_independently_of_each_other(processor):
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    picture[:, :4] = 200
    augmentation = build_augmentation([{"name": "HorizontalFlip"}, {"name": "InvertImg"}], (8, 8))
    one = Rows([{"image": Image.fromarray(picture), "image_id": "a", "captions": ["x"]}])
    rows = CaptionRows(one, processor, augmentation)
    seen = Counter()
    for epoch in range(200):
        left, right = rows[epoch, 0]["pixels"][0, 0, [0, 7]].tolist()
        seen[left, right] += 1
    # plain, flipped, inverted, both: 50 each are expected, 25 is four standard deviations away
    assert set(seen) == {(200, 0), (0, 200), (55, 255), (255, 55)} and min(seen.values()) > 25


# --- captions -------------------------------------------------------------------------------------------------------


def test_captions_are_drawn_without_repetition(processor):
    rows = CaptionRows(noise_rows(1), processor, captions_per_image=3)
    drawn = [rows[epoch, 0]["captions"] for epoch in range(100)]
    assert all(len(set(captions)) == 3 for captions in drawn)
    counts = Counter(caption for captions in drawn for caption in captions)
    assert len(counts) == 5 and min(counts.values()) > 35  # 60 are expected, with a standard deviation of 5


@pytest.mark.parametrize("wanted", [None, 5, 9])
def test_all_captions_keep_their_order(processor, wanted):
    rows = CaptionRows(noise_rows(2), processor, captions_per_image=wanted)
    assert rows[3, 1]["captions"] == rows.captions_of([1])[0]


def test_captions_are_padded_to_the_longest_of_the_batch(processor):
    rows = CaptionRows(Rows(
        {"image": Image.new("RGB", SIZE), "image_id": str(i), "captions": captions}
        for i, captions in enumerate(CAPTIONS)
    ), processor)  # fmt: skip
    lengths = [[len(ids) for ids in processor.tokenizer(captions)["input_ids"]] for captions in CAPTIONS]
    collate = Collator(processor.tokenizer)
    for chosen in ([0], [1, 2], [3, 0, 2]):
        batch = collate([rows[0, i] for i in chosen])
        expected = [length for i in chosen for length in lengths[i]]
        assert batch["input_ids"].shape == (len(expected), max(expected))
        assert batch["attention_mask"].sum(dim=1).tolist() == expected


def test_a_batch_assigns_captions_to_images(processor):
    rows = CaptionRows(Rows(
        {"image": Image.new("RGB", (50, 40), (60 * i, 0, 0)), "image_id": str(i), "captions": captions}
        for i, captions in enumerate(CAPTIONS)
    ), processor)  # fmt: skip
    batch = Collator(processor.tokenizer)([rows[0, 2], rows[0, FILLER - 1], rows[0, 0]])
    assert batch["image_id"].tolist() == [2, FILLER - 1, 0]
    assert batch["text_image_id"].tolist() == [2, 2] + [FILLER - 1] * 3 + [0, 0]
    texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == CAPTIONS[2] + CAPTIONS[1] + CAPTIONS[0]
    assert batch["pixel_values"].dtype == torch.uint8 and batch["pixel_values"].shape == (3, 3, *SIZE)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [120, 60, 0]


def test_rows_of_a_batch_equal_single_rows(processor, monkeypatch):
    monkeypatch.setattr(dataset, "READ_TOGETHER", 3)
    rows, keys = training_rows(processor), [(1, 4), (0, FILLER - 2), (2, 9), (1, 0), (0, 7)]
    together = rows.__getitems__(keys)
    for key, row in zip(keys, together, strict=True):
        alone = rows[key]
        assert row["captions"] == alone["captions"] and row["image_id"] == alone["image_id"] == key[1]
        assert np.array_equal(row["pixels"], alone["pixels"])


def test_pixels_have_the_memory_layout_of_convolutions(processor):
    rows = training_rows(processor)
    batch = next(iter(BatchLoader(rows, GlobalBatches(InOrder(10), 4), 0)))
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    for i in range(4):
        assert np.array_equal(batch["pixel_values"][i].numpy(), rows[0, i]["pixels"])


def test_long_captions_are_truncated(processor):
    rows = CaptionRows(
        Rows([{"image": Image.new("RGB", SIZE), "image_id": "a", "captions": ["dog " * 99]}]), processor
    )
    assert Collator(processor.tokenizer)([rows[0, 0]])["input_ids"].shape == (1, 24)


def test_features_replace_images_and_texts(processor):
    texts = [torch.arange(5.0).unsqueeze(1) + 10 * i for i in range(3)]
    rows = CaptionRows(noise_rows(3), processor, None, 2, 0, [torch.eye(3)], texts)
    plain = CaptionRows(noise_rows(3), processor, None, 2, 0)
    batch = Collator(processor.tokenizer)([rows[4, 2], rows[4, 0]])
    assert set(batch) == {"image_id", "text_image_id", "vision_pooler_output", "text_pooler_output"}
    assert torch.equal(batch["vision_pooler_output"], torch.eye(3)[[2, 0]])
    chosen = [i * 10 + rows.captions_of([i])[0].index(text) for i in (2, 0) for text in plain[4, i]["captions"]]
    assert batch["text_pooler_output"].flatten().tolist() == chosen  # the features are those of the drawn captions


# --- images ---------------------------------------------------------------------------------------------------------


def test_a_filler_is_the_row_of_its_id(processor):
    rows = CaptionRows(noise_rows(4), processor)
    real, filler = rows[0, 3], rows[0, FILLER - 3]
    assert filler["image_id"] == -4 and filler["captions"] == real["captions"]
    assert np.array_equal(filler["pixels"], real["pixels"])
    assert rows[0, FILLER - 0]["captions"] == rows[0, 0]["captions"]


def test_images_are_augmented_only_in_training(processor):
    image = decode_row(noise_rows(1)[0]["image"])
    plain, training = CaptionRows(noise_rows(1), processor), training_rows(processor, 1)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    for epoch in range(2):
        pixels = torch.from_numpy(plain[epoch, 0]["pixels"])[None]
        assert torch.allclose(processor.normalize(pixels), expected, atol=1e-6)
        assert not np.array_equal(training[epoch, 0]["pixels"], plain[epoch, 0]["pixels"])


@pytest.mark.parametrize(
    "transforms",
    [
        DEFAULT_AUGMENTATION,
        [{"name": "HorizontalFlip"}],
        [{"name": "RandomCrop", "height": 20, "width": 24}],
        [{"name": "LongestMaxSize", "max_size": 100}],
        [{"name": "RandomResizedCrop", "size": [60, 61], "scale": [0.5, 1.0]}, {"name": "Rotate", "limit": [-9, 9]}],
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_augmented_images_have_the_right_size(processor, transforms, mode):
    rows = Rows([{"image": Image.new(mode, (50, 41)), "image_id": "a", "captions": ["x"]}])
    pixels = CaptionRows(rows, processor, build_augmentation(transforms, (32, 48)))[0, 0]["pixels"]
    assert pixels.shape == (3, 32, 48) and pixels.dtype == np.uint8


def test_no_transforms_mean_no_augmentation():
    assert build_augmentation([], SIZE) is None


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ({"name": "HorizontalFlipp"}, ["'HorizontalFlipp'", "HorizontalFlip?"]),
        ({"name": "ColorJitter", "brightnes": 0.2}, ["ColorJitter", "brightnes;", "brightness?", "saturation"]),
        ({"name": "Compose"}, ["'Compose'"]),
        ({"p": 0.5}, ["no transform"]),
        ({"name": "HorizontalFlip", "p": 3}, ["HorizontalFlip", "less than or equal to 1"]),
        ({"name": "RandomCrop"}, ["RandomCrop", "height", "width"]),
        ({"name": "Normalize"}, ["Normalize", "8-bit RGB", "float32"]),
        ({"name": "ToTensorV2"}, ["ToTensorV2", "8-bit RGB"]),
        ({"name": "FDA"}, ["FDA", "image alone"]),
    ],
)
def test_a_wrong_augmentation_is_an_error(transform, expected):
    with pytest.raises(UsageError) as error:
        build_augmentation([transform], SIZE)
    for part in expected:
        assert part in str(error.value), f"{part!r} is not in {error.value}"


@pytest.mark.parametrize(("content", "num_workers"), [("text", 0), ("cut", 0), ("text", 1)])
def test_an_image_that_cannot_be_decoded_is_named(captioned_folder, processor, content, num_workers):
    path = captioned_folder / "Images" / "2.png"
    data = {"text": b"<html>", "cut": path.read_bytes()[:60]}[content]
    path.write_bytes(data)
    splits = load_captions(captioned_folder, validation_fraction=0.25, seed=1)
    split = splits["train" if "2.png" in splits["train"]["image_id"] else "validation"]
    rows = CaptionRows(split, processor)
    batches = BatchLoader(rows, GlobalBatches(InOrder(len(rows)), 2), num_workers)
    ((index, why),) = (found for batch in batches for found in batch.get("undecodable", []))
    assert rows.name(index) == "2.png" and why.startswith("image '2.png' cannot be decoded: ")
    with pytest.raises(DataError, match="'2.png' cannot be decoded"):
        rows[0, index]


@pytest.mark.parametrize(("num_workers", "side"), [(0, "left"), (2, "right")])
def test_batches_joined_from_pieces_equal_whole_ones(num_workers: int, side: str) -> None:
    processor = tiny_processor()
    processor.tokenizer.padding_side = side
    rows = training_rows(processor, 11, captions_per_image=None)
    rows.undecoded[8]["image"] = {"bytes": b"no image", "path": None}  # its piece has only this image
    batches = [[(0, i) for i in part] for part in ((3, 1, 0, 2, 4), (7, 5, 6), (8, 9, 10))]
    pieces = BatchLoader(rows, batches, num_workers, piece_size=1 if num_workers == 0 else 2)
    assert len(pieces) == len(batches)
    for _ in range(2):  # epochs
        found = list(pieces)
        assert len(found) == len(batches)
        for piece, whole in zip(found, BatchLoader(rows, batches, 0), strict=True):
            assert piece.keys() == whole.keys() and piece.get("undecodable") == whole.get("undecodable")
            images, texts = piece["image_id"] >= 0, piece["text_image_id"] >= 0
            for name in ("image_id", "pixel_values"):
                assert torch.equal(piece[name][images], whole[name]), name
            for name in ("text_image_id", "input_ids", "attention_mask"):
                assert torch.equal(piece[name][texts], whole[name]), name
            assert piece["pixel_values"].permute(0, 2, 3, 1).is_contiguous()


def test_an_image_too_small_for_a_crop_is_named(processor):
    augmentation = build_augmentation([{"name": "RandomCrop", "height": 500, "width": 500}], SIZE)
    with pytest.raises(DataError, match="'0.png' of 48x40 pixels.*--augmentation"):
        CaptionRows(noise_rows(1), processor, augmentation)[0, 0]


def test_a_batch_survives_pickling_with_tensors_of_any_size():
    ids = torch.arange(6).reshape(2, 3)
    small, large = {"input_ids": ids, "image_id": ids[:, 0]}, torch.arange(BY_VALUE // 4, dtype=torch.float32)
    batch = Batch(small | {"pixel_values": torch.cat([large, large[:1]]), "undecodable": [(3, "empty")]})

    restored = pickle.loads(pickle.dumps(batch))

    assert list(restored) == ["input_ids", "image_id", "pixel_values", "undecodable"]
    assert restored["undecodable"] == [(3, "empty")]
    assert all(torch.equal(restored[name], batch[name]) for name in list(restored)[:3])
    by_value, as_tensors = batch.__reduce__()[1]
    assert set(by_value) == {"input_ids", "image_id"}
    assert set(as_tensors) == {"pixel_values", "undecodable"}


@needs_fork
def test_batches_keep_their_pixels_in_reused_memory(processor: MiniClipProcessor) -> None:
    rows = CaptionRows(noise_rows(6), processor)
    batches = [[(0, i)] for i in range(6)]  # more than the memory has slots
    expected = [batch["pixel_values"] for batch in BatchLoader(rows, batches, 0)]
    loader = BatchLoader(rows, batches, num_workers=1)
    assert loader.memory is not None
    next(iter(loader))  # a pass that ends early
    for _ in range(3):
        held = list(loader)
        assert loader.memory.is_taken.tolist() == [[1, 1, 1]]
        assert all(torch.equal(batch["pixel_values"], pixels) for batch, pixels in zip(held, expected, strict=True))
        pixels = held[0]["pixel_values"][:, :1]  # a part keeps the whole batch
        del held
        gc.collect()
        assert sum(loader.memory.is_taken[0].tolist()) == 1
        del pixels
    assert not loader.memory.is_taken.any()


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (48, 40), (2500, 1700)])  # the last one is in several blocks
def test_pixels_of_an_image_are_those_of_numpy(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    pixels = pixels_of(image)
    assert pixels.flags.writeable and np.array_equal(pixels, np.array(image))


# --- loader processes -----------------------------------------------------------------------------------------------


class FailingRows(CaptionRows):
    """Rows whose images make a loader process die or fail."""

    def __init__(self, fail: Callable[[], Any]):
        super().__init__(noise_rows(4), tiny_processor())  # type: ignore[arg-type]
        self.fail = fail

    def _image(self, index: int, *rest: Any) -> Any:
        return self.fail()


def fail_with(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@needs_fork
@pytest.mark.parametrize(
    ("fail", "cause"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "lack of memory: lower --num_workers"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "/dev/shm.*--shm-size"),
        (lambda: os._exit(3), "--num_workers 0` shows which"),
        (fail_with(MemoryError()), "not enough memory to load an image: lower --batch_size"),
    ],
)
def test_a_dead_loader_process_is_reported_with_a_cause(fail: Callable[[], Any], cause: str) -> None:
    with pytest.raises(MiniClipError, match=rf"^[^\n]*{cause}[^\n]*$"), readable_worker_errors():
        list(BatchLoader(FailingRows(fail), [[(0, 1)]], 1))


class Unsendable:
    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def test_batch_that_cannot_be_sent_is_no_endless_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Collator, "__call__", lambda self, rows: Unsendable())
    with pytest.raises(MiniClipError, match="a loader process died"), ended_children(), readable_worker_errors():
        list(BatchLoader(CaptionRows(noise_rows(4), tiny_processor()), [[(0, 1)]], 1))


def test_unexpected_error_in_a_loader_process_is_not_called_a_death() -> None:
    rows, text = FailingRows(fail_with(RuntimeError("mat1 and mat2"))), "(?s)Traceback.*mat1 and mat2"
    with pytest.raises(RuntimeError, match=text), ended_children(), readable_worker_errors():
        list(BatchLoader(rows, [[(0, 1)]], 1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stop_iteration_is_not_taken_for_the_end(num_workers: int) -> None:
    with pytest.raises(RuntimeError, match="StopIteration: boom"), ended_children():
        list(BatchLoader(FailingRows(fail_with(StopIteration("boom"))), [[(0, 1)]], num_workers))


def test_other_runtime_errors_are_not_explained() -> None:
    with pytest.raises(RuntimeError, match="^mat1 and mat2$"), readable_worker_errors():
        raise RuntimeError("mat1 and mat2")


def test_lack_of_memory_in_the_trainer_is_explained() -> None:
    with pytest.raises(MiniClipError, match="not enough memory to load an image"):
        list(BatchLoader(FailingRows(fail_with(MemoryError())), [[(0, 1)]], 0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_loader_process_keeps_its_problem(num_workers: int) -> None:
    problem = Problem("undecodable", "too small; change it", "image 'a b'", 3, image="a b")
    batches = BatchLoader(FailingRows(fail_with(DataError(problem))), [[(0, 1)]], num_workers)
    try:  # not pytest.raises: its reference to the traceback would keep the loader process alive
        list(batches)
    except DataError as error:
        assert str(error) == "image 'a b', row 3: too small; change it" and error.problem == problem
    else:
        pytest.fail("no error was raised")


@needs_fork
def test_loader_processes_end_with_a_killed_trainer(processor, monkeypatch) -> None:
    """They hold a pipe of the trainer open: it does not end while one of them lives."""
    monkeypatch.setattr(processes, "SECONDS_BETWEEN_CHECKS", 0.1)
    output, end = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        try:
            signal.alarm(60)
            rows = CaptionRows(noise_rows(10), processor, vision_features=[torch.zeros(10, 4)])
            batches = iter(BatchLoader(rows, [[(0, i % 10) for i in range(200)]] * 40, 2, prefetch_factor=8))
            os.write(end, b"%d" % next(batches)["input_ids"].nbytes)
            time.sleep(1)  # until the workers are further ahead than a pipe holds
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(end)
    printed = b""
    while part := os.read(output, 100):
        printed += part
    os.close(output)
    assert os.waitstatus_to_exitcode(os.waitpid(trainer, 0)[1]) == -signal.SIGKILL
    assert 2**16 < 8 * int(printed) and int(printed) <= BY_VALUE
