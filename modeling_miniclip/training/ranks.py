"""Which of several processes this one is, also before torch is imported."""

import os
import sys


def own_rank() -> int:
    """This process among those of the run, whether a launcher told it or has joined the processes already."""
    joined = sys.modules.get("torch.distributed")  # not imported here: it takes seconds
    if joined is not None and joined.is_available() and joined.is_initialized():
        return int(joined.get_rank())
    return int(os.environ.get("RANK", "0"))
