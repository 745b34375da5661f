"""Tiny training runs for tests: captioned scenes, a preset of tiny towers, and ways to start a run."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling_miniclip.data.scenes import describe_scene, render, sample_scenes
from modeling_miniclip.training.command_line.arguments import PART_RATES, TrainingArguments
from tests.helpers.towers import PIXELS, TEXT, VISION

ROOT = Path(__file__).resolve().parents[2]


# Values of the flags whose defaults depend on the data and the model, so that a test does not depend on the rules.
PLAIN: dict[str, Any] = {
    "freeze": "none", "frozen_vision_fraction": 0.0, "batch_size": 32, "captions_per_image": 1, "num_train_epochs": 4,
    "head_learning_rate": 1e-3, "vision_learning_rate": 1e-4, "text_learning_rate": 1e-5, "layer_decay": 1.0,
    "weight_decay": 1e-3, "lr_scheduler_type": "plateau", "warmup_steps": 0, "ema_decay": 0.0,
    "best_metric": "loss",
}  # fmt: skip


def plain_arguments(**values: Any) -> TrainingArguments:
    """Arguments with plain values, as for a function that is called after the values have been derived."""
    return TrainingArguments(**PLAIN | values)


def shared_folder() -> Path:
    """Folder of real data and weights, which may not exist: `MINICLIP_SHARED`, else `shared` next to the checkout."""
    return Path(os.environ.get("MINICLIP_SHARED", ROOT.parent / "shared"))


def write_scene_folder(folder: Path, count: int = 26) -> Path:
    """Write `captions.csv` and `Images/` of `count` small scenes with five captions each. Returns the CSV."""
    (folder / "Images").mkdir(parents=True)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "caption"])
        for i, scene in enumerate(sample_scenes(count, seed=3)):
            render(scene, Random(i), PIXELS).save(folder / "Images" / f"{i:03d}.png")
            for caption in describe_scene(scene, Random(i)):
                writer.writerow([i, f"{i:03d}.png", caption])
    return folder / "captions.csv"


def write_preset(folder: Path, **fields: Any) -> Path:
    """Write a preset of the tiny ResNet and DistilBERT of `tests.helpers.towers`. Returns its path."""
    config = {
        "model_type": "miniclip",
        "projection_dim": 16,
        "vision_config": {
            "model_type": "timm_wrapper",
            **VISION["resnet"],
            "pretrained_cfg": {"input_size": [3, PIXELS, PIXELS], "crop_pct": 1.0, "interpolation": "bicubic"},
        },
        "text_config": {"model_type": "distilbert", **TEXT["distilbert"], "max_position_embeddings": 48},
        **fields,
    }
    path = folder / "preset.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def flags(folder: Path, output_dir: str = "run", **values: Any) -> list[str]:
    """Flags of a tiny run in `folder`, where data and preset are written if they do not exist yet.

    None leaves a flag out; a derived one is then derived.
    """
    csv_file = folder / "scenes" / "captions.csv"
    if not csv_file.exists():
        write_scene_folder(folder / "scenes")
        write_preset(folder)
    plain = {name: value for name, value in PLAIN.items() if name not in PART_RATES}
    arguments: dict[str, Any] = plain | {
        "dataset": csv_file,
        "preset": folder / "preset.json",
        "output_dir": folder / output_dir,
        "batch_size": 8,
        "feature_cache_dir": folder / "features",
        "num_train_epochs": 2,
        "validation_fraction": 0.2,
        "num_workers": 0,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    return [f"--{name}={value}" for name, value in (arguments | values).items() if value is not None]


def assert_blended(start: Path, best: Path, export: Path, share: float, tolerance: float) -> None:
    """Check that the weights of an export are those of two others, blended."""
    one, other, mixed = (load_file(folder / "model.safetensors") for folder in (start, best, export))
    assert mixed.keys() == other.keys() == one.keys()
    for name, tensor in mixed.items():
        expected = one[name] + share * (other[name] - one[name]) if tensor.is_floating_point() else other[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=tolerance, msg=name)


def leave_out_figures(patch: pytest.MonkeyPatch) -> None:
    """Let runs only say what they would draw: drawing takes longer than the rest of a tiny run."""

    def write_curves(metrics: list[dict[str, Any]], path: Path, best_step: int | None = None) -> None:
        path.write_text(f"{len(metrics)} lines, best step {best_step}")

    def write_retrieval(run: Any, model: Any, path: Path) -> None:
        path.write_text(f"step {run.progress.best_step}")

    patch.setattr("train_miniclip.draw_curves", write_curves)
    patch.setattr("train_miniclip.draw_retrieval", write_retrieval)


def launch(argv: list[str], processes: int = 1, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run `train_miniclip.py` in a separate process, or in several with `accelerate launch`."""
    line, pipe = command(argv, processes), subprocess.PIPE
    process = subprocess.Popen(
        line, env=environment(), cwd=ROOT, text=True, stdout=pipe, stderr=pipe, start_new_session=True, **options
    )
    try:
        output, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the processes of the launcher, too
        raise
    return subprocess.CompletedProcess(line, process.returncode, output, errors)


def command(argv: list[str], processes: int = 1, script: str = str(ROOT / "train_miniclip.py")) -> list[str]:
    """Command line of a run in one process, or in several with `accelerate launch`."""
    if processes == 1:
        return [sys.executable, script, *argv]
    config = ROOT / "configuration" / "accelerate" / "cpu2.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}"]
    return [*launcher, f"--num_processes={processes}", "--main_process_port=0", script, *argv]


def environment() -> dict[str, str]:
    """Environment of a run: that of this process, with one thread and without network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def assert_same_log(one: Path, other: Path, norms: float = 1e-4) -> None:
    """Check that two runs took the same steps and logged the same values, except for times.

    Args:
        one: output folder of a run.
        other: output folder of another run.
        norms: allowed relative difference of gradient norms, and of the small divergence from a teacher. Sums in
            another order differ in their last bits, which grows during a long run, and shows in these first.
    """
    for expected, found in zip(metrics_of(one), metrics_of(other), strict=True):
        assert found.keys() == expected.keys() and found["split"] == expected["split"]
        for name in found.keys() - {"split", "seconds", "pairs_per_second"}:
            tolerance = norms if name in ("gradient_norm", "teacher_divergence") else 1e-4
            assert found[name] == pytest.approx(expected[name], rel=tolerance), (name, expected["step"])


def assert_same_weights(one: Path, other: Path, tolerance: float) -> None:
    """Check that two exports or checkpoints have the same names, and values that differ by at most `tolerance`."""
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance, msg=name)


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
