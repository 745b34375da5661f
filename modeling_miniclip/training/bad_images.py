"""Images that cannot be decoded while a run goes on: each costs itself and is told once, too many end the run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import DataError
from .distributed import gather_lists


class BadImages:
    """Counts the images of each split that cannot be decoded; part of a checkpoint.

    All processes know the same: which rows a step goes without, and whether the run ends, does not depend on how many
    there are.

    Args:
        sizes: `images` of each split.
        limit: share of a split's images that may be bad.
        tell: prints a line.
        device: of the processes' communication.
    """

    def __init__(self, sizes: Mapping[str, Mapping[str, int]], limit: float, tell: Callable[[str], None],
                 device: torch.device):  # fmt: skip
        self.sizes = {split: size["images"] for split, size in sizes.items()}
        self.limit, self.tell, self.device = limit, tell, device
        self.rows: dict[str, list[int]] = {split: [] for split in sizes}

    def lose(self, split: str, lost: list[tuple[int, str]]) -> int:
        """Take note of what this process left out; every process has to call it.

        Args:
            split: name.
            lost: rows, and why they cannot be decoded.

        Returns:
            How many images all processes left out together.

        Raises:
            DataError: more different images of the split than `limit` allows have been met by now.
        """
        lost = sorted(gather_lists(lost, self.device))
        known, size = self.rows[split], self.sizes[split]
        for row, why in lost:
            if row not in known:
                known.append(row)
                self.tell(f"{why}; {split} goes on without it")
        if len(known) > self.limit * size:
            raise DataError(
                f"{len(known)} of {size} images of {split} cannot be decoded so far, the last one: {lost[-1][1]}. "
                f"--max_bad_image_fraction {self.limit:g} allows a share of {self.limit:.2%}: mend the files "
                "(`miniclip check` names them all) or raise it"
            )
        return len(lost)

    def good_rows(self, split: str) -> list[int]:
        """Rows of a split that have not been found bad."""
        return sorted(set(range(self.sizes[split])) - set(self.rows[split]))

    def describe(self) -> str | None:
        """A line with the numbers; None where no image is bad."""
        counts = [f"{len(rows)} of {self.sizes[split]} in {split}" for split, rows in self.rows.items() if rows]
        return f"images that could not be decoded and were left out: {', '.join(counts)}" if counts else None

    def state_dict(self) -> dict[str, Any]:
        """For `accelerator.register_for_checkpointing`."""
        return {split: list(rows) for split, rows in self.rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what [`state_dict`][BadImages.state_dict] gave."""
        self.rows = {split: list(rows) for split, rows in state.items()}
