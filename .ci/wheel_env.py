"""Install a wheel into a new environment that holds what the wheel declares, and nothing else.

.venv/bin/python .ci/wheel_env.py FOLDER WHEEL

The dependencies are links to the packages of the Python that runs this script, found by following the declared
requirements, so torch is not downloaded again. An import of an undeclared package, of an extra or of a file of the
checkout fails in the new environment, as it would after `pip install` elsewhere.
"""

import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement


def main(folder: Path, wheel: Path) -> None:
    """Make the environment and check that all requirements are met in it."""
    venv.EnvBuilder(clear=True, with_pip=True).create(folder)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    installed = next(found for found in distributions(path=[str(packages)]) if found.name == "miniclip")
    for found in required_by(installed).values():
        link(found, packages)
    subprocess.run([python, "-m", "pip", "check"], check=True)


def required_by(root: Distribution) -> dict[str, Distribution]:
    """Installed distributions by name that a distribution requires, directly or not, without its extras."""
    needed: dict[str, Distribution] = {}
    waiting = [(root, "")]
    visited = set()
    while waiting:
        owner, extra = waiting.pop()
        for requirement in map(Requirement, owner.requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            found = distribution(requirement.name)
            needed[found.name] = found
            for wanted in ("", *requirement.extras):
                if (found.name, wanted) not in visited:
                    visited.add((found.name, wanted))
                    waiting.append((found, wanted))
    return needed


def link(found: Distribution, packages: Path) -> None:
    """Make the modules and the metadata of an installed distribution importable from `packages`."""
    source = Path(sysconfig.get_path("purelib"))
    names = {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}
    for name in sorted(names):
        target = packages / name
        if not target.exists() and (source / name).exists() and not name.endswith(".pth"):
            target.symlink_to((source / name).resolve())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
