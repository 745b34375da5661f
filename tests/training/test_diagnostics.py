"""Each problem is reported in one line with its cause; a run that learns causes no warnings."""

import csv
import math
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from modeling_miniclip import MiniClipError
from modeling_miniclip.data.loading.pair_keys import NO_KEY
from modeling_miniclip.loss_miniclip import symmetric_contrastive_loss
from modeling_miniclip.training.command_line.parsing import parse_arguments
from modeling_miniclip.training.loss.global_loss import global_contrastive_loss
from modeling_miniclip.training.loss.pair_counts import PairCounts, count_pairs, plain_counts
from modeling_miniclip.training.reports import diagnostics
from modeling_miniclip.training.reports.diagnostics import (
    Diagnosis,
    above_chance,
    chance_loss,
    diagnose_captions,
    diagnose_collapse,
    diagnose_loss,
    diagnose_temperature,
    floor_loss,
    linear_alignment_z,
    mean_cosine,
)
from modeling_miniclip.training.reports.figures import read_metrics
from modeling_miniclip.training.reports.overfit import judge_overfit, least_loss, row_keys
from tests.helpers.runs import ROOT, flags, launch, write_preset, write_scene_folder
from train_miniclip import cli, main

pytestmark = pytest.mark.usefixtures("without_finish")


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pairs(images: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Image embeddings, two captions of each, which are the image's with noise, and their owners."""
    image_embeds = unit(images, 16, seed=seed)
    owner = torch.arange(images).repeat_interleave(2)
    return image_embeds, normalize(image_embeds[owner] + noise * unit(2 * images, 16, seed=seed + 1), dim=-1), owner


# --- the loss of guessing, and the least one ------------------------------------------------------------------------


LOSSES = ["softmax_sum", "softmax_mean", "sigmoid"]


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("captions", [1, 3])
def test_chance_loss_is_that_of_equal_embeddings(captions: int, loss_type: str) -> None:
    images = 6
    image_id = torch.arange(images)
    same = torch.ones(1, 4) / 2
    best_bias = -math.log(images - 1) - 20.0  # one pair in six is right
    owner = image_id.repeat_interleave(captions)
    rows = same.expand(images, 4), same.expand(len(owner), 4)
    loss = symmetric_contrastive_loss(*rows, 20.0, image_id, owner, loss_type, best_bias)
    assert chance_loss(plain_counts(images, images * captions), loss_type) == pytest.approx(loss.item(), rel=1e-5)


# Texts 0 and 1, of images 0 and 1, are equal. Text 4 is a negative, and equals text 2, a caption of image 2.
SHARED = {
    "image_keys": torch.tensor([[2**62], [2**62], [2**62 + 1]]),
    "text_keys": torch.tensor([[2**62], [2**62], [2**62 + 1], [NO_KEY], [2**62 + 1]]),
    "is_negative": torch.tensor([False, False, False, False, True]),
}
SHARED_IDS = torch.arange(3), torch.tensor([0, 1, 2, 2, 0])
# Texts belong to 2, 2, 1 and 1 images, each image to 2 texts; the images choose among 5, 5 and 4 texts.
SHARED_COUNTS = PairCounts(3, 4, 14, 6, math.log(2) / 2, math.log(2), (2 * math.log(5) + math.log(4)) / 3)


@pytest.mark.parametrize("tile", [None, 1, 2])
def test_pairs_of_shared_captions_are_counted_by_hand(tile: int | None) -> None:
    found = count_pairs(*SHARED_IDS, **SHARED, tile=tile)
    assert list(vars(found).values()) == pytest.approx(list(vars(SHARED_COUNTS).values()), rel=1e-6)
    plain = count_pairs(torch.arange(3), torch.tensor([0, 0, 1, 1, 2, 2]), tile=tile)
    assert list(vars(plain).values()) == pytest.approx(list(vars(plain_counts(3, 6)).values()), abs=1e-6)
    filled = count_pairs(torch.tensor([0, -1]), torch.tensor([0, -1, 0]), tile=tile)  # rows that are ignored
    assert list(vars(filled).values()) == pytest.approx(list(vars(plain_counts(1, 2)).values()), abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_chance_loss_knows_shared_captions_and_negatives(loss_type: str) -> None:
    same = torch.ones(1, 4) / 2
    best_bias = torch.tensor([math.log(6 / 8) - 20.0])  # 6 of 14 pairs are right
    rows = same.expand(3, 4), same.expand(5, 4), torch.tensor([20.0])
    loss = global_contrastive_loss(*rows, *SHARED_IDS, loss_type, best_bias, **SHARED)
    assert chance_loss(SHARED_COUNTS, loss_type) == pytest.approx(loss.item(), rel=1e-5)


def test_floor_is_reached_by_perfect_embeddings_alone() -> None:
    # Images 0 and 1 have equal captions: the best that a text can do is to give each of them a half.
    ids = torch.arange(3), torch.arange(3)
    keys = {name: torch.tensor([[2**62], [2**62], [NO_KEY]]) for name in ("image_keys", "text_keys")}
    rows = torch.eye(3)[[0, 0, 1]], torch.eye(3)[[0, 0, 1]], torch.tensor([100.0])
    counts = count_pairs(*ids, **keys)
    for loss_type, expected in (("softmax_sum", 0.0), ("softmax_mean", 2 / 3 * math.log(2))):
        assert floor_loss(counts, loss_type) == pytest.approx(expected, abs=1e-6)
        assert global_contrastive_loss(*rows, *ids, loss_type, **keys).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES[:2])
@pytest.mark.parametrize(
    ("image_key", "text_key", "expected"),
    [
        ("abc", "uvw", 0.0),  # of [0, 1, 2], one caption each
        ("aab", "uvw", 2 * math.log(2) / 3),  # two equal pictures: neither they nor their texts can be distinguished
        ("abc", "uuw", 2 * math.log(2) / 3),
        ("aaa", "uuu", math.log(3)),
        ("aaa", "uvw", math.log(3)),
    ],
)
def test_least_loss_with_equal_rows_worked_by_hand(
    image_key: str, text_key: str, expected: float, loss_type: str
) -> None:
    found = least_loss([0, 1, 2], [0, 1, 2], list(image_key), list(text_key), loss_type)
    assert found == pytest.approx(expected)


def test_least_loss_with_several_captions_worked_by_hand() -> None:
    owner = [0, 0, 1, 1, 2, 2]
    for texts in ("uvwxyz", "uuwxyz"):
        assert least_loss([0, 1, 2], owner, list("abc"), list(texts), "softmax_mean") == pytest.approx(math.log(2) / 2)
        assert least_loss([0, 1, 2], owner, list("abc"), list(texts), "softmax_sum") == pytest.approx(0)
    # A text that two images share: each image has one of its own besides, but the text cannot tell the two apart.
    shared = least_loss([0, 1, 2], owner, list("abc"), list("uvuxyz"), "softmax_sum")
    assert shared == pytest.approx(2 * math.log(2) / 6 / 2, abs=1e-3)
    assert least_loss([0, 1], [0, 1], list("aa"), list("uv"), "sigmoid") == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_optimizer_reaches_the_least_loss_from_above(loss_type: str) -> None:
    """Free embeddings, one a different row: 5 images, two of them equal; 8 texts, of which two pairs are equal."""
    image_key, text_key = [0, 0, 1, 2, 3], [0, 1, 2, 0, 3, 3, 4, 5]
    image_id, owner = torch.arange(5), torch.tensor([0, 0, 1, 2, 3, 3, 4, 4])
    least = least_loss(image_id.tolist(), owner.tolist(), image_key, text_key, loss_type)
    images, texts = (unit(n, 16, seed=n).requires_grad_() for n in (4, 6))
    bias = torch.tensor(-6.0, requires_grad=True)
    optimizer = torch.optim.Adam([images, texts, bias], lr=0.05)
    for _ in range(500):
        rows = normalize(images, dim=-1)[image_key], normalize(texts, dim=-1)[text_key]
        loss = symmetric_contrastive_loss(*rows, 14.0, image_id, owner, loss_type, bias)
        assert loss.item() >= least - 1e-4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert least > 0.1 and loss.item() == pytest.approx(least, abs=5e-3)


def test_row_keys_are_equal_for_equal_rows_alone() -> None:
    rows = torch.tensor([[1, 2], [1, 3], [1, 2]])
    keys = row_keys(list(rows)).tolist()
    assert keys[0] == keys[2] != keys[1]


# --- warnings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "has_learned", "message"),
    [
        (3.47, True, "stuck at that of guessing, 3.466.*too high"),
        (3.47, False, "stuck.*too low, or too much is frozen"),
        (3.9, True, "3.900, is above that of guessing.*too high"),
        (3.9, False, "above that of guessing.*too low"),
        (3.3, True, None),
        (0.1, False, None),
    ],
)
def test_loss_of_guessing_is_reported(loss: float, has_learned: bool, message: str | None) -> None:
    line = diagnose_loss(loss, math.log(32), 1.0, has_learned)
    assert line is None if message is None else re.search(message, str(line))


@pytest.mark.parametrize(
    ("scale", "loss", "message"),
    [(100.0, 3.0, "reached its bound 100"), (100.0, 0.3, None), (0.5, 3.4, "exploded"), (14.3, 3.4, None)],
)
def test_extreme_temperature_is_reported_unless_the_loss_is_low(
    scale: float, loss: float, message: str | None
) -> None:
    line = diagnose_temperature(scale, 100.0, loss, math.log(32))
    assert line is None if message is None else message in str(line)


def test_captions_that_many_images_share_cause_no_wrong_warnings() -> None:
    # 256 images, ten captions: in `softmax_mean` no model is below ln 25.6 = 3.24, and guessing costs ln 256 = 5.55.
    floor, chance = math.log(25.6), math.log(256)
    assert diagnose_temperature(100.0, 100.0, 3.3, chance, floor) is None
    assert diagnose_temperature(100.0, 100.0, 5.0, chance, floor) is not None
    assert diagnose_loss(5.0, chance, 1.0, floor=floor) is None
    # In `softmax_sum`, guessing costs ln 10, not ln 256.
    assert diagnose_loss(math.log(10), math.log(10), 1.0) is not None
    # All images have the same caption: there is nothing to learn.
    assert diagnose_loss(0.0, 0.0, 0.0) is None and diagnose_temperature(100.0, 100.0, 0.0, 0.0) is None


def test_mean_cosine_is_that_of_all_pairs() -> None:
    embeds = unit(7, 5)
    expected = torch.tensor([embeds[i] @ embeds[j] for i in range(7) for j in range(7) if i != j]).mean()
    assert mean_cosine(embeds) == pytest.approx(expected.item(), abs=1e-6)


def test_collapsed_side_is_named() -> None:
    spread, collapsed = unit(50, 16), normalize(torch.ones(50, 16) + 0.1 * unit(50, 16), dim=-1)
    assert diagnose_collapse(spread, spread) is None
    assert "image embeddings have collapsed" in str(diagnose_collapse(collapsed, spread))
    assert "--text_learning_rate or --head_learning_rate is too high" in str(diagnose_collapse(spread, collapsed))
    assert "is too low: nothing has changed" in str(diagnose_collapse(spread, collapsed, has_learned=False))


def test_above_chance_is_a_standard_score() -> None:
    scores = [above_chance(unit(200, 16, seed=i), unit(200, 16, seed=i + 500), torch.arange(200)) for i in range(100)]
    assert abs(sum(scores) / 100) < 0.4
    assert torch.tensor(scores).std().item() == pytest.approx(1, abs=0.25)
    images, texts, owner = pairs(200, 0.5)
    assert above_chance(texts, images, owner) > 20


def test_probe_finds_relations_only_in_unshuffled_captions() -> None:
    images, texts, owner = pairs(600, 1.0)
    turned = texts @ torch.linalg.qr(unit(16, 16, seed=9))[0]  # a model whose sides know nothing of each other
    constant = torch.full((1, 16), 0.25)
    images, turned = (normalize(constant + 1e-3 * x, dim=-1) for x in (images, turned))  # and are all but collapsed
    assert linear_alignment_z(images, turned, owner) > 10
    shuffled = torch.randperm(600, generator=torch.Generator().manual_seed(0))[owner]
    assert abs(linear_alignment_z(images, turned, shuffled)) < 3
    assert diagnose_captions(images, turned, owner, None) is None
    assert "likely not the data but the learning rates" in str(diagnose_captions(images, turned, owner, 1.0))
    assert "captions are unrelated" in str(diagnose_captions(images, turned, shuffled, 1.0))


def test_captions_are_judged_by_enough_images_only() -> None:
    images, texts, owner = pairs(100, 0.5)
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))[owner]
    assert diagnose_captions(images, texts, owner, 0.3) is None
    assert diagnose_captions(images, texts, shuffled, 0.95) is None, "100 are not enough"
    assert "although the training loss fell" in str(diagnose_captions(images, texts, shuffled, 0.3))
    few = shuffled[:20] % 10
    assert diagnose_captions(images[:10], texts[:20], few, 0.3) is None


def test_each_warning_appears_once_and_not_too_early() -> None:
    lines: list[str] = []
    diagnosis = Diagnosis(lines.append, warmup_steps=20, largest_scale=100.0)
    values = {"loss": 3.466, "gradient_norm": 1.0, "logit_scale": 100.0}
    for step in range(10, 120, 10):
        diagnosis.after_steps(step, values, 10, math.log(32))
    assert lines == []
    for step in range(120, 200, 10):
        diagnosis.after_steps(step, values, 10, math.log(32))
    assert len(lines) == 2 and "stuck" in lines[0] and "too low" in lines[0] and "bound" in lines[1]


@pytest.mark.parametrize("recorded", ["demo", "heads", "lit", "heads_then_full", "full"])
def test_recorded_runs_cause_no_warnings(recorded: str) -> None:
    lines: list[str] = []
    own = ROOT / "benchmarks" / recorded / "arguments.yaml"
    arguments = parse_arguments(["--recipe", str(own), "--dataset", "any"])
    images, captions = arguments.batch_size, arguments.captions_per_image
    diagnosis = Diagnosis(lines.append, arguments.warmup_steps, 100.0)
    steps = 0
    for line in read_metrics(ROOT / "benchmarks" / recorded / "metrics.jsonl"):
        if line["split"] == "train":
            steps += 1
            chance = chance_loss(plain_counts(images, images * captions), "softmax_sum")
            diagnosis.after_steps(line["step"], line, 10, chance)
    assert steps >= 15 and lines == []


def test_loss_is_judged_by_many_steps() -> None:
    lines: list[str] = []
    diagnosis = Diagnosis(lines.append, 0, 100.0)
    rng = random.Random(0)
    for step in range(1, 400):  # 6 % below that of guessing; single batches are above it
        values = {"loss": 3.26 + rng.gauss(0, 0.2), "gradient_norm": 1.0, "logit_scale": 14.0}
        diagnosis.after_steps(step, values, 1, math.log(32))
    assert lines == []


# --- the verdict on one batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "least", "reached", "cause"),
    [
        ([3.5, 1.0, 0.01], 0.0, True, "it reaches zero"),
        ([3.5, 1.0, 0.37], 0.3466, True, "below 0.3466"),
        ([3.5, 1.0, 0.37], 0.0, False, "part of the way"),
        ([3.5, 3.49, 3.48], 0.0, False, "too low, or too much is frozen"),
        ([3.5, 9.0, 3.47], 0.0, False, "too high and all embeddings became the same"),
        ([3.9, 3.47, 3.47], 0.0, False, "all embeddings became the same"),
        ([3.5, 1.0, 2.5], 0.0, False, "rises again"),
        ([3.5, 3.47, 3.47], 3.46, False, "all the same"),
    ],
)
def test_verdict_on_one_batch(losses: list[float], least: float, reached: bool, cause: str) -> None:
    found, line = judge_overfit(losses, least, math.log(32))
    assert found == reached and cause in line


# --- real runs ------------------------------------------------------------------------------------------------------


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]


def test_too_high_rates_are_reported_as_stuck_and_collapsed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "PATIENCE", 12)
    monkeypatch.setattr(diagnostics, "WINDOW", 12)
    main(flags(tmp_path, batch_size=3, num_train_epochs=3, logging_steps=3,
               best_metric="image_to_text_R@1", learning_rate=0.3))  # fmt: skip
    lines = warnings_of(capsys)
    assert any(re.search("that of guessing, 1.09.*too high", line) for line in lines), lines
    assert any("embeddings have collapsed" in line for line in lines), lines
    assert len(lines) == len({line[:30] for line in lines}), "each is reported once"


def test_nan_run_keeps_its_last_good_checkpoint_and_export(tmp_path: Path) -> None:
    main(flags(tmp_path, num_train_epochs=1, learning_rate=1e-4))
    # A run of its own, from the model of the first: in a resumed one AdamW's state would soften the first steps.
    argv = flags(tmp_path, "nan", num_train_epochs=3, preset=None, model_name_or_path=tmp_path / "run" / "export",
                 logging_steps=100, checkpointing_steps=1, learning_rate=1e30)  # fmt: skip
    with pytest.raises(MiniClipError, match="the (weights|training loss) became nan.*--head_learning_rate"):
        main(argv)
    for path in (tmp_path / "nan").rglob("model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


@pytest.mark.parametrize(
    ("captions", "equal"), [pytest.param(1, False, marks=pytest.mark.slow), (2, False), (1, True)]
)
def test_overfit_batch_reports_success_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, captions: int, equal: bool
) -> None:
    argv = flags(tmp_path, overfit_batch=True, captions_per_image=captions, head_learning_rate=3e-3, projection_dim=32,
                 loss_type="softmax_mean")  # fmt: skip
    if equal:
        pictures = sorted((tmp_path / "scenes" / "Images").iterdir())
        for picture in pictures:
            picture.write_bytes(pictures[0].read_bytes())
    monkeypatch.setattr("sys.argv", ["train_miniclip.py", *argv])
    assert cli() == int(equal)
    out, error = capsys.readouterr()
    assert ("all the same" in error) if equal else ("it reaches zero" in out)
    assert (f"below {math.log(2) / 2:.4f}" in out) == (captions == 2)
    assert not (tmp_path / "run").exists()


def test_overfit_batch_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(MiniClipError, match="does not reach zero.*rates are too low"):
        main(flags(tmp_path, overfit_batch=True, max_steps=5, learning_rate=1e-9))


@pytest.mark.slow
def test_two_processes_overfit_the_batch_that_one_does(tmp_path: Path) -> None:
    result = launch(flags(tmp_path, overfit_batch=True, captions_per_image=2, head_learning_rate=3e-3,
                          loss_type="softmax_mean"), processes=2)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "no model can be below 0.3466" in result.stdout and "one batch of 8 images" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_only_shuffled_captions_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shuffled: bool
) -> None:
    table = write_scene_folder(tmp_path / "scenes", 220)
    write_preset(tmp_path)
    if shuffled:
        header, *rows = csv.reader(table.read_text(encoding="utf-8").splitlines())
        images = sorted({row[1] for row in rows})
        other = dict(zip(images, random.Random(0).sample(images, len(images)), strict=True))
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *([number, other[image], text] for number, image, text in rows)])
    main(flags(tmp_path, validation_fraction=0.5, batch_size=10, captions_per_image=5, augmentation="[]",
               num_train_epochs=30, head_learning_rate=3e-3, best_metric="rsum"))  # fmt: skip
    lines = warnings_of(capsys)
    if shuffled:
        assert "although the training loss fell: likely captions are unrelated" in lines[-1], lines
        assert not any("collapsed" in line or "temperature" in line for line in lines), lines
    else:
        assert lines == []
