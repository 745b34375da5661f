"""The processes of a run, for code that must not import torch."""

import os
import sys


def process_rank() -> int:
    """Rank of this process: from `torch.distributed` if that is initialised, else from the launcher's `RANK`."""
    distributed = sys.modules.get("torch.distributed")  # importing it would take seconds
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", "0"))
