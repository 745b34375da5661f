"""Print the table of results from the committed `metrics.jsonl` of each run; `--write` puts it into the documents.

python benchmarks/report.py [--write]
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md")
BEGIN, END = "<!-- results: written by `python benchmarks/report.py` -->", "<!-- end of results -->"


@dataclass
class Recorded:
    """A run, whose metrics are in the folder of the same name.

    Args:
        what: data and model, as shown in the table.
        best_metric: metric that decided which epoch was exported.
        after: run whose model it started from; its time is added.
    """

    what: str
    best_metric: str = "rsum"
    after: str | None = None


RUNS = {
    "demo": Recorded(
        "`make demo` (recipe `scenes`): built-in scenes, tiny ResNet and LFM2 from random weights", "loss"
    ),
    "heads": Recorded("recipe `heads`: Flickr8k, EfficientNet-Lite0 and all-MiniLM-L6-v2 frozen, heads trained"),
    "lit": Recorded("`lit`: continues from `heads`, text tower fine-tuned too", after="heads"),
    "heads_then_full": Recorded("`heads_then_full`: continues from `heads`, both towers fine-tuned", after="heads"),
    "full": Recorded("recipe `full`: new heads, both towers fine-tuned from the first step"),
    "finish": Recorded("recipe `finish`: continues from `full`, larger images and more captions", after="full"),
}


def best_validation(name: str) -> dict[str, Any]:
    """The validation metrics of the exported epoch."""
    lines = [json.loads(line) for line in (HERE / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    sign = -1 if RUNS[name].best_metric == "loss" else 1
    trained = (line for line in lines if line["split"] == "validation" and line["step"] > 0)
    return max(trained, key=lambda line: sign * line[RUNS[name].best_metric])


def minutes(name: str) -> float:
    """Minutes of the whole run, including the run it started from."""
    own = json.loads((HERE / name / "time.json").read_text())["seconds"] / 60
    first = RUNS[name].after
    return own if first is None else own + minutes(first)


def row(name: str) -> str:
    """One row of the table."""
    best = best_validation(name)
    recall = [
        " / ".join(f"{best[f'{direction}_R@{k}']:.1f}" for k in (1, 5, 10))
        for direction in ("text_to_image", "image_to_text")
    ]
    figures = [*recall, f"{best['rsum']:.1f}", f"{best['epoch']:g}", f"{minutes(name):.1f}"]
    return f"| {RUNS[name].what} | {' | '.join(figures)} |"


def table() -> str:
    """Markdown: recalls in percent at the exported epoch, and minutes of the whole run."""
    head = (
        "| run, 1,000 validation images | text to image R@1/5/10 | image to text R@1/5/10 | rsum | best epoch "
        "| minutes, 2 cores |\n|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(row(name) for name in RUNS)]) + "\n"


def with_table(text: str) -> str:
    """A document with its table of results replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}"


def main(argv: list[str]) -> None:
    """Print the table, or write it into the documents."""
    if "--write" in argv:
        for path in DOCUMENTS:
            path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
