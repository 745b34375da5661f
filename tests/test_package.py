"""The package as a whole: public names, what importing it does, what it depends on, its command."""

import ast
import importlib
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import modeling_miniclip
import train_miniclip
from modeling_miniclip.errors import UsageError
from tests.helpers.runs import ROOT

MODULES = sorted((ROOT / "modeling_miniclip").rglob("*.py"))
SCRIPTS = [*MODULES, ROOT / "train_miniclip.py"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> list[tuple[str, list[str], int]]:
    """Module, imported names and level of every import of a file, wherever it is."""
    found: list[tuple[str, list[str], int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, [], 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", [alias.name for alias in node.names], node.level))
    return found


def test_every_public_name_has_a_docstring() -> None:
    for name in modeling_miniclip.__all__:
        value = getattr(modeling_miniclip, name)
        assert name in dir(modeling_miniclip)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'modeling_miniclip' has no attribute 'MiniClipModl'"):
        modeling_miniclip.MiniClipModl  # noqa: B018
    assert not hasattr(modeling_miniclip, "MiniClipModl")


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse((ROOT / "modeling_miniclip" / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {
        alias.asname: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert declared == modeling_miniclip._MODULE_OF


def test_nothing_private_of_transformers_is_imported() -> None:
    for path in SCRIPTS:
        for module, names, level in imports(path):
            if level == 0 and module.split(".")[0] == "transformers":
                private = [part for part in [*module.split("."), *names] if part.startswith("_")]
                assert not private, f"{path}: {module}: {private}"


def test_declared_dependencies_equal_imports() -> None:
    used = {module.split(".")[0] for path in SCRIPTS for module, _, level in imports(path) if level == 0}
    used -= {*sys.stdlib_module_names, "modeling_miniclip", "train_miniclip"}
    known = {"faiss": ["faiss-cpu"], "sklearn": ["scikit-learn"]}  # also where they are not installed
    distributions = known | dict(packages_distributions())
    needed = {distributions.get(module, [module])[0].lower().replace("_", "-") for module in used}

    def names(requirements: list[str]) -> set[str]:
        lines = [line.lower().replace("_", "-") for line in requirements]
        return {name for line in lines for name in re.findall(r"^[a-z0-9-]+", line)}

    declared = names(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        needed -= names(extra)
    # transformers loads these by name: its own image processors, and the weights' files.
    indirect = {"torchvision", "safetensors"}
    # Where their settings are needed, they come with a package that is declared.
    comes_with = {"aiohttp": "fsspec[http]", "opencv-python-headless": "albumentations"}
    assert all(re.search(rf"^{re.escape(other)}\W", "\n".join(PROJECT["project"]["dependencies"]), re.MULTILINE)
               for other in comes_with.values())  # fmt: skip
    assert needed <= declared | set(comes_with)
    assert declared - needed <= indirect


def test_every_dependency_is_listed_with_its_reason() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \| \S", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    declared = [re.split(r"[>=\[]", line)[0] for line in PROJECT["project"]["dependencies"]]
    assert sorted(listed) == sorted(declared)


def test_constraints_satisfy_the_requirements() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tried = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    tried = {name.lower().replace("_", "-"): version for name, version in tried.items()}
    extras = PROJECT["project"]["optional-dependencies"].values()
    for line in (*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)):
        requirement = Requirement(line)
        if requirement.name != "miniclip":
            assert requirement.specifier.contains(tried[requirement.name.lower().replace("_", "-")]), line


def test_nothing_installs_the_package_from_an_index_that_lacks_it() -> None:
    """Until the first release, `miniclip` is installed from a checkout, and libraries under their own names."""
    texts = [*SCRIPTS, ROOT / "README.md", ROOT / "model_card.md", ROOT / "CITATION.cff"]
    texts += [path for folder in ("docs", "configuration", "benchmarks") for path in (ROOT / folder).rglob("*.*")]
    for path in texts:
        if path.suffix in (".cff", ".ipynb", ".md", ".py", ".sh", ".yaml"):
            named = re.search(r"pip install[^`#\n]*\bminiclip\b", path.read_text(encoding="utf-8"))
            assert named is None, f"{path}: {named[0] if named else None}"


def test_the_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", modeling_miniclip.__version__)
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "modeling_miniclip/__init__.py"


def test_the_package_is_typed() -> None:
    assert (ROOT / "modeling_miniclip" / "py.typed").is_file()


def test_the_console_scripts_can_be_called() -> None:
    for target in PROJECT["project"]["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    assert PROJECT["project"]["scripts"]["train-miniclip"] == "train_miniclip:cli"


@pytest.mark.parametrize(
    ("argv", "message", "code"),
    [
        (["--batchsize", "3"], "error: unknown flag '--batchsize'; did you mean --batch_size?", 2),
        (
            ["--recipe", "nothing"],
            "error: nothing: neither a file nor a name in the package",
            2,
        ),
        (["--dataset", "no.csv", "--output_dir", "out"], "error: no.csv: no such file", 1),
    ],
)
def test_user_error_is_one_line_with_exit_code(
    argv: list[str],
    message: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_miniclip.py", *argv])
    assert train_miniclip.cli() == code
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train-miniclip", "--debug", "--batch_size", "0"])
    with pytest.raises(UsageError, match="--batch_size must be at least 1"):
        train_miniclip.cli()
