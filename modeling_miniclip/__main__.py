"""`python -m modeling_miniclip` runs the command `miniclip`."""

import sys

from .utils.interrupts import quit_at_interrupt

quit_at_interrupt()

from .cli import cli  # noqa: E402

sys.exit(cli())
