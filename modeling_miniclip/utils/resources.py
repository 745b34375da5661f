"""Paths of the data files that come with the package, in a checkout or in the installed package."""

import os
from pathlib import Path

from ..errors import UsageError

PACKAGE = Path(__file__).resolve().parents[1]


def _root() -> Path:
    # A wheel has them inside the package, a checkout next to it.
    return PACKAGE if (PACKAGE / "configuration").is_dir() else PACKAGE.parent


def packaged_file(*parts: str) -> Path:
    """Path of a data file, such as `packaged_file("configuration", "recipes", "scenes.yaml")`.

    Args:
        *parts: `configuration`, a folder in it and a file in that; or `model_card.md`.

    Returns:
        Its path, in a checkout or in the installed package.

    Raises:
        UsageError: there is no such file; the message lists the files in the same folder.
    """
    path = _root().joinpath(*parts).resolve()
    inside = path.is_relative_to(_root() / "configuration") or path == _root() / "model_card.md"
    if inside and os.path.exists(path):  # unlike Path.exists, it does not raise for an impossible name
        return path
    siblings = sorted(file.name for file in path.parent.glob("*.*")) if inside else []
    raise UsageError(f"{'/'.join(parts)} does not come with the package; available: {', '.join(siblings) or 'none'}")


def named_file(value: str, folder: str, suffix: str) -> Path:
    """Find a file by its path, or by its name in the package's `configuration/<folder>`.

    Args:
        value: path such as `path/to/my.yaml`, or bare name such as `scenes`.
        folder: folder of named files: `recipes`, `presets` or `accelerate`.
        suffix: suffix that is added to a bare name: `.yaml` or `.json`.

    Raises:
        UsageError: there is no such file and no such name.
    """
    path = Path(value).expanduser()
    if os.path.isfile(path):
        return path
    if path.suffix or path.name != value:  # a path; a bare name never leaves its folder
        raise UsageError(
            f"{value}: no such file; give the path of a file, or the name of one in configuration/{folder}"
        )
    try:
        return packaged_file("configuration", folder, value + suffix)
    except UsageError:
        names = sorted(file.stem for file in packaged_file("configuration", folder).glob(f"*{suffix}"))
        raise UsageError(
            f"{value}: neither a file nor a name in the package's configuration/{folder}; "
            f"available: {', '.join(names)}"
        ) from None
