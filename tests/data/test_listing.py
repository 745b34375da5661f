"""Listing folders: what is hidden, linked, cannot be listed, or is no file."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling_miniclip import DataError, load_captions
from modeling_miniclip.data.checking.check import check
from modeling_miniclip.data.listing import list_images, subfolders
from modeling_miniclip.errors import Problem
from tests.helpers.indexes import write_picture, write_pictures
from tests.helpers.listing import unlistable


def listed(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Images relative to a folder, and kind and relative place of each problem."""
    problems: list[Problem] = []
    found = [os.path.relpath(path, root) for path in list_images(root, problems.append)]
    return found, [(problem.kind, os.path.relpath(problem.file, root)) for problem in problems]


def test_hidden_and_system_files_are_passed_over(tmp_path: Path) -> None:
    names = "a.png ._a.png .hidden/b.png __MACOSX/c.png sub/d.JPG @eaDir/e.jpg"
    write_pictures(tmp_path, names)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "sub/notes.pdf", "sub/movie.mp4"):
        (tmp_path / name).write_bytes(b"x")
    assert listed(tmp_path) == (["a.png", "sub/d.JPG"], [])
    assert subfolders(tmp_path) == ["sub"]


def test_linked_folders_are_listed_once(tmp_path: Path) -> None:
    write_pictures(tmp_path, "root/a.png root/z/b.png other/c.png other/d/e.png")
    (tmp_path / "root" / "album").symlink_to("../other")
    (tmp_path / "root" / "again").symlink_to("../other/d")
    (tmp_path / "root" / "inside").symlink_to("z")
    (tmp_path / "root" / "z" / "up").symlink_to("..")
    (tmp_path / "other" / "all").symlink_to("..")
    found, problems = listed(tmp_path / "root")
    assert found == ["a.png", "z/b.png", "again/e.png", "album/c.png"]
    assert sorted(problems) == [("link", "album/all"), ("link", "album/d"), ("link", "inside"), ("link", "z/up")]


def test_links_to_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    write_pictures(tmp_path, "set/a/1.png set/a/__MACOSX/2.png set/b/.cache/deep/3.png .store/4.png")
    for link, target in {"a/link": "__MACOSX", "a/other": "../b/.cache/deep", "b/store": "../../.store"}.items():
        (tmp_path / "set" / link).symlink_to(target)
    assert listed(tmp_path / "set") == (["a/1.png", "b/store/4.png"], [])  # outside, a folder may be hidden
    assert list(list_images(tmp_path / "set" / "a", pytest.fail, tmp_path / "set")) == [str(tmp_path / "set/a/1.png")]


def test_linked_root_and_linked_files_are_listed(tmp_path: Path) -> None:
    write_pictures(tmp_path, "other/a.png")
    (tmp_path / "other" / "b.png").symlink_to("a.png")
    (tmp_path / "other" / "gone.png").symlink_to("nothing")
    (tmp_path / "root").symlink_to("other")
    assert listed(tmp_path / "root") == (["a.png", "b.png", "gone.png"], [])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_pipes_are_named_and_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert listed(tmp_path) == ([], [("missing", "a.png")])


def test_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, "a.png b/c.png b/d/e.png f/g.png")
    unlistable(monkeypatch, tmp_path / "b")
    assert listed(tmp_path) == (["a.png", "f/g.png"], [("unlisted", "b")])
    unlistable(monkeypatch, tmp_path)
    with pytest.raises(PermissionError):
        listed(tmp_path)


@pytest.mark.parametrize("format", ["imagefolder", "captions"])
def test_training_and_check_name_an_unlistable_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    data = tmp_path / "data"
    names = ["a.png", "b.png", "c.png"] if format == "imagefolder" else ["Images/a.png", "Images/b.png"]
    write_pictures(data, " ".join([*names, "other/x.png"]))
    rows = "".join(f"{Path(name).name},a picture\n" for name in names)
    (data / ("metadata.csv" if format == "imagefolder" else "captions.csv")).write_text(f"image,caption\n{rows}")
    folder = data / ("other" if format == "imagefolder" else "Images")
    unlistable(monkeypatch, folder)
    problems = [problem for problem in check(str(data), num_workers=0).problems if problem.kind == "unlisted"]
    assert [problem.file for problem in problems] == [str(folder)]
    if format == "imagefolder":
        with pytest.raises(DataError, match="other: this folder cannot be listed: Permission denied"):
            load_captions(data)
    else:  # which needs no list of the folder
        assert len(load_captions(data)["train"]) == 1


UNREADABLE: dict[str, Callable[[pytest.MonkeyPatch, Path], object]] = {
    "root": unlistable,
    "file": lambda patch, path: patch.setattr(Path, "open", _denied),
    "stat": lambda patch, path: patch.setattr(os, "stat", _denied),
}


def _denied(path: object, *args: object, **kwargs: object) -> None:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_data_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    write_picture(tmp_path / "a.png", 0)
    (tmp_path / "metadata.csv").write_text("image,caption\na.png,words\n")
    with monkeypatch.context() as patch:
        UNREADABLE[what](patch, tmp_path)
        with pytest.raises(DataError, match=f"{tmp_path}.*: cannot be read: Permission denied; check its permissions"):
            load_captions(tmp_path)


def test_path_that_is_not_utf8_is_rejected_early(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_picture(folder / "a.png", 0)
    (folder / "captions.csv").write_text("image,caption\na.png,words\n")
    with pytest.raises(DataError, match=r"caf\\xe9: its path is not UTF-8; rename"):
        load_captions(folder)
    assert [problem.kind for problem in check(str(folder)).problems] == ["unusable"]
