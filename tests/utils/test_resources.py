"""Data files of the package are found in a checkout and in the wheel, and nothing else is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from modeling_miniclip import UsageError, packaged_file
from modeling_miniclip.utils import resources
from modeling_miniclip.utils.resources import named_file
from tests.helpers.runs import ROOT


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as a wheel installs it, next to another package; returns the folder that holds both."""
    package = tmp_path / "site-packages" / "modeling_miniclip"
    (package / "configuration" / "recipes").mkdir(parents=True)
    (package / "configuration" / "recipes" / "scenes.yaml").write_text("dataset: scenes\n")
    (package / "model_card.md").write_text("# card\n")
    (package / "cli.py").touch()
    other = package.parent / "configuration" / "recipes"
    other.mkdir(parents=True)
    (other / "foreign.yaml").write_text("dataset: foreign\n")
    monkeypatch.setattr(resources, "PACKAGE", package)
    return package.parent


def test_checkout_has_data_files_next_to_package() -> None:
    assert packaged_file("model_card.md") == ROOT / "model_card.md"
    assert packaged_file("configuration", "recipes", "scenes.yaml") == ROOT / "configuration/recipes/scenes.yaml"
    assert packaged_file("configuration", "presets").is_dir()


def test_installed_package_uses_its_own_data_files(installed: Path) -> None:
    inside = installed / "modeling_miniclip"
    assert packaged_file("model_card.md") == inside / "model_card.md"
    assert named_file("scenes", "recipes", ".yaml") == inside / "configuration/recipes/scenes.yaml"
    with pytest.raises(UsageError, match="foreign.*configuration/recipes; available: scenes$"):
        named_file("foreign", "recipes", ".yaml")


def test_missing_data_file_error_lists_available_files() -> None:
    with pytest.raises(UsageError, match=r"configuration/presets/no\.json .* available: .*scenes_tiny\.json"):
        packaged_file("configuration", "presets", "no.json")
    with pytest.raises(
        UsageError, match="scenez: neither a file nor .* configuration/recipes; available: .*flickr8k, .*scenes"
    ):
        named_file("scenez", "recipes", ".yaml")


@pytest.mark.parametrize(
    "parts",
    [
        ("configuration", "..", "secret.txt"),
        ("configuration", "recipes", "../../secret.txt"),
        ("..", "..", "secret.txt"),
        ("modeling_miniclip", "cli.py"),
        ("cli.py",),
        ("/etc/passwd",),
        ("configuration", "/etc/passwd"),
    ],
)
def test_no_name_escapes_the_data_folder(installed: Path, parts: tuple[str, ...]) -> None:
    (installed / "modeling_miniclip" / "secret.txt").touch()
    with pytest.raises(UsageError, match="does not come with the package"):
        packaged_file(*parts)


def test_link_out_of_the_data_folder_raises(installed: Path) -> None:
    (installed / "modeling_miniclip" / "configuration" / "recipes" / "link.yaml").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="link"):
        named_file("link", "recipes", ".yaml")


@pytest.mark.parametrize("value", ["../scenes", "./scenes", "recipes/scenes", "scenes.yaml", "/scenes", "a/../scenes"])
def test_path_must_be_an_existing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"{value}: no such file"):
        named_file(value, "recipes", ".yaml")


@pytest.mark.parametrize("value", ["..", ".", ""])
def test_a_name_of_dots_is_no_file(value: str) -> None:
    with pytest.raises(UsageError):
        named_file(value, "recipes", ".yaml")


def test_own_file_takes_precedence_over_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_file("scenes", "recipes", ".yaml") == ROOT / "configuration/recipes/scenes.yaml"
    Path("scenes").mkdir()
    assert named_file("scenes", "recipes", ".yaml") == ROOT / "configuration/recipes/scenes.yaml"
    Path("mine").touch()
    assert named_file("mine", "recipes", ".yaml") == Path("mine")


@pytest.mark.slow
def test_builds_are_reproducible_bit_for_bit(tmp_path: Path) -> None:
    def build(source: Path, *options: str) -> dict[str, bytes]:
        target = tmp_path / f"dist of {source.name}"
        command = [sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", str(target), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return {path.name: path.read_bytes() for path in target.iterdir()}

    copy = tmp_path / "another checkout"
    unbuilt = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "runs", "build", "dist"
    )
    shutil.copytree(ROOT, copy, ignore=unbuilt)
    for i, path in enumerate(copy.rglob("*")):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (10**9 + i, 10**9 + i))
    wheel, archive = sorted(build(ROOT, "--wheel").items()), sorted(build(copy).items())
    assert archive[0] == wheel[0], "of the archive made from the copy, and of the checkout itself"
    assert len(wheel) == 1 and [name.rpartition("-")[2] for name, _ in archive] == ["any.whl", "0.1.0.tar.gz"]


@pytest.mark.slow
def test_wheel_has_code_and_data_files_only(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("miniclip-*-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [path for path in (ROOT / "configuration").rglob("*") if path.is_file()]
    expected = {
        *(f"modeling_miniclip/{path.relative_to(ROOT).as_posix()}" for path in data),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_miniclip").rglob("*.py")),
        "modeling_miniclip/model_card.md",
        "modeling_miniclip/py.typed",
        "train_miniclip.py",
    }
    assert len(data) > 9
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "from modeling_miniclip import packaged_file\n"
        "from modeling_miniclip.training.command_line.parsing import parse_arguments\n"
        "print(parse_arguments(['--recipe', 'scenes']).preset, packaged_file('model_card.md'))"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.split() == ["scenes_tiny", str(site / "modeling_miniclip" / "model_card.md")], done.stderr
