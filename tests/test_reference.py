"""The API reference: every public name is in it, with its arguments, result and errors."""

import ast
import builtins
import inspect
import re
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import pytest

import modeling_miniclip
from modeling_miniclip import errors
from tests.helpers.runs import ROOT

PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
NAMES = [name for name in modeling_miniclip.__all__ if name != "__version__"]
SECTION = re.compile(r"^(Args|Attributes|Examples|Raises|Returns|Yields):\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)


def described_names() -> list[str]:
    """Names that the pages describe, without the package."""
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    return [name for text in texts for name in re.findall(r"^::: modeling_miniclip\.(\S+)$", text, re.MULTILINE)]


def sections(docstring: str) -> dict[str, str]:
    """Sections of a docstring by title."""
    return {title: dedent(body) for title, body in SECTION.findall(docstring)}


def items(section: str) -> list[str]:
    """Names before the colon of each item of a section."""
    return re.findall(r"^(\*{0,2}[\w.]+):", section, re.MULTILINE)


def functions_of(name: str) -> Iterator[tuple[str, Any]]:
    """A public function, or the public methods that a class defines itself."""
    value = getattr(modeling_miniclip, name)
    if not inspect.isclass(value):
        yield name, value
        return
    for method, member in vars(value).items():
        function = member.__func__ if isinstance(member, classmethod) else member
        is_own = getattr(function, "__module__", "").startswith("modeling_miniclip.")  # and not added by a decorator
        if inspect.isfunction(function) and is_own and not method.startswith("_"):
            yield f"{name}.{method}", inspect.unwrap(function)


FUNCTIONS = dict(pair for name in NAMES for pair in functions_of(name))
CLASSES = [name for name in NAMES if inspect.isclass(getattr(modeling_miniclip, name))]


def parameters_of(function: Any) -> list[str]:
    """Parameters as a docstring writes them: `name`, `*name` or `**name`, without `self` and `cls`."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = inspect.signature(function).parameters.values()
    return [stars.get(each.kind, "") + each.name for each in found if each.name not in ("self", "cls")]


def test_sections_of_a_docstring_are_found() -> None:
    found = sections("Add.\n\nArgs:\n    a: one,\n        and more.\n    **b: rest.\n\nReturns:\n    Their sum.\n")
    assert items(found["Args"]) == ["a", "**b"] and found["Returns"].strip() == "Their sum."


def test_every_public_name_is_on_one_page() -> None:
    described = described_names()
    assert len(described) == len(set(described))
    assert set(NAMES) <= set(described)


def test_list_of_the_reference_is_that_of_its_pages() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
    rows = re.findall(r"^\| \[[^]]+\]\((\w+\.md)\) \| (.*) \|$", texts.pop("README.md"), re.MULTILINE)
    listed = {page: re.findall(r"`(\w+)`", names) for page, names in rows}
    described = r"^::: modeling_miniclip\.(\w+)$"
    assert listed == {page: re.findall(described, text, re.MULTILINE) for page, text in texts.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_result_and_errors_are_documented(name: str) -> None:
    function = FUNCTIONS[name]
    docstring = inspect.cleandoc(function.__doc__ or "")
    found = sections(docstring)
    listed = items(found.get("Args", ""))
    if hasattr(function, "__signature__"):  # names the flags one by one, and so does the docstring, after `**flags`
        listed.remove("**flags")
    assert listed == parameters_of(function)
    result = inspect.signature(function).return_annotation
    assert result in (None, "None") or found.keys() & {"Returns", "Yields"}
    raised = {
        node.exc.func.id
        for node in ast.walk(ast.parse(dedent(inspect.getsource(function))))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    known = vars(builtins) | vars(errors)
    documented = items(found.get("Raises", ""))
    for error in raised & known.keys():
        parents = {parent.__name__ for parent in known[error].__mro__}
        assert parents & set(documented), f"{error} is not in Raises"


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_of_classes_are_documented(name: str) -> None:
    value = getattr(modeling_miniclip, name)
    if issubclass(value, Exception) and "__init__" not in vars(value):
        return
    found = sections(inspect.cleandoc(value.__doc__ or ""))
    wanted = [parameter for parameter in parameters_of(value.__init__) if parameter != "**kwargs"]
    assert sorted(items(found["Args"])) == sorted(wanted)
