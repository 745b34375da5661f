"""A run from tar archives that goes on with other numbers of processes within an epoch."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from modeling_miniclip import load_captions
from tests.helpers.forks import train_in_processes
from tests.helpers.runs import assert_same_log, flags
from train_miniclip import main

pytestmark = pytest.mark.usefixtures("without_figures")


def write_tars(folder: Path, csv_file: Path, count: int = 6) -> str:
    """Write a captioned folder as archives; returns the pattern of their names."""
    folder.mkdir()
    rows = load_captions(csv_file, validation_fraction=0.2)["train"]
    for shard in range(count):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in rows.select(range(shard, len(rows), count)):
                name = row["image_id"]
                captions = "\n".join(row["captions"]).encode()
                for member, content in (
                    (name, (csv_file.parent / "Images" / name).read_bytes()),
                    (f"{Path(name).stem}.txt", captions),
                ):
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return f"{folder}/{{0..{count - 1}}}.tar"


@pytest.mark.long
@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_run_from_archives_changes_its_number_of_processes(tmp_path: Path, shuffle: str) -> None:
    flags(tmp_path)
    same: dict[str, Any] = {
        "dataset": write_tars(tmp_path / "tars", tmp_path / "scenes" / "captions.csv"),
        "shuffle": shuffle, "freeze_batch_norm": True, "dropout": 0, "checkpointing_steps": 2,
    }  # fmt: skip
    main(flags(tmp_path, "whole", **same))
    main(flags(tmp_path, "parts", max_steps=2, **same))  # of three steps per epoch
    two = {"max_steps": 4, "num_workers": 1, "resume_from_checkpoint": "latest"}
    train_in_processes(flags(tmp_path, "parts", **two, **same), 2, tmp_path / "log")
    main(flags(tmp_path, "parts", resume_from_checkpoint="latest", **same))
    assert_same_log(tmp_path / "whole", tmp_path / "parts")
