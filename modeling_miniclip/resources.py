"""Where the data files that come with the package are: in a checkout or inside the installed package."""

from pathlib import Path

from .errors import UsageError

PACKAGE = Path(__file__).resolve().parent


def packaged_file(*parts: str) -> Path:
    """Path of a data file, for instance `packaged_file("configuration", "recipes", "scenes.yaml")`.

    Raises:
        UsageError: there is no such file; those beside it are listed.
    """
    roots = (PACKAGE, PACKAGE.parent)  # the wheel carries them inside the package, a checkout beside it
    for root in roots:
        if root.joinpath(*parts).exists():
            return root.joinpath(*parts)
    siblings = sorted({path.name for root in roots for path in root.joinpath(*parts).parent.glob("*.*")})
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
    if Path(value).is_file():
        return Path(value)
    if Path(value).suffix or "/" in value:
        raise UsageError(f"{value}: no such file")
    return packaged_file("configuration", folder, value + suffix)
