"""Exports open under older releases, from a folder and from the Hub, with the newest one's results.

`make test-versions` makes the environments and runs this. `VERSIONS` selects some of the releases.
"""

import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling_miniclip import export
from modeling_miniclip.hub.renew_code import renew_code
from tests.helpers.hubs import add_repository, local_hub
from tests.helpers.runs import ROOT
from tests.helpers.towers import CLIP, SIGLIP, tiny_model, tiny_processor

SCRIPT = ROOT / ".ci" / "open_export.py"
VERSIONS = os.environ["VERSIONS"].split()
# (image tower, text tower, fields): every family, pooling and loss.
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("resnet", "distilbert", {"projection_depth": 1}),
    ("vit", "roberta", {"text_pooling": "mean"}),
    ("swin", "t5", {"loss_type": "sigmoid"}),
    ("efficientnet", "bert", {}),
    ("convnext", "mpnet", {}),
    ("resnet", "modernbert", {}),
    ("vit", "gpt2", {}),
    CLIP,
    SIGLIP,
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: Any) -> list[Path]:
    """Exports, of two models if there is only one release to test."""
    folder, models = tmp_path_factory.mktemp("exports"), MODELS if len(VERSIONS) > 1 else MODELS[:2]
    for i, (vision, text, fields) in enumerate(models):
        torch.manual_seed(i)
        export(tiny_model(vision, text, **fields), tiny_processor(), folder / f"{vision}-{text}")
    if len(VERSIONS) > 1:
        renew_code(ROOT / "tests" / "fixtures" / "before_folders" / "export", folder / "renewed")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def hub(folders: list[Path], tmp_path_factory: Any) -> Any:
    """A Hub on loopback with the first export."""
    with local_hub(tmp_path_factory.mktemp("hub")) as hub:
        add_repository(hub, "alice/clip", {path.name: path for path in folders[0].iterdir()})
        hub.cdn_url = hub.cdn_url.replace("127.0.0.1", "localhost")  # on another host, as the real Hub's
        yield hub


@pytest.fixture(scope="session")
def expected(folders: list[Path]) -> dict[str, np.ndarray]:
    """What the Auto classes and pipelines return here, with the newest releases and the package's own code."""
    outputs_of = runpy.run_path(str(SCRIPT))["outputs_of"]
    found = [outputs_of(str(folder)) for folder in folders]
    return {f"{i}/{name}": value for i, outputs in enumerate([*found, found[0]]) for name, value in outputs.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_export_gives_the_newest_releases_results(version, folders, hub, expected, tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    python = ROOT / ".venv-versions" / version / "bin" / "python"
    command = [python, SCRIPT, tmp_path / "found.npz", *folders, "alice/clip"]
    env |= hub.client_env(tmp_path / "home") | {"NO_PROXY": "*", "no_proxy": "*"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "found.npz") as found:
        assert set(found.files) == expected.keys()
        for name in found.files:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
