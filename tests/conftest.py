"""Fixtures for all tests: real data where it exists, small captioned images, and a tiny export, run and index.

`tiny_towers`, `tiny_export`, `tiny_run` and `tiny_index` are built once per session, shared by all workers, and
READ-ONLY: copy them (`shutil.copytree`) before you write. A test that changes one of them fails the session.
"""

import csv
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # tests never use the network; those with a local Hub override this
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests themselves run in parallel
# The last bits of a matrix product must not depend on where in memory the weights are, mapped from a file or not.
os.environ.setdefault("MKL_CBWR", "AUTO")
# Imports and collection make a million objects, of which none becomes garbage; see `pytest_collection_finish`.
gc.disable()

import pytest  # noqa: E402

# No heavy library is imported here: the process that only hands out the tests to the workers loads this file too.
from tests.helpers.forks import clean_process  # noqa: E402, F401  (a fixture)
from tests.helpers.session import shared_once  # noqa: E402

# These fork, kill or limit processes as only POSIX does.
POSIX = (
    "test_full_disks.py", "data/test_killed_caches.py", "training/test_checkpoints.py", "training/test_endings.py",
    "training/test_forks.py", "training/test_fuzz_resume.py", "training/test_heartbeat.py", "training/test_kills.py",
    "training/test_machines.py", "training/test_output_dir.py", "utils/test_commands.py",
)  # fmt: skip
collect_ignore = [] if hasattr(os, "fork") else list(POSIX)


def fsync_without_waiting(fd: Any) -> None:
    """Only check the file descriptor: no test cuts the power, so none has to wait for the disk."""
    os.fstat(fd if isinstance(fd, int) else fd.fileno())


os.fsync = fsync_without_waiting


def pytest_configure(config: pytest.Config) -> None:
    """Give the session its own caches, and let each worker fork its warm process before it imports the package."""
    if not hasattr(config, "workerinput"):  # the workers inherit it
        home = tempfile.mkdtemp(prefix="hf-home-")
        os.environ["HF_HOME"] = home
        config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    elif hasattr(os, "fork"):
        from tests.helpers.warm_process import fork_warm_process

        fork_warm_process()


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, which would look at a million objects each time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and weights: `MINICLIP_SHARED`, else `../shared` next to the checkout."""
    from tests.helpers.runs import shared_folder

    folder = shared_folder()
    if not (folder / "flickr8k" / "captions.csv").is_file():
        pytest.skip(f"no shared data at {folder}: set MINICLIP_SHARED")
    return folder


@pytest.fixture(scope="session")
def tiny_towers(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """Folders of a pretrained ResNet (timm) and DistilBERT (with tokenizer). Read-only."""
    from tests.helpers.towers import save_towers

    for folder in shared_once(request, "towers", save_towers):
        yield folder / "vision-resnet", folder / "text-distilbert"


@pytest.fixture(scope="session")
def tiny_export(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A finished export of a tiny model (ResNet, DistilBERT, random weights): model, processor, card. Read-only."""
    from tests.helpers.indexes import write_model

    for folder in shared_once(request, "export", lambda folder: write_model(folder / "export")):
        yield folder / "export"


@pytest.fixture(scope="session")
def tiny_run(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Output folder of a finished run of two epochs: checkpoints, `metrics.jsonl`, figures, export. Read-only.

    Next to it are its data, `scenes/captions.csv` (21 scenes to train on, 5 for validation), and `preset.json`.
    """

    def train(folder: Path) -> None:
        from tests.helpers.runs import flags
        from train_miniclip import main

        main(flags(folder))

    for folder in shared_once(request, "training", train):
        yield folder / "run"


@pytest.fixture(scope="session")
def tiny_index(request: pytest.FixtureRequest, tiny_export: Path) -> Iterator[Path]:
    """Index of the six images in the folder `photos` next to it, made with `tiny_export`. Read-only."""
    from modeling_miniclip import update_index
    from tests.helpers.indexes import write_pictures

    def index(folder: Path) -> None:
        write_pictures(folder / "photos", "a.png b.png c.png sub/d.png sub/e.png f.png")
        update_index(folder / "index", [folder / "photos"], tiny_export, progress=False)

    for folder in shared_once(request, "search", index):
        yield folder / "index"


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw nothing."""
    from tests.helpers.runs import leave_out_figures

    leave_out_figures(monkeypatch)


@pytest.fixture
def without_finish(monkeypatch: pytest.MonkeyPatch, without_figures: None) -> None:
    """Runs in this process draw nothing, and do not load their export again to check it."""
    monkeypatch.setattr("train_miniclip.load_checked_export", lambda run: None)


@pytest.fixture
def captioned_folder(tmp_path: Path) -> Path:
    """`captions.csv` with `id,image,caption` and `Images/` with four pictures of one colour each."""
    from PIL import Image

    from tests.helpers.towers import CAPTIONS

    folder = tmp_path / "captioned"
    (folder / "Images").mkdir(parents=True)
    colours = ["red", "yellow", "gray", "blue"]
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "caption"])
        number = 0
        for i, (captions, colour) in enumerate(zip(CAPTIONS, colours, strict=True)):
            Image.new("RGB", (40 + 4 * i, 36), colour).save(folder / "Images" / f"{i}.png")
            for caption in captions:
                writer.writerow([number, f"{i}.png", caption])
                number += 1
    return folder
