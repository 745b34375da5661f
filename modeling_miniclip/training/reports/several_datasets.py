"""A run on several datasets: the validation of each, and how often weights used each."""

import numpy as np
import torch
from datasets import DatasetDict
from torch import Tensor

from ...data.load_rows import Splits
from ...data.loading.mixing import Mixture
from ...evaluation.metrics import validation_metrics
from ..command_line.arguments import TrainingArguments
from ..processes.distributed import scale_and_bias
from ..run import TrainingRun
from .reporting import describe_validation


def validation_parts(splits: DatasetDict, arguments: TrainingArguments) -> dict[str, range]:
    """Rows of the validation split by dataset; empty unless several datasets have some."""
    if not isinstance(splits, Splits) or arguments.dataset is None:
        return {}
    edges = np.cumsum([0, *splits.sizes["validation"]]).tolist()
    ranges = [range(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    names = arguments.validation_dataset or arguments.dataset
    parts = {name: rows for name, rows in zip(names, ranges, strict=True) if rows}
    return parts if len(parts) > 1 else {}


def report_datasets(run: TrainingRun, embeddings: tuple[Tensor, Tensor, Tensor]) -> None:
    """Report the metrics of each dataset's validation images among themselves, and the uses of weighted datasets.

    Every process must call it; rank 0 reports.

    Args:
        run: the run.
        embeddings: image and text embeddings of the whole validation split, and the row of each text's image.
    """
    scale, bias = scale_and_bias(run.unwrapped_model)
    if not run.accelerator.is_main_process:
        return
    rows = torch.tensor(run.bad_images.good_rows("validation"))
    for name, part in run.validation_parts.items():
        own = part_of_embeddings(*embeddings, (rows >= part.start) & (rows < part.stop))
        if not len(own[0]):
            continue
        metrics = validation_metrics(*own, scale, run.unwrapped_model.config.loss_type, bias)
        run.write_metrics(f"validation of {name}", metrics)
        run.say(describe_validation(f"  {name}", metrics))
    order = run.train_batches.order
    if isinstance(order, Mixture):
        uses = zip(run.arguments.dataset or [], order.times_used(run.epoch), strict=True)
        run.say("  uses of each image so far: " + ", ".join(f"{name} {times:.3g}" for name, times in uses))


def part_of_embeddings(
    images: Tensor, texts: Tensor, image_row: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of some images and their texts, and the row of each text's image among these.

    Args:
        images: `[B, dim]` image embeddings.
        texts: `[N, dim]` text embeddings.
        image_row: `[N]`, row of each text's image.
        chosen: `[B]` bool, the images to keep.
    """
    of_chosen = chosen[image_row]
    return images[chosen], texts[of_chosen], (chosen.cumsum(0) - 1)[image_row[of_chosen]]
