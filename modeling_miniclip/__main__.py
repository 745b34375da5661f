"""`python -m modeling_miniclip` is `miniclip`."""

import sys

from .cli import cli

sys.exit(cli())
