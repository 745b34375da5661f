"""A resumed run finds every change of its data, its model and its flags, and accepts what changes nothing."""

import csv
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from tokenizers import Tokenizer

from modeling_miniclip import DataError, MiniClipModel, MiniClipProcessor, ModelError, UsageError, load_captions
from modeling_miniclip.data.shards.shard_url import member_url, table_url
from modeling_miniclip.data.tables import image_places
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.optimizer import apply_flags, build_scheduler, parameter_groups
from modeling_miniclip.training.resuming import fingerprint as fingerprints
from modeling_miniclip.training.resuming import fingerprint_rows
from modeling_miniclip.training.resuming.changes import (
    changed_pieces,
    changed_rows,
    changed_settings,
    check_data,
    check_flags,
)
from modeling_miniclip.training.resuming.fingerprint import (
    Fingerprint,
    add_model,
    fingerprint_of_data,
)
from modeling_miniclip.training.resuming.fingerprint_rows import image_hashes, image_sizes
from modeling_miniclip.training.resuming.resume_rules import (
    RESUME_RULES,
    changed_flags,
    describe_flags,
    recorded_flags,
)
from modeling_miniclip.training.row_order import choose_shuffle
from modeling_miniclip.training.setup import resume
from modeling_miniclip.training.towers.create_model import train_tokenizer
from tests.helpers.runs import ROOT, flags, metrics_of, plain_arguments
from tests.helpers.towers import tiny_model, tiny_processor
from train_miniclip import main

ARGUMENTS = plain_arguments(dataset="any", output_dir="out")
FEATURES = Features({"image": Image(), "image_id": Value("string"), "captions": [Value("string")]})
Rows = dict[str, list[tuple[str, bytes, list[str]]]]


def rows() -> Rows:
    """Five rows, each `(image_id, image, captions)`."""
    every = [(f"{name}.jpg", name.encode() * 3, [f"one {name}", f"two {name}"]) for name in "abcde"]
    return {"train": every[:3], "validation": every[3:]}


def splits_of(rows: Rows) -> DatasetDict:
    return DatasetDict({
        split: Dataset.from_dict(
            {
                "image": [{"bytes": content, "path": None} for _, content, _ in some],
                "image_id": [name for name, *_ in some],
                "captions": [captions for *_, captions in some],
            },
            features=FEATURES,
        )
        for split, some in rows.items()
    })  # fmt: skip


def differences(before: Rows, after: Rows) -> list[str]:
    splits = splits_of(after)
    return changed_rows(
        fingerprint_of_data(splits_of(before), ARGUMENTS), fingerprint_of_data(splits, ARGUMENTS), splits
    )


def edited(change: Callable[[Rows], object]) -> Rows:
    after = rows()
    change(after)
    return after


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r["train"].append(("f.jpg", b"f", ["f"])), ["image 'f.jpg' is new in train"]),
        (lambda r: r["validation"].pop(0), ["image 'd.jpg' is missing from validation"]),
        (
            lambda r: [r["train"].pop(0), r["train"].pop(0)],
            ["2 images are missing from train, the first: 'a.jpg'"],
        ),
        (lambda r: r["validation"].append(r["train"].pop(1)), ["image 'b.jpg' was in train, is in validation"]),
        (
            lambda r: r["train"][1][2].__setitem__(1, "two bees"),
            ["the captions of 1 image in train changed: caption 2 of 'b.jpg' is now 'two bees'"],
        ),
        (
            lambda r: [row[2].reverse() for row in r["train"]],
            ["the captions of 3 images in train changed: those of 'a.jpg' are in another order"],
        ),
        (lambda r: r["train"][2][2].pop(), ["the captions of 1 image in train changed: 'c.jpg' had 2, has 1"]),
        (
            lambda r: r["train"].__setitem__(0, ("a.jpg", b"AAA", rows()["train"][0][2])),
            ["the file of image 'a.jpg' in train changed"],
        ),
        (lambda r: r["train"].reverse(), ["the images of train are in another order: row 1 was 'a.jpg', is 'c.jpg'"]),
        (
            lambda r: [r["train"].append(("f.jpg", b"f", ["f"])), r["validation"][0][2].append("more")],
            [
                "image 'f.jpg' is new in train",
                "the captions of 1 image in validation changed: 'd.jpg' had 2, has 3",
            ],
        ),
    ],
)
def test_each_change_of_rows_is_named(change: Callable[[Rows], object], expected: list[str]) -> None:
    assert differences(rows(), edited(change)) == expected
    assert differences(rows(), rows()) == []


def test_error_says_what_changed_and_what_to_do() -> None:
    after = splits_of(edited(lambda r: r["train"].pop()))
    saved = fingerprint_of_data(splits_of(rows()), ARGUMENTS)
    arguments = replace(ARGUMENTS, validation_fraction=0.2)
    with pytest.raises(DataError) as raised:
        check_data(saved, fingerprint_of_data(after, arguments), after, arguments)
    assert str(raised.value) == (
        "--resume_from_checkpoint: the data changed since the run started: image 'c.jpg' is missing from train "
        "(changed flags: --validation_fraction 0.1 -> 0.2). Restore what was there, or start a new run with another "
        "--output_dir (with --model_name_or_path out/export it continues from this run's model)"
    )


def related(group: str, wrong: str, sources: list[str], folder: Path) -> tuple[Fingerprint, Any]:
    """The fingerprint, as a checkpoint has it, of a run whose data has groups and wrong captions; and the data."""
    splits = splits_of(rows())
    train = splits["train"].add_column("group", [None, group, "mug"])
    splits["train"] = train.add_column("negative_captions", [[wrong], [], ["no", "none"]])
    folder.mkdir()
    fingerprint_of_data(splits, replace(ARGUMENTS, hard_negatives=sources)).save(folder)
    return Fingerprint.load(folder), splits


@pytest.mark.parametrize(
    ("group", "wrong", "sources", "changed"),
    [
        ("cup", "wrong", ["column"], None),
        ("mug", "wrong", ["column"], "the column group of train changed"),
        ("cup", "false", ["column"], "the column negative_captions of train changed"),
        ("cup", "false", ["swap"], None),  # which does not use it
    ],
)
def test_changed_groups_and_wrong_captions_are_noticed(
    group: str, wrong: str, sources: list[str], changed: str | None, tmp_path: Path
) -> None:
    before, _ = related("cup", "wrong", sources, tmp_path / "before")
    after, splits = related(group, wrong, sources, tmp_path / "after")
    with nullcontext() if changed is None else pytest.raises(DataError, match=changed):
        check_data(before, after, splits, ARGUMENTS)
    check_data(replace(before, related=None), after, splits, ARGUMENTS)  # of a checkpoint that lacks the checksums


def test_moved_folder_and_saved_again_file_are_the_same_data(captioned_folder: Path, tmp_path: Path) -> None:
    before = fingerprint_of_data(load_captions(captioned_folder), ARGUMENTS)
    shutil.copytree(captioned_folder, tmp_path / "moved")
    table = tmp_path / "moved" / "captions.csv"
    with table.open(newline="", encoding="utf-8") as file:
        cells = list(csv.reader(file))
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(cells)
    splits = load_captions(table)
    assert changed_rows(before, fingerprint_of_data(splits, ARGUMENTS), splits) == []


def test_caption_file_of_equal_size_and_time_is_read_again(captioned_folder: Path) -> None:
    before = fingerprint_of_data(load_captions(captioned_folder), ARGUMENTS)
    table = captioned_folder / "captions.csv"
    stat = table.stat()
    table.write_bytes(table.read_bytes().replace(b"a white boat", b"a black boat"))
    os.utime(table, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (table.stat().st_size, table.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    splits = load_captions(captioned_folder)
    (line,) = changed_rows(before, fingerprint_of_data(splits, ARGUMENTS), splits)
    assert "caption 1 of '3.png' is now 'a black boat on a blue lake'" in line


def test_hashes_of_images_are_kept_until_a_file_changes(
    captioned_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, kept = load_captions(captioned_folder)["train"], tmp_path / "kept"
    first = image_hashes(rows, kept)
    assert not kept.exists(), "another change might have the same time"
    monkeypatch.setattr(image_places, "SETTLED", -1)
    assert np.array_equal(image_hashes(rows, kept), first) and len(list(kept.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint_rows, "_hashes_of_images", None)
        assert np.array_equal(image_hashes(rows, kept), first)
    path = Path(rows.cast_column("image", Image(decode=False))[0]["image"]["path"])
    stat = path.stat()
    time.sleep(0.02)  # some ticks of the system's clock
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert (image_hashes(rows, kept) != first).tolist() == [True, *[False] * (len(rows) - 1)]
    path.unlink()
    assert image_hashes(rows, kept)[0] == 0 and len(list(kept.iterdir())) == 2, "what cannot be read is not kept"


def test_large_sets_are_compared_by_the_size_of_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    same_size = edited(lambda r: r["train"].__setitem__(0, ("a.jpg", b"AAA", rows()["train"][0][2])))
    larger = edited(lambda r: r["train"].__setitem__(0, ("a.jpg", b"AAAA", rows()["train"][0][2])))
    assert len(differences(rows(), same_size)) == len(differences(rows(), larger)) == 1
    monkeypatch.setattr(fingerprints, "READ_WHOLE", 14)
    assert differences(rows(), same_size) == [] and len(differences(rows(), larger)) == 1
    saved = fingerprint_of_data(splits_of(rows()), ARGUMENTS)
    assert not saved.by_content
    monkeypatch.setattr(fingerprints, "READ_WHOLE", 15)
    assert fingerprint_of_data(splits_of(rows()), ARGUMENTS).by_content
    monkeypatch.setattr(fingerprints, "READ_MOST", 4)
    assert not fingerprint_of_data(splits_of(rows()), ARGUMENTS).by_content
    monkeypatch.undo()  # the set became smaller: it is compared in the way of the checkpoint
    assert fingerprint_of_data(splits_of(rows()), ARGUMENTS, saved.by_content).rows.equals(saved.rows)


def test_sizes_are_those_of_selected_rows_and_files(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"12345")
    images = [{"bytes": b"1", "path": None}, {"bytes": None, "path": str(tmp_path / "x.jpg")},
              {"bytes": None, "path": str(tmp_path / "none.jpg")}, {"bytes": b"1234", "path": "y"}]  # fmt: skip
    features = Features({"image": Image(), "image_id": Value("string")})
    split = Dataset.from_dict({"image": images, "image_id": list("abcd")}, features=features)
    sizes, total = image_sizes(split)
    assert sizes.tolist() == [1, 5, 0, 4] and total == 10
    assert image_sizes(split.select([3, 1, 0]))[0].tolist() == [4, 5, 1]


def test_sizes_in_shards_need_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(bytes(1000))
    table = str(tmp_path / "a.arrow")
    names = [member_url("none.tar", 512, 77, "x"), *(table_url(table, row, "image") for row in (3, 4))]

    def sizes(*images: str) -> tuple[list[int], float]:
        rows = [{"bytes": None, "path": image} for image in images]
        columns = {"image": rows, "image_id": [str(i) for i in range(len(images))]}
        features = Features({"image": Image(), "image_id": Value("string")})
        found, total = image_sizes(Dataset.from_dict(columns, features=features))
        return found.tolist(), total

    (member, *rows), total = sizes(*names)
    assert member == 77 and rows == [1_000_003_003, 1_000_003_004] and total == 1077
    (tmp_path / "a.arrow").write_bytes(bytes(1001))
    assert sizes(*names)[0][1:] == [1_001_003_006, 1_001_003_007]
    assert sizes(member_url("https://host/a.tar", 0, 5, "x")) == ([5], math.inf)


def test_known_hashes_of_captions_are_used(tmp_path: Path) -> None:
    splits = splits_of(rows())
    saved = fingerprint_of_data(splits, ARGUMENTS)
    hashes = {name: [[zlib.crc32(text.encode()) for text in row] for row in part["captions"]]
              for name, part in splits.items()}  # fmt: skip
    known = DatasetDict({name: part.remove_columns("captions").add_column("caption_hashes", hashes[name])
                         for name, part in splits.items()})  # fmt: skip
    assert fingerprint_of_data(known, ARGUMENTS).rows.equals(saved.rows)
    image = int.from_bytes(blake2b(b"aaa", digest_size=8).digest(), "little")
    assert saved.rows.table().to_pylist()[0] == {
        "split": "train", "image_id": "a.jpg", "image": image, "captions": hashes["train"][0]
    }  # fmt: skip


def test_equal_rows_are_recognised_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, shorter = (fingerprint_of_data(splits_of(some), ARGUMENTS) for some in
                      (rows(), edited(lambda r: r["validation"].pop())))  # fmt: skip
    for name, one in (("saved", saved), ("shorter", shorter)):
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
    monkeypatch.setattr(fingerprint_rows, "WRITTEN_TOGETHER", 2)
    loaded = Fingerprint.load(tmp_path / "saved")
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint_rows.FingerprintRows, "table", lambda rows: pytest.fail("all rows in memory"))
        assert changed_rows(loaded, saved, splits_of(rows())) == []
    for one, other in ((saved, shorter), (shorter, saved), (loaded, shorter)):
        assert one.rows.equals(one.rows) and not one.rows.equals(other.rows)


def test_repaired_images_are_no_change(tmp_path: Path) -> None:
    repaired = edited(lambda r: r["train"].__setitem__(1, ("b.jpg", b"good", rows()["train"][1][2])))
    saved = fingerprint_of_data(splits_of(rows()), ARGUMENTS)
    splits = splits_of(repaired)
    now = fingerprint_of_data(splits, ARGUMENTS)
    assert changed_rows(saved, now, splits) == ["the file of image 'b.jpg' in train changed"]
    saved.mark_undecodable({"train": [1], "validation": []}, tmp_path)
    assert changed_rows(saved, now, splits) == []
    later = fingerprint_of_data(splits_of(rows()), ARGUMENTS)  # found after the checkpoint was saved
    later.add_undecodable(tmp_path)
    assert changed_rows(later, now, splits) == []


def test_fingerprint_is_saved_whole(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        saved = fingerprint_of_data(splits_of(rows()), ARGUMENTS)
        add_model(saved, tiny_model(), tiny_processor(), ARGUMENTS)
        saved.save(tmp_path / name)
    loaded = Fingerprint.load(tmp_path / "one")
    assert loaded.rows.equals(saved.rows)
    assert vars(loaded) | {"rows": None} == vars(saved) | {"rows": None}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModelError, match="one is damaged or was saved by an earlier version"):
            Fingerprint.load(tmp_path / "one")
        path.write_bytes(whole)


# --- model, vocabulary, preprocessing -------------------------------------------------------------------------------


def settings_of(processor: MiniClipProcessor, arguments: TrainingArguments = ARGUMENTS, **model: Any) -> Fingerprint:
    found = fingerprint_of_data(splits_of(rows()), arguments)
    add_model(found, tiny_model(**model), processor, arguments)
    return found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda p: setattr(p.image_processor, "crop_size", {"height": 64, "width": 32}),
            "image_processor.crop_size.height was 32, is 64",
        ),
        (
            lambda p: setattr(p.image_processor, "image_mean", (0.485, 0.25, 0.406)),
            "image_processor.image_mean.1 was 0.456, is 0.25",
        ),
        (lambda p: setattr(p.tokenizer, "model_max_length", 9), "tokenizer.model_max_length was 24, is 9"),
    ],
)
def test_changed_preprocessing_is_named(change: Callable[[Any], object], expected: str) -> None:
    before, processor = settings_of(tiny_processor()), tiny_processor()
    change(processor)
    assert changed_settings(before.settings, settings_of(processor).settings) == [expected]


def test_changed_tokenizer_is_named() -> None:
    before = settings_of(tiny_processor())
    other = train_tokenizer([["a reddish square"], ["A Dog"]], 200)
    other.model_max_length = 24
    after = settings_of(MiniClipProcessor(tiny_processor().image_processor, other))
    assert changed_settings(before.settings, after.settings) == []
    (line,) = changed_pieces(before.vocabulary, after.vocabulary)
    number = next(i for i, (a, b) in enumerate(zip(before.vocabulary, after.vocabulary, strict=False)) if a != b)
    assert f"piece {number} was {list(before.vocabulary)[number]!r}, is {list(after.vocabulary)[number]!r}" in line
    assert changed_pieces({"a": 0, "b": 1}, {"a": 0}) == [
        "1 of 2 pieces of the vocabulary changed: piece 1 was 'b', is missing"
    ]
    cased = tiny_processor()
    text = json.loads(cased.tokenizer.backend_tokenizer.to_str())
    text["normalizer"]["lowercase"] = False
    cased.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(text))
    assert changed_settings(before.settings, settings_of(cased).settings) == [
        "tokenizer.normalizer.lowercase was True, is False"
    ]


def test_saved_and_moved_processor_is_the_same(tmp_path: Path) -> None:
    before, processor = settings_of(tiny_processor()), tiny_processor()
    processor.tokenizer(["a dog", "two"], padding=True, truncation=True)  # leaves its mark in the tokenizer
    processor.save_pretrained(tmp_path)
    after = settings_of(MiniClipProcessor.from_pretrained(tmp_path))
    assert changed_settings(before.settings, after.settings) == []
    assert changed_pieces(before.vocabulary, after.vocabulary) == []


def test_changed_model_and_augmentation_are_named() -> None:
    before = settings_of(tiny_processor())
    after = settings_of(tiny_processor(), replace(ARGUMENTS, augmentation='[{"name": "NoOp"}]'), projection_dim=8)
    assert changed_settings(before.settings, after.settings) == [
        "model.projection_dim was 16, is 8",
        "augmentation.transforms.0.name was 'RandomResizedCrop', is 'NoOp'",
    ]
    frozen = replace(ARGUMENTS, freeze="vision", augmentation="[]")
    torch.manual_seed(0)
    before = settings_of(tiny_processor(), frozen)
    (line,) = changed_settings(before.settings, settings_of(tiny_processor(), frozen).settings)
    assert line.startswith("frozen vision tower.weights was "), "features come from these weights"


# --- flags ----------------------------------------------------------------------------------------------------------


def test_each_flag_has_one_rule() -> None:
    ruled = [name for names in RESUME_RULES.values() for name in names]
    assert sorted(ruled) == sorted(field.name for field in fields(TrainingArguments))


def test_guide_has_the_rule_of_each_flag() -> None:
    guide = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = guide.split("| what happens if it changed | flags |")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line) for line in table.splitlines()[2:]]
    assert rows[:3] == [list(RESUME_RULES[rule]) for rule in ("fixed", "compared", "applied")] and rows[3:] == [[]]


def test_fixed_flags_are_errors_with_both_values() -> None:
    saved = fingerprint_of_data(splits_of(rows()), ARGUMENTS)
    check_flags(saved, replace(ARGUMENTS, num_workers=7, weight_decay=0.5, dataset="moved"))
    with pytest.raises(UsageError, match="cannot change --seed 0 -> 1, --ema_decay 0.0 -> 0.9: .*arguments.yaml"):
        check_flags(saved, replace(ARGUMENTS, seed=1, ema_decay=0.9))


def test_resumed_run_keeps_its_shuffle(tmp_path: Path) -> None:
    splits = splits_of(rows())
    saved = fingerprint_of_data(splits, replace(ARGUMENTS, shuffle="window"))
    saved.save(tmp_path)
    check_flags(Fingerprint.load(tmp_path), ARGUMENTS)
    nobody: Any = SimpleNamespace(is_main_process=False)
    assert choose_shuffle(splits, tmp_path, ARGUMENTS, nobody).shuffle == "window"
    assert choose_shuffle(splits, None, ARGUMENTS, nobody).shuffle == "full"
    with pytest.raises(UsageError, match="cannot change --shuffle window -> full:"):
        check_flags(saved, replace(ARGUMENTS, shuffle="full"))


def test_other_shards_with_equal_images_are_a_difference() -> None:
    splits = splits_of(rows())
    saved, now = (fingerprint_of_data(splits, ARGUMENTS) for _ in range(2))
    check_data(saved, now, splits, ARGUMENTS)
    saved.order = 1
    with pytest.raises(DataError, match="shards or datasets have other sizes"):
        check_data(saved, now, splits, ARGUMENTS)


def test_changed_flags_are_described_on_one_line() -> None:
    changed = changed_flags(recorded_flags(ARGUMENTS), replace(ARGUMENTS, max_steps=9, dropout=0.0), "applied")
    assert describe_flags(changed) == "--max_steps none -> 9, --dropout none -> 0.0"


def resumed_groups(before: TrainingArguments, after: TrainingArguments, epochs: int) -> tuple[dict[str, Any], Any]:
    """Optimizer groups, by name, and schedule of a run that goes on with other flags after some epochs of one step."""

    def start(arguments: TrainingArguments) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(parameter_groups(tiny_model(), arguments))
        return optimizer, build_scheduler(optimizer, arguments, arguments.num_train_epochs)

    optimizer, scheduler = start(before)
    for _ in range(epochs):
        optimizer.step()
        scheduler.step(*([1.0] if before.lr_scheduler_type == "plateau" else []))
    resumed, schedule = start(after)
    resumed.load_state_dict(optimizer.state_dict())
    schedule.load_state_dict(scheduler.state_dict())
    apply_flags(resumed, schedule, after, recorded_flags(before))
    return {group["name"]: group for group in resumed.param_groups}, schedule


def test_changed_rates_keep_what_a_plateau_has_lowered() -> None:
    before = replace(ARGUMENTS, lr_scheduler_kwargs="{patience: 0, factor: 0.5}")
    after = replace(
        before, text_learning_rate=2e-5, weight_decay=0.1, lr_scheduler_kwargs="{patience: 3, factor: 0.25}"
    )
    groups, scheduler = resumed_groups(before, after, 2)  # the second loss is no better: one halving
    assert groups["head"]["lr"] == pytest.approx(5e-4) and groups["text_no_decay"]["lr"] == pytest.approx(1e-5)
    assert groups["text"]["weight_decay"] == 0.1 and groups["text_no_decay"]["weight_decay"] == 0
    assert (scheduler.patience, scheduler.factor) == (3, 0.25)


def test_changed_schedule_holds_from_the_next_step() -> None:
    before = replace(ARGUMENTS, lr_scheduler_type="cosine", num_train_epochs=4)
    groups, scheduler = resumed_groups(before, replace(before, num_train_epochs=8, head_learning_rate=2e-3), 4)
    assert groups["head"]["lr"] == pytest.approx(1e-3) and groups["vision"]["lr"] == pytest.approx(5e-5)  # half-way
    assert scheduler.base_lrs[0] in (pytest.approx(2e-3), pytest.approx(1e-4))
    unchanged, _ = resumed_groups(before, before, 3)
    assert unchanged["head"]["lr"] == pytest.approx(1e-3 * (1 - 2**-0.5) / 2)  # cos(3 pi / 4) = -1 / sqrt(2)


@pytest.mark.slow
def test_changed_flags_hold_for_sharded_parameters() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The optimizer's state is saved and loaded by the functions that accelerate uses with fully_shard.
    before = replace(ARGUMENTS, lr_scheduler_type="cosine", num_train_epochs=4)
    after = replace(before, num_train_epochs=8, head_learning_rate=2e-3, weight_decay=0.3)

    def start(arguments: TrainingArguments) -> tuple[MiniClipModel, torch.optim.Optimizer, Any]:
        model = fully_shard(tiny_model(), mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(parameter_groups(model, arguments))
        return model, optimizer, build_scheduler(optimizer, arguments, arguments.num_train_epochs)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer, scheduler = start(before)
        for _ in range(4):
            optimizer.step()
            scheduler.step()
        state = get_optimizer_state_dict(model, optimizer)
        resumed_model, resumed, schedule = start(after)
        set_optimizer_state_dict(resumed_model, resumed, state)
        schedule.load_state_dict(scheduler.state_dict())
        assert {group["lr"] for group in resumed.param_groups} == {0.0}  # the end of the shorter schedule
        apply_flags(resumed, schedule, after, recorded_flags(before))
    finally:
        torch.distributed.destroy_process_group()
    groups = {group["name"]: group for group in resumed.param_groups}
    assert groups["head"]["lr"] == pytest.approx(1e-3) and groups["vision"]["lr"] == pytest.approx(5e-5)  # half-way
    assert groups["head"]["weight_decay"] == 0.3 and groups["head_no_decay"]["weight_decay"] == 0


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_fp16_needs_the_scale_of_the_loss(tmp_path: Path, precision: Any) -> None:
    arguments = replace(ARGUMENTS, mixed_precision=precision)
    fingerprint_of_data(splits_of(rows()), arguments).save(tmp_path)
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(scaler=object()), arguments=arguments)
    with pytest.raises(UsageError, match=r"has no scale of the loss \(scaler.pt\): .* --mixed_precision bf16 or no"):
        resume(run, tmp_path)


# --- runs -----------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("without_finish")


def test_run_with_changed_flags_applies_and_logs_them(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    main(flags(tmp_path, num_train_epochs=3, max_steps=7, learning_rate=5e-4, resume_from_checkpoint="latest"))
    assert (
        "changed from here on: --num_train_epochs 2 -> 3, --max_steps none -> 7, --head_learning_rate 0.001 -> 0.0005"
    ) in capsys.readouterr().out
    last = [line for line in metrics_of(tmp_path / "run") if line["split"] == "train"][-1]
    assert last["step"] == 7 and last["text_learning_rate"] == 5e-4


def test_run_with_changed_captions_ends_before_any_work(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    argv = flags(tmp_path, num_train_epochs=3, resume_from_checkpoint="latest")
    table = tmp_path / "scenes" / "captions.csv"
    table.write_text(table.read_text().replace("red", "blue"))
    monkeypatch.setattr("train_miniclip.setup.build_model", None)
    with pytest.raises(DataError, match="the captions of .* changed: caption .* is now '.*blue"):
        main(argv)
    assert metrics_of(tmp_path / "run") == metrics_of(tiny_run)


def test_run_with_another_preset_is_an_error(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    with pytest.raises(ModelError, match="model.projection_dim was 16, is 8"):
        main(flags(tmp_path, num_train_epochs=3, projection_dim=8, resume_from_checkpoint="latest"))
