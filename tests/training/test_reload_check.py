"""At the end of a run its export is loaded again, and has to embed what the run measured."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_miniclip import MiniClipModel
from modeling_miniclip.errors import ModelError
from modeling_miniclip.training.reports.reload_check import load_checked_export
from modeling_miniclip.training.resuming.checkpoints import ExportedEmbeddings
from modeling_miniclip.training.run import TrainingRun
from tests.helpers.runs import flags
from train_miniclip import main


def test_first_rows_are_kept_with_their_first_captions() -> None:
    kept, images = ExportedEmbeddings(), torch.arange(40.0).view(20, 2)
    image_row = torch.arange(20).repeat_interleave(3)
    kept.record(images, torch.arange(120.0).view(60, 2), image_row)
    restored = ExportedEmbeddings()
    restored.load_state_dict(kept.state_dict())
    assert restored.images is not None and restored.texts is not None
    assert restored.images.tolist() == images[:16].tolist()
    assert restored.texts[:, 0].tolist() == [6.0 * row for row in range(16)]


pytestmark = pytest.mark.usefixtures("without_figures")


def test_wrong_export_ends_the_run_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage_and_check(run: TrainingRun) -> MiniClipModel:
        path = run.export_dir / "model.safetensors"
        right = load_file(path)
        for what, tower in (("images", "visual"), ("captions", "text")):
            wrong = {name: torch.randn_like(value) if name.startswith(f"{tower}_projection") else value
                     for name, value in right.items()}  # fmt: skip
            save_file(wrong, path, {"format": "pt"})
            with pytest.raises(ModelError, match=f"export is wrong: .*embeds validation {what} in another way"):
                load_checked_export(run)
        incomplete = {name: value for name, value in right.items() if "projection" not in name}
        save_file(incomplete, path, {"format": "pt"})
        return load_checked_export(run)

    monkeypatch.setattr("train_miniclip.load_checked_export", damage_and_check)
    with pytest.raises(ModelError, match=r"export is wrong: .*lacks weights.*weights are in the checkpoints"):
        main(flags(tmp_path, max_steps=1))


def test_resumed_run_checks_the_export_of_its_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is exported after the first epoch, so that what its export embeds comes from the checkpoint."""
    run: dict[str, Any] = {"num_train_epochs": 2, "max_steps": 4}
    monkeypatch.setattr("train_miniclip.is_better", lambda metric, value, best: best is None)
    main(flags(tmp_path, **run))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    main(flags(tmp_path, resume_from_checkpoint="latest", **run))

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004", ignore_errors=True)
    weights = tmp_path / "run" / "checkpoints" / "step-00000003" / "export" / "model.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="export is wrong"):
        main(flags(tmp_path, resume_from_checkpoint="latest", **run))
