"""Write a model as one ONNX file per tower, after comparing it with PyTorch on captioned images."""

import copy
import json
import os
import runpy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from torch import Tensor, nn

from ..data.captions import load_captions
from ..errors import MiniClipError, ModelError, UsageError, one_line
from ..evaluation.metrics import retrieval_metrics
from ..inference.encode import open_image
from ..inference.loading import load_export
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..utils.files import check_new_folder, replaced_folder
from ..utils.resources import PACKAGE
from .onnx_quantize import quantize_folder

Inputs = dict[str, np.ndarray]  # inputs of an encoder by name

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
BATCH_SIZES = (1, 2, 5, 32)  # used in turn by the comparison
LONGEST_TEXT = 1024  # tokens; the comparison uses no longer text, even if the text tower takes one


class ImageEncoder(nn.Module):
    """The image side of a model, with a single output: `pixel_values [B, 3, H, W] -> [B, dim]`, unit norm."""

    def __init__(self, model: MiniClipModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).image_embeds


class TextEncoder(nn.Module):
    """The text side of a model, with a single output: `input_ids, attention_mask [N, L] -> [N, dim]`, unit norm."""

    def __init__(self, model: MiniClipModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).text_embeds


@dataclass(frozen=True)
class Encoder:
    """An ONNX file: the exported module, the dynamic axes of its inputs, and the name of its output."""

    module: type[nn.Module]
    axes: dict[str, dict[int, str]]
    output: str


ENCODERS = {
    "image_encoder": Encoder(ImageEncoder, {"pixel_values": {0: "batch"}}, "image_embeds"),
    "text_encoder": Encoder(
        TextEncoder, {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}, "text_embeds"
    ),
}


def export_onnx(
    source: str,
    folder: str | os.PathLike,
    dataset: str | os.PathLike,
    num_images: int,
    tolerance: float,
    quantize: bool = False,
    tolerance_rsum: float = 1.0,
    **options: Any,
) -> dict[str, Any]:
    """Write a model for onnxruntime: one ONNX file per tower, the files that prepare their inputs, and an example.

    The folder appears complete or not at all, and only if both encoders agree with PyTorch. If asked to, they are
    quantised to int8 then.

    Args:
        source: folder of an exported model, or its repository on the Hub.
        folder: folder to write; must not exist, or be empty.
        dataset: captioned images for the comparison, as in `load_captions`; the validation split is used, if there
            is one.
        num_images: maximum number of images to compare, each with all its captions.
        tolerance: largest accepted difference in a component of an embedding, before quantisation.
        quantize: whether to quantise both encoders to int8, see [`quantize_folder`]. The ranges of the image encoder
            come from the training split, or from the compared images if there is none.
        tolerance_rsum: how far rsum may fall by that, in percent.
        **options: further arguments of `load_captions`.

    Returns:
        The contents of `equality.json`, see [`compare`]; those of `quantization.json`, see [`quantize_folder`], under
        `quantization`.

    Raises:
        ModelError: there is no such model, a tower cannot be exported or quantised, the encoders differ from PyTorch,
            or int8 costs too much recall.
        DataError: the dataset cannot be read.
        MiniClipError: a library is missing.
        UsageError: the folder is not empty, `num_images` is below 1, or `tolerance_rsum` is no percentage.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise MiniClipError(f"--onnx needs {', '.join(missing)}: pip install {' '.join(LIBRARIES)}")
    target = Path(folder)
    check_new_folder(target, "--onnx ")
    if num_images < 1:
        raise UsageError(f"--images must be at least 1, not {num_images}")
    if not 0 <= tolerance_rsum <= 100:
        raise UsageError(f"--tolerance_rsum must be a percentage from 0 to 100, not {tolerance_rsum:g}")
    model, processor = _load_exportable(source)
    splits = load_captions(dataset, **options)
    split = next(splits[name] for name in ("validation", "test", "train") if name in splits)
    rows = split.select(range(min(num_images, len(split))))
    with replaced_folder(target) as fresh:
        write_encoders(fresh, model, processor, rows)
        write_preparation(fresh, model, processor)
        runtime = runpy.run_path(str(fresh / "example.py"))["MiniClip"](fresh)
        report = compare(model, processor, runtime, rows)
        worst = np.max(list(report["largest_difference"].values()))
        if not worst <= tolerance:  # also if it is NaN
            raise ModelError(
                f"{source}: the ONNX files differ from PyTorch by {worst:.1e} in a component of an embedding, "
                f"more than --tolerance {tolerance:.1e}; nothing was written to {target}"
            )
        (fresh / "equality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if quantize:
            report["quantization"] = quantize_folder(fresh, runtime, rows, splits.get("train", rows), tolerance_rsum)
            text = json.dumps(report["quantization"], indent=2) + "\n"
            (fresh / "quantization.json").write_text(text, encoding="utf-8")
        del runtime  # it keeps the files open
    return report


def _load_exportable(source: str) -> tuple[MiniClipModel, MiniClipProcessor]:
    try:
        model, processor = load_export(source, "EXPORT")
    except (HTTPError, OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"no model in {source}: {one_line(error)}") from error
    if not processor.tokenizer.is_fast:
        raise ModelError(
            f"{source}: its tokenizer is written in Python and cannot be saved as tokenizer.json; train with a text "
            "tower that has a fast tokenizer"
        )
    return model, processor


def write_encoders(folder: Path, model: MiniClipModel, processor: MiniClipProcessor, rows: Any) -> None:
    """Write both ONNX files. Weights above 2 GB, the limit of the format, go to `<name>.onnx.data` next to them.

    Args:
        folder: existing folder to write to.
        model: model in float32 on the CPU.
        processor: processor of the model.
        rows: captioned images, of which the first is traced.

    Raises:
        ModelError: a tower uses an operation that ONNX cannot express.
    """
    traced = copy.deepcopy(model).eval()
    # T5 cannot be exported with fused attention. The comparison uses the model as it was loaded.
    traced.text_model.set_attn_implementation("eager")
    texts = [rows[0]["captions"][0], f"{rows[0]['captions'][0]} and more"]  # two lengths, so that the mask has a zero
    with warnings.catch_warnings(action="ignore"):
        prepared = processor(images=[open_image(rows[0])] * 2, text=texts, return_tensors="pt")
    for name, encoder in ENCODERS.items():
        inputs = {key: prepared[key] for key in encoder.axes}
        try:
            with warnings.catch_warnings(action="ignore"):  # about axes with the same name, which is intended
                program = torch.onnx.export(
                    encoder.module(traced),
                    kwargs=inputs,
                    dynamo=True,
                    dynamic_shapes=encoder.axes,
                    output_names=[encoder.output],
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:500]
            raise ModelError(f"torch.onnx cannot export the {name.replace('_', ' ')}: {reason}") from error
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with paths of this machine
        program.save(folder / f"{name}.onnx")


def write_preparation(folder: Path, model: MiniClipModel, processor: MiniClipProcessor) -> None:
    """Write the settings that turn images and texts into inputs, the temperature, and `example.py`, which uses them.

    Args:
        folder: existing folder to write to.
        model: model whose temperature and bias go to `model.json`.
        processor: processor whose image settings go to `preprocessor_config.json`, and whose tokenizer goes to
            `tokenizer.json` with its truncation and padding.
    """
    from tokenizers import Tokenizer

    settings = processor.image_processor.to_dict()
    settings.pop("auto_map", None)  # there is no code in this folder
    bias = 0.0 if model.logit_bias is None else model.logit_bias.item()  # only the sigmoid loss has one
    logits = {"logit_scale": model.inverse_temperature().item(), "logit_bias": bias}
    files = {"preprocessor_config.json": settings, "model.json": {**logits, "empty_text": processor.fill_empty("")}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    original = processor.tokenizer
    tokenizer = Tokenizer.from_str(original.backend_tokenizer.to_str())
    tokenizer.enable_padding(pad_id=original.pad_token_id, pad_token=original.pad_token)
    tokenizer.no_truncation()  # drops the setting of the last call
    if original.model_max_length <= 2**31:  # transformers writes "no limit" as a number like 1e30
        tokenizer.enable_truncation(original.model_max_length)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "example.py").write_text(example_source(), encoding="utf-8")


def example_source() -> str:
    """`onnx_example.py` with the code of `pictures_miniclip.py` in place of its import, so that it runs alone."""
    example, pictures = (
        path.read_text(encoding="utf-8")
        for path in (Path(__file__).with_name("onnx_example.py"), PACKAGE / "pictures_miniclip.py")
    )
    start = example.index("from ..pictures_miniclip import")
    return example[:start] + pictures + "\n" + example[example.index("\n", start) + 1 :]


@torch.no_grad()
def compare(model: MiniClipModel, processor: MiniClipProcessor, runtime: Any, rows: Any) -> dict[str, Any]:
    """Embed the same images and captions with PyTorch and with the written files, preprocessing included.

    Args:
        model: model in evaluation mode and float32, on the CPU.
        processor: processor of the model.
        runtime: `MiniClip` object of the written `example.py`.
        rows: captioned images to embed.

    Returns:
        Numbers of `images` and `captions`; smallest and largest of the `batch_sizes` and `text_lengths` used;
        `largest_difference` in a component of `image_embeds` and of `text_embeds`; the metrics of
        `retrieval_metrics` under `pytorch` and `onnxruntime`; and `versions`.

    Raises:
        ModelError: the example prepares an image or a text differently from the processor.
    """
    texts = [caption for captions in rows["captions"] for caption in captions]
    image_of_text = [index for index, captions in enumerate(rows["captions"]) for _ in captions]
    text_batches = list(_batches(texts, "text", processor, runtime.prepare_texts))
    extremes = _extreme_texts(texts, processor.tokenizer.model_max_length, runtime)
    images = _embed(
        "image_encoder", _batches(map(open_image, rows), "images", processor, runtime.prepare_images), model, runtime
    )
    captions = _embed("text_encoder", text_batches, model, runtime)
    others = _embed("text_encoder", extremes, model, runtime)
    lengths = [batch["input_ids"].shape[1] for batch in (*text_batches, *extremes)]
    return {
        "images": len(rows),
        "captions": len(texts),
        "batch_sizes": [1, min(max(BATCH_SIZES), len(texts))],
        "text_lengths": [min(lengths), max(lengths)],
        "largest_difference": {
            "image_embeds": (images[0] - images[1]).abs().max().item(),
            "text_embeds": torch.cat([captions[0] - captions[1], others[0] - others[1]]).abs().max().item(),
        },
        "pytorch": retrieval_metrics(images[0], captions[0], image_of_text),
        "onnxruntime": retrieval_metrics(images[1], captions[1], image_of_text),
        "versions": {library: version(library) for library in ("torch", *LIBRARIES)},
    }


def _batches(
    items: Iterable[Any], modality: str, processor: MiniClipProcessor, prepare: Callable[[list[Any]], Inputs]
) -> Iterator[Inputs]:
    """Inputs of an encoder in batches of different sizes, prepared by `example.py` and checked by the processor."""
    remaining = iter(items)
    options: dict[str, Any] = {"padding": True} if modality == "text" else {}  # to the longest; the model pads further
    for size in cycle(BATCH_SIZES):
        batch = list(islice(remaining, size))
        if not batch:
            return
        with warnings.catch_warnings(action="ignore"):  # about truncated captions: both truncate them alike
            expected = processor(**{modality: batch}, return_tensors="np", **options)
        prepared = prepare(batch)
        for name, values in prepared.items():
            if not np.array_equal(values, expected[name]):
                raise ModelError(
                    f"example.py does not prepare {name} as {type(processor.image_processor).__name__} and "
                    f"{type(processor.tokenizer).__name__} of this model do: it knows how to resize, centre crop, "
                    "rescale and normalise images, and follows tokenizer.json"
                )
        yield prepared


def _extreme_texts(texts: Sequence[str], limit: int, runtime: Any) -> list[Inputs]:
    """Two batches: a single token; and the longest text that the model takes (joined captions) with a short one."""
    length = min(limit, LONGEST_TEXT)
    longest = " ".join(islice(cycle(texts), length))
    prepared = (runtime.prepare_texts(texts[:1]), runtime.prepare_texts([longest, texts[0]]))
    return [
        {name: values[:, :cut] for name, values in inputs.items()}
        for inputs, cut in zip(prepared, (1, length), strict=True)
    ]


def _embed(name: str, batches: Iterable[Inputs], model: MiniClipModel, runtime: Any) -> tuple[Tensor, Tensor]:
    """`[items, dim]` embeddings by PyTorch and by onnxruntime."""
    encoder, session = ENCODERS[name].module(model), getattr(runtime, name)
    pairs = [
        (
            encoder(**{key: torch.from_numpy(values) for key, values in batch.items()}),
            torch.from_numpy(session.run(None, batch)[0]),
        )
        for batch in batches
    ]
    ours, theirs = zip(*pairs, strict=True)
    return torch.cat(ours), torch.cat(theirs)


def format_onnx_report(report: dict[str, Any]) -> str:
    """Report of [`compare`] as text: counts, largest differences, and each metric by both with the difference."""
    (smallest, largest), (shortest, longest) = report["batch_sizes"], report["text_lengths"]
    differences = ", ".join(f"{name} {value:.1e}" for name, value in report["largest_difference"].items())
    lines = [
        f"compared on {report['images']} images and {report['captions']} captions, "
        f"batches of {smallest} to {largest}, texts of {shortest} to {longest} tokens",
        f"largest difference in a component: {differences}",
        f"{'':<26}{'PyTorch':>10}{'onnxruntime':>14}{'difference':>12}",
    ]
    for name, before in report["pytorch"].items():
        after = report["onnxruntime"][name]
        lines.append(f"{name:<26}{before:>10.2f}{after:>14.2f}{after - before:>+12.2f}")
    return "\n".join(lines)
