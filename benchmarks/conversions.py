"""How far conversions are from their originals: CLIPs of each family, to this package and back.

    python benchmarks/conversions.py --flickr8k FLICKR8K

Tiny models with random weights, as the tests have them. Records the families of transformers or, where open_clip is
installed, those of open_clip (`.venv-versions/open-clip/bin/python`, which `make test-open-clip` creates) in
`conversions.jsonl`, and writes `conversions.md`.
"""

import json
import os
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = Path(__file__).resolve().with_suffix(".jsonl")
COLUMNS = ("pixels", "image features", "text features", "temperature", "bias", "logits")
ABOUT = """# Conversions

Written by `benchmarks/conversions.py`: tiny random CLIPs of each family and their conversions, compared on six
photographs (odd sizes, grey, 16 bits, transparent) and five captions (empty, short, too long) in float32. Each cell
has the largest difference, relative to the largest absolute value. The tokens of all captions are the same. "to
MiniCLIP" compares `from_clip` with the original in its own library. "and back" exports the model with each weight
multiplied by {slightly}, as if it had been trained, converts the export and compares the copy in its own library with
the model; models of open_clip go back as they are and are compared with their originals.
`siglip2` takes pictures of any shape in patches, so here they are made square for it; it goes back as a SigLIP of a
fixed size. The tests compare the real vocabulary of CLIP, too.

"""


def of_transformers(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of the families of transformers."""
    from modeling_miniclip import export, from_clip
    from modeling_miniclip.clips.convert import convert
    from tests.clips.comparison import all_differences, our_results, transformers_results
    from tests.helpers.clips import FAMILIES, save_clip, train_slightly

    for family in FAMILIES:
        original = save_clip(family, folder / family)
        model = from_clip(original)
        ours = our_results(model, model.processor, square=family == "siglip2")
        found = all_differences(ours, transformers_results(original))
        yield line("transformers", family, "to MiniCLIP", found)
        train_slightly(model)
        export(model, model.processor, folder / f"{family}-tuned")
        convert(folder / f"{family}-tuned", back := folder / f"{family}-back", "transformers")
        found = all_differences(our_results(model, model.processor), transformers_results(back))
        yield line("transformers", family, "and back", found)


def of_open_clip(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of the families of open_clip."""
    from modeling_miniclip import from_clip
    from modeling_miniclip.clips.convert import convert
    from tests.clips.comparison import all_differences, our_results
    from tests.open_clip.test_conversion import MODELS, open_clip_results, save_open_clip

    for family in MODELS:
        original = save_open_clip(family, folder / family)
        model, theirs = from_clip(original), open_clip_results(f"local-dir:{original}")
        yield line("open_clip", family, "to MiniCLIP", all_differences(our_results(model, model.processor), theirs))
        convert(original, back := folder / f"{family}-back", "open_clip")
        found = all_differences(open_clip_results(f"local-dir:{back}"), theirs)
        yield line("open_clip", family, "and back", found)


def line(library: str, family: str, direction: str, found: dict[str, float]) -> dict[str, Any]:
    """A line of the record; an error if a caption has other tokens."""
    if found.pop("tokens", 0.0) != 0.0:
        sys.exit(f"{family}, {direction}: the tokens differ")
    return {"library": library, "family": family, "direction": direction, **found}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown table with one row for each family and direction."""
    rows = [["library", "family", "direction", *COLUMNS], [*["---"] * 3, *["---:"] * len(COLUMNS)]]
    for one in lines:
        cells = ["" if name not in one else f"{one[name]:.0e}" if one[name] else "0" for name in COLUMNS]
        rows.append([one["library"], one["family"], one["direction"], *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Compare, and write the page."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flickr8k", required=True, type=Path, help="folder of Flickr8k, for the photographs")
    # The tests look for the folder above that of Flickr8k.
    os.environ["MINICLIP_SHARED"] = str(parser.parse_args().flickr8k.resolve().parent)
    sys.path.insert(0, str(HERE.parent))
    library, measure = ("open_clip", of_open_clip) if find_spec("open_clip") else ("transformers", of_transformers)
    recorded = RECORD.read_text(encoding="utf-8").splitlines() if RECORD.exists() else []
    others = [one for one in map(json.loads, recorded) if one["library"] != library]
    with tempfile.TemporaryDirectory() as folder:
        lines = sorted([*others, *measure(Path(folder))], key=lambda one: one["library"], reverse=True)
    RECORD.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    from tests.helpers.clips import SLIGHTLY

    page = ABOUT.format(slightly=SLIGHTLY) + table(lines)
    RECORD.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page, end="")


if __name__ == "__main__":
    main()
