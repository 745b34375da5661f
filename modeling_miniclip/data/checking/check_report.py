"""The report of `miniclip check`: all problems of a dataset and its figures, as text or JSON."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

from ...errors import Problem, printable
from ..problems import KINDS

SHOWN = 100  # problems of each kind on the terminal; --json and the report of --fix list all of them


@dataclass
class Report:
    """All problems of a dataset, and its figures.

    Args:
        dataset: name or path of the dataset.
        problems: all problems found.
        figures: numbers of images and captions, expected false negatives, truncated captions.
    """

    dataset: str
    problems: list[Problem] = field(default_factory=list)
    figures: dict[str, int | float] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of problems of each kind, in the order of [`KINDS`]."""
        counted = Counter(problem.kind for problem in self.problems)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    def as_json(self) -> str:
        """The whole report as JSON."""
        values = {"dataset": self.dataset, "counts": self.counts, "figures": self.figures}
        return json.dumps(values | {"problems": [asdict(problem) for problem in self.problems]}, indent=1)

    def as_text(self, most: int | None = SHOWN) -> str:
        """The report for people: at most `most` problems of each kind (None: all), the figures, the counts."""
        lines = []
        for kind, count in self.counts.items():
            of_kind = [printable(problem) for problem in self.problems if problem.kind == kind]
            lines += of_kind[:most]
            if most is not None and count > most:
                lines.append(f"... and {count - most} more {KINDS[kind]} (--json lists them)")
        lines += [f"{name.replace('_', ' ')}: {printable(value)}" for name, value in self.figures.items()]
        lines += [f"{count} {KINDS[kind]}" for kind, count in self.counts.items()] or ["no problems found"]
        return "\n".join(lines)
