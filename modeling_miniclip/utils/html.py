"""Self-contained HTML pages of images: no scripts and no external resources, so they work offline and stay private.

All text is escaped here. Only three arguments take HTML, which must come from the functions of this file: `body` of
[`page`], `content` of [`section`] and `tiles` of [`grid`]. A page shows no more than it is given: pages that people
share get names from [`public_name`][modeling_miniclip.utils.names.public_name].
"""

import base64
from collections.abc import Iterable
from html import escape

from PIL import Image

from .thumbnails import THUMBNAIL, encode_thumbnail

# With this policy the browser blocks scripts and everything outside of the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --soft: #5a6678; --line: #dfe5ec; --paper: #fff; --card: #f7f9fb;
        --right: #15803d; --wrong: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ecf1; --soft: #9aa7b8; --line: #334050; --paper: #12171e; --card: #1a212b;
          --right: #4ade80; --wrong: #fb923c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 75ch; }
.soft, figcaption, .note { color: var(--soft); }
section { margin-top: 1.25rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.note { margin: .1rem 0 .6rem; font-size: .875rem; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: .75rem; }
figure { margin: 0; padding: .4rem; border: 2px solid transparent; border-radius: .5rem; background: var(--card); }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: .25rem; }
figure .text { aspect-ratio: 1; overflow: auto; padding: .25rem; }
figcaption { margin-top: .35rem; font-size: .8125rem; line-height: 1.35; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-variant-numeric: tabular-nums; }
.right { border-color: var(--right); } .right figcaption b { color: var(--right); }
.wrong { border-color: var(--wrong); } .wrong figcaption b { color: var(--wrong); }
.weak { border: 2px dashed var(--line); } .weak img { opacity: .5; } .weak figcaption b { color: var(--soft); }
a:focus-visible { outline: 3px solid var(--soft); outline-offset: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--soft); font-weight: 600; }
""".strip()


def page(title: str, body: str, lead: str = "") -> str:
    """A complete HTML document.

    Args:
        title: text of the title and of the main heading.
        body: HTML below the heading.
        lead: text under the heading; may be empty.
    """
    below = f'<p class="soft">{escape(lead)}</p>\n' if lead else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{below}{body}\n</body>\n</html>\n"
    )


def heading(text: str, note: str = "") -> str:
    """A heading within the page, with an optional remark under it."""
    return f"<h2>{escape(text)}</h2>\n" + (f'<p class="soft">{escape(note)}</p>\n' if note else "")


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>\n"


def section(title: str, note: str, content: str) -> str:
    """A query and its results.

    Args:
        title: text of the query.
        note: text of the remark under it.
        content: HTML of [`grid`].
    """
    return f'<section>\n<h3>{escape(title)}</h3>\n<p class="note">{escape(note)}</p>\n{content}\n</section>\n'


def grid(tiles: Iterable[str]) -> str:
    """HTML tiles, made by [`tile`], in rows that fill the width."""
    return f'<div class="grid">\n{"".join(tiles)}</div>'


def tile(label: str, name: str, image: str = "", text: str = "", mark: str = "", link: str = "") -> str:
    """An image or a text, with a label and a name under it.

    Args:
        label: text in bold, such as the score.
        name: text after the label, such as the file name; also the image's text for screen readers.
        image: URL of the image, from [`thumbnail`].
        text: text to show if there is no image.
        mark: `right` (green frame), `wrong` (orange frame), `weak` (dimmed) or empty (no frame).
        link: URL that a click on the image opens; may be empty.
    """
    shown = f'<img src="{escape(image)}" alt="{escape(name)}" loading="lazy">' if image else ""
    shown = f'<a href="{escape(link)}">{shown}</a>' if link and shown else shown
    words = f'<div class="text">{escape(text)}</div>' if not image else ""
    return (
        f'<figure class="{escape(mark)}">{shown}{words}'
        f"<figcaption><b>{escape(label)}</b> {escape(name)}</figcaption></figure>\n"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts.

    Args:
        head: texts of the column headers.
        rows: texts of the cells, row by row; the first cell is the name of the row.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>\n'


def thumbnail(image: Image.Image, pixels: int = THUMBNAIL) -> str:
    """A small JPEG as a `data:` URL for `<img>`; arguments as in [`encode_thumbnail`]."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_thumbnail(image, pixels)).decode("ascii")
