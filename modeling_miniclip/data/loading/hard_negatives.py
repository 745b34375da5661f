"""Wrong captions of an image as additional candidates: from a column, or its own captions with words swapped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..word_swaps.swaps import SWAP_KINDS, draw_swap
from .pair_keys import same_text


@dataclass(frozen=True)
class HardNegatives:
    """Where the wrong captions of an image come from; as many are drawn per epoch as captions.

    Args:
        from_column: whether to draw from the column [`NEGATIVES`][modeling_miniclip.data.columns.NEGATIVES].
        kinds: kinds of swaps to draw; if both sources are used, a caption is swapped where the column has none left.
        seed: random seed of the draws.
    """

    from_column: bool
    kinds: tuple[str, ...]
    seed: int = 0

    @classmethod
    def from_sources(cls, sources: Sequence[str], seed: int = 0) -> "HardNegatives | None":
        """The sources that `--hard_negatives` names; None without any."""
        kinds = tuple(kind for kind in SWAP_KINDS if kind in sources or "swap" in sources)
        return cls("column" in sources, kinds, seed) if kinds or "column" in sources else None

    def draw(
        self, captions: Sequence[str], negatives: Sequence[str], chosen: Sequence[int], epoch: int, row: int
    ) -> list[str]:
        """Wrong captions for one row; they depend only on the seed, the epoch and the row.

        Args:
            captions: all captions of the image.
            negatives: its wrong captions in the column.
            chosen: captions that are drawn in this epoch.
            epoch: number of the epoch.
            row: number of the row.

        Returns:
            At most one for each caption that is drawn.
        """
        drawn: list[str] = []
        right = {same_text(caption) for caption in captions}
        negatives = [text for text in dict.fromkeys(negatives) if same_text(text) not in right]
        if self.from_column and negatives:
            rng = np.random.default_rng([self.seed, epoch, row, 1])
            size = min(len(chosen), len(negatives))
            drawn = [negatives[i] for i in rng.choice(len(negatives), size=size, replace=False)]
        for index in chosen[len(drawn) :] if self.kinds else ():
            if (swap := draw_swap(captions, int(index), self.seed, epoch, row, self.kinds)) is not None:
                drawn.append(swap[1])
        return drawn
