"""`python -m modeling_miniclip` runs the command `miniclip`."""

import os
import sys

from .utils.interrupts import quit_at_interrupt

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks is computed on its CPU
quit_at_interrupt()

from .cli import cli  # noqa: E402

sys.exit(cli())
