"""Check that the fast tests catch small faults: all of `faults.py`, or those that words on the command line select."""

import argparse
import os
import sys
from pathlib import Path

# As in tests/conftest.py, before the libraries are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "MKL_CBWR": "AUTO"}
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of the process that forks, when it ends

from tests.mutants.faults import FAULTS
from tests.mutants.runner import try_faults


def main() -> int:
    """Try the faults that the command line selects; returns the exit code, 1 if one survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="only faults whose file or description contains one of these")
    parser.add_argument("--root", type=Path, default=Path(), help="checkout to copy (default: the current folder)")
    parser.add_argument("--jobs", type=int, default=2, help="number of faults to try at the same time (default: 2)")
    arguments = parser.parse_args()
    words = arguments.words or [""]
    chosen = [fault for fault in FAULTS if any(word in f"{fault.file} {fault.what}" for word in words)]
    return try_faults(chosen, arguments.root.resolve(), arguments.jobs)


if __name__ == "__main__":
    sys.exit(main())
