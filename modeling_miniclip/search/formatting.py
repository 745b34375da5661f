"""Search results and groups of duplicates as text or JSON."""

import json
import os
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import printable
from .duplicates import Group
from .exact import Match
from .index import ImageIndex
from .query import Query, Timing
from .unrelated import is_weak, percent

# Under results that have a chance.
CHANCE_NOTE = "%: how often an unrelated caption scores as high; ?: no better than that"
NOTHING = "nothing fits: unrelated captions score as high"


def format_table(index: ImageIndex, matches: list[Match], width: int) -> str:
    """Format search results as a table: rank, score, chance if there is one, date, image and first caption.

    Args:
        index: index that was searched.
        matches: images found, best first.
        width: columns of the terminal; longer lines are cut.
    """
    rows = [index.entry(match.index) for match in matches]
    home = os.path.commonpath([row["id"] for row in rows]) if rows and all(row["path"] for row in rows) else ""
    home = os.path.dirname(home) if len(rows) == 1 else home
    names = [os.path.relpath(row["id"], home) if home else row["id"] for row in rows]
    longest = max((display_width(name) for name in names), default=0)
    chances = [chance_column(match.chance) for match in matches]
    least = 24 + longest + max(map(len, chances), default=0)
    lines = [f"in {home}"] if home else []
    for rank, (match, chance, row, name) in enumerate(zip(matches, chances, rows, names, strict=True), 1):
        date = row["date"].strftime("%Y-%m-%d") if row["date"] else " " * 10
        padded = name + " " * (longest - display_width(name))
        caption = row["captions"][0] if row["captions"] else ""
        line = f"{rank:4d}  {match.score:6.3f}{chance}  {date}  {padded}  {caption}"
        lines.append(cut(printable(line.rstrip()), max(width, least)))
    return "\n".join(lines)


def chance_column(chance: float | None) -> str:
    """A chance in 12 columns, marked if it is large; empty if there is none."""
    return "" if chance is None else f"  {percent(chance):>8} {'?' if is_weak(chance) else ' '}"


def format_count(index: ImageIndex, matches: list[Match], cutoff: str | None) -> str:
    """How many images were found, and what was left out.

    Args:
        index: index that was searched.
        matches: images found.
        cutoff: the largest chance of a match, as it was given, or None.
    """
    if not matches and cutoff is not None:
        return f"{NOTHING} (--cutoff {cutoff}; 0 of {len(index)} images)"
    return f"{len(matches)} of {len(index)} images"


def display_width(text: str) -> int:
    """Terminal columns that a text takes: two per wide character (Chinese, emoji), none per combining character."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(line: str, width: int) -> str:
    """Cut a line to at most `width` terminal columns."""
    if display_width(line) <= width:
        return line
    while display_width(line) > width - 1:
        line = line[:-1]
    return line + "…"


def format_json(index: ImageIndex, query: Query, matches: list[Match], timing: Timing) -> str:
    """Format query, matches with all columns of their entries, and timing as JSON."""
    found: list[dict[str, Any]] = []
    for rank, match in enumerate(matches, 1):
        entry = index.entry(match.index)
        entry["date"] = entry["date"].isoformat() if entry["date"] else None
        chance = None if match.chance is None else float(f"{match.chance:.4g}")
        found.append({"rank": rank, "score": round(match.score, 6), "chance": chance, **entry})
    values = {
        "index": str(Path(index.folder).resolve()),
        "query": {**asdict(query), "image": None if query.image is None else os.fspath(query.image)},
        "matches": found,
        "seconds": {name: round(value, 4) for name, value in asdict(timing).items()},
    }
    return json.dumps(values, indent=1, ensure_ascii=False)


def format_groups(index: ImageIndex, groups: list[Group], threshold: float) -> str:
    """Format groups of duplicates as text. All images of a group except its first are superfluous."""
    ids, splits = index.entries["id"].to_pylist(), index.entries["split"].to_pylist()
    lines = []
    for group in groups:
        lines.append("identical" if group.exact else f"near-identical, cosine {group.similarity:.4f}")
        lines += [printable(f"  {ids[row]}" + (f"  ({splits[row]})" if splits[row] else "")) for row in group.rows]
    across = sum(len({splits[row] for row in group.rows} - {""}) > 1 for group in groups)
    more = sum(len(group.rows) - 1 for group in groups)
    exact = sum(group.exact for group in groups)
    plural = "" if len(groups) == 1 else "s"
    lines.append(
        f"{len(groups)} group{plural} among {len(index)} images: {exact} identical, "
        f"{len(groups) - exact} near-identical (cosine {threshold:.4f} or more), "
        f"{more} superfluous images; {across} across splits"
    )
    return "\n".join(lines)


def format_groups_json(index: ImageIndex, groups: list[Group]) -> str:
    """Format groups of duplicates as JSON."""
    entries = index.entries.select(["id", "split", "hash"])
    return json.dumps(
        [
            {
                "exact": group.exact,
                "similarity": round(group.similarity, 6),
                "images": entries.take(group.rows).to_pylist(),
            }
            for group in groups
        ],
        indent=1,
        ensure_ascii=False,
    )
