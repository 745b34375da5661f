"""macOS and Windows on Linux: what they lack is used in one place each; files are treated as Windows treats them."""

import ast
import os
import selectors
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modeling_miniclip import MiniClipError, update_index
from modeling_miniclip.search.building import plan
from modeling_miniclip.search.index import ImageIndex
from modeling_miniclip.training.processes import connections
from modeling_miniclip.training.resuming import signals
from modeling_miniclip.training.resuming.signals import SignalHandler
from modeling_miniclip.training.towers.feature_cache import FeatureTable
from modeling_miniclip.utils import files
from modeling_miniclip.utils.files import delete_file, identity, is_link, is_same_file, replaced_file
from tests.helpers.hubs import run
from tests.helpers.indexes import write_picture
from tests.helpers.runs import ROOT, flags, metrics_of
from tests.helpers.windows_files import treat_files_like_windows
from train_miniclip import main

SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*sorted((ROOT / "modeling_miniclip").rglob("*.py")), ROOT / "train_miniclip.py")
}
POSIX_MODULES = set("crypt fcntl grp nis posix pty pwd readline resource spwd syslog termios tty".split())
# What Windows lacks, by module.
POSIX_NAMES = {
    "os": set(
        "chown fork forkpty geteuid getgid getloadavg getpgid getuid killpg lchown mkfifo nice posix_fadvise pread "
        "pwrite register_at_fork sched_getaffinity sched_setaffinity sendfile setsid statvfs sync sysconf uname wait "
        "O_CLOEXEC O_DIRECT O_DIRECTORY O_NOFOLLOW O_TMPFILE WNOHANG".split()
    ),
    "signal": set(
        "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 SIGXFSZ alarm pause "
        "pthread_kill pthread_sigmask setitimer sigwait".split()
    ),
    "select": set("poll epoll kqueue POLLERR POLLHUP POLLIN".split()),
    "socket": set("AF_UNIX recv_fds send_fds socketpair".split()),
    "multiprocessing": {"set_start_method"},  # it would be that of the whole process
}
PLACES = {
    "os.sched_getaffinity": "utils/processes.py",
    "os.register_at_fork": "training/processes/heartbeat.py",
    "signal.SIGCHLD": "utils/processes.py",
    "select.poll": "utils/commands.py",
    "select.POLLERR": "utils/commands.py",
    "select.POLLHUP": "utils/commands.py",
}
RENAMES = {"os.rename", "os.replace", "os.renames", "os.symlink", "os.link", "shutil.move"}


def nodes(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Nodes of one kind in the package, with their files."""
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kind):
                yield name, node


def dotted(node: ast.AST) -> str:
    """`os.fork` of such an attribute; "" of others."""
    is_plain = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return f"{node.value.id}.{node.attr}" if is_plain else ""


# --- what other systems lack ----------------------------------------------------------------------------------------


def test_nothing_imports_a_module_of_posix() -> None:
    for name, node in (*nodes(ast.Import), *nodes(ast.ImportFrom)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        assert not POSIX_MODULES & {module.partition(".")[0] for module in modules}, name


def test_names_of_posix_are_used_in_one_place_each() -> None:
    missing = {f"{module}.{each}" for module, several in POSIX_NAMES.items() for each in several}
    used = {(dotted(node), name) for name, node in nodes(ast.Attribute) if dotted(node) in missing}
    assert used == {(each, f"modeling_miniclip/{place}") for each, place in PLACES.items()}
    for each, place in PLACES.items():
        module, attribute = each.split(".")
        guard = f'hasattr({module}, "{attribute}")' if not attribute.startswith("POLL") else 'hasattr(select, "poll")'
        assert guard in SOURCES[f"modeling_miniclip/{place}"], each


def test_names_of_files_change_in_one_place() -> None:
    for name, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        is_path = isinstance(node.func, ast.Attribute) and not node.keywords and len(node.args) == 1
        renames = is_path and node.func.attr in ("rename", "replace", "symlink_to", "hardlink_to")
        if renames or dotted(node.func) in RENAMES:
            assert name == "modeling_miniclip/utils/files.py", f"{name}:{node.lineno}"


def test_separators_are_known_in_one_place() -> None:
    used = {name for name, node in nodes(ast.Attribute) if dotted(node) in ("os.sep", "os.altsep")}
    assert used == {"modeling_miniclip/utils/names.py"}


def test_texts_are_read_and_written_as_utf8() -> None:
    for name, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        is_method = isinstance(node.func, ast.Attribute)
        function = node.func.attr if is_method else getattr(node.func, "id", "")
        modes = [arg.value for arg in node.args[0 if is_method else 1 :][:1] if isinstance(arg, ast.Constant)]
        if function == "open":
            is_text = modes[0] in ("r", "w", "a", "x", "r+", "w+") if modes else not is_method
        else:
            is_text = function in ("read_text", "write_text")
        if is_text:
            assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{name}:{node.lineno}"


# Imports all modules of the package where those of POSIX are missing. The libraries have been imported before.
IMPORT_ALL = """
import asyncio, builtins, importlib, pkgutil, sys
import datasets, filelock, huggingface_hub, matplotlib.figure, torch, transformers
import modeling_miniclip
MISSING = set(sys.argv[1].split())
plain = builtins.__import__
def without_posix(name, globals=None, *rest, **more):
    importer = str((globals or {}).get("__name__", ""))
    if name.partition(".")[0] in MISSING and importer.startswith(("modeling_miniclip", "train_miniclip")):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return plain(name, globals, *rest, **more)
builtins.__import__ = without_posix
sys.modules["fcntl"] = None
for found in pkgutil.walk_packages(modeling_miniclip.__path__, "modeling_miniclip."):
    if not found.name.endswith(("__main__", "onnx_example")):
        importlib.import_module(found.name)
import train_miniclip
from modeling_miniclip.utils import locks
assert locks.FCNTL is None
"""


@pytest.mark.slow
def test_all_modules_import_without_those_of_posix(tmp_path: Path) -> None:
    finished = run(IMPORT_ALL, tmp_path, " ".join(POSIX_MODULES), PYTHONPATH=str(ROOT))
    assert finished.returncode == 0, finished.stderr


def test_ctrl_break_saves_like_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    other = signal.SIGUSR1 if hasattr(signal, "SIGUSR1") else signal.SIGBREAK
    monkeypatch.setattr(signals, "TERMINATING", (signal.SIGTERM, other))
    lines: list[str] = []
    with SignalHandler(lines.append) as handler:
        signal.raise_signal(other)
        assert handler.received == signal.SIGTERM
    assert lines == ["SIGTERM: saving after this step"]


@pytest.mark.parametrize("selector", [connections.SELECTOR, selectors.SelectSelector])  # the latter is Windows'
def test_sockets_are_awaited_on_every_system(selector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SELECTOR", selector)
    assert connections.wait_for([], 0) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert connections.wait_for([server], 0) == []
        with socket.create_connection(server.getsockname()):
            assert connections.wait_for([server], 5) == [server]


# --- files ----------------------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Windows' files are simulated on Linux")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    treat_files_like_windows(monkeypatch)
    return monkeypatch


@needs_proc
def test_simulated_windows_keeps_open_files(tmp_path: Path, windows: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with (folder / "a").open("w"):
        for change in (lambda: os.replace(folder / "a", folder / "b"), lambda: folder.rename(tmp_path / "other"),
                       (folder / "a").unlink):  # fmt: skip
            with pytest.raises(PermissionError):
                change()
        assert not delete_file(folder / "a")
    assert delete_file(folder / "a") and delete_file(folder / "a") and not os.listdir(folder)


@needs_proc
def test_a_file_that_a_scanner_has_open_is_replaced_later(tmp_path: Path, windows: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    target.write_text("before")
    scanner, pauses = target.open(), list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            scanner.close()

    windows.setattr(files, "PATIENCE", 60.0)
    windows.setattr(files.time, "sleep", sleep)
    with replaced_file(target) as fresh:
        fresh.write_text("after")
    assert target.read_text() == "after" and len(pauses) == 3


@needs_proc
def test_training_works_with_windows_files(tmp_path: Path, windows: pytest.MonkeyPatch, without_finish: None) -> None:
    for _ in range(2):
        main(flags(tmp_path, freeze="text", overwrite_output_dir=True))
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) >= 1 and metrics_of(tmp_path / "run")
    main(flags(tmp_path, freeze="text", num_train_epochs=3, resume_from_checkpoint="latest"))
    assert not list(tmp_path.rglob(".*.new")) + list(tmp_path.rglob(".*.old"))


@needs_proc
def test_an_index_is_updated_with_windows_files(
    tiny_export: Path, tmp_path: Path, windows: pytest.MonkeyPatch
) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "index"
    for number in range(3):
        write_picture(photos / f"{number}.png", number)
        report = update_index(folder, [photos], tiny_export, progress=False)
        assert (report.images, report.encoded) == (number + 1, 1)
    held = ImageIndex.open(folder)
    write_picture(photos / "more.png", 9)
    with pytest.raises(MiniClipError, match="index cannot be written: used by another process"):
        update_index(folder, progress=False)
    assert len(ImageIndex.open(folder)) == len(held) == 3
    held.close()
    assert update_index(folder, progress=False).images == 4
    assert sorted(os.listdir(tmp_path)) == ["index", "photos"]


@needs_proc
def test_features_are_stored_with_windows_files(tmp_path: Path, windows: pytest.MonkeyPatch) -> None:
    first = FeatureTable(tmp_path, {}, rows=3, width=2)
    assert first.folder == FeatureTable(tmp_path, {}, rows=3, width=2).folder and not first.done().any()


def test_folders_without_numbers_differ_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "c").mkdir()
    names = [tmp_path / name for name in "abc"]
    numbered = [identity(name) for name in names]
    monkeypatch.setattr(os, "stat", lambda path, **options: SimpleNamespace(st_ino=0, st_dev=7))
    for found in (numbered, [identity(name) for name in names]):
        assert found[0] == found[1] != found[2]


def test_junctions_of_windows_are_links() -> None:
    for symlink, junction in ((True, False), (False, True), (False, False)):
        entry = SimpleNamespace(is_symlink=lambda: symlink, is_junction=lambda: junction)  # noqa: B023
        assert is_link(entry) == (symlink or junction)
    assert not is_link(SimpleNamespace(is_symlink=lambda: False))  # Python 3.11


# --- names that differ in case --------------------------------------------------------------------------------------


def test_same_folder_in_another_case(tmp_path: Path) -> None:
    (tmp_path / "Fotos é").mkdir()
    (tmp_path / "fotos e\u0301").symlink_to(tmp_path / "Fotos é")  # as a file system that knows no case finds it
    (tmp_path / "FOTOS É").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "Fotos é")
    name = str(tmp_path / "Fotos é")
    assert is_same_file(name, str(tmp_path / "fotos e\u0301"))
    assert is_same_file("user/dataset", "user/dataset")  # neither is a file
    assert not any(is_same_file(name, str(tmp_path / other)) for other in ("FOTOS É", "link", "fotos É"))


def test_a_source_is_indexed_once_whatever_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "is_same_file", lambda one, other: one.lower() == other.lower())
    monkeypatch.setattr(plan, "resolve_source", str)
    existing = SimpleNamespace(manifest=SimpleNamespace(sources=["/data/Photos", "/data/more"]))
    chosen = plan._choose_sources(existing, ["/Data/photos", "/data/new"], [])
    assert chosen == (["/data/Photos", "/data/new"], ["/data/more"])
    assert plan._choose_sources(existing, [], ["/DATA/PHOTOS"]) == ([], ["/data/more"])
