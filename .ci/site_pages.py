"""Hooks of MkDocs for `make site`: pages from outside `docs/`, links between pages, the notebook, names in docstrings.

The documents link to files of the repository, such as `../benchmarks/speed.md` and `../tests/test_cli.py`. On the
site, a link to a page leads to that page. A link to any other file leads to the repository, if `REPO_URL` says where
that is; otherwise its text remains.
"""

import base64
import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "docs/miniclip.ipynb"
# Pages from outside `docs/`, and where they are on the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    ".github/SECURITY.md": "security.md",
    "configuration/README.md": "flags.md",
}
BENCHMARK = re.compile(r"benchmarks/(\w+\.md|\w+/\w+\.png)")  # pages and pictures, under the same names
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
NAME = re.compile(r"\[<code>([\w.]+)</code>\](?![\[(])")
DESCRIBED = re.compile(r"^::: (\S+)$", re.MULTILINE)


# --- links ----------------------------------------------------------------------------------------------------------


def place_on_site(file: str) -> str | None:
    """Where a file of the repository is on the site; None if it is not there.

    Args:
        file: path in the repository, with `/`.
    """
    if file in ("docs", "docs/README.md"):  # the list of the guides; on the site, that is the navigation
        return "index.md"
    if file == NOTEBOOK:
        return "notebook.md"
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return PAGES.get(file) or (file if BENCHMARK.fullmatch(file) else None)


def site_links(markdown: str, file: str, repository: str | None) -> str:
    """The text of a page with the links of the site.

    Args:
        markdown: text of the page.
        file: its path in the repository.
        repository: address of the repository, or None.

    Returns:
        The text. A link to a file that does not exist stays as it is, and MkDocs reports it.
    """
    here = posixpath.dirname(place_on_site(file) or file)

    def link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        named = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
        if ":" in target or named.startswith("..") or not (ROOT / named).exists():
            return found[0]
        place = place_on_site(named)
        if place is not None:
            return f"{mark}[{text}]({posixpath.relpath(place, here or '.')}{anchor})"
        return f"[{text}]({repository.rstrip('/')}/blob/main/{named}{anchor})" if repository else text

    return LINK.sub(link, markdown)


def name_links(html: str, paths: Mapping[str, str]) -> str:
    """The page with names in docstrings, such as `Match` in brackets, as links to their description.

    Args:
        html: page as mkdocstrings made it.
        paths: dotted path of each described name; a name that is not described loses its brackets.
    """

    def link(found: re.Match[str]) -> str:
        name, *rest = found[1].split(".")
        if name not in paths:
            return f"<code>{found[1]}</code>"
        return f'<autoref identifier="{".".join([paths[name], *rest])}"><code>{found[1]}</code></autoref>'

    return NAME.sub(link, html)


# --- the notebook ---------------------------------------------------------------------------------------------------


def notebook_page(notebook: Mapping[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs as Markdown, and the pictures in it.

    Args:
        notebook: content of an `.ipynb` file.

    Returns:
        The text, and PNG files by their path on the site.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            shown = output.get("data", {}).items()
            data = {kind: "".join(value) for kind, value in shown if not kind.startswith("application/")}
            if "image/png" in data:
                name = f"notebook/{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![output of the cell above]({name})")
            elif "text/html" in data:
                parts.append("<div>\n" + re.sub(r"\n\s*\n", "\n", data["text/html"]) + "\n</div>")
            elif text := "".join(output.get("text", "")) or data.get("text/plain", ""):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


# --- hooks ----------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures from outside `docs/`, and the notebook as a page."""
    from mkdocs.structure.files import File

    benchmarks = (path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.*"))
    for file in (*PAGES, *sorted(filter(BENCHMARK.fullmatch, benchmarks))):
        files.append(File.generated(config, place_on_site(file), abs_src_path=str(ROOT / file)))
    text, pictures = notebook_page(json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8")))
    files.append(File.generated(config, place_on_site(NOTEBOOK), content=text))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead the links of a page to the site or to the repository."""
    at = {place_on_site(file): file for file in (*PAGES, NOTEBOOK)}
    uri = page.file.src_uri
    file = at.get(uri) or (uri if BENCHMARK.fullmatch(uri) else f"docs/{uri}")
    text = site_links(markdown, file, config.repo_url)
    return text if file != NOTEBOOK else text.replace("\n", "\n\n[Download this notebook](miniclip.ipynb)\n", 1)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Link names in docstrings."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    return name_links(html, {path.rpartition(".")[2]: path for text in texts for path in DESCRIBED.findall(text)})
