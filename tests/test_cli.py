"""The `miniclip` command: parsing, errors, exit codes and imports."""

import errno
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from modeling_miniclip import __version__
from modeling_miniclip.cli import COMMANDS, Command, cli
from modeling_miniclip.data.shards import remote_shards
from modeling_miniclip.errors import MiniClipError, ModelError, UsageError
from modeling_miniclip.utils.commands import run_command
from tests.helpers.runs import ROOT, environment
from train_miniclip import cli as train_cli


def test_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["push", str(tmp_path), "alice/model"]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {tmp_path} is not an export: it has no config.json\n"
    assert printed.out == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        cli(["push", str(tmp_path), "alice/model", "--debug"])


def test_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = Command("warns", lambda parser: None, lambda args: warnings.warn("left out 3 images", stacklevel=1))
    monkeypatch.setitem(COMMANDS, "check", command)
    assert cli(["check"]) == 0
    assert capsys.readouterr().err == "warning: left out 3 images\n"


@pytest.mark.parametrize("argv", [[], ["psuh"], ["push"]])
def test_bad_command_line_exits_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli(argv)
    assert stopped.value.code == 2


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"miniclip {__version__}\n"


# Exit code 2 if the command line is wrong, 1 if something that it names is.
COMMAND_LINES = [
    (["search", "nowhere", "dog", "-k", "0"], 2),
    (["search", "nowhere", "dog"], 1),
    (["eval", "nowhere", "nowhere.csv", "--batch_size", "0"], 2),
    (["eval", "nowhere", "nowhere.csv", "--truncate_dim", "0"], 2),
    (["eval", "nowhere", "nowhere.csv"], 1),
    (["check", "nowhere.csv", "--batch_size", "0"], 2),
    (["check", "nowhere.csv"], 1),
    (["check", "nowhere.csv", "--shard_cache_gb", "-1"], 2),
    (["index", "nowhere", "-o", "new"], 2),
    (["index", "nowhere", "pictures", "-o", "new"], 1),
    (["app", "nowhere"], 1),
    (["duplicates", "nowhere"], 1),
    (["export", "nowhere", "--onnx", "new", "--images", "0"], 2),
    (["export", "nowhere", "--onnx", "new"], 1),
]


@pytest.mark.parametrize(
    "argv",
    [["check", "a.csv"], ["eval", "m", "a.csv"], ["index", "m", "a", "-o", "new"], ["export", "m", "--onnx", "new"],
     ["space", "m", "new", "--images", "a"]],
)  # fmt: skip
def test_commands_that_read_limit_the_cache_of_shards(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (remote_shards.FOLDER, remote_shards.GIGABYTES):
        monkeypatch.setenv(name, "")
    command = COMMANDS[argv[0]]
    monkeypatch.setitem(COMMANDS, argv[0], Command("", command.declare, lambda args: None))
    assert cli([*argv, "--shard_cache_gb", "3"]) == 0
    assert remote_shards.current_cache().limit_gb == 3


@pytest.mark.parametrize(("argv", "code"), COMMAND_LINES)
def test_commands_exit_with_2_for_usage_otherwise_1(
    argv: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(argv) == code
    assert capsys.readouterr().err.startswith("error: ")


TRAINING = [
    (["--epochs", "3"], 2),
    (["--batch_size", "none"], 2),
    (["--preset", "scenes_tiny", "--model_name_or_path", "x"], 2),
    (["--recipe", "unknown_key.yaml"], 2),
    (["--dataset", "nowhere.csv"], 1),
    (["--dataset", "empty.csv"], 1),
    (["--model_name_or_path", "./nowhere", "--dataset", "captioned/captions.csv"], 1),
]


@pytest.mark.parametrize(("argv", "code"), TRAINING)
def test_training_exits_with_2_for_usage_otherwise_1(
    argv: list[str],
    code: int,
    captioned_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(captioned_folder.parent)
    Path("unknown_key.yaml").write_text("epochs: 3\n")
    Path("empty.csv").write_text("image,caption\n")
    monkeypatch.setattr(sys, "argv", ["train_miniclip.py", *argv])
    assert train_cli() == code
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    sys.argv.append("--debug")
    with pytest.raises(MiniClipError) as raised:
        train_cli()
    assert isinstance(raised.value, UsageError) == (code == 2)


def test_full_disk_is_reported_and_bugs_are_raised(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a\nb")

    assert run_command(full, debug=False) == 1
    assert re.fullmatch(r"error: cannot write: .*No space left on device.*a\\+nb.*\n", capsys.readouterr().err)
    for mistake, debug in ((full, True), (lambda: [][0], False)):
        with pytest.raises((OSError, IndexError)):
            run_command(mistake, debug)
    assert [run_command(lambda done=done: done, False) for done in (None, 3, Path("export"))] == [0, 3, 0]


def test_help_lists_commands_without_heavy_imports() -> None:
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


def test_package_runs_as_a_module() -> None:
    argv = [sys.executable, "-m", "modeling_miniclip", "search", "nowhere", "-k", "0"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "error: -k 0: expected at least 1 image"
