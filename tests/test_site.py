"""The site: links between its pages, the notebook as a page, names in docstrings, and its navigation.

`make site`, which `.ci/run` runs, builds it; a broken link or reference fails there.
"""

import base64
import importlib.util
import re
from types import ModuleType

import pytest

from tests.helpers.runs import ROOT


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / ".ci" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = hooks()


@pytest.mark.parametrize(
    ("file", "link", "on_site"),
    [
        ("docs/train.md", "[data](data.md#groups)", "[data](data.md#groups)"),
        ("docs/train.md", "[two\nlines](../benchmarks/loss.md)", "[two\nlines](benchmarks/loss.md)"),
        ("docs/train.md", "[`flags`](../configuration/README.md#recipes)", "[`flags`](flags.md#recipes)"),
        ("docs/README.md", "[start](../README.md)", "[start](index.md)"),
        ("docs/reference/README.md", "[flags](../../configuration/README.md)", "[flags](../flags.md)"),
        ("README.md", "[train](docs/train.md), [all](docs/README.md)", "[train](train.md), [all](index.md)"),
        ("README.md", "[a notebook](docs/miniclip.ipynb)", "[a notebook](notebook.md)"),
        ("README.md", "![a [b] c](benchmarks/demo/retrieval.png)", "![a [b] c](benchmarks/demo/retrieval.png)"),
        (".github/SECURITY.md", "[promises](../benchmarks/RELIABILITY.md)", "[promises](benchmarks/RELIABILITY.md)"),
        ("benchmarks/README.md", "![c](demo/curves.png) [s](speed.md)", "![c](demo/curves.png) [s](speed.md)"),
        ("benchmarks/README.md", "[t](../docs/train.md#settings)", "[t](../train.md#settings)"),
        ("README.md", "[licence](LICENSE)", "[licence](https://example.org/mini/blob/main/LICENSE)"),
        ("docs/train.md", "[t](../tests/test_cli.py)", "[t](https://example.org/mini/blob/main/tests/test_cli.py)"),
        ("docs/train.md", "[gone](gone.md) [web](https://a.org/data.md) [here](#time)", None),
        ("docs/train.md", "[out](../../README.md) `rows[0](x)`", None),
    ],
)
def test_links_lead_to_pages_or_the_repository(file: str, link: str, on_site: str | None) -> None:
    assert SITE.site_links(link, file, "https://example.org/mini/") == (link if on_site is None else on_site)


def test_text_of_a_link_remains_without_a_repository() -> None:
    text = SITE.site_links("[licence](LICENSE): [time](docs/train.md)", "README.md", None)
    assert text == "licence: [time](train.md)"


def test_notebook_becomes_markdown_and_pictures() -> None:
    png = b"\x89PNG and more"
    image = {"output_type": "display_data", "data": {"image/png": base64.b64encode(png).decode(), "text/plain": ["x"]}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]},
        {"cell_type": "code", "source": ["a = 1\n", "a"], "outputs": [
            {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]},
            image,
            {"output_type": "display_data", "data": {"text/html": ["<b>1</b>\n", "\n", "<i>2</i>"], "text/plain": ""}},
            {"output_type": "execute_result", "data": {"text/plain": ["1"], "application/json": {"a": 1}}},
        ]},
    ]  # fmt: skip
    text, pictures = SITE.notebook_page({"cells": cells})
    assert text == (
        "# Title\n\nText.\n\n```python\na = 1\na\n```\n\n```text\none\ntwo\n```\n\n"
        "![output of the cell above](notebook/1.png)\n\n<div>\n<b>1</b>\n<i>2</i>\n</div>\n\n```text\n1\n```\n"
    )
    assert pictures == {"notebook/1.png": png}


def test_names_in_docstrings_become_references() -> None:
    paths = {"Match": "modeling_miniclip.search.exact.Match", "ImageIndex": "modeling_miniclip.ImageIndex"}
    html = "[<code>Match</code>]es of [<code>ImageIndex.entries</code>], [<code>other</code>], <code>[B, N]</code>"
    assert SITE.name_links(html, paths) == (
        '<autoref identifier="modeling_miniclip.search.exact.Match"><code>Match</code></autoref>es of '
        '<autoref identifier="modeling_miniclip.ImageIndex.entries"><code>ImageIndex.entries</code></autoref>, '
        "<code>other</code>, <code>[B, N]</code>"
    )


def test_navigation_lists_every_page_once() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", settings.partition("\nnav:\n")[2], re.MULTILINE)
    docs = ROOT / "docs"
    guides = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md") if "notebook-" not in str(path)}
    added = {*SITE.PAGES.values(), "notebook.md", "benchmarks/README.md"}
    assert sorted(listed) == sorted((guides - {"README.md"}) | added)
