"""Make an environment with other releases of some packages than the Python that runs this script.

.venv/bin/python .ci/version_env.py FOLDER transformers==4.57.6 ...

Everything else comes from that Python's packages, so torch is not installed again.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def main(folder: Path, requirements: list[str]) -> None:
    """Make the environment, and install the requirements with what they need and the other packages do not give."""
    venv.EnvBuilder(clear=True).create(folder)
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-warn-conflicts", *requirements], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
