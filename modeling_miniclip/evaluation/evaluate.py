"""`miniclip eval`: scores of one or two models on a split, the results of every query, and the worst failures.

The report, which `metrics.json` holds, has `model`, `dataset`, `split`, `images`, `texts`, `metrics` (recalls in
percent, median ranks, `rsum`) and their 95 % `intervals` from a bootstrap over images; for captions
`by_caption_length`, see [`recall_by_length`][modeling_miniclip.evaluation.by_length.recall_by_length].

If texts belong to several images (equal captions, a group, equal bytes), `shared` has their number as `texts`, and
`metrics`, `intervals` and those of the comparison with these answers counted as right, too.

With a baseline it also has `baseline`, `baseline_metrics`, `baseline_intervals`, the `difference` of the recalls
(model minus baseline) and its `difference_intervals` from the paired bootstrap; what follows has its `baseline_...`
too: with an order test `order_test`, see [`order_report`][modeling_miniclip.evaluation.order_test.order_report], and
with a probe `linear_probe`, see [`linear_probe`][modeling_miniclip.evaluation.linear_probe.linear_probe]. With
`truncate_dim` it has that number.

If images could not be read, or folders not be listed, they are left out of everything else: `skipped` has their names
and the reasons, and `warning` a sentence about them.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from ..data.skipped import describe_skipped
from ..errors import DataError
from ..utils.files import check_new_folder, replaced_folder
from ..utils.html import table
from ..utils.names import public_name
from .by_length import length_table, recall_by_length
from .encoders import ClipEncoder, open_encoder
from .eval_sets import EvalSet, ReadableImages
from .failure_page import failure_page
from .linear_probe import PROBE_NOTE, check_probe, linear_probe, probe_table
from .metrics import Ranking, metrics_of_ranks, named_intervals, rank_keys, resampled_recalls
from .order_page import order_page
from .order_pairs import OrderPairs, load_pairs
from .order_test import ORDER_NOTE, PairScores, order_report, order_table, score_pairs, write_pairs
from .shared import SHARED_NOTE
from .zero_shot import ensemble_weights

RESULTS = 10  # results that are kept per query
FILES = ("metrics.json", "queries.parquet", "failures.html")
ORDER_FILES = ("order_test.csv", "order_test.html")
ROWS = 10_000  # rows of the Parquet file that are in memory at a time


@dataclass(frozen=True)
class ModelScores:
    """Scores of a model on a set.

    Args:
        rankings: ranking of the queries, by direction.
        metrics: recalls in percent, median ranks and `rsum`, by name.
        recalls: `[samples, recalls]` bootstrap samples of the recalls in percent.
        images: `[images, dim]` embeddings.
        shared: the same with the answers that `data.shared` counts as right, too; its rankings have no results.
    """

    rankings: dict[str, Ranking]
    metrics: dict[str, float]
    recalls: Tensor
    images: Tensor
    shared: "ModelScores | None" = None


def evaluate_model(
    model: str,
    data: EvalSet,
    baseline: str | None = None,
    output_dir: str | os.PathLike | None = None,
    templates: str | Sequence[str] = "ensemble",
    batch_size: int = 32,
    progress: bool = False,
    order_test: bool | str | os.PathLike = False,
    image_dir: str | os.PathLike | None = None,
    probe: Mapping[str, EvalSet] | None = None,
    truncate_dim: int | None = None,
    absolute_paths: bool = False,
) -> dict[str, Any]:
    """Evaluate a model, or compare two on the same queries.

    Args:
        model: model as for [`open_encoder`][modeling_miniclip.evaluation.encoders.open_encoder].
        data: split from [`load_eval_set`][modeling_miniclip.evaluation.eval_sets.load_eval_set].
        baseline: second model to compare with, or None.
        output_dir: folder for `metrics.json` (the report), `queries.parquet` (see [`query_rows`]) and `failures.html`,
            with an order test also `order_test.csv` (all pairs) and `order_test.html` (some); complete, or not there.
        templates: sentences for class names, as in `zero_shot_weights`.
        batch_size: images per forward pass.
        progress: whether to show progress bars.
        order_test: whether to compare captions with the same ones with words swapped, or a file of true and false
            captions, see [`read_pairs`][modeling_miniclip.evaluation.order_pairs.read_pairs].
        image_dir: folder of the images of that file.
        probe: class folders to train linear probes on, from
            [`probe_sets`][modeling_miniclip.evaluation.eval_sets.probe_sets], or None.
        truncate_dim: number of dimensions of the embeddings to keep, the first ones, normalised again, of the baseline
            too; by default all. Linear probes use features before the projection, which stay whole.
        absolute_paths: whether the HTML pages name models, datasets and images with the folders that they are in on
            this machine. The other files always do.

    Returns:
        The report, see above.

    Raises:
        ModelError: a model does not load.
        UsageError: the output folder holds other files, or embeddings do not have `truncate_dim` dimensions.
        DataError: no image can be read.
    """
    if output_dir is not None:
        check_new_folder(Path(output_dir), "--output_dir ", allowed=(*FILES, *ORDER_FILES))
    if probe is not None:
        check_probe()
    pairs = load_pairs(data, order_test, image_dir)
    named = [("MODEL", model)] + ([("--baseline", baseline)] if baseline is not None else [])
    encoders = [open_encoder(name, flag, truncate_dim) for flag, name in named]  # both before the long work
    scores, data = _score_models(encoders, data, templates, batch_size, progress)
    report = _report_of_scores(model, baseline, truncate_dim, scores, data)
    order: list[PairScores] = []
    if pairs is not None:
        if order_test is True:  # without the images that could not be read
            pairs = load_pairs(data, order_test, image_dir) or pairs
        order = _add_order_tests(report, encoders, scores, pairs, pairs.images is data.images, batch_size, progress)
    if probe is not None:
        _add_probes(report, encoders, probe, templates, batch_size, progress)
    if output_dir is not None:
        _write_results(Path(output_dir), report, data, scores, pairs, order, absolute_paths)
    return report


def _add_order_tests(
    report: dict[str, Any],
    encoders: list[ClipEncoder],
    scores: list[ModelScores],
    pairs: OrderPairs,
    is_same: bool,
    batch_size: int,
    progress: bool,
) -> list[PairScores]:
    """Add the order tests of the model and, if there is one, of the baseline to a report.

    If the images of the pairs are those that were scored, `is_same`, they are not embedded again.
    """
    order = []
    for name, encoder, each in zip(("order_test", "baseline_order_test"), encoders, scores, strict=False):
        order.append(score_pairs(encoder, pairs, each.images if is_same else None, batch_size, progress))
        report[name] = order_report(pairs, order[-1])
    return order


def _add_probes(
    report: dict[str, Any],
    encoders: list[ClipEncoder],
    probe: Mapping[str, EvalSet],
    templates: str | Sequence[str],
    batch_size: int,
    progress: bool,
) -> None:
    """Add the linear probes of the model and, if there is one, of the baseline to a report."""
    for name, encoder in zip(("linear_probe", "baseline_linear_probe"), encoders, strict=False):
        report[name] = linear_probe(encoder, probe, templates, batch_size, progress)
    if skipped := report["linear_probe"]["skipped"]:
        images = sum(report["linear_probe"][f"{name}_images"] for name in ("train", "test"))
        report.setdefault("warning", describe_skipped(skipped, images + len(skipped), {}))


def _report_of_scores(
    model: str, baseline: str | None, truncate_dim: int | None, scores: list[ModelScores], data: EvalSet
) -> dict[str, Any]:
    """The report of [`evaluate_model`] as far as it is about retrieval or classification."""
    report: dict[str, Any] = {
        "model": model,
        "dataset": data.name,
        "split": data.split,
        "images": len(data.image_ids),
        "texts": len(data.texts),
        **_figures(scores, data),
    }
    if baseline is not None:
        report["baseline"] = baseline
    if truncate_dim is not None:
        report["truncate_dim"] = truncate_dim
    if data.shared is not None:
        with_shared = [each.shared for each in scores if each.shared is not None]
        report["shared"] = {"texts": data.shared.texts, **_figures(with_shared, data)}
    if data.skipped or data.unlisted:
        report["skipped"] = data.skipped | data.unlisted
        report["warning"] = describe_skipped(data.skipped, len(data.image_ids) + len(data.skipped), data.unlisted)
    if not data.is_classification:
        for name, each in zip(("by_caption_length", "baseline_by_caption_length"), scores, strict=False):
            rank, image_of = each.rankings["text_to_image"].rank, data.image_of_query("text_to_image")
            report[name] = recall_by_length(data.texts, rank, image_of, data.at)
    return report


def _write_results(
    target: Path,
    report: dict[str, Any],
    data: EvalSet,
    scores: list[ModelScores],
    pairs: OrderPairs | None,
    order: list[PairScores],
    absolute_paths: bool,
) -> None:
    """Write [`FILES`] from the report and the scores of the model and, perhaps, the baseline; and [`ORDER_FILES`]."""
    ours, *theirs = scores
    shown, shown_data = (report, data) if absolute_paths else (public_report(report), data.with_public_names())
    with replaced_folder(target) as fresh:
        (fresh / FILES[0]).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        write_queries(fresh / FILES[1], data, ours, theirs[0] if theirs else None)
        figures = table(*table_of(shown))
        if "by_caption_length" in shown:
            figures += table(*length_table(shown))
        with_shared = None if ours.shared is None else ours.shared.rankings
        gallery = failure_page(shown, shown_data, ours.rankings, figures, with_shared)
        (fresh / FILES[2]).write_text(gallery, encoding="utf-8")
        if pairs is not None:
            names = data.image_ids if pairs.images is data.images else None
            write_pairs(fresh / ORDER_FILES[0], pairs, order[0], names)
            source = pairs.source if absolute_paths else public_name(pairs.source)
            (fresh / ORDER_FILES[1]).write_text(order_page(shown, pairs, order[0], source), encoding="utf-8")


def public_report(report: dict[str, Any]) -> dict[str, Any]:
    """A report whose models and dataset are named without the folders that they are in on this machine."""
    named = ("model", "baseline", "dataset")
    return report | {name: public_name(report[name]) for name in named if name in report}


def _score_models(
    encoders: list[ClipEncoder], data: EvalSet, templates: str | Sequence[str], batch_size: int, progress: bool
) -> tuple[list[ModelScores], EvalSet]:
    """Scores of each model, and the set without the images that the first one could not read."""
    scores: list[ModelScores] = []
    for encoder in encoders:
        texts, images, readable = embed_set(encoder, data, templates, batch_size, progress)
        unreadable = readable.unreadable
        if unreadable and scores:
            raise DataError(f"{next(iter(unreadable.values()))}; it could be read a moment ago: evaluate again")
        if not scores:
            rows = [row for row in range(len(data.image_ids)) if row not in unreadable]
            if unreadable:
                texts, data = texts[data.kept_texts(unreadable)], data.without(unreadable)
            data = data.with_shared({i: readable.marks[row] for i, row in enumerate(rows) if row in readable.marks})
        scores.append(score_model(texts, images, data))
    return scores, data


def embed_set(
    encoder: ClipEncoder, data: EvalSet, templates: str | Sequence[str], batch_size: int, progress: bool
) -> tuple[Tensor, Tensor, ReadableImages]:
    """Embed a split with one model.

    Args:
        encoder: model to score.
        data: split to embed.
        templates: sentences for class names, as in `zero_shot_weights`.
        batch_size: number of images per forward pass; texts are encoded four times as many at a time.
        progress: whether to show progress bars.

    Returns:
        `[texts, dim]`; `[readable images, dim]`; which images could not be read.

    Raises:
        DataError: no image can be read.
    """

    def encode(texts: list[str]) -> Tensor:
        return encoder.encode_texts(texts, 4 * batch_size, progress)

    # Texts first: they are quick, and a wrong template raises an error before the images are encoded.
    texts = ensemble_weights(encode, data.texts, templates) if data.is_classification else encode(data.texts)
    readable = ReadableImages(data.images)
    return texts, encode_readable(encoder, readable, batch_size, progress), readable


def encode_readable(encoder: ClipEncoder, readable: ReadableImages, batch_size: int, progress: bool) -> Tensor:
    """Embed those of some images that can be read: `[readable images, dim]`.

    Raises:
        DataError: no image can be read.
    """
    try:
        return encoder.encode_images(readable, batch_size, progress)
    except ValueError as error:
        if len(readable.unreadable) < len(readable):
            raise
        raise DataError(f"none of the {len(readable)} images can be read; {readable.unreadable[0]}") from error


def score_model(texts: Tensor, images: Tensor, data: EvalSet) -> ModelScores:
    """Rank the answers to the queries of a split in each direction.

    Args:
        texts: `[texts, dim]` embeddings.
        images: `[images, dim]` embeddings.
        data: split that was embedded.
    """
    own = {direction: (data.sides(direction)[0][1], data.sides(direction)[1][1]) for direction in data.directions}
    scores = _score(texts, images, data, own, RESULTS)
    if data.shared is None:
        return scores
    keys = {direction: data.shared.sides(direction) for direction in data.directions}
    return replace(scores, shared=_score(texts, images, data, keys, 0))


def _score(
    texts: Tensor, images: Tensor, data: EvalSet, ids: Mapping[str, tuple[Tensor, Tensor]], results: int
) -> ModelScores:
    """The scores by the ids of queries and answers of each direction."""
    rankings = {}
    for direction in data.directions:
        queries, answers = (texts, images) if direction == "text_to_image" else (images, texts)
        rankings[direction] = rank_keys(queries, answers, *ids[direction], results)
    rank_of = {direction: ranking.rank for direction, ranking in rankings.items()}
    if data.is_classification:
        (rank,) = rank_of.values()
        metrics = {f"top-{k}": 100 * (rank <= k).double().mean().item() for k in data.at}
    else:
        metrics = metrics_of_ranks(rank_of)
    image_of = {direction: data.image_of_query(direction) for direction in data.directions}
    return ModelScores(rankings, metrics, resampled_recalls(rank_of, image_of, len(images), data.at), images)


def _figures(scores: list[ModelScores], data: EvalSet) -> dict[str, Any]:
    """Metrics and intervals of the model and, if there is one, of the baseline, and their difference."""
    ours, *theirs = scores
    names = [data.metric(direction, k) for direction in data.directions for k in data.at]
    figures: dict[str, Any] = {"metrics": ours.metrics, "intervals": _intervals(names, ours.recalls, data)}
    for other in theirs:
        figures |= _comparison(ours, other, names, data)
    return figures


def _intervals(names: list[str], recalls: Tensor, data: EvalSet) -> dict[str, tuple[float, float]]:
    return named_intervals(names, recalls, None if data.is_classification else "rsum")


def _comparison(ours: ModelScores, theirs: ModelScores, recalls: list[str], data: EvalSet) -> dict[str, Any]:
    intervals = _intervals(recalls, ours.recalls - theirs.recalls, data)
    return {
        "baseline_metrics": theirs.metrics,
        "baseline_intervals": _intervals(recalls, theirs.recalls, data),
        "difference": {key: ours.metrics[key] - theirs.metrics[key] for key in intervals},
        "difference_intervals": intervals,
    }


def write_queries(path: Path, data: EvalSet, ours: ModelScores, theirs: ModelScores | None = None) -> None:
    """Write [`query_rows`] as Parquet, `ROWS` rows at a time."""
    result = [("answer", pa.string()), ("score", pa.float32()), ("is_right", pa.bool_())]
    columns = {
        **dict.fromkeys(("direction", "query", "image_id", "right"), pa.string()),
        "rank": pa.int64(),
        "score": pa.float32(),
    }
    if data.shared is not None:
        result.append(("is_shared", pa.bool_()))
        columns["shared_rank"] = pa.int64()
    if theirs is not None:
        columns["baseline_rank"] = pa.int64()
        if data.shared is not None:
            columns["baseline_shared_rank"] = pa.int64()
    schema = pa.schema([*columns.items(), ("results", pa.list_(pa.struct(result)))])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        rows = query_rows(data, ours, theirs)
        while chunk := [row for row, _ in zip(rows, range(ROWS), strict=False)]:
            writer.write_table(pa.Table.from_pylist(chunk, schema))


def query_rows(data: EvalSet, ours: ModelScores, theirs: ModelScores | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of `queries.parquet`, one per query.

    Columns: `direction`; `query` (the text, or the image's id); `image_id` (the query's image); `right` (id of the
    right image, first right caption, or class name); `rank` of the best right answer among all candidates, and its
    `score`; `baseline_rank`, if there is a baseline; `results`, the first answers with `answer`, `score` and
    `is_right`. If texts belong to several images, also `shared_rank` and `baseline_shared_rank`, the ranks of the best
    answer of those that belong to the query, and for each result `is_shared`, whether it is one of them without being
    the query's own.

    Args:
        data: split that was evaluated.
        ours: scores of the model.
        theirs: scores of the baseline, or None.
    """
    for direction, ranking in ours.rankings.items():
        (queries, query_groups), (answers, answer_groups) = data.sides(direction)
        query_group, answer_group = query_groups.tolist(), answer_groups.tolist()
        first_of: dict[int, str] = {}
        for group, answer in zip(answer_group, answers, strict=True):
            first_of.setdefault(group, answer)
        image_of = data.image_of_query(direction).tolist()
        right_scores, ranks = ranking.right_score.tolist(), _ranks(ours, theirs, direction)
        belong = None if data.shared is None else data.shared.belong(direction, ranking.indices)
        for i, query in enumerate(queries):
            found = zip(ranking.indices[i].tolist(), ranking.scores[i].tolist(), strict=True)
            results = [
                {"answer": answers[j], "score": score, "is_right": answer_group[j] == query_group[i]}
                for j, score in found
            ]
            for result, belongs in zip(results, [] if belong is None else belong[i].tolist(), strict=False):
                result["is_shared"] = belongs and not result["is_right"]
            yield {
                "direction": direction,
                "query": query,
                "image_id": data.image_ids[image_of[i]],
                "right": first_of[query_group[i]],
                "score": right_scores[i],
                **{name: values[i] for name, values in ranks.items()},
                "results": results,
            }


def _ranks(ours: ModelScores, theirs: ModelScores | None, direction: str) -> dict[str, list[int]]:
    """The columns of `queries.parquet` with ranks."""
    of_models = {"": ours, "baseline_": theirs}
    ranks = {}
    for prefix, scores in of_models.items():
        if scores is not None:
            ranks[f"{prefix}rank"] = scores.rankings[direction].rank.tolist()
            if scores.shared is not None:
                ranks[f"{prefix}shared_rank"] = scores.shared.rankings[direction].rank.tolist()
    return ranks


def table_of(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a report."""
    sides = [("metrics", "intervals", report["model"], ".1f")]
    if "baseline" in report:
        sides += [
            ("baseline_metrics", "baseline_intervals", report["baseline"], ".1f"),
            ("difference", "difference_intervals", "difference", "+.1f"),
        ]
    sources = [(report, "")] + ([(report["shared"], ", shared")] if "shared" in report else [])
    columns = [
        (source[values], source[spans], f"{name}{more}", form)
        for values, spans, name, form in sides
        for source, more in sources
    ]
    rows = []
    for metric in report["metrics"]:
        cells = (_cell(values, spans, metric, form) for values, spans, _, form in columns)
        rows.append([metric.replace("_", " "), *cells])
    return ["", *(name for _, _, name, _ in columns)], rows


def describe_shared(report: dict[str, Any]) -> str | None:
    """What the columns of [`table_of`] called "shared" are; None if there are none."""
    if "shared" not in report:
        return None
    return f"{SHARED_NOTE}: {report['shared']['texts']:,} of {report['texts']:,} texts belong to several images"


def _cell(values: dict[str, float], intervals: dict[str, tuple[float, float]], metric: str, form: str) -> str:
    text = f"{values[metric]:{form}}" if metric in values else ""
    if metric in intervals:
        low, high = intervals[metric]
        text += f" [{low:{form}}, {high:{form}}]"
    return text


def format_report(report: dict[str, Any]) -> str:
    """The report of [`evaluate_model`] as text tables."""
    note = describe_shared(report)
    cut = f", the first {report['truncate_dim']} dimensions" if "truncate_dim" in report else ""
    lines = [
        f"{report['dataset']}, {report['split']}: {report['images']:,} images, {report['texts']:,} texts{cut}",
        *_aligned(*table_of(report)),
        "in brackets: 95 % confidence interval (bootstrap over images)",
        *([] if note is None else [note]),
    ]
    if "by_caption_length" in report:
        lines += ["", "text to image by length of the caption:", *_aligned(*length_table(report))]
    if (probe := report.get("linear_probe")) is not None:
        sizes = f"{probe['train_images']:,} images for training and {probe['test_images']:,} for testing"
        lines += ["", f"linear probe, {probe['dataset']}: {probe['classes']} classes, {sizes}",
                  *_aligned(*probe_table(report)), PROBE_NOTE]  # fmt: skip
    for name, model in (("order_test", "model"), ("baseline_order_test", "baseline")):
        if name in report:
            lines += [
                "",
                f"word order, {report[name]['source']}, {report[model]}:",
                *_aligned(*order_table(report[name])),
            ]
    return "\n".join(lines + ([ORDER_NOTE] if "order_test" in report else []))


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table, the first column to the left."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *rows)
    ]
