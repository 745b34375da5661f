"""Retrieval recall as a metric of `evaluate`: `evaluate.load(path of this file)` or `RetrievalMetric()`."""

import datasets
import evaluate
import numpy
import torch

from modeling_miniclip.evaluation.metrics import retrieval_metrics

DESCRIPTION = """Recall@1, 5 and 10 in percent, median rank in both directions, and rsum, the sum of the six recalls.
All added rows are candidates. Ties count against the model."""

INPUTS = """
Args:
    predictions: one image embedding per row, unit norm.
    references: for each image the list of embeddings of its captions, at least one, unit norm.
Returns:
    text_to_image_R@1, text_to_image_R@5, text_to_image_R@10, text_to_image_median_rank, the same with
    image_to_text, and rsum.
"""


class RetrievalMetric(evaluate.Metric):
    """Recall as [`retrieval_metrics`][modeling_miniclip.retrieval_metrics] computes it, as a metric of `evaluate`.

    Add one entry per image: its embedding `[dim]` as the prediction, and the `[captions, dim]` embeddings of its
    captions, at least one, as the reference, all with unit norm. `compute` returns the metrics.
    """

    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": vector, "references": datasets.Sequence(vector)}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        text_image_id = [i for i, captions in enumerate(references) for _ in captions]
        texts = [caption for captions in references for caption in captions]
        return retrieval_metrics(_matrix(predictions), _matrix(texts), text_image_id)


def _matrix(rows: list) -> torch.Tensor:
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"embeddings differ in width: {sorted(widths)}")
    return torch.from_numpy(numpy.asarray(rows, dtype=numpy.float32).reshape(len(rows), -1 if rows else 0))
