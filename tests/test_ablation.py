"""What benchmarks that train record, and their tables."""

import importlib
from pathlib import Path
from random import Random
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent.parent / "benchmarks"
with pytest.MonkeyPatch.context() as patch:  # its scripts import each other
    patch.syspath_prepend(str(HERE))
    import conversions
    import distillation
    import finetune
    import hard_negatives
    import short_embeddings
    from ablation import EXPERIMENTS, Experiment, difference, table
    from missing_runs import record_missing, recorded


def test_differences_are_paired_by_seed() -> None:
    theirs = {0: 300.0, 1: 310.0, 2: 290.0}
    # differences 1, 2 and 3: mean 2, standard error 0.577, t of two degrees of freedom 4.303
    assert difference({0: 301.0, 1: 312.0, 2: 293.0}, theirs) == ("+2.0 [-0.5, +4.5]", "no")
    assert difference({2: 292.9, 1: 313.0, 0: 303.1, 7: 0.0}, theirs) == ("+3.0 [+2.8, +3.2]", "yes")
    assert difference({0: 290.0}, theirs) == ("-10.0", "unknown") and difference({9: 1.0}, theirs) == ("", "unknown")


def test_table_compares_each_variant_with_the_first() -> None:
    def line(rsum: float, seed: int, **settings: float) -> dict[str, float]:
        recalls = {f"{d}_R@{k}": 1.0 for d in ("text_to_image", "image_to_text") for k in (1, 10)}
        return {**settings, "seed": seed, "rsum": rsum, "epoch": 1.0, **recalls}

    experiment = Experiment("Title", "Text.", {}, [({}, 2), ({"lr": 0.5}, 2), ({"lr": 0.1}, 1)])
    lines = [line(300, 0), line(310, 1), line(303.1, 0, lr=0.5), line(312.9, 1, lr=0.5)]
    rows = [row.split(" | ")[:5] for row in table(experiment, lines).splitlines() if row.startswith("| ")][2:]
    assert rows == [
        ["| unchanged", "2", "305.0 ± 7.1", "", ""],
        ["| `lr` 0.5", "2", "308.0 ± 6.9", "+3.0 [+1.7, +4.3]", "yes"],
    ]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_recorded_tables_are_those_of_their_runs(name: str) -> None:
    page = (HERE / f"{name}.md").read_text(encoding="utf-8")
    assert page == table(EXPERIMENTS[name], recorded(HERE / f"{name}.jsonl"))


@pytest.mark.parametrize("script", [conversions, distillation, finetune, short_embeddings], ids=lambda x: x.__name__)
def test_pages_have_the_table_of_the_recorded_runs(script: Any) -> None:
    lines = recorded(HERE / f"{script.__name__}.jsonl")
    write = getattr(script, "page", None) or script.table
    assert lines and write(lines) in (HERE / f"{script.__name__}.md").read_text(encoding="utf-8")


def test_equal_captions_are_replaced_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    script = importlib.import_module("equal_captions")
    captions = [[f"caption {i} of {row}" for i in range(5)] for row in range(30)]
    changed = script.replace_captions(captions, Random(0))
    pairs = [(a, b) for one, other in zip(captions, changed, strict=True) for a, b in zip(one, other, strict=True)]
    assert sum(a != b for a, b in pairs) == 50 and {b for a, b in pairs if a != b} <= set(script.PHRASES)
    assert changed == script.replace_captions(captions, Random(0))
    values = {("negatives", 0): 300.0, ("negatives", 1): 310.0, ("pairs", 0): 303.1, ("pairs", 1): 312.9}
    lines = [{"variant": variant, "seed": seed, **dict.fromkeys(script.COLUMNS, rsum)}
             for (variant, seed), rsum in values.items()]  # fmt: skip
    rows = [row.split(" | ")[:3] for row in script.table(lines).splitlines()][2:]
    assert rows == [
        ["| equal captions are negatives", "2", "305.0 ± 7.1"],
        ["| equal captions are pairs", "2", "308.0 ± 6.9"],
        ["| difference", "2", "+3.0 [+1.7, +4.3]"],
    ]


def test_only_missing_runs_are_measured_and_recorded(tmp_path: Path) -> None:
    path, measured = tmp_path / "runs.jsonl", []

    def measure(run: dict[str, Any]) -> dict[str, Any]:
        measured.append(run)
        if run == {"variant": "b", "seed": 1}:
            raise KeyboardInterrupt  # as if stopped by hand
        return {"rsum": len(measured)}

    runs = [{"variant": variant, "seed": seed} for seed in (0, 1) for variant in ("a", "b")]
    with pytest.raises(KeyboardInterrupt):
        record_missing(path, runs, measure)
    record_missing(path, runs[:3], measure)
    assert measured == runs and recorded(path) == [{**run, "rsum": i} for i, run in enumerate(runs[:3], 1)]

    by_flags = tmp_path / "flags.jsonl"

    def same(line: dict[str, Any], run: dict[str, Any]) -> bool:
        return {name: value for name, value in line.items() if name != "rsum"} == run

    record_missing(by_flags, [{"lr": 1, "seed": 0}, {"seed": 0}], lambda run: {"rsum": 0}, same)
    assert len(recorded(by_flags)) == 2  # the unchanged run is not taken for one with other flags


def test_hard_negatives_are_compared_with_captions_alone() -> None:
    def line(variant: str, seed: int, rsum: float, *right: float) -> dict[str, Any]:
        kinds = {kind: {"pairs": 9, "right_image": value, "wrong_image": 50.0}
                 for kind, value in zip(hard_negatives.SWAP_KINDS, right, strict=True)}  # fmt: skip
        return {"variant": variant, "seed": seed, "rsum": rsum, "order": kinds}

    lines = [line("before", 0, 350, 60, 61, 62), line("captions alone", 0, 351, 60, 60, 60)]
    lines.append(line("with hard negatives", 0, 349.5, 75, 72, 66.5))
    rows = [row.strip("| ").split(" | ") for row in hard_negatives.table(lines).splitlines()[2:]]
    assert rows == [
        ["before", "1", "350.0", "60.0 / 50.0", "61.0 / 50.0", "62.0 / 50.0"],
        ["captions alone", "1", "351.0", "60.0 / 50.0", "60.0 / 50.0", "60.0 / 50.0"],
        ["with hard negatives", "1", "349.5", "75.0 / 50.0", "72.0 / 50.0", "66.5 / 50.0"],
        ["gain", "", "-1.5", "+15.0", "+12.0", "+6.5"],
    ]
