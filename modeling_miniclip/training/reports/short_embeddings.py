"""Validation of the short embeddings of a run with `--matryoshka_dims`."""

from torch import Tensor

from ...evaluation.metrics import validation_metrics
from ...inference.encode import truncate_embeddings
from ..matryoshka import short_lengths
from ..processes.distributed import scale_and_bias
from ..run import TrainingRun
from .reporting import describe_validation


def report_lengths(run: TrainingRun, embeddings: tuple[Tensor, Tensor, Tensor]) -> dict[int, dict[str, float]]:
    """Report the validation metrics of each trained length below the full one, in metrics.jsonl and the log.

    Every process must call it; rank 0 reports.

    Args:
        run: the run.
        embeddings: image and text embeddings of the whole validation split, and the row of each text's image.

    Returns:
        The metrics by length; empty without such lengths, and on other ranks.
    """
    config = run.unwrapped_model.config
    lengths = short_lengths(config)
    if not lengths:
        return {}
    scale, bias = scale_and_bias(run.unwrapped_model)
    found: dict[int, dict[str, float]] = {}
    if run.accelerator.is_main_process:
        images, texts, image_row = embeddings
        for dim in lengths:
            short = truncate_embeddings(images, dim), truncate_embeddings(texts, dim)
            found[dim] = validation_metrics(*short, image_row, scale, config.loss_type, bias)
            run.write_metrics(f"validation with {dim} dimensions", found[dim])
            run.say(describe_validation(f"  {dim} dimensions", found[dim]))
    return found
