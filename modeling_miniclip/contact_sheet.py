"""Found images as one HTML page that needs no other file and no network: its thumbnails are in it."""

import base64
import html
from pathlib import Path
from string import Template

from .errors import UsageError
from .files import replace_text
from .image_index import ImageIndex
from .nearest import Match
from .processing_miniclip import load_rgb
from .thumbnails import encode_thumbnail

# A page that is to be opened anywhere loads nothing and runs nothing, whatever a caption says.
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1a202c; --soft: #5a6577; --page: #f5f6f8; --card: #fff; --line: #e2e8f0;
  --bar: #2b6cb0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edf2f7; --soft: #a0aec0; --page: #14171c; --card: #1d2229; --line: #2d3540; --bar: #63b3ed; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
header { margin-bottom: 1.5rem; }
h1 { margin: 0 0 .2rem; font-size: 1.5rem; font-weight: 650; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1.1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  display: flex; flex-direction: column; }
.picture { display: block; aspect-ratio: 4 / 3; background: var(--line); color: var(--soft); }
.picture img { width: 100%; height: 100%; object-fit: contain; display: block; }
.missing { display: grid; place-items: center; padding: 1rem; text-align: center; }
a:focus-visible { outline: 3px solid var(--bar); outline-offset: -3px; }
.text { padding: .7rem .85rem .85rem; display: grid; gap: .35rem; }
.rank { display: flex; align-items: center; gap: .6rem; font-variant-numeric: tabular-nums; font-weight: 600; }
.rank span { color: var(--soft); font-weight: 400; }
.scale { flex: 1; height: 5px; border-radius: 3px; background: var(--line); overflow: hidden; }
.scale i { display: block; height: 100%; background: var(--bar); }
.name { font-size: .82rem; color: var(--soft); overflow-wrap: anywhere; }
.caption { overflow-wrap: anywhere; }
</style>
</head>
<body>
<header><h1>$title</h1><p>$about</p></header>
<main><ol>
$cards
</ol></main>
</body>
</html>
""")
CARD = Template("""<li>$picture<div class="text">
<div class="rank"><span>$rank</span>$score<div class="scale"><i style="width:$share%"></i></div></div>
<div class="caption">$caption</div><div class="name">$name</div>
</div></li>""")


def write_contact_sheet(target: Path, index: ImageIndex, title: str, matches: list[Match]) -> None:
    """Write the page.

    Args:
        target: HTML file; one that is there is replaced.
        index: that was searched.
        title: the query in words.
        matches: best first; the best has a full bar.

    Raises:
        UsageError: the file cannot be written.
    """
    best = max((match.score for match in matches), default=1.0)
    cards = [_card(rank, match, index, best) for rank, match in enumerate(matches, 1)]
    about = f"The nearest {len(matches)} of {len(index):,} images, by {index.model}"
    page = PAGE.substitute(title=html.escape(title), about=html.escape(about), cards="\n".join(cards))
    try:
        replace_text(target, page)
    except OSError as error:
        raise UsageError(f"--html {target} cannot be written: {error.strerror or error}") from error


def _card(rank: int, match: Match, index: ImageIndex, best: float) -> str:
    entry = index.entry(match.index)
    caption = entry["captions"][0] if entry["captions"] else ""
    share = 100 * max(0.0, match.score) / best if best > 0 else 0.0
    return CARD.substitute(
        picture=_picture(entry["path"], picture_of(index, match.index), caption or Path(match.name).name),
        rank=rank,
        score=f"{match.score:.3f}",
        share=f"{share:.1f}",
        caption=html.escape(caption),
        name=html.escape(match.name),
    )


def _picture(path: str | None, content: bytes | None, description: str) -> str:
    if content is None:
        return '<div class="picture missing">no longer there, or not to be read</div>'
    data = base64.b64encode(content).decode()
    image = f'<img alt="{html.escape(description)}" src="data:image/jpeg;base64,{data}">'
    if path is None:
        return f'<div class="picture">{image}</div>'
    return f'<a class="picture" href="{html.escape(Path(path).as_uri())}">{image}</a>'


def picture_of(index: ImageIndex, row: int) -> bytes | None:
    """JPEG thumbnail of an image of the index; None if its file is no longer there or cannot be read."""
    path = index.entry(row)["path"]
    if path is None:
        return index.thumbnail(row)
    try:
        return encode_thumbnail(load_rgb(path))
    except Exception:  # Pillow's decoders raise all sorts
        return None
