"""docs/miniclip.ipynb: its code is valid, its stored outputs are small, and it runs from top to bottom."""

import ast
import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest

import modeling_miniclip
from modeling_miniclip.training.command_line.arguments import TrainingArguments
from modeling_miniclip.training.command_line.parsing import keyword_arguments
from tests.helpers.runs import ROOT

NOTEBOOK = ROOT / "docs" / "miniclip.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def sources() -> list[str]:
    return ["".join(cell["source"]) for cell in code_cells()]


def test_stored_outputs_are_small_and_show_an_image() -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    outputs = [output for cell in code_cells() for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert max(len(output.get("data", {}).get("image/jpeg", "")) for output in outputs) > 20_000
    assert str(ROOT.parent) not in json.dumps(outputs) and "/home/" not in json.dumps(outputs)


def test_names_are_defined_before_they_are_used() -> None:
    known = set(dir(builtins))
    for source in sources():
        nodes = list(ast.walk(ast.parse(source)))
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "modeling_miniclip":
                assert {alias.name for alias in node.names} <= set(modeling_miniclip.__all__)
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {alias.asname or alias.name for alias in node.names}
        names = [node for node in nodes if isinstance(node, ast.Name)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        assert {node.id for node in names} <= known


def test_keywords_of_both_datasets_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[TrainingArguments] = []

    def train(dataset: str, output_dir: str, **keywords: Any) -> None:
        started.append(keyword_arguments({"dataset": dataset, "output_dir": output_dir, **keywords}))

    monkeypatch.setattr(modeling_miniclip, "train", train)
    (choice,) = [source for source in sources() if "OPTIONS =" in source]
    (training,) = [source for source in sources() if "train(DATASET" in source]
    for cell in (choice, choice.replace("\n# ", "\n")):  # as it is, and as a reader edits it to use their own images
        exec(f"{cell}\n{training}", {})
    assert [run.dataset for run in started] == [["scenes"], ["captions.csv"]]
    assert [run.time_limit for run in started] == [None, "20m"]


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # 2 steps per epoch instead of 24: every cell runs, in seconds instead of minutes
        cell.source = cell.source.replace("3000", "256")
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "notebook-found.jpg").is_file()
    assert (tmp_path / "notebook-run" / "export" / "model.safetensors").is_file()
