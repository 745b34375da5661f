"""`--blend`: the choice of a share, the weights in between, and runs that export them."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from modeling_miniclip import MiniClipModel, UsageError
from modeling_miniclip.training.command_line.check_arguments import BLENDS, blends, chosen_blend
from modeling_miniclip.training.command_line.parsing import keyword_arguments, parse_arguments
from modeling_miniclip.training.finetune.blend import (
    Blend,
    best_blend,
    blend_weights,
    load_plain_weights,
    relative_values,
    weights_to_change,
)
from modeling_miniclip.training.optimizer import clamp_logit_scale
from modeling_miniclip.training.time_limit import rest_of
from tests.helpers.runs import (
    assert_blended,
    assert_same_weights,
    flags,
    metrics_of,
    plain_arguments,
    write_scene_folder,
)
from tests.helpers.towers import tiny_model, with_slow
from tests.test_model import shake
from train_miniclip import main


def arguments_of(blend: Any) -> Any:
    return parse_arguments(["--dataset=a.csv", "--model_name_or_path=m", f"--blend={blend}"])


# --- the choice ------------------------------------------------------------------------------------------------------


def test_shares_include_both_ends() -> None:
    assert BLENDS == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert (blends(arguments_of("auto")), chosen_blend(arguments_of("auto"))) == (BLENDS, None)
    assert (blends(arguments_of(0.25)), chosen_blend(arguments_of(0.25))) == ((0.0, 0.25, 1.0), 0.25)
    assert blends(arguments_of(1)) == (0.0, 1.0)
    assert blends(plain_arguments()) == ()


@pytest.mark.parametrize("blend", ["1.5", "-0.1", "nan", "half", ""])
def test_wrong_shares_are_rejected(blend: str) -> None:
    with pytest.raises(UsageError, match=f"--blend must be auto or a number in .*, not {blend}"):
        arguments_of(blend)


@pytest.mark.parametrize("value", ["auto", 0.5, 1])
def test_recipe_has_a_share_or_auto(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "my.yaml"
    values = {"dataset": "a.csv", "model_name_or_path": "m", "blend": value}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert parse_arguments([f"--recipe={path}"]).blend == str(value)
    assert keyword_arguments(values).blend == str(value)
    path.write_text("blend: [1]\n", encoding="utf-8")
    with pytest.raises(UsageError, match="blend: expected auto, or a number from 0 to 1"):
        parse_arguments([f"--recipe={path}"])


def found(metric: str, *values: tuple[float, ...]) -> list[Blend]:
    """Blends with one metric on the first dataset and, if there is a second number, on the second one."""
    return [
        Blend(share, {metric: value[0]}, {metric: value[1]} if len(value) > 1 else None)
        for share, value in zip((0.0, 0.5, 1.0), values, strict=True)
    ]


@pytest.mark.parametrize(
    ("metric", "values", "share"),
    [
        ("rsum", [(300,), (310,), (305,)], 0.5),
        ("rsum", [(300,), (310,), (310,)], 1.0),  # as little as possible is given up
        ("loss", [(2.0,), (1.0,), (1.5,)], 0.5),
        ("rsum", [(100, 400), (200, 360), (220, 200)], 0.5),  # means 0.727, 0.905, 0.75
        ("rsum", [(100, 400), (120, 390), (400, 100)], 0.5),  # means 0.625, 0.6375, 0.625
        ("text_to_image_median_rank", [(4, 1), (2, 2), (1, 4)], 1.0),  # means 0.625, 0.5, 0.625
        ("rsum", [(0, 0), (0, 0), (0, 0)], 1.0),
    ],
)
def test_best_blend_has_the_best_mean(metric: str, values: list[tuple[float, ...]], share: float) -> None:
    assert best_blend(found(metric, *values), metric) == share


def test_second_dataset_without_the_metric_counts_by_rsum() -> None:
    measured = [
        Blend(0.0, {"zero_shot_top-1": 80.0}, {"rsum": 100.0}),
        Blend(1.0, {"zero_shot_top-1": 90.0}, {"rsum": 50.0}),
    ]
    assert best_blend(measured, "zero_shot_top-1") == 0.0  # means 0.944 and 0.75


def test_values_are_relative_to_the_best_one() -> None:
    assert relative_values([50.0, 100.0, 75.0], "rsum") == [0.5, 1.0, 0.75]
    assert relative_values([2.0, 1.0, 4.0], "loss") == [0.5, 1.0, 0.25]
    assert relative_values([0.0, 0.5], "loss") == [1.0, 0.0]
    assert relative_values([0.0, 0.0], "rsum") == [1.0, 1.0]


# --- the weights -----------------------------------------------------------------------------------------------------


def test_ends_are_exact_and_statistics_are_blended() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    model.text_model.requires_grad_(False)
    before = weights_to_change(model)
    assert not any(name.startswith("text_model") for name in before)
    assert any(name.endswith("running_var") for name in before) and "logit_scale" in before
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shake(model)
    new = model.state_dict()
    for share, expected in ((0.0, old), (1.0, new)):
        mixed = blend_weights(before, new, share)
        assert all(torch.equal(mixed[name], expected[name]) for name in before)
    half = blend_weights(before, new, 0.5)
    assert half.keys() == new.keys()
    for name in before:
        torch.testing.assert_close(half[name], (old[name] + new[name]) / 2)
    load_plain_weights(model, half)
    assert all(torch.equal(tensor, half[name]) for name, tensor in model.state_dict().items())


# --- runs ------------------------------------------------------------------------------------------------------------


def tuning(tiny_run: Path, folder: Path, output_dir: str, **values: Any) -> list[str]:
    start = {"preset": None, "model_name_or_path": tiny_run / "export", "learning_rate": 0.01, "best_metric": "rsum"}
    return flags(folder, output_dir, **start | values)


def lines_of(output_dir: Path, split: str) -> list[dict[str, Any]]:
    return [line for line in metrics_of(output_dir) if line["split"] == split]


@pytest.mark.parametrize("lora", with_slow([{"lora_rank": 2}], [{}]), ids=["adapters", "whole"])
def test_run_exports_weights_in_between(
    lora: dict[str, Any], tiny_run: Path, tmp_path: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if lora:
        pytest.importorskip("peft", reason="PEFT comes with the extra lora")
    best = main(tuning(tiny_run, tmp_path, "plain", **lora))
    export = main(tuning(tiny_run, tmp_path, "blended", blend=0.4, **lora))
    assert_blended(tiny_run / "export", best, export, 0.4, 1e-6)
    run = tmp_path / "blended"
    start, *validations = lines_of(run, "validation")
    measured = lines_of(run, "blend")
    assert [line["share"] for line in measured] == [0.0, 0.4, 1.0]
    chosen = max(validations, key=lambda line: line["rsum"])
    for line, expected in ((measured[0], start), (measured[2], chosen)):
        for name in ("loss", "rsum", "text_to_image_R@1"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4)
    assert lines_of(run, "chosen blend")[0]["share"] == 0.4
    printed, card = capsys.readouterr().out, (export / "README.md").read_text()
    assert "exported: 40% of the best model and 60% of that before training\n" in printed
    assert "### Blend\n" in card and "(40 %)" in card and "chosen on the same images" not in card
    for line, share in zip(measured, ("0", "0.4", "1"), strict=True):
        assert f"\n| {share} | {line['rsum']:.1f} | {line['text_to_image_R@1']:.1f} | " in card
    assert f"rsum, is {measured[1]['rsum']:.1f}" in card


@pytest.mark.slow
def test_auto_takes_the_best_mean_of_both_datasets(tiny_run: Path, tmp_path: Path, without_figures: None) -> None:
    other = write_scene_folder(tmp_path / "other", 40)
    export = main(tuning(tiny_run, tmp_path, "run", blend="auto", retention_dataset=other))
    measured = lines_of(tmp_path / "run", "blend")
    assert [line["share"] for line in measured] == list(BLENDS)
    best = {name: max(line[name] for line in measured) for name in ("rsum", "retained_rsum")}
    score = {line["share"]: sum(line[name] / best[name] for name in best) for line in measured}
    share = lines_of(tmp_path / "run", "chosen blend")[0]["share"]
    assert score[share] == pytest.approx(max(score.values()), rel=1e-5)
    card = (export / "README.md").read_text()
    assert f"({100 * share:.0f} %)" in card and "The share was chosen on the same images" in card
    chosen = next(line for line in measured if line["share"] == share)
    assert f"| this model | {chosen['retained_rsum']:.1f} |" in card
    assert card.index("### Retention") < card.index("### Blend") < card.index("\n## Training\n")
    assert "rsum on the other dataset" in card


@pytest.mark.slow
def test_interrupted_run_is_blended_when_it_is_resumed(
    tiny_run: Path, tmp_path: Path, without_figures: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    main(tuning(tiny_run, tmp_path, "whole", blend=0.5))

    def interrupt_in_step_two(model: MiniClipModel) -> None:
        clamp_logit_scale(model)
        if next(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    steps = iter(range(1, 9))
    with monkeypatch.context() as patch:
        patch.setattr("train_miniclip.clamp_logit_scale", interrupt_in_step_two)
        main(tuning(tiny_run, tmp_path, "parts", blend=0.5))
    assert "not blended with the model before training, as the run was interrupted" in capsys.readouterr().out
    assert not lines_of(tmp_path / "parts", "blend")
    main(tuning(tiny_run, tmp_path, "parts", blend=0.5, resume_from_checkpoint="latest"))
    assert len(lines_of(tmp_path / "parts", "blend")) == 3
    assert_same_weights(tmp_path / "whole" / "export", tmp_path / "parts" / "export", 0)

    main(tuning(tiny_run, tmp_path, "parts", blend=0.5, resume_from_checkpoint="latest"))  # it was finished
    assert_same_weights(tmp_path / "whole" / "export", tmp_path / "parts" / "export", 0)
    with pytest.raises(UsageError, match="cannot change --blend 0.5 -> 0.7"):
        main(tuning(tiny_run, tmp_path, "parts", blend=0.7, resume_from_checkpoint="latest"))


def test_time_limit_leaves_time_for_the_blends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_miniclip.training.time_limit.hard_negatives_of", lambda arguments: None)
    pace = SimpleNamespace(step_seconds=1.0, validations=[2.0], checkpoints=[1.0])
    ends = []
    for blend in (None, "auto"):
        arguments = plain_arguments(model_name_or_path="m", blend=blend)
        run: Any = SimpleNamespace(pace=pace, arguments=arguments, progress=SimpleNamespace(step=3), steps_per_epoch=3)
        ends.append(rest_of(run).end)
    assert ends[1] - ends[0] == 12 * 2.0  # eleven, and the chosen one again
