"""`python -m modeling_miniclip` runs the command `miniclip`."""

import sys

from .cli import cli

sys.exit(cli())
