"""Print pip constraints that pin each direct dependency in `pyproject.toml` to its oldest allowed version."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
    for requirement in (text.partition(";")[0] for text in requirements):
        if found := re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement):
            print(f"{found[1]}=={found[2]}")
