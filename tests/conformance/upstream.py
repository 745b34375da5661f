"""The test suite of transformers as a package, `transformers_tests`, next to this project's `tests`.

Run as a script, it fetches the source archive of the installed release into the folder that is its argument. The
archive lacks some folders that its tests import: `stand_ins/` has an empty class or value for each, so that what
they hold upstream is not run.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"


def source_name() -> str:
    """Name of the archive of the installed release, without its ending."""
    return f"transformers-{version('transformers')}"


def fetch(folder: Path) -> None:
    """Download and unpack the archive, unless it is there. Nothing of it is installed; pip reads its metadata.

    Raises:
        CalledProcessError: pip did not find the archive at its index.
    """
    if (folder / source_name()).is_dir():
        return
    requirement = source_name().replace("-", "==", 1)
    options = ["--quiet", "--no-deps", "--no-binary", "transformers"]
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", unfinished, requirement]
        subprocess.run(command, check=True)
        with tarfile.open(Path(unfinished) / f"{source_name()}.tar.gz") as archive:
            archive.extractall(unfinished, filter="data")
        (Path(unfinished) / source_name() / "tests" / "__init__.py").touch()  # missing too, and looked for
        (Path(unfinished) / source_name()).rename(folder / source_name())


def mount() -> None:
    """Make `transformers_tests` importable from the archive in `TRANSFORMERS_SOURCE`, else `.venv`.

    Raises:
        FileNotFoundError: it is not there.
    """
    source = Path(os.environ.get("TRANSFORMERS_SOURCE", ".venv")) / source_name()
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not there: `make conformance` fetches it")
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(source / "tests"), str(STAND_INS)]
    sys.modules[package.__name__] = package
    sys.path.append(str(STAND_INS))  # where the archive would have its folder `utils`


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
