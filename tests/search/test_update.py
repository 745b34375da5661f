"""`update_index`: contents of an index, encoding each image once, interruptions, several processes."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
from datetime import datetime
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as DatasetImage
from PIL import ExifTags, Image
from safetensors.numpy import load_file, save_file

from modeling_miniclip import (
    DataError,
    EntryFilter,
    ImageIndex,
    MiniClipError,
    MiniClipModel,
    ModelError,
    UsageError,
    encode_images,
    update_index,
)
from modeling_miniclip.cli import cli
from modeling_miniclip.data import picture_formats
from modeling_miniclip.data.columns import ColumnNames
from modeling_miniclip.search import update
from modeling_miniclip.search.building import shards as shards_module
from modeling_miniclip.search.page.pictures import picture_of
from modeling_miniclip.search.query import Query, search_index
from tests.helpers.indexes import write_model, write_picture, write_pictures
from tests.helpers.listing import unlistable
from tests.helpers.pictures import SIZE, odd_pictures
from tests.helpers.runs import ROOT, command, environment

NAMES = "b.png a.png sub/c.jpg sub/deep/d.png"


@pytest.fixture(scope="session")
def model(tiny_export: Path) -> Path:
    """A tiny export, read-only."""
    return tiny_export


def ids(index: ImageIndex) -> list[str]:
    return index.entries["id"].to_pylist()


load_model = cache(MiniClipModel.from_pretrained)


def expected(model: Path, paths: list[str]) -> np.ndarray:
    """Embeddings of images, encoded one by one."""
    return encode_images(load_model(model), paths, batch_size=1, progress=False).numpy()


def test_a_single_source_needs_no_list(tmp_path: Path, model: Path) -> None:
    write_pictures(tmp_path / "photos", NAMES)
    for source in (str(tmp_path / "photos"), tmp_path / "photos"):
        assert update_index(tmp_path / "index", source, model, progress=False).images == 4
    write_pictures(tmp_path / "more", "e.png")
    update_index(tmp_path / "index", str(tmp_path / "more"), progress=False)
    assert update_index(tmp_path / "index", remove=str(tmp_path / "photos"), progress=False).images == 1


def test_index_holds_every_image_below_a_folder(tmp_path: Path, model: Path) -> None:
    write_pictures(tmp_path / "photos", NAMES + " .hidden/e.png .f.png")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    report = update_index(tmp_path / "index", [tmp_path / "photos"], model, batch_size=3, progress=False)
    assert (report.images, report.encoded, report.reused, report.dropped, report.skipped) == (4, 4, 0, 0, {})
    index = ImageIndex.open(tmp_path / "index")
    assert [os.path.relpath(name, tmp_path / "photos") for name in ids(index)] == [
        "a.png", "b.png", "sub/c.jpg", "sub/deep/d.png"
    ]  # fmt: skip
    np.testing.assert_allclose(index.embeddings, expected(model, ids(index)), atol=1e-5)
    assert len(index) == 4 and index.model == str(model)
    row = index.entry(2)
    stat = (tmp_path / "photos" / "sub" / "c.jpg").stat()
    assert (row["size"], row["mtime"], row["width"], row["height"]) == (stat.st_size, stat.st_mtime_ns, 44, 40)
    assert row["date"] == datetime.fromtimestamp(int(stat.st_mtime)) and row["captions"] == []
    assert index.thumbnail(2) is None
    assert sorted(os.listdir(tmp_path)) == ["index", "photos"]


def test_safetensors_reads_the_embeddings_file(tmp_path: Path, model: Path) -> None:
    write_pictures(tmp_path / "photos", NAMES)
    for dtype in ("float32", "float16"):
        update_index(tmp_path / dtype, [tmp_path / "photos"], model, dtype=dtype, progress=False)
        read = load_file(tmp_path / dtype / "embeddings.safetensors")["embeddings"]
        index = ImageIndex.open(tmp_path / dtype)
        assert read.dtype == index.embeddings.dtype == np.dtype(dtype)
        assert isinstance(index.embeddings, np.memmap)
        np.testing.assert_array_equal(read, index.embeddings)
    np.testing.assert_allclose(read, ImageIndex.open(tmp_path / "float32").embeddings, atol=1e-3)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that the model encodes during the test."""
    names: list[str] = []
    encode = shards_module.Encoding._encode

    def recording(self: shards_module.Encoding, batch: list[shards_module.Prepared]) -> None:
        names.extend(os.path.basename(prepared.entry["id"]) for prepared in batch)
        encode(self, batch)

    monkeypatch.setattr(shards_module.Encoding, "_encode", recording)
    return names


def test_update_encodes_changes_and_drops_missing_images(tmp_path: Path, model: Path, encoded: list[str]) -> None:
    photos = tmp_path / "photos"
    write_pictures(photos, NAMES)
    update_index(tmp_path / "index", [photos], model, progress=False)
    before = ImageIndex.open(tmp_path / "index")
    old = dict(zip(map(os.path.basename, ids(before)), np.array(before.embeddings), strict=True))
    encoded.clear()
    assert update_index(tmp_path / "index", progress=False).encoded == 0
    assert encoded == []

    (photos / "a.png").unlink()  # gone
    write_picture(photos / "b.png", seed=50)  # changed
    write_picture(photos / "new.png", seed=51)
    (photos / "sub" / "c.jpg").rename(photos / "moved.jpg")
    os.utime(photos / "sub" / "deep" / "d.png", ns=(1, 1))  # touched
    report = update_index(tmp_path / "index", progress=False)
    assert sorted(encoded) == ["b.png", "new.png"]
    assert (report.images, report.encoded, report.reused, report.dropped) == (4, 2, 2, 2)
    after = ImageIndex.open(tmp_path / "index")
    now = dict(zip(map(os.path.basename, ids(after)), after.embeddings, strict=True))
    assert set(now) == {"b.png", "new.png", "moved.jpg", "d.png"}
    np.testing.assert_array_equal(now["moved.jpg"], old["c.jpg"])
    np.testing.assert_array_equal(now["d.png"], old["d.png"])
    np.testing.assert_allclose(after.embeddings, expected(model, ids(after)), atol=1e-5)
    touched = after.entries.to_pylist()[[name.endswith("d.png") for name in ids(after)].index(True)]
    assert touched["mtime"] == 1
    encoded.clear()
    assert update_index(tmp_path / "index", progress=False).encoded == 0 and encoded == []


def test_other_sources_stay_until_removed(tmp_path: Path, model: Path, encoded: list[str]) -> None:
    one, two = write_pictures(tmp_path / "one", "a.png b.png"), [write_picture(tmp_path / "two" / "c.png", 9)]
    update_index(tmp_path / "index", [tmp_path / "one"], model, progress=False)
    report = update_index(tmp_path / "index", [tmp_path / "two"], progress=False)
    assert (report.images, report.encoded, report.dropped) == (3, 1, 0)
    assert ids(ImageIndex.open(tmp_path / "index")) == [str(path) for path in [*one, *two]]
    with pytest.raises(UsageError, match="three: not a source of this index, which has: .*one, .*two"):
        update_index(tmp_path / "index", remove=[tmp_path / "three"], progress=False)
    report = update_index(tmp_path / "index", remove=[tmp_path / "one"], progress=False)
    assert (report.images, report.dropped) == (1, 2)
    index = ImageIndex.open(tmp_path / "index")
    assert ids(index) == [str(two[0])] and index.manifest.sources == [str(tmp_path / "two")]
    np.testing.assert_allclose(index.embeddings, expected(model, ids(index)), atol=1e-5)
    assert encoded == ["a.png", "b.png", "c.png"]


def test_unreadable_images_are_named_and_skipped(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_pictures(photos, NAMES)
    (photos / "broken.jpg").write_bytes((photos / "sub" / "c.jpg").read_bytes()[:300])
    (photos / "empty.png").touch()
    assert cli(["index", str(model), str(photos), "-o", str(tmp_path / "index")]) == 1
    printed = capsys.readouterr()
    assert "4 images; 4 encoded, 0 reused, 0 dropped" in printed.out
    assert "2 of 6 images could not be read: " in printed.err
    for name in ("broken.jpg", "empty.png"):
        assert f"skipped: {photos / name}" in printed.err
    index = ImageIndex.open(tmp_path / "index")
    assert len(index) == 4 and set(index.manifest.skipped) == {str(photos / "broken.jpg"), str(photos / "empty.png")}
    shutil.copy(photos / "a.png", photos / "empty.png")
    (photos / "broken.jpg").unlink()
    assert cli(["index", str(model), "-o", str(tmp_path / "index")]) == 0
    assert (
        ImageIndex.open(tmp_path / "index").manifest.skipped == {} and "5 images; 0 encoded" in capsys.readouterr().out
    )


def test_unlistable_folder_keeps_its_images(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_pictures(photos, "a/1.png a/2.png b/3.png b/c/4.png d/5.png")
    update_index(tmp_path / "index", [photos], model, progress=False)
    before = ImageIndex.open(tmp_path / "index")
    (photos / "d" / "5.png").unlink()  # this one is gone
    write_picture(photos / "a" / "6.png", 6)
    argv = ["index", str(model), str(photos), "-o", str(tmp_path / "index")]
    with monkeypatch.context() as patch:
        unlistable(patch, photos / "b")
        assert cli(argv) == 1
        printed = capsys.readouterr()
        assert "5 images; 1 encoded, 2 reused, 1 dropped" in printed.out
        assert f"1 folder could not be listed: {photos / 'b'}; " in printed.err
        assert "; of the images indexed there before, 2 are kept. " in printed.err
        index = ImageIndex.open(tmp_path / "index")
        assert {os.path.relpath(name, photos) for name in ids(index)} == {
            "a/1.png", "a/2.png", "a/6.png", "b/3.png", "b/c/4.png"
        }  # fmt: skip
        assert index.manifest.skipped[str(photos / "b")].startswith("this folder cannot be listed: Permission denied")
        row = ids(index).index(str(photos / "b" / "3.png"))
        np.testing.assert_array_equal(index.embeddings[row], before.embeddings[2])
        assert cli([*argv, "--overwrite"]) == 1
        assert "2 images of .* cannot be read" and "nothing was overwritten" in capsys.readouterr().err
        assert len(ImageIndex.open(tmp_path / "index")) == 5
        unlistable(patch, photos)
        assert cli(argv) == 1
        assert f"{photos}: cannot be read: Permission denied" in capsys.readouterr().err
    assert cli(argv) == 0 and "5 images; 0 encoded, 5 reused, 0 dropped" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv")
def test_permissions_of_the_system_keep_images(tmp_path: Path, model: Path) -> None:
    write_pictures(tmp_path / "photos", "a/1.png b/2.png")
    update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False)
    (tmp_path / "photos" / "b").chmod(0)
    capabilities = "-dac_override,-dac_read_search"  # without these two, root is a user like any other
    user = ["setpriv", "--bounding-set", capabilities, "--inh-caps", capabilities] if os.geteuid() == 0 else []
    line = [*user, sys.executable, "-m", "modeling_miniclip", "index", model, tmp_path / "photos", "-o"]
    line = [str(word) for word in (*line, tmp_path / "index")]
    try:
        done = subprocess.run(line, env=environment(), cwd=ROOT, text=True, capture_output=True, timeout=300)
    finally:
        (tmp_path / "photos" / "b").chmod(0o755)
    assert done.returncode == 1 and "1 folder could not be listed" in done.stderr, done.stderr
    assert len(ImageIndex.open(tmp_path / "index")) == 2


@pytest.mark.parametrize(("number", "stays"), [(errno.EACCES, True), (errno.EIO, True), (errno.ENOENT, False)])
def test_image_on_a_failing_disk_stays(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, number: int, stays: bool
) -> None:
    first, second = write_pictures(tmp_path / "photos", "a.png b.png")
    update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False)
    os.utime(second, ns=(5, 5))
    real = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path == second:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    report = update_index(tmp_path / "index", progress=False)
    assert list(report.skipped) == [str(second)] and report.kept == stays
    assert ids(ImageIndex.open(tmp_path / "index")) == sorted([str(first)] + [str(second)] * stays, reverse=stays)


def test_unreadable_sources_leave_the_index_alone(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path, "photos/a.png c.png")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(tmp_path / "c.png", "c.png")
    (tmp_path / "list.csv").write_text("image\nc.png\n")
    sources = [tmp_path / name for name in ("photos", "b.tar", "list.csv")]
    update_index(tmp_path / "index", sources, model, progress=False)
    (tmp_path / "photos" / "a.png").unlink()
    real = open

    for broken in ("b.tar", "list.csv"):

        def denied(path: object, *args: object, broken: str = broken, **kwargs: object) -> object:
            if str(path).endswith(broken):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("io.open", denied)
            patch.setattr("builtins.open", denied)
            with pytest.raises(DataError, match=f"{broken}: .*Permission denied"):
                update_index(tmp_path / "index", [tmp_path / broken], progress=False)
        assert len(ImageIndex.open(tmp_path / "index")) == 3


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = tmp_path / os.fsdecode(b"f\xf6to")
    names = [b"caf\xe9.jpg", rb"caf\xe9.jpg", "café.jpg".encode(), b"broken\xff.jpg", b"s\xfcb/d.png"]
    for seed, name in enumerate(names):
        write_picture(top / os.fsdecode(name), seed)
    (top / os.fsdecode(names[3])).write_bytes(b"")
    index_folder = tmp_path / "my.index"
    assert cli(["index", str(model), str(top), "-o", str(index_folder)]) == 1
    assert r"broken\xff.jpg" in capsys.readouterr().err
    index = ImageIndex.open(index_folder)
    inside = [name.removeprefix(rf"{tmp_path}/f\xf6to/") for name in ids(index)]
    assert inside == [r"caf\x5cxe9.jpg", "café.jpg", r"caf\xe9.jpg", r"s\xfcb/d.png"]
    assert update_index(index_folder, progress=False).encoded == 0
    for row in range(4):
        assert picture_of(index, row, 20) is not None
    pages = ["--html", str(tmp_path / "page.html"), "--absolute_paths"]
    assert cli(["search", str(index_folder), "x", "--json", *pages]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {match["id"] for match in found["matches"]} == set(ids(index))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert r"caf\xe9.jpg" in page and "caf%E9.jpg" in page and "missing or unreadable" not in page
    assert cli(["duplicates", str(index_folder)]) == 0
    assert (
        len(index.search(np.ones(index.manifest.dim), 5, EntryFilter(folder=str(top / os.fsdecode(b"s\xfcb"))))) == 1
    )
    index.to_parquet(tmp_path / "all.parquet")
    with pytest.raises(UsageError, match=r"f\\xf6to/x: .* is not UTF-8; choose another name"):
        update_index(top / "x", [top], model, progress=False)
    assert update_index(index_folder, remove=[top], sources=[top / os.fsdecode(names[4])], progress=False).images == 1


def test_names_in_archives_are_escaped(tmp_path: Path, model: Path) -> None:
    picture = write_picture(tmp_path / "a.png", 0)
    with tarfile.open(tmp_path / "l.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("café.png", "b.png", "._b.png", "__MACOSX/b.png"):
            archive.add(picture, name)
    update_index(tmp_path / "index", [tmp_path / "l.tar"], model, progress=False)
    assert ids(ImageIndex.open(tmp_path / "index")) == [rf"{tmp_path}/l.tar/caf\xe9.png", f"{tmp_path}/l.tar/b.png"]


def test_formats_that_are_not_read_are_counted(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(picture_formats, "import_module", missing)
    photos = tmp_path / "photos"
    write_pictures(photos, "a.png")
    start = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for name, content in {"b.HEIC": start, "c.jpg": start, "d.CR2": b"II*\0", "notes.txt": b"x"}.items():
        (photos / name).write_bytes(content)
    assert cli(["index", str(model), str(photos), "-o", str(tmp_path / "index")]) == 1
    printed = capsys.readouterr()
    assert "index: 1 images; 1 encoded" in printed.out
    assert "3 of 4 images could not be read: " in printed.err
    assert "2 of them HEIC (pip install pillow-heif reads it); 1 of them RAW (export it as JPEG)" in printed.err
    for name in ("b.HEIC", "c.jpg", "d.CR2"):
        assert f"skipped: {photos / name}: " in printed.err
    assert len(ImageIndex.open(tmp_path / "index").manifest.skipped) == 3


def test_linked_folders_are_indexed_once(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path, "photos/a.png other/b.png other/c.png")
    (tmp_path / "photos" / "album").symlink_to("../other")
    (tmp_path / "other" / "back").symlink_to("../photos")
    assert cli(["index", str(model), str(tmp_path / "photos"), "-o", str(tmp_path / "index")]) == 0
    names = [os.path.relpath(name, tmp_path / "photos") for name in ids(ImageIndex.open(tmp_path / "index"))]
    assert names == ["a.png", "album/b.png", "album/c.png"]
    assert "album/back: a link to a folder that is listed already; not followed" in capsys.readouterr().err


def test_images_behind_a_broken_link_stay(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path, "photos/a.png disk/b.png")
    (tmp_path / "photos" / "album").symlink_to("../disk")
    (tmp_path / "photos" / "notes").symlink_to("nothing")
    argv = ["index", str(model), str(tmp_path / "photos"), "-o", str(tmp_path / "index")]
    assert cli(argv) == 0 and "warning: " in capsys.readouterr().err
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    assert cli(argv) == 1
    printed = capsys.readouterr()
    assert "2 images; 0 encoded, 1 reused, 0 dropped" in printed.out
    assert f"1 folder could not be listed: {tmp_path / 'photos' / 'album'}; of the images" in printed.err


def test_images_of_an_unmounted_disk_stay(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    write_pictures(photos, "a.png disk/b.png disk/2020/c.png sorted/d.png")
    argv = ["index", str(model), str(photos), "-o", str(tmp_path / "index")]
    assert cli(argv) == 0
    (photos / "disk").rename(elsewhere)
    (photos / "disk").mkdir()
    os.utime(photos / "disk", (1, 1))  # a mount point: it was empty before, too
    (photos / "sorted" / "d.png").unlink()  # by somebody who leaves the folder
    capsys.readouterr()
    for dropped in (1, 0):
        assert cli(argv) == 1
        printed = capsys.readouterr()
        assert f"3 images; 0 encoded, 1 reused, {dropped} dropped" in printed.out
        assert f"skipped: {photos / 'disk'}: empty, though images were indexed in it" in printed.err
        assert f"1 folder could not be listed: {photos / 'disk'}; of the images" in printed.err
    assert cli([*argv, "--overwrite"]) == 1 and "nothing was overwritten" in capsys.readouterr().err
    (photos / "disk").rmdir()
    elsewhere.rename(photos / "disk")
    assert cli(argv) == 0 and "3 images; 0 encoded, 3 reused, 0 dropped" in capsys.readouterr().out
    shutil.rmtree(photos / "disk")
    assert cli(argv) == 0 and "1 images; 0 encoded, 1 reused, 2 dropped" in capsys.readouterr().out


def test_source_without_a_readable_image_drops_nothing(tmp_path: Path, model: Path) -> None:
    write_pictures(tmp_path, "photos/a.png set/pictures/b.png set/pictures/c.png")
    (tmp_path / "set" / "list.csv").write_text("image\npictures/b.png\npictures/c.png\n")
    update_index(tmp_path / "index", [tmp_path / "photos", tmp_path / "set" / "list.csv"], model, progress=False)
    (tmp_path / "set" / "pictures").rename(tmp_path / "elsewhere")  # like a disk that is not mounted
    report = update_index(tmp_path / "index", progress=False)
    assert (report.images, report.kept, report.dropped, len(report.skipped)) == (3, 2, 0, 2)


@pytest.mark.filterwarnings("ignore")
def test_pictures_with_odd_metadata_are_indexed(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, (content, _) in odd_pictures().items():
        (photos / name).write_bytes(content)
    assert cli(["index", str(model), str(photos), "-o", str(tmp_path / "index")]) == 0
    warned = {line.partition(": ")[2] for line in capsys.readouterr().err.splitlines() if "EXIF data" in line}
    for name, (_, orientation) in odd_pictures().items():
        line = f"{photos / name}: its EXIF data cannot be read, so it may be shown turned"
        assert (line in warned) == (orientation is None), name
    rows = ImageIndex.open(tmp_path / "index").entries.to_pylist()
    sizes = {os.path.basename(row["id"]): (row["width"], row["height"]) for row in rows}
    turned = {name for name, size in sizes.items() if size == SIZE[::-1]}
    assert turned == {name for name, (_, orientation) in odd_pictures().items() if orientation == 6}


def test_source_without_images_drops_nothing(tmp_path: Path, model: Path) -> None:
    photos = write_pictures(tmp_path / "photos", "a.png")
    update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False)
    photos[0].unlink()  # like a disk that is not mounted
    with pytest.raises(DataError, match="photos: no images found; the images that were indexed"):
        update_index(tmp_path / "index", progress=False)
    assert len(ImageIndex.open(tmp_path / "index")) == 1
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        update_index(tmp_path / "index", [tmp_path / "nowhere"], progress=False)


def test_error_for_another_model_shows_the_fix(tmp_path: Path, model: Path) -> None:
    write_pictures(tmp_path / "photos", NAMES)
    update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False)
    other = write_model(tmp_path / "other", seed=1)
    before = np.array(ImageIndex.open(tmp_path / "index").embeddings)
    with pytest.raises(ModelError) as raised:
        update_index(tmp_path / "index", [tmp_path / "photos"], other, progress=False)
    np.testing.assert_array_equal(before, ImageIndex.open(tmp_path / "index").embeddings)
    fix = str(raised.value).partition("rebuild the index: miniclip ")[2].split()
    assert cli(fix) == 0
    index = ImageIndex.open(tmp_path / "index")
    assert index.model == str(other)
    np.testing.assert_allclose(index.embeddings, expected(other, ids(index)), atol=1e-5)
    # A copy of the model under another name is accepted.
    shutil.copytree(other, tmp_path / "renamed")
    assert update_index(tmp_path / "index", model=tmp_path / "renamed", progress=False).encoded == 0


def test_retrained_model_in_the_same_folder_is_detected(tmp_path: Path) -> None:
    model = write_model(tmp_path / "export")
    write_pictures(tmp_path / "photos", "a.png")
    update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False)
    write_model(tmp_path / "export", seed=1)
    with pytest.raises(ModelError, match="other weights than .*export has now"):
        update_index(tmp_path / "index", progress=False)


def test_captions_and_splits_follow_the_files(
    tmp_path: Path, model: Path, captioned_folder: Path, encoded: list[str]
) -> None:
    (captioned_folder / "train.txt").write_text("0.png\n1.png\n")
    (captioned_folder / "validation.txt").write_text("3.png\n")
    update_index(tmp_path / "index", [captioned_folder], model, progress=False)
    rows = ImageIndex.open(tmp_path / "index").entries.to_pylist()
    assert [row["split"] for row in rows] == ["train", "train", "", "validation"]
    assert rows[2]["captions"] == ["a man climbs a steep rock", "someone is climbing"]
    text = (captioned_folder / "captions.csv").read_text()
    (captioned_folder / "captions.csv").write_text(text.replace("someone", "somebody"))
    encoded.clear()
    update_index(tmp_path / "index", progress=False)
    rows = ImageIndex.open(tmp_path / "index").entries.to_pylist()
    assert rows[2]["captions"] == ["a man climbs a steep rock", "somebody is climbing"] and encoded == []


def test_csv_needs_no_captions_but_rejects_outside_images(tmp_path: Path, model: Path) -> None:
    write_pictures(tmp_path / "set", "Images/a.png Images/sub/b.png")
    secret = write_picture(tmp_path / "secret.png", 7)
    (tmp_path / "set" / "list.csv").write_text("file_name\na.png\nsub/b.png\n../../secret.png\ngone.png\n")
    source, index = tmp_path / "set" / "list.csv", tmp_path / "index"
    report = update_index(index, [source], model, progress=False)
    images = tmp_path / "set" / "Images"
    assert ids(ImageIndex.open(index)) == [str(images / "a.png"), str(images / "sub" / "b.png")]
    assert set(report.skipped) == {str(secret), str(images / "gone.png")}
    assert "'../../secret.png' is outside" in report.skipped[str(secret)]
    columns = ColumnNames(allow_outside_images=True)
    assert set(update_index(index, columns=columns, progress=False).skipped) == {str(images / "gone.png")}
    assert str(secret) in ids(ImageIndex.open(index))


def test_date_and_size_follow_the_exif_data(tmp_path: Path, model: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2019:07:14 18:30:05"
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photos" / "a.jpg", exif=exif)
    update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False)
    row = ImageIndex.open(tmp_path / "index").entry(0)
    assert (row["date"], row["width"], row["height"]) == (datetime(2019, 7, 14, 18, 30, 5), 30, 40)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_archive_gives_images_captions_and_thumbnails(
    tmp_path: Path, model: Path, encoded: list[str], suffix: str
) -> None:
    write_pictures(tmp_path / "photos", "train/x.png train/y.jpg")
    (tmp_path / "photos" / "train" / "x.txt").write_text("a caption\n")
    (tmp_path / "photos" / "train" / "y.json").write_text(json.dumps({"caption": ["one", "two"], "width": 3}))
    archive = tmp_path / f"photos{suffix}"
    with tarfile.open(archive, "w:gz" if suffix.endswith("gz") else "w") as tar:
        for name in ("x.png", "x.txt", "y.json", "y.jpg"):
            tar.add(tmp_path / "photos" / "train" / name, f"train/{name}")
    update_index(tmp_path / "index", [archive], model, progress=False)
    index = ImageIndex.open(tmp_path / "index")
    rows = index.entries.to_pylist()
    assert ids(index) == [f"{archive}/train/x.png", f"{archive}/train/y.jpg"]
    assert [(row["path"], row["captions"], row["split"]) for row in rows] == [
        (None, ["a caption"], ""), (None, ["one", "two"], "")  # a member's folder is no split
    ]  # fmt: skip
    files = [str(tmp_path / "photos" / "train" / name) for name in ("x.png", "y.jpg")]
    np.testing.assert_allclose(index.embeddings, expected(model, files), atol=1e-5)
    thumbnail = index.thumbnail(1)
    assert thumbnail is not None and thumbnail[:2] == b"\xff\xd8"
    encoded.clear()
    assert update_index(tmp_path / "index", progress=False).reused == 2 and encoded == []
    assert ImageIndex.open(tmp_path / "index").thumbnail(1) == thumbnail


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_data_set_is_encoded_only_once(tmp_path: Path, model: Path, encoded: list[str], kind: str) -> None:
    files = write_pictures(tmp_path / "files", "a.png b.jpg c.png")
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in files],
        "captions": [["one", "two"], ["three"], []],
    }
    data = Dataset.from_dict(rows, features=Features({"image": DatasetImage(), "captions": [Value("string")]}))
    source = tmp_path / ("rows.parquet" if kind == "parquet" else "saved")
    data.to_parquet(source) if kind == "parquet" else DatasetDict(test=data).save_to_disk(source)
    update_index(tmp_path / "index", [source], model, progress=False)
    assert len(encoded) == 3
    assert update_index(tmp_path / "index", progress=False).reused == 3 and len(encoded) == 3
    index = ImageIndex.open(tmp_path / "index")
    start, split = ("", "") if kind == "parquet" else ("test-", "test")
    assert ids(index) == [f"{source}/{start}{i:06d}" for i in range(3)]
    assert index.entries["captions"].to_pylist() == rows["captions"] and index.entry(0)["split"] == split
    assert index.thumbnail(2) is not None and index.entry(2)["path"] is None
    np.testing.assert_allclose(index.embeddings, expected(model, [str(path) for path in files]), atol=1e-5)


# --- interruptions --------------------------------------------------------------------------------------------------


def test_interrupted_run_keeps_embeddings_and_old_index(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    photos = tmp_path / "photos"
    write_pictures(photos, " ".join(f"{i:02d}.png" for i in range(4)))
    update_index(tmp_path / "index", [photos], model, progress=False)
    for i in range(4, 14):
        write_picture(photos / f"{i:02d}.png", i)
    counting = shards_module.Encoding._encode

    def interrupted(self: shards_module.Encoding, batch: list[shards_module.Prepared]) -> None:
        if len(encoded) >= 8:
            raise KeyboardInterrupt
        counting(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module.Encoding, "_encode", interrupted)
        encoded.clear()
        with pytest.raises(KeyboardInterrupt):
            update_index(tmp_path / "index", batch_size=4, progress=False)
    assert len(encoded) == 8 and len(ImageIndex.open(tmp_path / "index")) == 4
    encoded.clear()
    report = update_index(tmp_path / "index", progress=False)
    assert (report.images, report.encoded, report.reused) == (14, 2, 12) and encoded == ["12.png", "13.png"]
    index = ImageIndex.open(tmp_path / "index")
    np.testing.assert_allclose(index.embeddings, expected(model, ids(index)), atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["index", "photos"]


def test_concurrent_run_on_one_index_is_rejected(tmp_path: Path, model: Path) -> None:
    from filelock import FileLock

    write_pictures(tmp_path / "photos", "a.png")
    (tmp_path / ".index.shards").mkdir()
    with FileLock(tmp_path / ".index.shards" / "lock"):
        with pytest.raises(MiniClipError, match="index is being written by another run"):
            update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False)


def test_damaged_and_future_indexes_are_rejected(tmp_path: Path, model: Path) -> None:
    write_pictures(tmp_path / "photos", NAMES)
    update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False)
    with pytest.raises(DataError, match="nothing: no index here; make one with: miniclip index MODEL SOURCE -o"):
        ImageIndex.open(tmp_path / "nothing")
    file = tmp_path / "index" / "embeddings.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="embeddings.safetensors does not match .*delete it and index again"):
        ImageIndex.open(tmp_path / "index")
    file.write_bytes(whole)
    manifest = tmp_path / "index" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "count": 3}))
    with pytest.raises(DataError, match="manifest.json does not match its checksum"):
        ImageIndex.open(tmp_path / "index")
    del values["sha256"]
    manifest.write_text(json.dumps({**values, "count": 3}))
    with pytest.raises(DataError, match="lists .* embeddings"):
        ImageIndex.open(tmp_path / "index")
    manifest.write_text(json.dumps({**values, "format": 2, "more": 1}))
    with pytest.raises(DataError, match="format 2, but this version reads up to 1: upgrade"):
        ImageIndex.open(tmp_path / "index")


# --- several processes ----------------------------------------------------------------------------------------------

# `miniclip` with shards of four images. With DIE set, the second process kills itself when it has encoded six images,
# four of them in a shard, and the first process has stored all of its twelve.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from modeling_miniclip.search.building import shards
from modeling_miniclip.cli import cli

shards.SHARD = 4
encode = shards.Encoding._encode

def dying(self, batch):
    encode(self, batch)
    if self.encoded == 6:
        for _ in range(1200):
            if len(list(self.shards.glob("shard-*"))) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.1)

if os.environ["RANK"] == "1" and os.environ.get("DIE"):
    shards.Encoding._encode = dying
sys.exit(cli(sys.argv[1:]))
"""


def test_shards_missing_on_shared_disk_are_reported(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather_reports = update.gather_reports

    def without_shards(encoding: update.Encoding) -> update.Report:
        for shard in encoding.shards.glob("shard-*"):
            shutil.rmtree(shard)
        return gather_reports(encoding)

    write_pictures(tmp_path / "photos", "0.png 1.png 2.png")
    with monkeypatch.context() as patched:
        patched.setattr(update, "gather_reports", without_shards)
        with pytest.raises(MiniClipError, match="3 of 3 images are not in .*the first .*0.png: all processes must"):
            update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False)
    assert not (tmp_path / "index").exists()
    assert update_index(tmp_path / "index", [tmp_path / "photos"], model, progress=False).images == 3


@pytest.mark.slow
def test_killed_process_loses_only_its_unfinished_shard(tmp_path: Path, model: Path) -> None:
    write_pictures(tmp_path / "photos", " ".join(f"{i:02d}.png" for i in range(24)))
    (tmp_path / "run.py").write_text(SCRIPT)
    argv = ["index", str(model), str(tmp_path / "photos"), "-o", str(tmp_path / "index"), "--batch_size", "2"]
    line = command(argv, 2, str(tmp_path / "run.py"))

    def launch(**env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(line, env=environment() | env, cwd=ROOT, text=True, capture_output=True, timeout=900)

    died = launch(DIE="1")
    assert died.returncode != 0 and not (tmp_path / "index").exists()
    shards = [ImageIndex.open(path) for path in (tmp_path / ".index.shards").glob("shard-*")]
    assert sorted(map(len, shards)) == [4, 4, 4, 4]
    done = launch()
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{tmp_path / 'index'}: 24 images; 8 encoded, 16 reused, 0 dropped" in done.stdout
    index = ImageIndex.open(tmp_path / "index")
    assert [os.path.basename(name) for name in ids(index)] == [f"{i:02d}.png" for i in range(24)]
    np.testing.assert_allclose(index.embeddings, expected(model, ids(index)), atol=1e-5)
    assert not (tmp_path / ".index.shards").exists()


def test_index_follows_its_moved_model_without_images(
    tmp_path: Path, model: Path, encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    place, photos, target = tmp_path / "place", tmp_path / "photos", tmp_path / "my index"
    shutil.copytree(model, place)
    write_pictures(photos, NAMES)
    update_index(target, [photos], place, progress=False)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    encoded.clear()
    place.rename(tmp_path / "elsewhere")
    message = rf"place: .*if the model has moved, run .*: miniclip index NEW_PLACE -o '{target}'"
    with pytest.raises(ModelError, match=message):
        search_index(target, Query("a dog"))
    with pytest.raises(ModelError, match=message):
        update_index(target, progress=False)
    photos.rename(tmp_path / "pictures")
    shutil.copytree(model, tmp_path / "other")
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "logit_scale": weights["logit_scale"] + 1}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ModelError, match="not comparable"):
        update_index(target, model=tmp_path / "other", progress=False)
    assert cli(["index", str(tmp_path / "elsewhere"), "-o", str(target)]) == 0
    assert (
        f"4 images, now of {tmp_path / 'elsewhere'}; not updated, as these are gone: {photos}"
        in capsys.readouterr().out
    )
    after = {path.name: path.read_bytes() for path in target.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    assert len(search_index(target, Query("a dog"), verify=True)[1]) == 4 and not encoded
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "my index", "other", "pictures"]


def test_moved_model_with_its_images_is_a_normal_update(tmp_path: Path, model: Path, encoded: list[str]) -> None:
    shutil.copytree(model, tmp_path / "place")
    write_pictures(tmp_path / "photos", NAMES)
    update_index(tmp_path / "index", [tmp_path / "photos"], tmp_path / "place", progress=False)
    encoded.clear()
    (tmp_path / "place").rename(tmp_path / "elsewhere")
    write_picture(tmp_path / "photos" / "new.png", seed=9)
    report = update_index(tmp_path / "index", model=tmp_path / "elsewhere", progress=False)
    assert (encoded, report.reused, report.missing) == (["new.png"], 4, [])
    assert ImageIndex.open(tmp_path / "index").model == str(tmp_path / "elsewhere")
