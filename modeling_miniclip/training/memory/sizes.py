"""Sizes of steps that are known to fit into memory."""

from dataclasses import dataclass, field
from typing import Any

Size = tuple[int, int, int]  # images, texts, and tokens of a text


@dataclass
class StepSizes:
    """Which steps are known to fit into memory.

    Args:
        is_given: whether the user has chosen the chunk size; then only a failed allocation makes it smaller.
        known: sizes of steps that fitted; none of them is within another.
    """

    is_given: bool = False
    known: list[Size] = field(default_factory=list)

    def fits(self, size: Size) -> bool:
        """Whether a step of this size, or one that is at least as large in every respect, has fitted before."""
        return any(_is_within(size, other) for other in self.known)

    def add(self, size: Size) -> None:
        """Remember that a step of this size fitted."""
        if not self.fits(size):
            self.known = [other for other in self.known if not _is_within(other, size)] + [size]


def size_of(batch: dict[str, Any]) -> Size:
    """What the memory of a step depends on; stored features of texts have 0 tokens."""
    tokens = batch["input_ids"].shape[1] if "input_ids" in batch else 0
    return len(batch["image_id"]), len(batch["text_image_id"]), tokens


def _is_within(size: Size, other: Size) -> bool:
    return all(one <= most for one, most in zip(size, other, strict=True))
