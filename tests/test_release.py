"""What is checked before a release: the tag, the version in its one place, the changelog; the citation; workflows."""

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import modeling_miniclip
from tests.helpers.runs import ROOT


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RELEASE = script()
INIT = '"""A package."""\n\n__version__ = "0.2.0"\n'
LOG = "# Changelog\n\n## 0.2.0 (2027-01-31)\n\n- New.\n\n## 0.1.0 (2026-12-01)\n\n- First.\n"


@pytest.mark.parametrize(
    ("tag", "log", "problem"),
    [
        ("v0.2.0", LOG, None),
        ("v0.2.0", LOG.partition("## 0.1.0")[0], None),
        ("0.2.0", LOG, "has version 0.2.0: tag v0.2.0"),
        ("v0.3.0", LOG, "has version 0.2.0: tag v0.2.0"),
        ("v0.2.0", LOG.replace("2027-01-31", "unreleased"), "must have the date of the release"),
        ("v0.2.0", LOG.replace(" (2027-01-31)", ""), "must have the date of the release"),
        ("v0.2.0", LOG.replace("0.2.0", "0.2.1"), "the first heading must be '## 0.2.0 (YYYY-MM-DD)'"),
        ("v0.2.0", "# Changelog\n", "the first heading must be"),
        ("v0.2.0", LOG.replace("- New.\n", ""), "nothing is listed under '## 0.2.0 (2027-01-31)'"),
    ],
)
def test_tag_needs_the_version_and_a_dated_list_of_changes(tag: str, log: str, problem: str | None) -> None:
    found = RELEASE.problem_of(tag, INIT, log)
    assert found is None if problem is None else problem in found


def test_changelog_names_the_version_first() -> None:
    init = (ROOT / RELEASE.INIT).read_text(encoding="utf-8")
    assert RELEASE.version_of(init) == modeling_miniclip.__version__
    first = RELEASE.HEADING.search((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert first[1] == modeling_miniclip.__version__


def test_citation_leaves_the_version_to_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()  # required by the format
    assert "version" not in citation and "date-released" not in citation
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_have_limits_and_run_what_exists(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}  # a job that needs more says so
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action) for action in actions), actions
        commands = [step["run"] for step in job["steps"] if "run" in step]
        for command in commands:
            assert all((ROOT / script).is_file() for script in re.findall(r"\.ci/[\w.]+", command)), command
            if command.startswith("make "):
                assert set(command.split()[1:]) <= set(targets), command
