"""`miniclip check`: problems are found at their rows, the fixed copy has none, the figures are right."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image, ImageFilter

from modeling_miniclip import MiniClipError, ModelError, UsageError, load_captions
from modeling_miniclip.cli import cli
from modeling_miniclip.data.checking import near_duplicates
from modeling_miniclip.data.checking.check import check, expected_false_negatives, quick_check
from modeling_miniclip.data.checking.find_problems import CHECKS, looks_like_data
from modeling_miniclip.data.checking.near_duplicates import inspect_image
from modeling_miniclip.data.problems import KINDS
from modeling_miniclip.data.scenes import build_scenes
from modeling_miniclip.data.tables import row_blocks
from tests.helpers.shards import write_tar

NAMES = [f"{i}.png" for i in range(26)]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 26 images of smooth noise. Read-only."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for name in NAMES:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
        coarse.resize((90, 80), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture
def good(noise: Path, tmp_path: Path) -> Path:
    """A valid CSV with 26 images of noise and two captions for each."""
    shutil.copytree(noise, tmp_path / "Images")
    lines = [f"{name},{word} number {name[:-4]}" for name in NAMES for word in ("first", "second")]
    path = tmp_path / "captions.csv"
    path.write_text("\n".join(["image,caption", *lines]) + "\n")
    return path


def append(path: Path, line: str | bytes) -> int:
    """Add a row and return its number."""
    data = path.read_bytes() + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    path.write_bytes(data)
    return data.count(b"\n")


def found(path: Path, **options) -> list[tuple[str, str, int | None]]:
    problems = check(str(path), num_workers=0, validation_fraction=0.5, batch_size=8, **options).problems
    return [(problem.kind, Path(problem.file).name, problem.row) for problem in problems]


def test_valid_data_has_no_problems(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found(good) == []
    argv = ["check", str(good), "--validation_fraction=0.5", "--batch_size=8", "--num_workers=2"]
    assert cli(argv) == 0
    assert "no problems found" in capsys.readouterr().out


ROWS: dict[str, tuple[str | bytes, str]] = {
    "not utf-8": ("0.png,caf\u00e9".encode("latin-1"), "encoding"),
    "open quotation mark": ('0.png,"open', "quotes"),
    "one field": ("0.png", "fields"),
    "three fields": ("0.png,red, green", "fields"),
    "no name": (" ,words", "no-name"),
    "empty caption": ("0.png,  ", "empty-caption"),
    "long caption": ("0.png," + "word " * 300, "long-caption"),
    "control characters": ("0.png,red\x1b[2J", "odd-caption"),
    "null byte": ("0.png,re\x00d", "odd-caption"),
    "Python list": ("0.png,\"['red', 'a red one']\"", "data-caption"),
    "JSON list": ('0.png,"[""red"", ""a red one""]"', "data-caption"),
    "JSON object": ('0.png,"{""raw"": ""red""}"', "data-caption"),
    "missing value": ("0.png,NaN", "data-caption"),
    "twice": ("0.png,first number 0", "duplicate-caption"),
    "missing": ("none.png,words", "missing"),
    "parent folder": ("../captions.csv,words", "outside"),
    "absolute path": ("/etc/hostname,words", "outside"),
    "null byte in the name": ("a\x00.png,words", "missing"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_found_and_later_ones_read(good: Path, case: str) -> None:
    line, kind = ROWS[case]
    row = append(good, line)
    last = append(good, "last.png,words")
    assert sorted(found(good)) == sorted([(kind, "captions.csv", row), ("missing", "captions.csv", last)])


def gigantic(path: Path) -> None:
    header = Image.new("1", (1, 1))
    header.save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (20000).to_bytes(4, "big") * 2  # of PNG's header, whose checksum must then be fixed
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_bytes(b"<html>"), "undecodable"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:300]), "undecodable"),
    "gigantic": (gigantic, "huge"),
    "gone": (lambda path: path.unlink(), "missing"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "missing"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_found_at_its_first_row(good: Path, case: str) -> None:
    FILES[case][0](good.parent / "Images" / "5.png")
    assert found(good) == [(FILES[case][1], "captions.csv", 12)]


def test_only_links_that_leave_the_folder_are_problems(good: Path, tmp_path: Path) -> None:
    images = good.parent / "Images"
    (images / "5.png").rename(tmp_path / "elsewhere.png")
    (images / "5.png").symlink_to(tmp_path / "elsewhere.png")
    (images / "6.png").rename(images / "other.png")
    (images / "6.png").symlink_to("other.png")
    kinds = {"outside", "no-captions"}  # other.png has no row
    assert {kind for kind, *_ in found(good)} == kinds
    assert {kind for kind, *_ in found(good, allow_outside_images=True)} == {"no-captions"}


def test_copies_are_found_within_and_across_splits(good: Path) -> None:
    images = good.parent / "Images"
    splits = load_captions(good, validation_fraction=0.5)
    train, validation = splits["train"]["image_id"], splits["validation"]["image_id"]
    (images / train[1]).write_bytes((images / train[0]).read_bytes())
    with Image.open(images / train[2]) as image:
        image.resize((180, 160), Image.Resampling.BICUBIC).save(images / validation[0])
    kinds = [kind for kind, *_ in found(good)]
    assert sorted(kinds) == ["duplicate-image", "two-splits"]


def test_different_pictures_are_not_copies(good: Path) -> None:
    images = good.parent / "Images"
    Image.new("RGB", (30, 30), "red").save(images / "0.png")
    Image.new("RGB", (30, 30), "blue").save(images / "1.png")
    with Image.open(images / "2.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(images / "3.png")
        image.filter(ImageFilter.GaussianBlur(1)).rotate(90, expand=True).save(images / "4.png")
    assert found(good) == []


def test_a_missing_header_is_reported_with_a_fix(tmp_path: Path, good: Path) -> None:
    rows = good.read_text().split("\n", 1)[1]
    for text, fix in ((rows, "write a header"), ("image,Caption\n" + rows, "did you mean 'Caption'")):
        good.write_text(text)
        (problem,) = check(str(good)).problems
        assert (problem.kind, problem.row) == ("unusable", 1) and fix in problem.text
    good.write_text("image;caption\n" + rows.replace(",", ";"))
    assert found(good) == [("separator", "captions.csv", 1)]


def test_an_imagefolder_is_checked_file_by_file(good: Path) -> None:
    folder = good.parent / "set"
    folder.mkdir()
    (good.parent / "Images").rename(folder / "train")
    rows = good.read_text().replace("image,", "file_name,", 1) + "none.png,words\n"
    (folder / "train" / "metadata.csv").write_text(rows)
    (folder / "train" / "5.png").write_bytes(b"")
    (folder / "train" / "6.png").write_bytes(b"broken")
    assert sorted(found(folder)) == [
        ("empty", "metadata.csv", 12), ("missing", "metadata.csv", 54), ("undecodable", "metadata.csv", 14)
    ]  # fmt: skip


def test_split_files_and_splits_are_checked(good: Path) -> None:
    (good.parent / "train.txt").write_text("\n".join([*NAMES[:7], "ghost.png"]) + "\n")
    (good.parent / "validation.txt").write_text("\n".join([*NAMES[6:20]]) + "\n")
    assert sorted(found(good), key=str) == [
        ("no-captions", "train.txt", 8), ("small-split", "captions.csv", None), ("two-splits", "validation.txt", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "caption", ["[sic] a dog", "(a dog) and 'a cat'", "{dog}", "none of them", "a", "Nantes", "[a dog]", "'a', 'b'"]
)
def test_odd_texts_are_still_captions(caption: str) -> None:
    assert looks_like_data(caption) is None


def with_split_column(path: Path) -> None:
    """Put the first 14 images into train, 11 into validation and one into no split."""
    header, *lines = path.read_text().splitlines()
    split_of = dict(zip(NAMES, ["train"] * 14 + ["dev"] * 11 + [""], strict=True))
    path.write_text("\n".join([f"{header},Split", *(f"{line},{split_of[line.split(',')[0]]}" for line in lines)]))


def test_a_split_column_is_honoured_and_copied(good: Path) -> None:
    with_split_column(good)
    append(good, "")
    last = append(good, "none.png,words,train")
    fixed = good.parent / "fixed.csv"
    report = check(str(good), decode=False, batch_size=8, fix=str(fixed))
    assert [(problem.kind, problem.row) for problem in report.problems] == [("missing", last)]
    sizes = {"images_in_train": 15, "images_in_validation": 11, "images_in_none": 1}  # with the missing one
    assert sizes.items() <= report.figures.items()
    copy = check(str(fixed), num_workers=0, batch_size=8)
    assert copy.problems == [] and (sizes | {"images_in_train": 14}).items() <= copy.figures.items()


def test_shards_are_checked_like_files(good: Path) -> None:
    content = {name: (good.parent / "Images" / name).read_bytes() for name in NAMES}
    content |= {"7.png": content["6.png"], "8.png": b"broken", "9.png": b""}
    members = [member for name in NAMES for member in ((name, content[name]), (name.replace("png", "txt"), b"a\nb"))]
    del members[-1]
    shard = good.parent / "0.tar"
    write_tar(shard, members)
    assert found(shard) == [
        ("empty", "0.tar", None), ("left-out", "0.tar", None), ("undecodable", "0.tar", None),
        ("two-splits", "0.tar", None),
    ]  # fmt: skip
    report = check(str(shard), num_workers=0)
    assert [problem.text for problem in report.problems if problem.kind == "duplicate-image"] == [
        "image '0.tar/7' is byte for byte '0.tar/6'; move its captions to that one"
    ]
    shard.write_bytes(shard.read_bytes()[:20_000])
    assert "damaged-shard" in [kind for kind, *_ in found(shard)]
    with pytest.raises(UsageError, match="--fix: .*0.tar is not a local caption file or folder"):
        check(str(shard), decode=False, fix=str(good.parent / "fixed.csv"))


def test_validation_images_of_another_file_are_checked(good: Path) -> None:
    with_split_column(good)
    (good.parent / "val.csv").write_text("image,caption\n0.png,a\n" + "".join(f"{name},b\n" for name in NAMES[14:]))
    report = check(str(good), num_workers=0, batch_size=8, validation_dataset=str(good.parent / "val.csv"))
    sizes = {"images_in_train": 14, "images_in_validation": 13, "images_in_none": 12}
    assert sizes.items() <= report.figures.items()
    (leak,) = report.problems
    assert leak.kind == "two-splits" and leak.text.startswith("image '0.png of ") and "of train" in leak.text
    both = [str(good.parent / "val.csv"), str(good.parent / "other.csv")]
    (good.parent / "other.csv").write_text("image,caption\n1.png,a\n2.png,b\n")
    report = check(str(good), num_workers=0, batch_size=8, validation_dataset=both)
    assert report.figures["images_in_validation"] == 15 and len(report.problems) == 3
    with pytest.raises(UsageError, match="--fix writes a copy of one dataset"):
        check(str(good), validation_dataset="scenes", fix=str(good.parent / "fixed.csv"))
    with pytest.raises(UsageError, match="--validation_fraction must be between 0 and 1, not 1"):
        check(str(good), validation_fraction=1)


def test_a_fixed_copy_has_no_problems(good: Path, tmp_path: Path) -> None:
    images = good.parent / "Images"
    for line, _ in ROWS.values():
        append(good, line)
    (images / "5.png").write_bytes(b"")
    (images / "6.png").write_bytes(b"broken")
    (images / "8.png").write_bytes((images / "7.png").read_bytes())
    before = good.read_bytes()
    fixed = tmp_path / "fixed.csv"
    argv = ["check", str(good), "--num_workers=0", "--batch_size=8", "--fix", str(fixed)]
    assert cli(argv) == 1 and good.read_bytes() == before
    rows = list(csv.reader(fixed.open(encoding="utf-8")))[1:]
    assert {name for name, _ in rows} == set(NAMES) - {"5.png", "6.png", "8.png"}
    assert [text for name, text in rows if name == "7.png"] == [
        "first number 7", "second number 7", "first number 8", "second number 8"
    ]  # fmt: skip
    assert {kind for kind, *_ in found(fixed)} <= {"long-caption", "odd-caption", "data-caption", "no-captions"}
    report = (tmp_path / "fixed.report.txt").read_text()
    assert "row 12" in report and "\x1b" not in report
    assert cli(argv) == 2  # nothing is overwritten
    for name in ("fixed.txt", "nowhere/fixed.csv"):
        with pytest.raises(UsageError, match="--fix"):
            check(str(good), fix=str(tmp_path / name))


def test_json_has_every_problem(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = append(good, "none.png,words")
    assert cli(["check", str(good), "--quick", "--json", "--batch_size=8", "--validation_fraction=0.5"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"missing": 1} and [p["row"] for p in report["problems"]] == [row]
    assert report["figures"]["images_in_train"] + report["figures"]["images_in_validation"] == 27


def test_a_missing_dataset_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["check", str(tmp_path / "nowhere.csv")]) == 1
    assert "nowhere.csv: no such file or folder" in capsys.readouterr().err


def test_the_terminal_gets_no_control_characters(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("\x1b[31mred\u202e.png,words", "0.png,red\x1b[2J"):
        append(good, line)
    assert cli(["check", str(good), "--quick"]) == 1
    output = capsys.readouterr().out
    assert "\\x1b[31mred\\u202e.png" in output and not any(c in output for c in "\x1b\u202e")


def test_the_text_report_shows_a_limited_number_of_problems(good: Path) -> None:
    for i in range(3):
        append(good, f"none{i}.png,words")
    report = check(str(good), decode=False)
    lines = report.as_text(1).split("\n")
    assert [line.count("none") for line in lines[:2]] == [1, 0]
    assert lines[1] == f"... and 2 more {KINDS['missing']} (--json lists them)"
    assert report.as_text(None).count("none") == 3


def test_truncated_captions_are_counted(good: Path, tiny_towers: tuple[Path, Path]) -> None:
    append(good, "0.png," + "dog " * 99)
    append(good, "0.png,dog")
    figures = check(str(good), decode=False, tokenizer=str(tiny_towers[1])).figures
    assert figures["captions_cut_to_24_tokens"] == 1
    with pytest.raises(ModelError, match="--tokenizer .*Images: no text tower"):
        check(str(good), decode=False, tokenizer=str(good.parent / "Images"))


def test_the_built_in_scenes_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_scenes, "__defaults__", (40, 12, 32, 0))
    report = check("scenes", num_workers=0)
    assert report.problems == []
    assert report.figures["images_in_train"] == 40 and report.figures["captions"] == 52 * 5
    with pytest.raises(UsageError, match="--fix: scenes is not a local"):
        check("scenes", decode=False, fix=str(tmp_path / "fixed.csv"))
    with pytest.raises(UsageError, match="--batch_size must be at least 1"):
        check("scenes", batch_size=0)


def die(content: object) -> None:
    os._exit(1)


def test_a_dead_decoder_process_is_explained(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "inspect_image", die)
    with pytest.raises(MiniClipError, match="a process that decodes images died.*--num_workers 0"):
        check(str(good), num_workers=1)


def test_expected_false_negatives_match_drawn_batches() -> None:
    captions = [["A dog.", "two"], ["a  dog"], ["two", "two", "three"], ["four"], ["a dog", "four"]]
    rng, total, draws = Random(0), 0, 20000
    for _ in range(draws):
        batch = [rng.choice(texts).lower().replace("  ", " ").rstrip(".") for texts in rng.sample(captions, 3)]
        total += sum(batch[i] == batch[j] for i in range(3) for j in range(3) if i != j)
    assert expected_false_negatives(captions, 3) == pytest.approx(total / draws, rel=0.05)
    assert expected_false_negatives([["a"]], 8) == 0
    assert expected_false_negatives([["a"]] * 4, 2, ["x", "x", "y", None]) == pytest.approx(10 / 12 * 2)


def test_a_run_starts_with_a_summary_of_problems(good: Path) -> None:
    append(good, "0.png,first number 0")
    lines = quick_check(load_captions(good, validation_fraction=0.5), "captions.csv", 32)
    assert [line.split(";")[0] for line in lines] == [
        f"1 {KINDS['duplicate-caption']}", f"1 {KINDS['small-split']}"
    ]  # fmt: skip
    assert len(CHECKS) == 3


def test_summary_of_a_large_set_names_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"image_id": [f"{i}.png" for i in range(50)], "captions": [["twice", "twice"]] * 50}
    splits = {"train": Dataset.from_dict(rows), "validation": Dataset.from_dict(rows).select(range(11))}
    (line,) = quick_check(splits, "any", 32)  # type: ignore[arg-type]
    assert line == f"61 {KINDS['duplicate-caption']}; `miniclip check` lists them"
    monkeypatch.setattr(row_blocks, "MOST_CAPTIONS", 40)
    lines = quick_check(splits, "any", 60)  # type: ignore[arg-type]
    assert lines == [  # 20 training images, and all 11 of validation
        f"31 {KINDS['duplicate-caption']} among 62 sampled captions; `miniclip check` lists them",
        f"1 {KINDS['small-split']}; `miniclip check` lists them",
    ]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_images_of_any_mode_can_be_inspected(tmp_path: Path, mode: str) -> None:
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "F": "tiff"}.get(mode, "png")
    Image.new(mode, (20, 20)).save(tmp_path / f"a.{suffix}")
    assert inspect_image(str(tmp_path / f"a.{suffix}")).kind is None


@pytest.mark.slow
def test_flickr8k_has_only_nine_duplicate_captions(shared: Path) -> None:
    report = check(str(shared / "flickr8k"), decode=False)
    assert report.counts == {"duplicate-caption": 9}
