"""Where the data files that come with the package are: in a checkout or inside the installed package."""

import os
from pathlib import Path

from ..errors import UsageError

PACKAGE = Path(__file__).resolve().parents[1]


def _root() -> Path:
    # The wheel carries them inside the package, a checkout beside it.
    return PACKAGE if (PACKAGE / "configuration").is_dir() else PACKAGE.parent


def packaged_file(*parts: str) -> Path:
    """Path of a data file, for instance `packaged_file("configuration", "recipes", "scenes.yaml")`.

    Args:
        *parts: `configuration`, then a folder and a file in it; or `model_card.md`.

    Raises:
        UsageError: there is no such file; those beside it are listed.
    """
    path = _root().joinpath(*parts).resolve()
    inside = path.is_relative_to(_root() / "configuration") or path == _root() / "model_card.md"
    if inside and os.path.exists(path):  # which says no to an impossible name
        return path
    siblings = sorted(file.name for file in path.parent.glob("*.*")) if inside else []
    raise UsageError(f"{'/'.join(parts)} does not come with the package; there are {', '.join(siblings) or 'none'}")


def named_file(value: str, folder: str, suffix: str) -> Path:
    """A file given by path, or by the name of one that comes with the package under `configuration/<folder>`.

    Args:
        value: `path/to/my.yaml`, or a bare name such as `scenes`.
        folder: `recipes`, `presets` or `accelerate`.
        suffix: `.yaml` or `.json`, added to a bare name.

    Raises:
        UsageError: neither a file nor a name that comes with the package.
    """
    path = Path(value).expanduser()
    if os.path.isfile(path):
        return path
    if path.suffix or path.name != value:  # something like a path; a bare name never leaves its folder
        raise UsageError(f"{value}: no such file; give the path of one, or the name of one that comes along")
    try:
        return packaged_file("configuration", folder, value + suffix)
    except UsageError:
        names = sorted(file.stem for file in packaged_file("configuration", folder).glob(f"*{suffix}"))
        raise UsageError(
            f"{value}: neither a file nor one of those that come with the package in configuration/{folder}: "
            f"{', '.join(names)}"
        ) from None
