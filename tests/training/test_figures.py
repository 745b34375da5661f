"""Curves of a run, and the captions chosen for its picture of retrieved images."""

import json
import warnings

import pytest
from datasets import Dataset

from modeling_miniclip.evaluation.metrics import METRIC_NAMES
from modeling_miniclip.training.reports.figures import draw_curves, example_queries, read_metrics
from tests.helpers.pixels import has_color, picture


def validation(step: int, **values: float) -> dict:
    metrics = {"loss": 3.0 - step / 100, **{name: min(90.0, 10.0 + step) for name in METRIC_NAMES}}
    return {"step": step, "epoch": step / 10, "split": "validation", **metrics, **values}


def training(step: int, **values: float) -> dict:
    rates = {f"{name}_learning_rate": 1e-3 / step for name in ("vision", "text", "heads")}
    return {"step": step, "epoch": step / 10, "split": "train", "loss": 2.0, "logit_scale": 14.3, **rates, **values}


@pytest.fixture(autouse=True)
def no_warning_of_matplotlib():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a legend without lines, a scale without positive values
        warnings.simplefilter("ignore", DeprecationWarning)  # of what matplotlib itself calls
        yield


@pytest.mark.parametrize(
    "metrics",
    [
        [line for step in range(1, 60) for line in (training(step), validation(step))],
        [validation(5)],
        [training(5)],
        [validation(5), validation(10)],
        [training(5), validation(5)],
        [training(step, vision_learning_rate=0.0, text_learning_rate=0.0, head_learning_rate=0.0) for step in (1, 2)],
        [training(1), {key: value for key, value in training(2).items() if key != "logit_scale"}],
        [validation(1, **dict.fromkeys(METRIC_NAMES, 0.0))],
        [],
    ],
    ids=["usual", "one_validation", "one_step", "no_training", "one_of_each", "rates_of_zero", "without_scale",
         "nothing_found", "empty"],
)  # fmt: skip
def test_curves_are_drawn_whatever_was_logged(tmp_path, metrics):
    draw_curves(metrics, tmp_path / "curves.png", best_step=5)
    pixels = picture(tmp_path / "curves.png")
    assert pixels.shape == (770, 1320, 3)
    assert (pixels < 250).any()


@pytest.mark.parametrize(("line", "color"), [(validation(5), (221, 107, 32)), (training(5), (128, 90, 213))])
def test_a_single_point_is_seen(tmp_path, line, color):
    draw_curves([], tmp_path / "none.png")
    draw_curves([line], tmp_path / "one.png")
    none, one = picture(tmp_path / "none.png"), picture(tmp_path / "one.png")
    assert has_color(one, color, 8) and not has_color(none, color, 1)


def test_the_exported_step_is_marked(tmp_path):
    metrics = [training(5), validation(5), training(10), validation(10)]
    for name, best_step in (("without", None), ("with", 10)):
        draw_curves(metrics, tmp_path / f"{name}.png", best_step)
    green = [(pixels[..., 1] > pixels[..., 0] + 50.0) & (pixels[..., 1] > pixels[..., 2] + 30.0)
             for pixels in (picture(tmp_path / "with.png"), picture(tmp_path / "without.png"))]  # fmt: skip
    assert green[0].any(axis=1).mean() > 0.35 and not green[1].any()


def test_metrics_are_read_line_by_line(tmp_path):
    lines = [training(1), validation(1, loss=0.1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


def test_queries_are_spread_over_the_split():
    split = Dataset.from_dict({"captions": [[f"first {i}", "second"] for i in range(10)]})
    assert example_queries(split, 5) == [(i, f"first {i}") for i in (0, 2, 4, 6, 8)]
    assert example_queries(split.select([0, 1]), 5) == [(0, "first 0"), (1, "first 1")]


def test_second_dataset_and_blends_have_panels_of_their_own(tmp_path):
    retention = [{**validation(step), "split": "retention"} for step in (0, 5)]
    blends = [{"step": 5, "split": "blend", "share": share, "rsum": 300 + share, "retained_rsum": 200 - share}
              for share in (0.0, 0.5, 1.0)]  # fmt: skip
    chosen = [{"step": 5, "split": "chosen blend", "share": 0.5}]
    right = {}
    for name, lines in (("blends", blends), ("both", [*retention, *blends, *chosen])):
        draw_curves([training(5), validation(5), *lines], tmp_path / "curves.png", best_step=5)
        pixels = picture(tmp_path / "curves.png")
        assert pixels.shape == (770, 1980, 3)
        upper, lower = pixels[:385, 1450:], pixels[385:, 1450:]  # of the third column
        right[name] = [bool((half < 200).any()) for half in (upper, lower)]
    assert right == {"blends": [False, True], "both": [True, True]}
