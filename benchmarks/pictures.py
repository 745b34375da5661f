"""Draw the pictures of the guides, `docs/pictures/`, with the demo's model and the built-in drawings.

    python -m benchmarks.pictures runs/demo/export

Needs the extra `app`, playwright and an installed Chromium. No picture shows a path of this machine.
"""

import argparse
import contextlib
import csv
import re
import tempfile
from pathlib import Path
from typing import Any

from modeling_miniclip import ImageIndex, load_captions
from modeling_miniclip.cli import cli
from modeling_miniclip.search.page.app import build_page, launch_options
from tests.helpers.browsers import browser_page

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
DRAWINGS = 200
SCORE = re.compile(r"\d\.\d\d")
# In the browser: whether all thumbnails are there.
LOADED = "[...document.querySelectorAll('#results img')].every(image => image.complete && image.naturalWidth)"


def write_drawings(folder: Path) -> str:
    """Write validation drawings with their captions as `captions.csv`, and return the caption of the first one."""
    rows = load_captions("scenes")["validation"].select(range(DRAWINGS))
    (folder / "Images").mkdir()
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i, row in enumerate(rows):
            row["image"].save(folder / "Images" / f"{i:03d}.png")
            writer.writerows([f"{i:03d}.png", caption] for caption in row["captions"])
    first: str = rows[0]["captions"][0]
    return first


def draw_search_page(page: Any, words: str) -> None:
    """The search page with the answer to a query, and similar images below it."""
    assert cli(["index", "demo", "captions.csv", "-o", "drawings.index"]) == 0
    blocks = build_page(ImageIndex.open("drawings.index"), "Search drawings")
    blocks.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, **launch_options())
    try:
        page.goto(blocks.local_url)
        page.get_by_label("Words").fill(words)
        page.keyboard.press("Enter")
        page.locator("#results").get_by_text(SCORE).first.wait_for()  # the sample that the page opens with has none
        page.wait_for_function(LOADED)
        page.get_by_role("button", name="Search").scroll_into_view_if_needed()
        page.screenshot(path=PICTURES / "search-page.png")
    finally:
        blocks.close(verbose=False)


def draw_failures(page: Any) -> None:
    """The start of the page of failures that `miniclip eval` writes."""
    assert cli(["eval", "demo", "captions.csv", "--split", "all", "--output_dir", "eval"]) == 0
    page.goto(Path("eval/failures.html").resolve().as_uri())
    page.get_by_role("heading", name="the worst failures").first.evaluate("heading => heading.scrollIntoView()")
    page.screenshot(path=PICTURES / "failures.png")


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", metavar="EXPORT", type=Path, help="export of the demo")
    export = parser.parse_args().export.resolve(strict=True)
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        Path("demo").symlink_to(export)  # the name that the pages show
        words = write_drawings(Path())
        with browser_page(width=1100, height=900) as page:
            draw_search_page(page, words)
            draw_failures(page)


if __name__ == "__main__":
    main()
