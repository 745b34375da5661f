"""Replace the ONNX files of an export by int8 ones, after measuring what that changes."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from ..evaluation.metrics import retrieval_metrics
from ..inference.encode import open_image
from ..utils.files import replace_file

Inputs = dict[str, np.ndarray]  # inputs of an encoder by name

CALIBRATION_IMAGES = 128
BATCH_SIZE = 32  # of the measurement
TURNS = 5  # float32 and int8 take turns; medians count


def quantize_folder(folder: Path, runtime: Any, rows: Any, calibration: Any, tolerance: float) -> dict[str, Any]:
    """Replace both encoders in a folder by int8 ones, with onnxruntime's own tools.

    Images: static, with the ranges that activations have on the calibration images. Texts: dynamic, with the ranges of
    each batch, as onnxruntime advises for transformers.

    Args:
        folder: folder with both encoders in float32.
        runtime: `MiniClip` object of its `example.py`.
        rows: captioned images to measure on.
        calibration: rows whose images set the ranges; at most `CALIBRATION_IMAGES` are used.
        tolerance: how far rsum may fall, in percent of what it was.

    Returns:
        Numbers of `images` and `captions` measured and of `calibration_images`; under `float32` and `int8`, megabytes
        of each encoder, `images_per_second` and `texts_per_second` without preparation, and the metrics of
        `retrieval_metrics`; and `versions`.

    Raises:
        ModelError: rsum falls by more than the tolerance, or an encoder cannot be quantised. The files are as before.
    """
    from onnxruntime import InferenceSession

    images = _batches([open_image(row) for row in rows], runtime.prepare_images)
    texts = _batches([caption for captions in rows["captions"] for caption in captions], runtime.prepare_texts)
    chosen = calibration.select(_spread(len(calibration)))
    ranges = (runtime.prepare_images([open_image(row)]) for row in chosen)
    with TemporaryDirectory(dir=folder) as temporary:
        small = Path(temporary)
        for name, write in (("image_encoder", _static(ranges)), ("text_encoder", _dynamic)):
            _quantize(folder / f"{name}.onnx", small / f"{name}.onnx", write)
        sides = {
            "float32": (folder, runtime.image_encoder, runtime.text_encoder),
            "int8": (small, *(InferenceSession(str(small / f"{name}_encoder.onnx"), providers=["CPUExecutionProvider"])
                              for name in ("image", "text"))),
        }  # fmt: skip
        report = _measure(sides, images, texts, [len(captions) for captions in rows["captions"]])
        _check(report["float32"]["rsum"], report["int8"]["rsum"], tolerance)
        del sides
        for path in folder.glob("*_encoder.onnx*"):
            path.unlink()
        for path in small.iterdir():
            replace_file(path, folder / path.name)
    counts = {"images": len(rows), "captions": sum(map(len, rows["captions"])), "calibration_images": len(chosen)}
    return counts | report | {"versions": {library: version(library) for library in ("onnx", "onnxruntime")}}


def _spread(rows: int) -> list[int]:
    """At most `CALIBRATION_IMAGES` of the rows, from the first to the last: they may be sorted by class."""
    return np.linspace(0, rows - 1, min(CALIBRATION_IMAGES, rows)).astype(int).tolist()


def _batches(items: Sequence[Any], prepare: Callable[[Sequence[Any]], Inputs]) -> list[Inputs]:
    return [prepare(items[start : start + BATCH_SIZE]) for start in range(0, len(items), BATCH_SIZE)]


def _quantize(source: Path, target: Path, write: Callable[[Path, Path, bool], None]) -> None:
    """Infer shapes and fuse operations, as onnxruntime's tools need it, then write the int8 file."""
    from onnxruntime.quantization import quant_pre_process

    external = source.with_name(f"{source.name}.data").exists()  # over 2 GB
    prepared = target.with_name(f"prepared_{target.name}")
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # one for each layer norm, which has no output channels
    try:
        quant_pre_process(source, prepared, skip_symbolic_shape=True, save_as_external_data=external)
        write(prepared, target, external)
    except Exception as error:  # of whatever kind: the tools raise their own and those of onnx
        reason = " ".join(str(error).split())[:500]
        part = source.stem.replace("_", " ")
        raise ModelError(f"onnxruntime cannot quantise the {part}: {reason}; export without --quantize") from error
    finally:
        logging.disable(quiet)
        for path in target.parent.glob(f"{prepared.name}*"):
            path.unlink()


def _static(batches: Iterable[Inputs]) -> Callable[[Path, Path, bool], None]:
    def write(source: Path, target: Path, external: bool) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.batches = iter(batches)

            def get_next(self) -> Inputs | None:
                return next(self.batches, None)

        quantize_static(
            source,
            target,
            Reader(),
            per_channel=True,  # depthwise convolutions need a range for each output channel
            activation_type=QuantType.QUInt8,  # x86 multiplies unsigned by signed; signed by signed is slow there
            use_external_data_format=external,
        )

    return write


def _dynamic(source: Path, target: Path, external: bool) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, use_external_data_format=external)


def _measure(
    sides: dict[str, tuple[Path, Any, Any]], images: list[Inputs], texts: list[Inputs], captions: list[int]
) -> dict[str, dict[str, Any]]:
    """Sizes, rates and recall of each side."""
    image_of_text = [index for index, count in enumerate(captions) for _ in range(count)]
    seconds: dict[tuple[str, str], list[float]] = {}
    report: dict[str, dict[str, Any]] = {}
    for _ in range(TURNS):
        for side, (_, image_encoder, text_encoder) in sides.items():
            for kind, session, batch in (("images", image_encoder, images[0]), ("texts", text_encoder, texts[0])):
                begin = time.perf_counter()
                session.run(None, batch)
                seconds.setdefault((side, kind), []).append(time.perf_counter() - begin)
    for side, (folder, image_encoder, text_encoder) in sides.items():
        embeds = _embed(image_encoder, images), _embed(text_encoder, texts)
        sizes = {
            f"{name}_megabytes": sum(path.stat().st_size for path in folder.glob(f"{name}.onnx*")) / 1e6
            for name in ("image_encoder", "text_encoder")
        }
        rates = {
            f"{kind}_per_second": len(next(iter(batches[0].values()))) / median(seconds[side, kind])
            for kind, batches in (("images", images), ("texts", texts))
        }
        report[side] = sizes | rates | retrieval_metrics(*embeds, image_of_text)
    return report


def _embed(session: Any, batches: list[Inputs]) -> Tensor:
    """`[items, dim]` embeddings."""
    return torch.from_numpy(np.concatenate([session.run(None, batch)[0] for batch in batches]))


def _check(before: float, after: float, tolerance: float) -> None:
    if not math.isfinite(after):
        raise ModelError(f"with int8, rsum is {after}; nothing was written. Leave out --quantize")
    lost = 100 * (before - after) / before if before else 0.0
    if lost > tolerance:
        raise ModelError(
            f"with int8, rsum falls from {before:.1f} to {after:.1f}, by {lost:.1f} %, more than --tolerance_rsum "
            f"{tolerance:g}; nothing was written. Leave out --quantize, or accept the loss by --tolerance_rsum "
            f"{np.ceil(lost):g}"
        )


def format_quantization(report: dict[str, Any]) -> str:
    """Report of [`quantize_folder`] as a table: sizes, rates and recall of both, with the change."""
    before, after = report["float32"], report["int8"]
    lines = [
        f"int8, measured on {report['images']} images and {report['captions']} captions; ranges from "
        f"{report['calibration_images']} images",
        f"{'':<26}{'float32':>10}{'int8':>10}{'change':>12}",
    ]
    for name, value in before.items():
        ratio = name.endswith(("megabytes", "per_second"))
        change = f"{after[name] / value:.2f}x" if ratio else f"{after[name] - value:+.2f}"
        lines.append(f"{name:<26}{value:>10.2f}{after[name]:>10.2f}{change:>12}")
    return "\n".join(lines)
