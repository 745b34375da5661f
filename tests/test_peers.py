"""What the page of the comparison with other libraries says, and what its sides have in common."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_page  # type: ignore[import-not-found]

    return peer_page


def turns(part: str, number: str, **sides: tuple[float, ...]) -> list[dict[str, Any]]:
    """Lines of a part; in the names of sides, `_5` stands for five captions and `_best` for the fastest settings."""
    names = {side: side.replace("_5", ", 5 captions").replace("_best", ", best") for side in sides}
    return [
        {"group": part, "side": names[side], "turn": turn, number: value}
        for side, values in sides.items()
        for turn, value in enumerate(values)
    ]


def ratios(page: ModuleType, lines: list[dict[str, Any]]) -> list[list[str]]:
    """Best peer, ratio, range and target of each row."""
    return [[cell.strip() for cell in row.split("|")[2:-1]] for row in page.compared(lines).splitlines()]


def test_ratios_are_those_to_the_best_peer_within_each_turn(page: ModuleType) -> None:
    lines = turns(
        "train", "images_per_second", plain=(2.0, 5.0, 4.0), open_clip=(3.0, 3.0, 9.0), package=(12.0, 10.0, 16.0)
    )
    assert ratios(page, lines) == [["plain loop", "4.00", "2.00 to 6.00", "3"]]  # medians 4 and 3; 12/2, 10/5, 16/4


def test_without_better_settings_the_package_is_at_its_best_as_it_starts(page: ModuleType) -> None:
    sides = {"plain": (2.0,), "plain_best": (4.0,), "package": (8.0,)}
    assert [row[1] for row in ratios(page, turns("encode", "images_per_second", **sides))] == ["4.00", "2.00"]
    sides["package_best"] = (10.0,)
    assert [row[1] for row in ratios(page, turns("encode", "images_per_second", **sides))] == ["4.00", "2.50"]


def test_five_captions_are_compared_with_the_pairs_of_a_peers_step(page: ModuleType) -> None:
    lines = turns("train", "pairs_per_second", sentence_transformers_best=(4.0,), package=(9.0,), package_5=(40.0,))
    assert ratios(page, lines) == [["sentence-transformers, at its best", "10.00", "10.00 to 10.00", "5"]]


def test_the_best_memory_is_the_least(page: ModuleType) -> None:
    lines = turns("memory", "gib", plain=(5.0,), open_clip=(4.0,), package=(4.5,), package_5=(6.0,))
    assert [row[:2] for row in ratios(page, lines)] == [["open_clip", "1.12"], ["open_clip", "1.50"]]


def test_steps_become_pairs_and_distinct_images(page: ModuleType) -> None:
    assert page.distinct(1) == pytest.approx(1)
    assert page.distinct(2) == pytest.approx(2 - 4 / 29_999)  # the other four captions of the first image
    assert page.distinct(30_000) == pytest.approx(6_000)
    half = {"steps_per_second": 0.5}
    for part, side, pairs, images in (
        ("train", "open_clip, best", 16, page.distinct(32) / 2),
        ("train", "package", 16, 16),
        ("train", "package, 5 captions, best", 80, 16),
        ("texts", "plain", 20, page.distinct(40) / 2),
        ("texts", "package, best", 20, 4),
        ("trials", "train, package: num_workers=1", 16, 16),
    ):
        found = page.rates(part, side, half)
        assert (found["pairs_per_second"], found["images_per_second"]) == pytest.approx((pairs, images)), side
    assert page.rates("encode", "package", {"images_per_second": 3.0}) == {"images_per_second": 3.0}


def test_the_fastest_trial_that_worked_is_a_peers_best(page: ModuleType) -> None:
    import peers  # type: ignore[import-not-found]

    tried = (("", 5.0), ("num_workers=1", 6.0), ("channels_last", 7.0), ("channels_last compile", None))
    lines = [
        {"group": "trials", "side": page.trial("train", "plain", settings), "turn": 0, "settings": settings}
        | ({"error": "no compiler"} if rate is None else {"images_per_second": rate})
        for settings, rate in tried
    ]
    sides = peers.group_of("train", lines).sides
    assert sides["plain, best"][1:] == ["train", "plain", "--allocator", "--set", "channels_last", "--batch_size=32"]
    assert sides["plain"][1:] == ["train", "plain", "--set", "--batch_size=32"]
    assert "package, best" not in sides and sides["package, 5 captions"][-1] == "--captions=5"
    assert peers.group_of("texts", lines).sides["package"][-2:] == ["--batch_size=8", "--captions=5"]
    rows = [row.split("|")[-3:-1] for row in page.trials_table(lines).splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["5.0", ""],
        ["6.0", ""],
        ["7.0", "chosen"],
        ["failed", ""],
    ]


def test_the_page_has_a_row_for_each_measured_side(page: ModuleType) -> None:
    lines = turns("train", "pairs_per_second", plain=(1.0, 3.0, 2.0), package=(6.0, 6.0, 6.0))
    lines += [{"group": "quality", "side": "plain, best", "rsum": 250.0, "steps": 300, "minutes": 20.0}]
    facts = dict.fromkeys(("processor", "cores", "torch", "commit", "open_clip_torch", "sentence_transformers"), "X")
    text = page.page([*lines, {"group": "encode", "side": "plain", "turn": 0, "others_percent": 12.0}], facts)
    assert "ranges of 3 turns" in text and "took 12 %" in text and "## Recall after 20 minutes" in text
    assert "| plain loop | 2.0 (1.0 to 3.0) |" in text and "| plain loop, at its best | 250.0 | 300 |" in text
    assert "open_clip |" not in text


def test_a_clock_ends_training_after_its_steps_or_its_time(page: ModuleType) -> None:
    import peer_sides  # type: ignore[import-not-found]

    clock = peer_sides.Clock()
    with pytest.raises(peer_sides.Done):
        for _ in range(100):
            clock.end_step()
    clock.ends = [5.0, 7.0, 8.0, 9.0, 11.0]
    assert clock.numbers() == {
        "import_seconds": 0.0, "first_step_seconds": 5.0, "steps_per_second": 0.75, "steps": 5
    }  # fmt: skip
    with pytest.raises(peer_sides.Done):
        peer_sides.Clock(limit=0.0).end_step()


def test_training_that_ends_early_is_an_error(page: ModuleType) -> None:
    import peer_sides

    peer_sides.Clock(limit=100.0, ends=[1.0, 95.0]).check_end()
    peer_sides.Clock(ends=[1.0]).check_end()
    peer_sides.Clock(limit=float("inf"), ends=[1.0]).check_end()
    with pytest.raises(SystemExit, match="after 94 of 100 s: it needs more pairs"):
        peer_sides.Clock(limit=100.0, ends=[1.0, 94.0]).check_end()


def test_parts_need_those_that_they_build_on(page: ModuleType) -> None:
    import peers

    trials, train = [{"group": "trials"}], [{"group": "trials"}, {"group": "train"}]
    peers.check_order(peers.PARTS, [])
    peers.check_order(["trials", "train", "quality"], [])
    peers.check_order(["encode", "memory"], trials)
    peers.check_order(["quality"], train)
    with pytest.raises(SystemExit, match="part encode needs the lines of part trials: pass --only trials encode"):
        peers.check_order(["encode", "trials"], [])
    with pytest.raises(SystemExit, match="part quality needs the lines of part train"):
        peers.check_order(["quality"], trials)


def test_batch_norms_keep_their_statistics_in_training_mode(page: ModuleType) -> None:
    import peer_sides

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    peer_sides.freeze_batch_norm(model)
    model.train()(torch.randn(2, 3, 5, 5)).sum().backward()
    assert model.training and torch.equal(model[1].running_mean, torch.zeros(4))
    assert model[1].weight.grad is not None
