"""Features of frozen towers: right values, computed once, resumed, shared, and never taken for others."""

import errno
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

import train_miniclip
from modeling_miniclip import load_captions
from modeling_miniclip.data.loading.augmentation import build_augmentation
from modeling_miniclip.data.loading.dataset import CaptionRows
from modeling_miniclip.data.shards.shard_url import member_url
from modeling_miniclip.data.tables import image_copies, image_places
from modeling_miniclip.errors import MiniClipError, UsageError
from modeling_miniclip.modeling_miniclip import MiniClipModel
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.resuming import fingerprint_rows
from modeling_miniclip.training.towers import feature_cache, features
from modeling_miniclip.training.towers.feature_cache import (
    CaptionFeatures,
    FeatureRows,
    FeatureTable,
    KeptValue,
    cache_of,
    default_cache_dir,
    digest,
)
from modeling_miniclip.training.towers.features import frozen_image_features, frozen_text_features
from tests.helpers.forks import fork
from tests.helpers.runs import flags, launch, metrics_of, plain_arguments, write_preset, write_scene_folder
from tests.helpers.shards import write_tar
from tests.helpers.towers import CAPTIONS, PIXELS, tiny_model, tiny_processor


@pytest.fixture
def rows(tmp_path: Path) -> CaptionRows:
    """Twelve scenes."""
    split = load_captions(write_scene_folder(tmp_path / "scenes", 13))["train"]
    return CaptionRows(split, tiny_processor())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "EVALUATION_BATCH", 5)
    monkeypatch.setattr(features, "TEXT_BLOCK", 4)


def model_of(seed: int = 0, **fields: Any) -> MiniClipModel:
    torch.manual_seed(seed)
    return tiny_model(**fields)


def all_of(features: FeatureRows) -> torch.Tensor:
    return features.take(range(len(features)))


def image_features(model: MiniClipModel, rows: CaptionRows, cache: Path, views: int = 1) -> list[FeatureRows]:
    return frozen_image_features(model, rows, views, 0, cache, Accelerator(cpu=True))


def count_calls(model: Any, name: str, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """Rows of each call of a method; the call number `fail_at` is interrupted instead."""
    calls: list[int] = []
    plain = getattr(model, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(len(args[0] if args else kwargs["input_ids"]))
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, name, counted)
    return calls


# --- the table ------------------------------------------------------------------------------------------------------


def table(cache: Path, **depends_on: Any) -> FeatureTable:
    return FeatureTable(cache, depends_on, rows=7, width=2)


def test_a_table_is_filled_row_by_row_and_remembers_them(tmp_path: Path) -> None:
    assert not table(tmp_path).done().any()
    values = torch.arange(14.0).view(7, 2)
    table(tmp_path).write(range(3, 6), values[3:6])
    assert np.flatnonzero(table(tmp_path).done()).tolist() == [3, 4, 5]
    rows = np.array([6, 2, 0, 1])  # in any order
    table(tmp_path).write(rows, values[rows])
    assert table(tmp_path).done().all()
    assert torch.equal(table(tmp_path).read(), values)


def test_rows_of_several_tables_are_one_after_the_other() -> None:
    values = torch.arange(14.0).view(7, 2)
    found = FeatureRows([values[:1], values[1:5], values[5:]])
    assert len(found) == 7 and torch.equal(torch.stack([found[i] for i in range(7)]), values)
    assert torch.equal(found.between(2, 4), values[2:4]) and torch.equal(found.take([6, 0]), values[[6, 0]])
    captions = CaptionFeatures(found, np.array([0, 1, 3, 5, 5, 7]))
    assert [captions[i].tolist() for i in range(5)] == [values[a:b].tolist() for a, b in
                                                        ((0, 1), (1, 3), (3, 5), (5, 5), (5, 7))]  # fmt: skip
    assert len(captions) == 5


def test_what_depends_on_something_else_is_another_table(tmp_path: Path) -> None:
    folders = {table(tmp_path, weights=w, view=v).folder for w in "ab" for v in (0, 1)}
    folders.add(FeatureTable(tmp_path, {"weights": "a", "view": 0}, 7, 3).folder)
    assert len(folders) == 5
    assert all((folder / "about.json").is_file() for folder in folders)


@pytest.mark.parametrize("name", ["features.npy", "done.npy"])
def test_truncated_table_is_computed_again(tmp_path: Path, name: str) -> None:
    before = table(tmp_path)
    before.write(range(7), torch.ones(7, 2))
    path = before.folder / name
    path.write_bytes(path.read_bytes()[:-1])
    assert not table(tmp_path).done().any()


def test_full_disk_keeps_what_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path).write(range(0, 3), torch.ones(3, 2))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(feature_cache, "_write_at", full)
        with pytest.raises(MiniClipError, match="No space left on device; free some space, or choose another folder"):
            table(tmp_path).write(range(3, 6), torch.ones(3, 2))
    assert np.flatnonzero(table(tmp_path).done()).tolist() == [0, 1, 2]


def test_unwritable_cache_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MiniClipError, match="--feature_cache_dir .*file/cache cannot be written: Not a directory"):
        table(tmp_path / "file" / "cache")


def test_parts_of_a_digest_do_not_run_together() -> None:
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])


def test_the_cache_lies_beside_those_of_the_other_libraries() -> None:
    from huggingface_hub.constants import HF_HOME

    assert default_cache_dir().parts[-2:] == ("miniclip", "features")
    assert str(default_cache_dir()).startswith(HF_HOME)


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", ["resnet", "siglip_vision_model", "clip_vision_model", "swin", "convnext"])
def test_image_features_are_those_of_each_image_alone(
    tmp_path: Path, rows: CaptionRows, small_blocks: None, vision: str
) -> None:
    model = model_of(vision=vision)
    (found,) = image_features(model, rows, tmp_path / "cache")
    assert len(found) == len(rows) and found[0].shape == (model.vision_width,)
    for i in range(len(rows)):
        pixels = rows.processor.normalize(torch.from_numpy(rows[0, i]["pixels"])[None])
        with torch.no_grad():
            expected = model.pool_images(pixels).pooler_output[0]
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)


def test_batch_norms_are_folded_while_features_are_computed(
    tmp_path: Path, rows: CaptionRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("a batch norm was computed")

    model = model_of()
    plain = model.pool_images

    def without_batch_norm(pixels: torch.Tensor) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "batch_norm", refuse)
            return plain(pixels)

    monkeypatch.setattr(model, "pool_images", without_batch_norm)
    image_features(model, rows, tmp_path / "cache")
    with pytest.raises(AssertionError, match="batch norm"):
        model.pool_images(torch.zeros(1, 3, PIXELS, PIXELS))


def test_image_features_are_computed_once(
    tmp_path: Path, rows: CaptionRows, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = image_features(model_of(), rows, tmp_path / "cache")
    again = model_of()  # another run
    calls = count_calls(again, "pool_images", monkeypatch)
    (second,) = image_features(again, rows, tmp_path / "cache")
    assert calls == []
    assert torch.equal(all_of(first), all_of(second))


def test_interrupted_pass_resumes_with_the_same_bits(
    tmp_path: Path, rows: CaptionRows, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = image_features(model_of(), rows, tmp_path / "whole")
    model = model_of()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        count_calls(model, "pool_images", patched, fail_at=1)
        image_features(model, rows, tmp_path / "cache")
    calls = count_calls(model, "pool_images", monkeypatch)
    (found,) = image_features(model, rows, tmp_path / "cache")
    assert calls == [5, len(rows) - 10]
    assert torch.equal(all_of(found), all_of(expected))


def test_cache_depends_on_weights_pixels_and_settings(tmp_path: Path, rows: CaptionRows, small_blocks: None) -> None:
    def tables() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    def computed(model: MiniClipModel) -> int:
        before = tables()
        image_features(model, rows, tmp_path / "cache")
        return tables() - before

    image_features(model_of(), rows, tmp_path / "cache")
    assert computed(model_of()) == 0
    other = model_of()
    with torch.no_grad():
        next(other.vision_model.parameters()).flatten()[0] += 1e-6
    assert computed(other) == 1
    other = model_of()
    next(other.vision_model.buffers()).flatten()[0] += 1e-6  # a running mean
    assert computed(other) == 1
    other = model_of()
    next(other.text_model.parameters()).data += 1  # the text tower has no part in it
    assert computed(other) == 0
    rows.processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    assert computed(model_of()) == 1
    path = Path(rows.undecoded[0]["image"]["path"])
    with Image.open(path) as image:
        changed = image.convert("RGB")
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(path)
    assert computed(model_of()) == 1


def test_a_data_set_that_moved_keeps_its_features(tmp_path: Path, rows: CaptionRows, small_blocks: None) -> None:
    image_features(model_of(), rows, tmp_path / "cache")
    (tmp_path / "scenes").rename(tmp_path / "elsewhere")
    moved = CaptionRows(load_captions(tmp_path / "elsewhere" / "captions.csv")["train"], rows.processor)
    image_features(model_of(), moved, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_cached_features_open_no_image(
    tmp_path: Path, rows: CaptionRows, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = image_features(model_of(), rows, tmp_path / "cache")
    for row in rows.undecoded:
        path = Path(row["image"]["path"])
        status = path.stat()
        path.write_bytes(bytes(status.st_size))  # no picture
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (found,) = image_features(model_of(), rows, tmp_path / "cache")
    assert torch.equal(all_of(found), all_of(expected))


def test_cached_features_prepare_nothing(
    tmp_path: Path, rows: CaptionRows, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is prepared")

    (expected,) = image_features(model_of(), rows, tmp_path / "cache")
    for name in ("folded_batch_norms", "BatchLoader"):  # runs of the tower on noise, loader processes
        monkeypatch.setattr(features, name, refuse)
    (found,) = image_features(model_of(), rows, tmp_path / "cache")
    assert torch.equal(all_of(found), all_of(expected))
    os.utime(rows.undecoded[5]["image"]["path"], ns=(1, 1))
    with pytest.raises(AssertionError, match="something is prepared"):
        image_features(model_of(), rows, tmp_path / "cache")


def test_kept_values_belong_to_what_they_depend_on(tmp_path: Path) -> None:
    kept = KeptValue(tmp_path / "new", "number", {"texts": ["a", "\udc80"], "limit": 3})
    assert kept.read() is None
    kept.write(17)
    same, *others = (KeptValue(tmp_path / "new", name, about) for name, about in (
        ("number", {"limit": 3, "texts": ["a", "\udc80"]}), ("other", {"limit": 3, "texts": ["a", "\udc80"]}),
        ("number", {"limit": 4, "texts": ["a", "\udc80"]}), ("number", {"limit": 3, "texts": ["a"]}),
    ))  # fmt: skip
    assert same.read() == 17 and [other.read() for other in others] == [None] * 3
    kept.path.write_text('{"dama', encoding="utf-8")
    assert same.read() is None
    (tmp_path / "file").touch()
    KeptValue(tmp_path / "file", "number", {}).write(1)  # the run goes on without


def test_only_runs_with_a_frozen_tower_keep_something(tmp_path: Path) -> None:
    found = {freeze: cache_of(plain_arguments(freeze=freeze)) for freeze in ("none", "vision", "text", "both", None)}
    assert found == {"none": None, None: None, **dict.fromkeys(("vision", "text", "both"), default_cache_dir())}
    assert cache_of(plain_arguments(freeze="both", feature_cache_dir=str(tmp_path))) == tmp_path


def test_images_in_tars_have_the_features_of_files(tmp_path: Path, rows: CaptionRows, small_blocks: None) -> None:
    (expected,) = image_features(model_of(), rows, tmp_path / "cache")
    names = []
    for part in (range(7), range(7, 12)):  # two archives, which end within a batch
        files = [Path(rows.undecoded[i]["image"]["path"]) for i in part]
        archive = write_tar(tmp_path / f"{part.start}.tar", [(file.name, file.read_bytes()) for file in files])
        with tarfile.open(archive) as tar:
            names += [member_url(archive, member.offset_data, member.size, member.name) for member in tar]
    images = [{"bytes": None, "path": name} for name in names]
    columns = {"image": images, "image_id": rows.undecoded["image_id"][:], "captions": rows.texts["captions"][:]}
    features = Features({"image": ImageColumn(), "image_id": Value("string"), "captions": [Value("string")]})
    (found,) = image_features(
        model_of(), CaptionRows(Dataset.from_dict(columns, features=features), rows.processor), tmp_path / "cache"
    )
    assert torch.equal(all_of(found), all_of(expected)) and len(list((tmp_path / "cache").iterdir())) == 2


def test_only_the_part_of_a_changed_image_is_computed(
    tmp_path: Path, rows: CaptionRows, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_places, "MOST", 4)  # batches of five images reach over the ends of parts
    (expected,) = image_features(model_of(), rows, tmp_path / "cache")
    os.utime(rows.undecoded[5]["image"]["path"], ns=(1, 1))
    model = model_of()
    calls = count_calls(model, "pool_images", monkeypatch)
    (found,) = image_features(model, rows, tmp_path / "cache")
    assert calls == [5, 5] and len(rows) == 12, "rows 4 to 7 are in the first two batches"
    assert torch.equal(all_of(found), all_of(expected))


def test_views_are_augmentations_used_in_turn(tmp_path: Path, rows: CaptionRows, small_blocks: None) -> None:
    crop = {"name": "RandomResizedCrop", "scale": [0.2, 0.9]}
    rows.augmentation = build_augmentation([crop], (PIXELS, PIXELS))
    model = model_of()
    pixels = [rows.processor.normalize(torch.from_numpy(rows[view, 2]["pixels"])[None]) for view in (0, 1)]
    rows.vision_features = image_features(model, rows, tmp_path / "cache", views=2)
    with torch.no_grad():
        expected = [model.pool_images(p).pooler_output[0] for p in pixels]
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    for epoch in range(4):
        torch.testing.assert_close(rows[epoch, 2]["vision_features"], expected[epoch % 2], rtol=1e-4, atol=1e-5)


def test_more_views_are_added_to_those_that_are_there(
    tmp_path: Path, rows: CaptionRows, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.augmentation = build_augmentation([{"name": "HorizontalFlip"}], (PIXELS, PIXELS))
    model = model_of()
    image_features(model, rows, tmp_path / "cache", views=1)
    calls = count_calls(model, "pool_images", monkeypatch)
    image_features(model, rows, tmp_path / "cache", views=2)
    assert sum(calls) == len(rows)
    rows.seed = 1
    image_features(model, rows, tmp_path / "cache", views=1)
    assert sum(calls) == 2 * len(rows)


# --- texts ----------------------------------------------------------------------------------------------------------


def text_features(model: MiniClipModel, cache: Path, captions: list[list[str]] = CAPTIONS) -> CaptionFeatures:
    rows = Dataset.from_dict({"captions": captions})
    return frozen_text_features(model, rows, tiny_processor(), cache, Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("text", "pooling"),
    [("distilbert", "cls"), ("distilbert", "mean"), ("gpt2", "last"), ("bert", "pooler"), ("clip_text_model", "eos")],
)
def test_text_features_are_those_of_each_caption_alone(
    tmp_path: Path, small_blocks: None, text: str, pooling: str
) -> None:
    model, tokenizer = model_of(text=text, text_pooling=pooling), tiny_processor().tokenizer
    found = text_features(model, tmp_path)
    assert [len(found[i]) for i in range(len(found))] == [len(row) for row in CAPTIONS]
    for i, row in enumerate(CAPTIONS):
        values = found[i]
        for caption, value in zip(row, values, strict=True):
            with torch.no_grad():
                expected = model.pool_texts(**tokenizer([caption], return_tensors="pt")).pooler_output[0]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_text_features_depend_on_captions_and_pooling(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_features(model_of(), tmp_path)
    model = model_of()
    calls = count_calls(model, "pool_texts", monkeypatch)
    text_features(model, tmp_path)
    assert calls == []
    changed = [["a blue dog"], *CAPTIONS[1:]]
    text_features(model, tmp_path, changed)
    assert sum(calls) == sum(map(len, changed))
    model.config.text_pooling = "mean"
    text_features(model, tmp_path)
    assert sum(calls) == sum(map(len, changed)) + sum(map(len, CAPTIONS))


def test_image_that_can_be_decoded_since_has_no_features(rows: CaptionRows) -> None:
    found = torch.zeros(len(rows), 4)
    found[1] = torch.nan  # it could not be decoded when the features were computed
    cached = CaptionRows(load_captions(Path(rows.undecoded[0]["image"]["path"]).parents[1])["train"], rows.processor,
                         vision_features=[found])  # fmt: skip
    first, second = cached.__getitems__([(0, 0), (0, 1)])
    assert first["vision_features"].tolist() == [0] * 4
    assert "it can be now: name another --feature_cache_dir" in second["undecodable"]


# --- in a run -------------------------------------------------------------------------------------------------------


def test_views_need_a_frozen_tower_and_an_augmentation() -> None:
    with pytest.raises(UsageError, match="--num_views needs a frozen image tower"):
        parse_arguments(["--num_views=2"])
    with pytest.raises(UsageError, match="--num_views needs an augmentation"):
        parse_arguments(["--num_views=2", "--freeze=both", "--augmentation=[]"])


def test_frozen_image_tower_runs_once_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[int] = []
    plain = MiniClipModel.pool_images

    def counted(model: MiniClipModel, pixel_values: torch.Tensor, *args: Any) -> Any:
        images.append(len(pixel_values))
        return plain(model, pixel_values, *args)

    monkeypatch.setattr(MiniClipModel, "pool_images", counted)
    train_miniclip.main(flags(tmp_path, freeze="both"))
    splits = load_captions(tmp_path / "scenes", validation_fraction=0.2)
    # The first image tries the tower; by the last ones the export, loaded again, is compared with the model.
    assert sum(images) == 1 + len(splits["train"]) + 2 * len(splits["validation"])
    assert (tmp_path / "run" / "retrieval.png").is_file()


def opened_by(*starts: list[str]) -> list[list[str]]:
    """The images that each start of a run opens, until its first step: files, and what Pillow or a hash reads."""
    opened: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith(".png"):
            opened.append(str(args[0]))

    def noted(plain: Any) -> Any:
        return lambda content, *args, **options: opened.append("pixels") or plain(content, *args, **options)

    sys.addaudithook(hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_places, "SETTLED", -1)
        for module in (fingerprint_rows, image_copies):
            patch.setattr(module, "read_encoded", noted(module.read_encoded))
        patch.setattr(Image, "open", noted(Image.open))
        found = []
        for argv in starts:
            train_miniclip.prepare(parse_arguments(argv))
            found.append(list(opened))
            opened.clear()
    return found


def test_run_with_cached_features_opens_no_image(tmp_path: Path) -> None:
    write_scene_folder(tmp_path / "scenes", 60)
    write_preset(tmp_path)
    contents = sorted((tmp_path / "scenes" / "Images").iterdir())
    write_tar(tmp_path / "scenes.tar", [member for i, path in enumerate(contents) for member in (
        (path.name, path.read_bytes()), (f"{path.stem}.txt", f"caption {i % 7}".encode()))])  # fmt: skip
    (tmp_path / "run").mkdir()
    starts = [
        flags(tmp_path, dataset=dataset, freeze=freeze, overwrite_output_dir=True)
        for dataset in (tmp_path / "scenes" / "captions.csv", tmp_path / "scenes.tar")
        for freeze in ("both", "vision" if dataset.suffix == ".tar" else "both")
    ]
    process = fork(opened_by, *starts)
    process.join(300)
    counts = [len(opened) for opened in process.result]
    assert min(counts[0], counts[2]) >= 60, "the first start opens every image"
    assert counts[1] == counts[3] == 0


@pytest.mark.slow
def test_two_processes_fill_one_cache_that_one_process_reuses(tmp_path: Path) -> None:
    def lines(name: str) -> Iterator[tuple[Any, ...]]:
        return ((line["step"], line["loss"]) for line in metrics_of(tmp_path / name))

    for name, processes in (("two", 2), ("one", 1)):
        done = launch(flags(tmp_path, name, freeze="both", dropout=0, num_views=2, num_workers=1), processes)
        assert done.returncode == 0, done.stderr
        assert ("image features, view 2 of 2" in done.stderr) == (name == "two")
    for (step, loss), (other_step, other_loss) in zip(lines("one"), lines("two"), strict=True):
        assert step == other_step
        assert loss == pytest.approx(other_loss, rel=1e-5)
    tables = [path for path in (tmp_path / "features").iterdir() if path.is_dir()]
    assert len(tables) == 5  # two views, validation images, captions of both splits
    assert all(np.load(path / "done.npy").all() for path in tables)
