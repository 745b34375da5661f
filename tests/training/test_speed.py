"""The comparison that `benchmarks/speed.py` makes is fair: both sides do the same work. Nothing is timed here."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_miniclip
from modeling_miniclip.training.command_line.parsing import parse_arguments
from tests.helpers.runs import PLAIN, ROOT, write_scene_folder
from tests.helpers.towers import PIXELS, save_towers


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_plain_loop_and_package_agree_on_a_loss(benchmark: Any, tmp_path: Path) -> None:
    vision, text = save_towers(tmp_path)
    argv: dict[str, Any] = PLAIN | {
        "dataset": write_scene_folder(tmp_path / "scenes", 8),
        "vision_model": vision,
        "text_model": text,
        "augmentation": "[]",
        "batch_size": 6,
        "validation_fraction": 0.25,
        "dropout": 0,
        "projection_dim": 256,
        "image_size": PIXELS,
        "num_workers": 0,
        "output_dir": tmp_path / "run",
    }
    argv["output_dir"].mkdir()
    arguments = parse_arguments([f"--{name}={value}" for name, value in argv.items()])
    plain = benchmark("plain_loop").PlainLoop(arguments, captions_per_image=1)
    run = train_miniclip.prepare(arguments)
    run.unwrapped_model.load_state_dict(plain.model.state_dict())
    rows = run.train_loader.rows
    all_captions = rows.captions_of
    rows.captions_of = lambda indices: [captions[:1] for captions in all_captions(indices)]  # not drawn
    (batch,) = run.train_loader
    ours = train_miniclip.compute_loss_and_gradients(run, batch)
    (theirs,) = plain.train_epoch()
    assert len(batch["image_id"]) == len(plain.loader.dataset) == 6
    assert ours.item() == pytest.approx(theirs, rel=1e-4)
    assert sum(p.requires_grad for p in run.unwrapped_model.parameters()) == sum(
        p.requires_grad for p in plain.model.parameters()
    )


def test_committed_table_is_made_of_the_recorded_measurements(benchmark: Any) -> None:
    speed = benchmark("speed")
    lines = [json.loads(line) for line in speed.RESULTS.read_text(encoding="utf-8").splitlines()]
    table = speed.table(lines)
    assert table and table in speed.RESULTS.with_suffix(".md").read_text(encoding="utf-8")


def test_ratios_are_taken_within_a_turn(benchmark: Any) -> None:
    speed = benchmark("speed")
    numbers = {"load_bare": (100, 50, 10), "load_package": (95, 40, 20)}  # ratios 0.95, 0.8, 2
    lines = [
        {"group": "loader", "side": side, "turn": turn, "images_per_second": number}
        for side, values in numbers.items()
        for turn, number in enumerate(values)
    ]
    (row,) = speed.table(lines).splitlines()
    assert row.split(" | ")[1:4] == ["50", "40", "0.95 x"]


def test_waiting_is_measured_after_the_warm_up(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workloads = benchmark("workloads")
    watch = workloads.Stopwatch(torch.utils.data.DataLoader(range(3)))
    watch.requested, watch.waited = [0.0, 9.0, 10.0, 12.0, 15.0], [9.0, 0.5, 0.5, 1.0, 7.0]
    monkeypatch.setattr(workloads, "WARM_UP", 1)
    rates = watch.rates(images=6, captions=5)  # three steps in six seconds, two of them spent waiting
    assert rates == pytest.approx({"pairs_per_second": 15, "images_per_second": 3, "waiting_percent": 100 * 2 / 6})
