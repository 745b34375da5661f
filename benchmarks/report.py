"""Print the table of results from the committed `metrics.jsonl` of each run; with `--write` put it into the documents.

python benchmarks/report.py [--write]
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md")
BEGIN, END = "<!-- results: written by `python benchmarks/report.py` -->", "<!-- end of results -->"
# What each run was trained on and with; its metrics are in the folder of that name.
RUNS = {
    "demo": "`make demo` (recipe `scenes`): built-in scenes, tiny ResNet and DistilBERT from random weights",
    "flickr8k_lite": "recipe `flickr8k_lite`: Flickr8k, EfficientNet-Lite0 and all-MiniLM-L6-v2 frozen, heads trained",
}


def best_validation(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The validation that decided the export: the smallest loss."""
    return min((line for line in lines if line["split"] == "validation"), key=lambda line: line["loss"])


def row(name: str, what: str) -> str:
    """One line of the table."""
    folder = HERE / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    best, seconds = best_validation(lines), json.loads((folder / "time.json").read_text())["seconds"]
    recall = [
        " / ".join(f"{best[f'{direction}_R@{k}']:.1f}" for k in (1, 5, 10))
        for direction in ("text_to_image", "image_to_text")
    ]
    return f"| {what} | {recall[0]} | {recall[1]} | {best['rsum']:.1f} | {best['epoch']:g} | {seconds / 60:.1f} |"


def table() -> str:
    """Markdown: recalls in percent at the exported epoch, and the whole run's minutes."""
    head = (
        "| run, 1,000 validation images | text to image R@1/5/10 | image to text R@1/5/10 | rsum | best epoch "
        "| minutes, 2 cores |\n|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(row(name, what) for name, what in RUNS.items())]) + "\n"


def with_table(text: str) -> str:
    """A document with its table replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}"


def main(argv: list[str]) -> None:
    """Print, or write into the documents."""
    if "--write" in argv:
        for path in DOCUMENTS:
            path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
