"""Check that a tag may be released: it is the version of the package, and the changelog describes that version.

python .ci/release.py v0.1.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INIT = "modeling_miniclip/__init__.py"  # the one place of the version
HEADING = re.compile(r"^## (\S+)(?: \((.*)\))?$", re.MULTILINE)


def version_of(init: str) -> str:
    """The version in the package's `__init__.py`."""
    found = re.search(r'^__version__ = "(.+)"$', init, re.MULTILINE)
    assert found is not None, f"{INIT} has no version"
    return found[1]


def problem_of(tag: str, init: str, changelog: str) -> str | None:
    """What keeps a tag from being released; None if nothing does.

    Args:
        tag: name of the tag.
        init: content of the package's `__init__.py`.
        changelog: content of `CHANGELOG.md`.
    """
    version, heading = version_of(init), HEADING.search(changelog)
    if tag != f"v{version}":
        return f"the tag is {tag}, but {INIT} has version {version}: tag v{version}, or change the version first"
    if heading is None or heading[1] != version:
        return f"CHANGELOG.md: the first heading must be '## {version} (YYYY-MM-DD)', followed by what changed"
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", heading[2] or ""):
        return f"CHANGELOG.md: '{heading[0]}' must have the date of the release, as in '## {version} (2027-01-31)'"
    following = HEADING.search(changelog, heading.end())
    if "- " not in changelog[heading.end() : following.start() if following else None]:
        return f"CHANGELOG.md: nothing is listed under '{heading[0]}'"
    return None


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in (INIT, "CHANGELOG.md")]
    sys.exit(problem_of(sys.argv[1], *texts))
