"""A finished run for a Python program: its model, metrics and history, and how a notebook shows it."""

import base64
import io
import os
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ModelError, UsageError, one_line
from ..evaluation.metrics import DIRECTIONS, RECALL_AT, ZERO_SHOT_METRICS, is_better
from ..inference.loading import load_export
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..training.reports.figures import read_metrics
from ..utils.plain_yaml import load_yaml

PLACE = ("step", "epoch", "split", "seconds", "share")  # of a line of metrics.jsonl, besides its metrics
PICTURE_WIDTH = 640  # pixels
COLOURS = 64  # of the curves


@dataclass(repr=False)
class TrainResult:
    """A finished run. In a notebook it shows its metrics, curves and retrieved pictures.

    Args:
        output_dir: folder of the run.
        history: lines of `metrics.jsonl` as dictionaries: `step`, `epoch`, `split` (`train` or `validation`) and the
            metrics. Without a log, as after `overfit_batch=True`, it is empty.
        best_metric: metric that selected the exported model.

    Attributes:
        export: folder of the exported model, `output_dir/export`.
        model: the best model, in evaluation mode on the CPU; it is loaded when it is first used.
        processor: its processor.
    """

    output_dir: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: str = "loss"

    @classmethod
    def load(cls, output_dir: str | os.PathLike[str]) -> "TrainResult":
        """The result of a run from its folder, for instance of one that several processes have trained.

        Args:
            output_dir: folder of the run.

        Returns:
            Its result, as `train` returns it.

        Raises:
            UsageError: no run has written to the folder.
        """
        folder = Path(output_dir)
        log, arguments = folder / "metrics.jsonl", folder / "arguments.yaml"
        if not log.is_file() or not arguments.is_file():
            raise UsageError(f"{folder}: no run of MiniCLIP; name the output_dir of one")
        chosen = load_yaml(arguments.read_text(encoding="utf-8"))
        return cls(folder, read_metrics(log), str(chosen.get("best_metric", "loss")))

    @property
    def export(self) -> Path:
        """Folder of the exported model."""
        return self.output_dir / "export"

    @property
    def best_step(self) -> int | None:
        """Step of the exported model; None without a validation."""
        best = self._best()
        return None if best is None else int(best["step"])

    @property
    def metrics(self) -> dict[str, float]:
        """Validation metrics of the exported model: `loss`, `text_to_image_R@1`, ..., `rsum`.

        Those of a blend also have the metrics on `retention_dataset`, as `retained_loss` and so on.
        """
        line = self._blend() or self._best() or {}
        return {name: value for name, value in line.items() if name not in PLACE}

    def _blend(self) -> dict[str, Any] | None:
        """The measured blend that was exported; None without `blend`."""
        share = None
        for line in reversed(self.history):
            if line["split"] == "chosen blend":
                share = line["share"]
            elif line["split"] == "blend" and line["share"] == share:
                return line
        return None

    def _best(self) -> dict[str, Any] | None:
        best = None
        for line in self.history:
            if line["split"] != "validation" or not line["step"]:  # step 0: the model that the run started from
                continue
            if best is None or is_better(self.best_metric, line[self.best_metric], best[self.best_metric]):
                best = line
        return best

    @cached_property
    def _loaded(self) -> tuple[MiniClipModel, MiniClipProcessor]:
        try:
            return load_export(str(self.export), "export")
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.export} cannot be loaded: {one_line(error)}") from error

    @property
    def model(self) -> MiniClipModel:
        """The best model, in evaluation mode on the CPU.

        Raises:
            ModelError: it cannot be loaded.
        """
        return self._loaded[0]

    @property
    def processor(self) -> MiniClipProcessor:
        """The processor of the model.

        Raises:
            ModelError: it cannot be loaded.
        """
        return self._loaded[1]

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which loads the model itself."""
        return {name: value for name, value in vars(self).items() if name != "_loaded"}

    def __repr__(self) -> str:
        return "\n".join([f"{self.export}{self._when()}", *(": ".join(row) for row in self._rows())])

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._rows())
        pictures = _picture(self.output_dir / "curves.png", COLOURS) + _picture(self.output_dir / "retrieval.png")
        return f"<p><b>{escape(str(self.export))}</b>{escape(self._when())}</p><table>{rows}</table>{pictures}"

    def _when(self) -> str:
        return "" if self.best_step is None else f", the model of step {self.best_step} of {self.history[-1]['step']}"

    def _rows(self) -> list[tuple[str, str]]:
        """The metrics to show, named and formatted."""
        metrics = self.metrics
        recalls = [(f"{direction}_R@", f"R@{'/'.join(map(str, RECALL_AT))} {direction.replace('_', ' ')}")
                   for direction in DIRECTIONS]  # fmt: skip
        rows = [
            (title, " / ".join(f"{metrics[f'{start}{k}']:.1f}" for k in RECALL_AT))
            for start, title in recalls
            if f"{start}{RECALL_AT[0]}" in metrics
        ]
        for name, digits in (("rsum", 1), ("loss", 4), *((name, 1) for name in ZERO_SHOT_METRICS)):
            if name in metrics:
                rows.append((name, f"{metrics[name]:.{digits}f}"))
        return rows


def _picture(path: Path, colours: int | None = None) -> str:
    """A picture of a run as HTML, small enough for a notebook; empty if there is none.

    Args:
        path: PNG file.
        colours: number of colours of a drawing, which keeps its lines sharp; None for photographs.
    """
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except OSError:  # none was drawn
        return ""
    small.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
    file = io.BytesIO()
    if colours is None:
        small.save(file, "JPEG", quality=80)
    else:
        small.quantize(colours).save(file, "PNG", optimize=True)
    data, kind = base64.b64encode(file.getvalue()).decode(), "png" if colours else "jpeg"
    return f'<p><img alt="{escape(path.stem)}" src="data:image/{kind};base64,{data}"></p>'
