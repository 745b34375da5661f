"""The `miniclip` command: parsing, errors, exit codes, what it imports."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from modeling_miniclip.cli import COMMANDS, Command, cli
from modeling_miniclip.errors import UsageError
from tests.runs import ROOT, environment


def test_an_error_of_usage_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["push", str(tmp_path), "alice/model"]) == 2
    told = capsys.readouterr()
    assert told.err == f"error: {tmp_path} is not an export: it has no config.json\n"
    assert told.out == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        cli(["push", str(tmp_path), "alice/model", "--debug"])


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = Command("warns", lambda parser: None, lambda args: warnings.warn("left out 3 images", stacklevel=1))
    monkeypatch.setitem(COMMANDS, "check", command)
    assert cli(["check"]) == 0
    assert capsys.readouterr().err == "warning: left out 3 images\n"


@pytest.mark.parametrize("argv", [[], ["psuh"], ["push"]])
def test_a_wrong_command_line_exits_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli(argv)
    assert stopped.value.code == 2


def test_help_lists_every_command_and_imports_no_heavy_library() -> None:
    code = """
import sys
from modeling_miniclip.cli import build_parser
print(build_parser().format_help())
heavy = {"torch", "transformers", "timm", "datasets", "accelerate", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert name in done.stdout and command.help in done.stdout


def test_the_package_runs_as_a_module() -> None:
    argv = [sys.executable, "-m", "modeling_miniclip", "push", "nowhere", "alice/model"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "error: nowhere is not an export: it has no config.json"
