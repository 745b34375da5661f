"""Folders are complete or not there, whenever a process fails or dies while it writes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_miniclip.utils import files
from modeling_miniclip.utils.files import commit_folder, recover_folder, replaced_folder
from tests.helpers.runs import ROOT

NAMES = ("config.json", "model.safetensors", "README.md", "code/model.py")


def write(folder: Path, text: str) -> None:
    """A folder of four files that all say `text`."""
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["one exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    elif not sys.platform.startswith(("linux", "darwin")):
        pytest.skip("this system does not exchange two names")
    return str(request.param)


def test_replaced_folder_is_complete_and_leaves_nothing_else(tmp_path: Path, way: str) -> None:
    for text in ("first", "second"):
        with replaced_folder(tmp_path / "deep" / "export") as fresh:
            write(fresh, text)
            (fresh / f"only-{text}").touch()
        assert content(tmp_path / "deep" / "export") == dict.fromkeys(NAMES, text) | {f"only-{text}": ""}
        assert os.listdir(tmp_path / "deep") == ["export"]


def test_former_folder_is_kept_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "export"
    write(target, "former")
    with replaced_folder(target) as fresh:
        write(fresh, "new")
        assert content(target) == dict.fromkeys(NAMES, "former")


@pytest.mark.parametrize("n", range(len(NAMES)))
def test_error_at_any_file_keeps_the_former_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    target = tmp_path / "export"
    write(target, "former")
    written = []
    write_text = Path.write_text

    def failing(path: Path, text: str) -> int:
        written.append(path)
        if len(written) == n + 1:
            write_text(path, text[:1])
            raise OSError(28, "No space left on device")
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OSError, match="No space"), replaced_folder(target) as fresh:
        write(fresh, "new")
    assert content(target) == dict.fromkeys(NAMES, "former")
    assert os.listdir(tmp_path) == ["export"]


def test_a_first_folder_that_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replaced_folder(tmp_path / "export") as fresh:
        (fresh / "config.json").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_error_between_renames_restores_the_former_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    target = tmp_path / "export"
    write(target, "former")
    rename = Path.rename

    def failing(path: Path, new: Path) -> Path:
        if path.name == ".export.new":
            raise OSError(5, "Input/output error")
        return rename(path, new)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), replaced_folder(target) as fresh:
        write(fresh, "new")
    assert content(target) == dict.fromkeys(NAMES, "former")
    assert os.listdir(tmp_path) == ["export"]


# Replaces `export` in a process that ends at once, as if it were killed, at the n-th call that changes a name.
DYING = """
import os, sys
from pathlib import Path
from modeling_miniclip.utils import files

target, way, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls = 0
def dying(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == n:
            os._exit(9)
        return function(*args, **kwargs)
    return call

Path.rename = dying(Path.rename)
exchange = files._exchange if way == "one exchange" else lambda first, second: False
files._exchange = dying(exchange)
rmtree = files.shutil.rmtree
files.shutil.rmtree = lambda path, **kwargs: dying(rmtree)(path, **kwargs) if path.exists() else None
with files.replaced_folder(target) as fresh:
    for name in ("config.json", "model.safetensors", "README.md", "code/model.py"):
        (fresh / name).parent.mkdir(exist_ok=True)
        (fresh / name).write_text("new")
"""


def die_at(target: Path, way: str, n: int) -> bool:
    """Whether the process reached its n-th change and died there."""
    command = [sys.executable, "-c", DYING, str(target), way, str(n)]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60).returncode
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("way", ["one exchange", "two renames"])
def test_killed_process_leaves_a_complete_folder(tmp_path: Path, way: str) -> None:
    if way == "one exchange" and not sys.platform.startswith(("linux", "darwin")):
        pytest.skip("this system does not exchange two names")
    target = tmp_path / "export"
    deaths = 0
    while True:
        write(target, "former")
        if not die_at(target, way, deaths + 1):
            break
        deaths += 1
        if way == "one exchange":
            assert target.exists(), "there is no moment without a folder"
        recover_folder(target)
        assert content(target) in (dict.fromkeys(NAMES, "former"), dict.fromkeys(NAMES, "new"))
    assert deaths >= {"one exchange": 2, "two renames": 3}[way], "it died before, between and after the changes"
    assert content(target) == dict.fromkeys(NAMES, "new")
    assert os.listdir(tmp_path) == ["export"], "the next run clears away what the dead ones left"


def test_recovering_a_missing_folder_does_nothing(tmp_path: Path) -> None:
    recover_folder(tmp_path / "export")
    assert os.listdir(tmp_path) == []


def test_files_are_flushed_before_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    target, fresh = tmp_path / "step-1", tmp_path / ".step-1.new"
    write(target, "former")
    write(fresh, "new")
    events: list[str] = []
    flush, rename, exchange = files._flush, Path.rename, files._exchange
    monkeypatch.setattr(files, "_flush", lambda path: (events.append(path.name), flush(path))[1])
    monkeypatch.setattr(Path, "rename", lambda path, new: (events.append("rename"), rename(path, new))[1])
    monkeypatch.setattr(files, "_exchange", lambda a, b: (events.append("rename"), exchange(a, b))[1])
    commit_folder(fresh, target)
    first, last = events.index("rename"), len(events) - 1 - events[::-1].index("rename")
    assert sorted(events[:first]) == sorted([".step-1.new", "code", *(Path(name).name for name in NAMES)])
    assert events[last + 1 :] == [tmp_path.name]


def test_what_killed_writers_left_long_ago_is_removed(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (f".a.{'0' * 32}.new", f".a.{'1' * 32}.new", ".a.txt.new"))
    for path in (old, young, other):
        path.write_text("half")
    folder = tmp_path / f".b.{'2' * 32}.new"
    folder.mkdir()
    for path in (old, other, folder):
        os.utime(path, (0, 0))
    with files.shared_file(tmp_path / "a") as fresh:
        fresh.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([young.name, other.name, "a"])
    with pytest.raises(ValueError), files.shared_file(tmp_path / "a") as fresh:
        fresh.write_text("half")
        raise ValueError
    assert (tmp_path / "a").read_text() == "whole" and not fresh.exists()
