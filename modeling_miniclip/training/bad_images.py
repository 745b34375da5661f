"""Images that cannot be decoded during a run: each is skipped and reported once, and too many end the run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import DataError
from .processes.distributed import gather_lists


class BadImages:
    """The images of each split that could not be decoded so far; part of a checkpoint.

    All processes have the same list, so that the rows that a step skips, and whether the run ends, do not depend on
    the number of processes.

    Args:
        sizes: number of `images` of each split.
        limit: largest fraction of a split's images that may be bad.
        warn: function that prints a line.
        device: device for the communication between processes.
        remember: function called with the rows of each split when another image was found bad.
    """

    def __init__(
        self,
        sizes: Mapping[str, Mapping[str, int]],
        limit: float,
        warn: Callable[[str], None],
        device: torch.device,
        remember: Callable[[dict[str, list[int]]], object] = lambda rows: None,
    ):
        self.sizes = {split: size["images"] for split, size in sizes.items()}
        self.limit, self.warn, self.device, self.remember = limit, warn, device, remember
        self.rows: dict[str, list[int]] = {split: [] for split in sizes}

    def record_undecodable(self, split: str, undecodable: list[tuple[int, str]]) -> int:
        """Record the images that this process skipped; every process must call it.

        Args:
            split: name of the split.
            undecodable: row of each skipped image, and why it cannot be decoded.

        Returns:
            Number of images that all processes skipped.

        Raises:
            DataError: more than `limit` of the split's images were bad so far.
        """
        undecodable = sorted(gather_lists(undecodable, self.device))
        known, size = self.rows[split], self.sizes[split]
        new = [(row, why) for row, why in undecodable if row not in known]
        for row, why in new:
            known.append(row)
            self.warn(f"{why}; skipped in {split}")
        if new:
            self.remember(self.rows)
        if undecodable and len(known) > self.limit * size:
            raise DataError(
                f"{len(known)} of {size} images of {split} cannot be decoded so far, the last one: "
                f"{undecodable[-1][1]}. --max_bad_image_fraction {self.limit:g} allows {self.limit:.2%}: fix the "
                "files (`miniclip check` lists them all) or raise it"
            )
        return len(undecodable)

    def good_rows(self, split: str) -> list[int]:
        """Rows of a split whose images have not been found bad."""
        return sorted(set(range(self.sizes[split])) - set(self.rows[split]))

    def describe(self) -> str | None:
        """One line with the number of bad images per split; None if there are none."""
        counts = [f"{len(rows)} of {self.sizes[split]} in {split}" for split, rows in self.rows.items() if rows]
        return f"images that could not be decoded and were skipped: {', '.join(counts)}" if counts else None

    def state_dict(self) -> dict[str, Any]:
        """State for `accelerator.register_for_checkpointing`."""
        return {split: list(rows) for split, rows in self.rows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what [`state_dict`][BadImages.state_dict] returned."""
        self.rows |= {split: list(rows) for split, rows in state.items()}
