"""`miniclip export --onnx` and torch.export: the same values as the model, free axes, nothing half-written."""

import copy
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_miniclip import MiniClipModel, MiniClipProcessor, encode_images, encode_texts, export, load_captions
from modeling_miniclip.cli import build_parser, cli
from modeling_miniclip.data.scenes import describe_scene, sample_scenes
from modeling_miniclip.errors import MiniClipError, ModelError, UsageError
from modeling_miniclip.evaluation.metrics import retrieval_metrics
from modeling_miniclip.hub import onnx_export as module
from modeling_miniclip.hub import onnx_quantize
from modeling_miniclip.hub.onnx_export import ENCODERS, LIBRARIES, export_onnx, write_encoders
from modeling_miniclip.hub.onnx_quantize import format_quantization, quantize_folder
from modeling_miniclip.inference.encode import open_image
from modeling_miniclip.processing_miniclip import image_processor_from_timm
from modeling_miniclip.training.towers.create_model import train_tokenizer
from tests.helpers.runs import ROOT, write_scene_folder
from tests.helpers.session import shared_once
from tests.helpers.towers import CAPTIONS, PIXELS, TEXT, VISION, tiny_config, tiny_model, tiny_processor

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in LIBRARIES), reason=f"pip install {' '.join(LIBRARIES)}"
)
FILES = {
    "equality.json", "example.py", "image_encoder.onnx", "model.json", "preprocessor_config.json",
    "text_encoder.onnx", "tokenizer.json",
}  # fmt: skip
LIMIT = 24  # tokens of the tiny text towers


def save_export(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An export whose images are cropped with an odd margin; `settings` are of the image processor.

    Its towers have hardly any layers, since torch.onnx takes up to a second per layer. The slow tests export more.
    """
    torch.manual_seed(seed)
    fields = {"text_pooling": "mean", "projection_depth": 1, "logit_scale_init_value": 3.0, "loss_type": "sigmoid"}
    config = tiny_config("vit", "distilbert", **fields)
    config.vision_config.model_args = {**config.vision_config.model_args, "depth": 1}
    config.text_config.n_layers = 0
    config.vision_config.pretrained_cfg = {**config.vision_config.pretrained_cfg, "crop_pct": 0.85}
    tokenizer = train_tokenizer([describe_scene(scene, Random(0)) for scene in sample_scenes(200, seed=3)], 200)
    tokenizer.model_max_length = LIMIT
    processor = MiniClipProcessor(image_processor_from_timm(config.vision_config), tokenizer)
    processor.image_processor = type(processor.image_processor)(**(processor.image_processor.to_dict() | settings))
    return export(MiniClipModel(config).eval(), processor, folder)


@pytest.fixture(scope="session")
def exported(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with `export`, `scenes/captions.csv` and, made from them, `onnx`. Read-only."""

    def build(folder: Path) -> None:
        save_export(folder / "export")
        csv_file = write_scene_folder(folder / "scenes", 120)
        export_onnx(str(folder / "export"), folder / "onnx", csv_file, 200, 1e-4)

    yield from shared_once(request, "onnx", build)


@pytest.fixture
def ready_encoders(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX files of `exported` instead of a new conversion, which takes seconds."""

    def copied(folder: Path, *_: Any) -> None:
        for name in ENCODERS:
            shutil.copy(exported / "onnx" / f"{name}.onnx", folder)

    monkeypatch.setattr(module, "write_encoders", copied)


def odd_pictures(folder: Path) -> list[Path]:
    """Files as users have them: tall, with transparency, rotated by EXIF, 16 bits of grey, and tiny."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 43, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(noise[..., :3]).save(folder / "tall.png")
    Image.fromarray(noise).save(folder / "transparent.png")
    Image.fromarray(noise[..., :3]).resize((90, 50)).save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "grey16.png")
    Image.fromarray(noise[:3, :20, :3]).save(folder / "tiny.png")
    return sorted(folder.glob("*.*g"))


def run_example(folder: Path, argv: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run `example.py` where PyTorch and everything around it cannot be imported."""
    code = f"""
import runpy, sys
for name in ("torch", "torchvision", "transformers", "timm", "modeling_miniclip"):
    sys.modules[name] = None
sys.argv = ["example.py", *{argv!r}]
runpy.run_path({str(folder / "example.py")!r}, run_name="__main__")
"""
    return subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


@needs_onnx
def test_the_example_gives_the_models_logits_without_pytorch(exported: Path, tmp_path: Path) -> None:
    paths = odd_pictures(tmp_path)
    texts = ["a red circle", "a small blue square left of it, " * 10, "zebra"]
    done = run_example(exported / "onnx", [*map(str, paths), "--text", *texts])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:: len(texts) + 1] == [str(path) for path in paths]
    rows = [line.split(maxsplit=1) for line in lines if line not in map(str, paths)]
    assert [text.strip() for _, text in rows] == [text.strip() for text in texts] * len(paths)
    model = MiniClipModel.from_pretrained(exported / "export")
    processor = MiniClipProcessor.from_pretrained(exported / "export")
    with pytest.warns(UserWarning, match="1 of 3 captions were truncated"):
        inputs = processor(images=[open_image(path) for path in paths], text=texts, return_tensors="pt")
    logits = model(**inputs).logits_per_image
    scores = torch.tensor([float(score) for score, _ in rows]).view(len(paths), len(texts))
    torch.testing.assert_close(scores, logits, atol=2e-4, rtol=0)
    assert logits.std(dim=0).min() > 0.01 and logits.std(dim=1).min() > 0.01  # or any answer would be right


@needs_onnx
def test_onnx_equals_pytorch_for_any_batch_and_length(exported: Path) -> None:
    from onnxruntime import InferenceSession

    model = MiniClipModel.from_pretrained(exported / "export")
    session = {name: InferenceSession(str(exported / "onnx" / f"{name}.onnx")) for name in ENCODERS}
    shapes = {axis.name: axis.shape for s in session.values() for axis in (*s.get_inputs(), *s.get_outputs())}
    assert shapes == {
        "pixel_values": ["batch", 3, PIXELS, PIXELS],
        "image_embeds": ["batch", 16],
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
        "text_embeds": ["batch", 16],
    }
    for batch in (1, 2, 7):
        pixels = torch.randn(batch, 3, PIXELS, PIXELS)
        found = session["image_encoder"].run(None, {"pixel_values": pixels.numpy()})[0]
        np.testing.assert_allclose(found, model(pixel_values=pixels).image_embeds.detach(), atol=1e-6)
    for batch, length in ((1, 1), (5, 1), (1, LIMIT), (4, 9)):
        ids = torch.randint(5, 150, (batch, length))
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
        found = session["text_encoder"].run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        expected = model(input_ids=ids, attention_mask=mask).text_embeds.detach()
        np.testing.assert_allclose(found, expected, atol=1e-6)


@needs_onnx
def test_report_has_the_recall_of_both_runtimes(exported: Path) -> None:
    report = json.loads((exported / "onnx" / "equality.json").read_text())
    rows = load_captions(exported / "scenes" / "captions.csv")["validation"]
    texts = [caption for row in rows for caption in row["captions"]]
    image_of_text = [index for index, row in enumerate(rows) for _ in row["captions"]]
    model = MiniClipModel.from_pretrained(exported / "export")
    with warnings.catch_warnings(action="ignore"):  # of captions that are cut
        embeds = encode_images(model, rows, progress=False), encode_texts(model, texts, progress=False)
    assert report["pytorch"] == pytest.approx(retrieval_metrics(*embeds, image_of_text))
    runtime = runpy.run_path(str(exported / "onnx" / "example.py"))["MiniClip"](exported / "onnx")
    onnx_embeds = runtime.encode_images([row["image"] for row in rows]), runtime.encode_texts(texts)
    expected = retrieval_metrics(*map(torch.from_numpy, onnx_embeds), image_of_text)
    assert report["onnxruntime"] == pytest.approx(expected)
    assert (report["images"], report["captions"]) == (len(rows), len(texts)) == (12, 60)
    assert report["text_lengths"] == [1, LIMIT] and report["batch_sizes"] == [1, 32]
    assert set(report["largest_difference"]) == {"image_embeds", "text_embeds"}
    assert all(0 < value < 1e-5 for value in report["largest_difference"].values())


@needs_onnx
def test_onnx_folder_is_complete_and_names_no_local_path(exported: Path) -> None:
    assert {path.name for path in (exported / "onnx").iterdir()} == FILES
    for path in (exported / "onnx").iterdir():
        content = path.read_bytes()
        for place in (str(ROOT), str(exported), str(Path(torch.__file__).parent)):
            assert place.encode() not in content, f"{path.name} names {place}"
    settings = json.loads((exported / "onnx" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 37} and "auto_map" not in settings
    logits = json.loads((exported / "onnx" / "model.json").read_text())
    assert logits == {"logit_scale": pytest.approx(np.exp(3.0)), "logit_bias": -10.0, "empty_text": ""}


@needs_onnx
def test_the_example_is_short_and_lacks_no_name(exported: Path) -> None:
    example = exported / "onnx" / "example.py"
    model, pictures = example.read_text().split("# --- decode any picture ")
    assert len(model.splitlines()) <= 100 and len(pictures.splitlines()) <= 190
    argv = ["ruff", "check", "--isolated", "--select", "F,E7,E9", str(example)]
    done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_onnx
def test_files_that_differ_from_pytorch_never_appear(exported: Path, tmp_path: Path, ready_encoders: None) -> None:
    other = save_export(tmp_path / "other", seed=1)  # its files will be those of the first model
    with pytest.raises(ModelError, match=r"differ from PyTorch by \d.*more than --tolerance 1.0e-04"):
        export_onnx(str(other), tmp_path / "onnx", exported / "scenes" / "captions.csv", 200, 1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@needs_onnx
def test_processor_unlike_the_example_raises(exported: Path, tmp_path: Path, ready_encoders: None) -> None:
    other = save_export(tmp_path / "other", do_normalize=False)
    with pytest.raises(ModelError, match="does not prepare pixel_values as CLIPImageProcessorPil"):
        export_onnx(str(other), tmp_path / "onnx", exported / "scenes" / "captions.csv", 200, 1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@needs_onnx
def test_the_command_prints_differences_recall_and_files(
    exported: Path, tmp_path: Path, ready_encoders: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source, csv_file = str(exported / "export"), str(exported / "scenes" / "captions.csv")
    assert cli(["export", source, "--onnx", str(tmp_path / "onnx"), "--dataset", csv_file, "--images", "3"]) == 0
    printed = capsys.readouterr().out
    assert "compared on 3 images and 15 captions, batches of 1 to 15, texts of 1 to 24 tokens" in printed
    assert re.search(r"image_embeds \d\.\de-\d\d, text_embeds \d\.\de-\d\d", printed)
    report = json.loads((tmp_path / "onnx" / "equality.json").read_text())
    rsum = report["pytorch"]["rsum"], report["onnxruntime"]["rsum"]
    (line,) = [line.split() for line in printed.splitlines() if line.startswith("rsum")]
    assert line == ["rsum", f"{rsum[0]:.2f}", f"{rsum[1]:.2f}", f"{rsum[1] - rsum[0]:+.2f}"]
    assert all(name in printed for name in FILES)


def test_an_error_of_usage_comes_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "load_captions", lambda _: pytest.fail("data were loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "config.json").write_text("{}")
    new = tmp_path / "new"
    with pytest.raises(UsageError, match="full: there is already something here, and nothing is overwritten"):
        export_onnx("export", tmp_path / "full", "scenes", 200, 1e-4)
    with pytest.raises(UsageError, match="--images must be at least 1, not 0"):
        export_onnx("export", new, "scenes", 0, 1e-4)
    with pytest.raises(ModelError, match="EXPORT ./nowhere: no such folder"):
        export_onnx("./nowhere", new, "scenes", 200, 1e-4)
    with pytest.raises(ModelError, match="this folder has no config.json; did you mean .*run/export"):
        export_onnx(str(tmp_path / "run"), new, "scenes", 200, 1e-4)
    assert not new.exists() and (tmp_path / "full" / "mine.txt").exists()


def test_missing_library_error_has_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(MiniClipError, match="--onnx needs onnxscript: pip install onnx onnxscript onnxruntime"):
        export_onnx("export", tmp_path / "new", "scenes", 200, 1e-4)


def test_export_commands_of_the_guides_parse() -> None:
    guides = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    lines = re.findall(r"^miniclip export.*$", guides, re.MULTILINE)
    assert lines
    for line in lines:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


class Undecided(torch.nn.Module):
    """Does one thing or another, by the values that it gets: nothing that a graph can express."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, :16] if hidden.sum() > 0 else -hidden[:, :16]


@needs_onnx
def test_tower_that_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.onnx.OnnxExporterError("failed") from ValueError("no\nsuch operation")

    monkeypatch.setattr(torch.onnx, "export", fail)
    rows = [{"image": Image.new("RGB", (40, 40)), "captions": CAPTIONS[0]}]
    with pytest.raises(ModelError, match="torch.onnx cannot export the image encoder: no such operation$"):
        write_encoders(tmp_path, tiny_model(), tiny_processor(), rows)


def load_runtime(folder: Path) -> Any:
    return runpy.run_path(str(folder / "example.py"))["MiniClip"](folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@needs_onnx
def test_int8_files_are_smaller_and_have_the_reported_recall(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported / "onnx", folder)
    splits = load_captions(exported / "scenes" / "captions.csv")
    rows, before = splits["validation"], contents(folder)
    report = quantize_folder(folder, load_runtime(folder), rows, splits["train"], 100.0)
    after = contents(folder)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {f"{name}.onnx" for name in ENCODERS}
    for name in ENCODERS:
        assert report["int8"][f"{name}_megabytes"] == len(after[f"{name}.onnx"]) / 1e6
        assert report["float32"][f"{name}_megabytes"] == len(before[f"{name}.onnx"]) / 1e6
    texts = [caption for captions in rows["captions"] for caption in captions]
    image_of_text = [index for index, captions in enumerate(rows["captions"]) for _ in captions]
    floats, ints = load_runtime(exported / "onnx"), load_runtime(folder)
    pictures = [row["image"] for row in rows]
    for side, runtime in (("float32", floats), ("int8", ints)):
        texts_in_batches = np.concatenate([runtime.encode_texts(texts[i : i + 32]) for i in range(0, len(texts), 32)])
        embeds = torch.from_numpy(runtime.encode_images(pictures)), torch.from_numpy(texts_in_batches)
        expected = retrieval_metrics(*embeds, image_of_text)
        assert {name: report[side][name] for name in expected} == pytest.approx(expected)
    assert report["calibration_images"] == len(splits["train"])
    for encode, items in (("encode_images", pictures), ("encode_texts", texts[:7])):
        int8, float32 = getattr(ints, encode)(items), getattr(floats, encode)(items)
        assert 0.9 < (int8 * float32).sum(axis=1).min() < 0.9999999  # close, and not the same numbers


@needs_onnx
def test_the_image_encoder_is_calibrated_on_the_images_it_gets(
    exported: Path,
    tmp_path: Path,
) -> None:
    splits = load_captions(exported / "scenes" / "captions.csv")
    black = splits["train"].map(lambda row: {"image": row["image"].point(lambda value: 0)})
    cosines = []
    for name, calibration in (("right", splits["train"]), ("wrong", black)):
        shutil.copytree(exported / "onnx", tmp_path / name)
        quantize_folder(tmp_path / name, load_runtime(tmp_path / name), splits["validation"], calibration, 100.0)
        pictures = [row["image"] for row in splits["validation"]]
        pairs = (load_runtime(folder).encode_images(pictures) for folder in (exported / "onnx", tmp_path / name))
        cosines.append(float((next(pairs) * next(pairs)).sum(axis=1).mean()))
    assert cosines[0] > cosines[1] + 0.01


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            98.9,
            r"rsum falls from 100.0 to 98.9, .* more than --tolerance_rsum 1; nothing was .* by --tolerance_rsum 2",
        ),
        (float("nan"), "rsum is nan; nothing was written. Leave out --quantize$"),
    ],
)
def test_lost_recall_is_an_error(after: float, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        onnx_quantize._check(100.0, after, 1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--onnx", "new", "--quantize", "int8"], "--quantize needs --dataset"),
        (["--onnx", "new", "--tolerance_rsum", "5"], "--tolerance_rsum needs --quantize int8"),
        (["--code", "new", "--quantize", "int8"], "--quantize belongs to --onnx"),
    ],
)
def test_flags_of_int8_that_would_be_ignored(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["export", "no-model", *flags]) == 2
    assert message in capsys.readouterr().err


def test_images_for_the_ranges_come_from_everywhere() -> None:
    assert [onnx_quantize._spread(rows) for rows in (1, 5)] == [[0], [0, 1, 2, 3, 4]]
    found = onnx_quantize._spread(1280)
    assert len(set(found)) == 128 and (found[0], found[-1]) == (0, 1279)
    assert {second - first for first, second in zip(found, found[1:], strict=False)} == {10, 11}


def test_recall_within_the_tolerance_is_accepted() -> None:
    onnx_quantize._check(100.0, 99.0, 1.0)
    onnx_quantize._check(100.0, 105.0, 0.0)


@needs_onnx
def test_nothing_is_written_where_recall_is_lost(
    exported: Path,
    tmp_path: Path,
    ready_encoders: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics = iter([{"rsum": 200.0}, {"rsum": 190.0}])
    monkeypatch.setattr(onnx_quantize, "retrieval_metrics", lambda *_: next(metrics))
    argv = ["export", str(exported / "export"), "--onnx", str(tmp_path / "onnx"), "--quantize", "int8"]
    with pytest.raises(ModelError, match="from 200.0 to 190.0, by 5.0 %, .*--tolerance_rsum 5"):
        export_onnx(argv[1], tmp_path / "onnx", exported / "scenes" / "captions.csv", 3, 1e-4, quantize=True)
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_the_command_prints_one_table(
    exported: Path,
    tmp_path: Path,
    ready_encoders: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["export", str(exported / "export"), "--onnx", str(tmp_path / "onnx"), "--images", "12"]
    more = ["--dataset", str(exported / "scenes" / "captions.csv"), "--quantize", "int8", "--tolerance_rsum", "100"]
    assert cli([*argv, *more]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "onnx" / "quantization.json").read_text())
    assert format_quantization(report) in printed
    rows = {words[0]: words[1:] for line in printed.splitlines() if (words := line.split()) and len(words) == 4}
    for name in ("image_encoder_megabytes", "images_per_second", "texts_per_second"):
        before, after = report["float32"][name], report["int8"][name]
        assert rows[name] == [f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}x"]
    assert rows["image_to_text_R@1"][1] == f"{report['int8']['image_to_text_R@1']:.2f}"


@pytest.mark.parametrize("value", [-1.0, 101.0, float("nan")])
def test_a_tolerance_that_is_no_percentage_comes_before_any_work(tmp_path: Path, value: float) -> None:
    with pytest.raises(UsageError, match="--tolerance_rsum must be a percentage from 0 to 100, not"):
        export_onnx("export", tmp_path / "new", "scenes", 200, 1e-4, True, value)


@needs_onnx
def test_an_encoder_that_cannot_be_quantised_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text_encoder.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="cannot quantise the text encoder: "):
        onnx_quantize._quantize(tmp_path / "text_encoder.onnx", tmp_path / "int8.onnx", onnx_quantize._dynamic)
    assert [path.name for path in tmp_path.iterdir()] == ["text_encoder.onnx"]


@pytest.mark.slow
@needs_onnx
@pytest.mark.skipif(TORCH < (2, 9), reason="torch 2.8 writes a draft: only the comparison with the model finds it")
def test_tower_that_onnx_cannot_express_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.visual_projection = Undecided()
    rows = [{"image": Image.new("RGB", (40, 40)), "captions": CAPTIONS[0]}]
    with pytest.raises(ModelError, match="torch.onnx cannot export the image encoder: "):
        write_encoders(tmp_path, model, tiny_processor(), rows)


@pytest.mark.slow
@pytest.mark.parametrize(("vision", "text"), [("resnet", "distilbert"), ("vit", "modernbert")])
def test_torch_export_handles_model_and_each_tower(vision: str, text: str) -> None:
    model = tiny_model(vision, text, text_pooling="mean")
    images, texts = torch.export.Dim("images", min=1), torch.export.Dim("texts", min=1)
    length = torch.export.Dim("length", min=1, max=LIMIT)
    axes = {
        "pixel_values": {0: images},
        "input_ids": {0: texts, 1: length},
        "attention_mask": {0: texts, 1: length},
    }

    def sample(num_images: int, num_texts: int, num_tokens: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(num_tokens) < torch.randint(1, num_tokens + 1, (num_texts, 1))).long()
        return {
            "pixel_values": torch.randn(num_images, 3, PIXELS, PIXELS),
            "input_ids": torch.randint(5, 150, (num_texts, num_tokens)),
            "attention_mask": mask,
        }

    for names in (["pixel_values"], ["input_ids", "attention_mask"], list(axes)):
        with torch.no_grad():
            program = torch.export.export(
                model,
                (),
                {name: sample(2, 3, 7)[name] for name in names},
                dynamic_shapes={name: axes[name] for name in names},
            ).module()
            for sizes in ((1, 1, 1), (4, 1, LIMIT), (1, 5, 9)):
                inputs = {name: values for name, values in sample(*sizes).items() if name in names}
                found, expected = program(**inputs), model(**inputs)
                assert found.keys() == expected.keys()
                for name in expected.keys() & {"image_embeds", "text_embeds", "logits_per_image"}:
                    torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def encoders_agree(model: MiniClipModel, processor: MiniClipProcessor, folder: Path, atol: float = 2e-6) -> None:
    """Write both encoders and hold them against PyTorch."""
    from onnxruntime import InferenceSession

    folder.mkdir(exist_ok=True)
    rows = [{"image": Image.new("RGB", (40, 40)), "captions": CAPTIONS[0]}]
    before = copy.deepcopy(model.state_dict())
    write_encoders(folder, model, processor, rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    crop = processor.image_processor.crop_size
    for batch, length in ((1, 1), (3, 11), (2, LIMIT)):
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
        inputs = {
            "image_encoder": {"pixel_values": torch.randn(batch, 3, crop["height"], crop["width"])},
            "text_encoder": {"input_ids": torch.randint(5, 150, (batch, length)), "attention_mask": mask},
        }
        for name, encoder in ENCODERS.items():
            session = InferenceSession(str(folder / f"{name}.onnx"))
            found = session.run(None, {key: value.numpy() for key, value in inputs[name].items()})[0]
            with torch.no_grad():
                expected = getattr(model(**inputs[name]), encoder.output)
            np.testing.assert_allclose(found, expected, atol=atol)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(("vision", "text"), [(list(VISION)[i % len(VISION)], text) for i, text in enumerate(TEXT)])
def test_every_family_of_towers_can_be_exported(vision: str, text: str, tmp_path: Path) -> None:
    pooling = "mean" if text == "t5" else None
    encoders_agree(tiny_model(vision, text, text_pooling=pooling), tiny_processor(), tmp_path)


@needs_onnx
@pytest.mark.slow
def test_large_weights_go_to_a_separate_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    encoders_agree(tiny_model(), tiny_processor(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.onnx{suffix}" for name in ENCODERS for suffix in ("", ".data")
    }


@needs_onnx
@pytest.mark.slow
def test_real_towers_on_real_photographs(shared: Path, tmp_path: Path) -> None:
    towers = (shared / "weights" / "tf_efficientnet_lite0", shared / "weights" / "all-MiniLM-L6-v2")
    torch.manual_seed(0)
    model = MiniClipModel.from_towers(*towers, text_pooling="mean")
    export(model, MiniClipProcessor.from_towers(*towers), tmp_path / "export")
    report = export_onnx(str(tmp_path / "export"), tmp_path / "onnx", shared / "flickr8k", 40, 1e-5)
    assert (report["images"], report["captions"], report["text_lengths"]) == (40, 200, [1, 512])
    photographs = sorted((shared / "flickr8k" / "Images").glob("*.jpg"))[:2]
    texts = ["a dog in the snow", "a child on stairs"]
    done = run_example(tmp_path / "onnx", [*map(str, photographs), "--text", *texts])
    assert done.returncode == 0, done.stderr
    found = [float(line.split()[0]) for line in done.stdout.splitlines() if not line.endswith(".jpg")]
    embeds = (
        encode_images(model, photographs, MiniClipProcessor.from_pretrained(tmp_path / "export"), progress=False),
        encode_texts(model, texts, MiniClipProcessor.from_pretrained(tmp_path / "export"), progress=False),
    )
    expected = model.inverse_temperature() * embeds[0] @ embeds[1].T
    torch.testing.assert_close(torch.tensor(found), expected.flatten().detach(), atol=2e-4, rtol=0)


@needs_onnx
def test_example_prepares_images_like_the_processor() -> None:
    example: dict[str, Any] = {"__name__": "example", "__file__": "example.py"}
    exec(module.example_source(), example)
    runtime, processor = object.__new__(example["MiniClip"]), tiny_processor()
    runtime.settings = processor.image_processor.to_dict()
    for size in ((50, 40), (3, 20), (1, 30_000)):  # the last one would be resized to 37 x 1.1 million
        image = Image.effect_noise(size, 80)
        expected = processor(images=image, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(runtime.prepare_image(image), expected), size
