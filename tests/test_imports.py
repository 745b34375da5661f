"""The imports of the package point one way, and there is no cycle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

PACKAGE = "modeling_miniclip"
# Each layer may import its own files and those of the layers before it.
LAYERS = (
    "root", "utils", "data", "inference", "evaluation", "hub", "clips", "training", "search", "api", "entry points",
)  # fmt: skip
# On top of everything: they start the commands, or run one.
ENTRY_POINTS = {f"{PACKAGE}.cli", f"{PACKAGE}.__main__", f"{PACKAGE}.retrieval_metric", f"{PACKAGE}.api.train"}
ENTRY_POINTS |= {"train_miniclip"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in (*(ROOT / PACKAGE).rglob("*.py"), ROOT / "train_miniclip.py")}


def imported_modules(name: str, source: str, is_package: bool, modules: set[str]) -> set[str]:
    """Modules of the project that a file imports, inside functions and for type checkers too.

    Args:
        name: dotted name of the importing module.
        source: its code.
        is_package: whether it is the `__init__` of a package.
        modules: dotted names of all modules of the project.
    """
    package = name if is_package else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
    return found & modules


def layer(name: str) -> int:
    """Place of a module in `LAYERS`."""
    if name in ENTRY_POINTS:
        return LAYERS.index("entry points")
    folder = name.split(".")[1] if name.count(".") > 1 or name.removeprefix(f"{PACKAGE}.") in LAYERS else "root"
    return LAYERS.index(folder)


# The package's own `__init__` names its public functions for type checkers and imports them when they are first used.
IMPORTS = {
    name: imported_modules(name, path.read_text(encoding="utf-8"), path.name == "__init__.py", set(FILES))
    for name, path in FILES.items()
    if name != PACKAGE
}


@pytest.mark.parametrize("name", sorted(IMPORTS))
def test_imports_point_to_lower_layers_only(name: str) -> None:
    above = {other for other in IMPORTS[name] - {PACKAGE} if layer(other) > layer(name)}
    assert not above, f"{name} ({LAYERS[layer(name)]}) imports {sorted(above)}"


def test_there_is_no_import_cycle() -> None:
    try:
        order = list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")
    assert set(order) >= set(IMPORTS)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..search import index", "m.search.index"),
        ("def f():\n    from ..search.index import ImageIndex", "m.search.index"),
        ("import m.search.index", "m.search.index"),
        ("from m.search import index as other", "m.search.index"),
        ("from .captions import load", "m.data.captions"),
        ("from . import captions", "m.data.captions"),
        ("if TYPE_CHECKING:\n    from ..search.index import ImageIndex", "m.search.index"),
    ],
)
def test_every_kind_of_import_is_seen(source: str, expected: str) -> None:
    modules = {"m", "m.data", "m.data.check", "m.data.captions", "m.search", "m.search.index"}
    assert expected in imported_modules("m.data.check", source, False, modules)


def test_every_folder_describes_its_files_and_folders() -> None:
    for init in (ROOT / PACKAGE).glob("*/**/__init__.py"):
        tree = ast.parse(init.read_text(encoding="utf-8"))
        lines = (ast.get_docstring(tree) or "").splitlines()
        assert len(tree.body) == 1, f"{init} holds more than a docstring"
        described = {line.split(": ")[0] for line in lines if ".py: " in line or "/: " in line}
        files = {path.name for path in init.parent.glob("*.py")} - {"__init__.py"}
        folders = {f"{path.parent.name}/" for path in init.parent.glob("*/__init__.py")}
        assert described == files | folders, init
        assert len(files) <= 15, f"{init.parent} holds {len(files)} files"
