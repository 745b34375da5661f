"""What is computed from a tile of similarities: the softmax and sigmoid losses, and the distillation of a teacher.

Each objective sees every tile twice. `add` collects what the loss of each query depends on, and `finish` completes
these sums over the processes. `gradient` then gives the derivative of the loss by the logits of a tile.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ...data.loading.pairs import Pairs
from ..processes.distributed import add_over_processes, logsumexp_over_processes

# From here on, softplus(x) = x in float64 as well. Torch's own threshold, 20, is only exact in float32.
SOFTPLUS_IS_LINEAR = 40


@dataclass
class Tile:
    """A part of the matrix of similarities, `[texts, images]`.

    Args:
        rows: texts, those of this process.
        columns: images of all processes.
        is_negative: whether the texts are additional wrong captions: candidates for all images but those that they
            belong to, and never queries.
        all_pairs: the pairs of the whole matrix.
        device: device of the similarities.
    """

    rows: slice
    columns: slice
    is_negative: bool
    all_pairs: Pairs
    device: torch.device

    @cached_property
    def are_pairs(self) -> Tensor | None:
        """`[r, c]` booleans, whether text and image belong together; None for a large tile, which has `pairs`."""
        found = self.all_pairs.compared(self.rows, self.columns)
        return None if found is None else self._moved(found)

    @cached_property
    def pairs(self) -> Tensor:
        """`[P]` places in the flattened tile where text and image belong together."""
        return self._moved(self.all_pairs.in_tile(self.rows, self.columns))

    def _moved(self, found: Tensor) -> Tensor:
        return found.to(self.device, non_blocking=self.device.type == "cuda")


@dataclass
class Sizes:
    """Rows of the batch over all processes.

    Args:
        images: number of images.
        texts: number of texts without the additional negatives.
        own_texts: number of these in this process.
        processes: number of processes.
    """

    images: int
    texts: int
    own_texts: int
    processes: int


class Objective(Protocol):
    """A loss that is the sum of its parts over the processes."""

    def add(self, logits: Tensor, tile: Tile) -> None:
        """Take the logits `[r, c]` of a tile into account, without changing them."""

    def finish(self) -> Tensor:
        """This process's part of the loss, a scalar. Every process must call it."""

    def gradient(self, logits: Tensor, tile: Tile) -> Tensor:
        """`[r, c]`, the derivative of the whole loss by the logits of a tile, which stay as they are."""


class _Sums:
    """For each query, a sum over all tiles.

    Args:
        number: number of queries.
        like: tensor of the device and type to use.
    """

    nothing = 0.0

    def __init__(self, number: int, like: Tensor):
        self.number, self.like = number, like
        self.values: Tensor | None = None

    def add(self, found: Tensor, part: slice) -> None:
        """Add what was found in a tile for a part of the queries; `found` is kept."""
        if self.values is None and len(found) == self.number:
            self.values = found
        else:
            values = self.so_far()
            values[part] = self.plus(values[part], found)

    def so_far(self) -> Tensor:
        """`[number]`."""
        if self.values is None:
            self.values = self.like.new_full((self.number,), self.nothing)
        return self.values

    @staticmethod
    def plus(first: Tensor, second: Tensor) -> Tensor:
        """Elementwise sum."""
        return first + second

    def combine_processes(self) -> None:
        """Complete the sums of queries whose terms are in several processes."""
        self.values = add_over_processes(self.so_far())


class _LogSums(_Sums):
    """For each query, the logarithm of a sum of exponentials over all tiles."""

    nothing = -math.inf

    @staticmethod
    def plus(first: Tensor, second: Tensor) -> Tensor:
        """Logarithm of the sum of the exponentials."""
        return torch.logaddexp(first, second)

    def combine_processes(self) -> None:
        """Complete the sums of queries whose terms are in several processes."""
        self.values = logsumexp_over_processes(self.so_far())


# --- softmax --------------------------------------------------------------------------------------------------------


class _Queries:
    """Cross-entropy of the rows or the columns over all tiles.

    Args:
        dim: 0 if the rows of the tiles are queries, 1 if the columns are.
        number: number of queries.
        weight: weight of each query's loss, above 0.
        mean: whether several positives are combined by the mean of their log-probabilities.
        like: tensor of the device and type to use.
    """

    def __init__(self, dim: int, number: int, weight: float, mean: bool, like: Tensor):
        self.dim, self.weight, self.mean = dim, weight, mean
        self.total = _LogSums(number, like)  # of the logits of all candidates
        self.positive = _Sums(number, like) if mean else _LogSums(number, like)  # of those of the positives
        self.count = _Sums(number, like)  # number of the positives, with `mean`

    def add_compared(self, right: Tensor, are_pairs: Tensor, part: slice) -> None:
        """Take the positives of a tile into account: the logits, what is nothing to the sum elsewhere, and which."""
        if self.mean:
            self.positive.add(right.sum(1 - self.dim), part)
            self.count.add(are_pairs.sum(1 - self.dim, dtype=right.dtype), part)
        else:
            self.positive.add(right.logsumexp(1 - self.dim), part)

    def add_positives(self, logits: Tensor, query: Tensor, part: slice) -> None:
        """Take some positives into account: `[P]` logits, and their queries counted from the start of a part."""
        nothing = logits.new_zeros(part.stop - part.start)
        if self.mean:
            self.positive.add(nothing.index_add(0, query, logits), part)
            self.count.add(nothing.index_add_(0, query, torch.ones_like(logits)), part)
            return
        largest = torch.full_like(nothing, -torch.inf).scatter_reduce_(0, query, logits, "amax")
        sums = nothing.index_add_(0, query, (logits - largest[query]).exp_())
        self.positive.add(sums.log_().add_(largest), part)

    def combine_processes(self) -> None:
        """Complete the sums of queries whose candidates are in several processes."""
        self.total.combine_processes()
        self.positive.combine_processes()
        if self.mean:
            self.count.combine_processes()

    def finish(self) -> Tensor:
        """The sum of the weighted losses; from then on, the shares in the total are weighted."""
        total, positive = self.total.so_far(), self.positive.so_far()
        loss = (total - (positive / self.count.so_far() if self.mean else positive)).sum() * self.weight
        total -= math.log(self.weight)
        return loss

    def probabilities(self, logits: Tensor, part: slice) -> Tensor:
        """`[r, c]`, the weighted share of each logit of a tile among all candidates of its query."""
        return self._exp(logits, self.total, part)

    def shares(self, logits: Tensor, part: slice) -> Tensor:
        """`[r, c]` or of that form, the weighted share of each logit of a tile among the positives of its query."""
        if self.mean:
            return (self.weight / self.count.so_far()[part]).unsqueeze(1 - self.dim)
        return self._exp(logits, self.positive, part).mul_(self.weight)

    def shares_of(self, logits: Tensor, query: Tensor, part: slice) -> Tensor:
        """`[P]`, the same for some positives, as in `add_positives`."""
        if self.mean:
            return self.weight / self.count.so_far()[part][query]
        return (logits - self.positive.so_far()[part][query]).exp_() * self.weight

    def _exp(self, logits: Tensor, log_sums: _Sums, part: slice) -> Tensor:
        """`[r, c]`, the exponentials of the logits of a tile, divided by the sum of their query."""
        return (logits - log_sums.so_far()[part].unsqueeze(1 - self.dim)).exp_()


class Softmax:
    """CLIP's loss with any number of positives: the mean of both directions' cross-entropies.

    Args:
        sizes: rows of the batch.
        mean: whether several positives are combined by the mean of their log-probabilities (`softmax_mean`) or by
            their summed probability (`softmax_sum`).
        weight: factor of the loss.
        like: tensor of the device and type to use.
    """

    def __init__(self, sizes: Sizes, mean: bool, weight: float, like: Tensor):
        self.processes, self.mean = sizes.processes, mean
        self.texts = _Queries(0, sizes.own_texts, weight / 2 / sizes.texts, mean, like)
        self.images = _Queries(1, sizes.images, weight / 2 / sizes.images, mean, like)

    def add(self, logits: Tensor, tile: Tile) -> None:
        if tile.is_negative:
            with _replaced(logits, tile.pairs, -torch.inf):
                self.images.total.add(logits.logsumexp(0), tile.columns)
            return
        self.texts.total.add(logits.logsumexp(1), tile.rows)
        self.images.total.add(logits.logsumexp(0), tile.columns)
        if tile.are_pairs is not None:
            right = torch.where(tile.are_pairs, logits, self.images.positive.nothing)
            self.texts.add_compared(right, tile.are_pairs, tile.rows)
            self.images.add_compared(right, tile.are_pairs, tile.columns)
            return
        positives, width = logits.take(tile.pairs), logits.shape[1]
        self.texts.add_positives(positives, tile.pairs // width, tile.rows)
        self.images.add_positives(positives, tile.pairs % width, tile.columns)

    def finish(self) -> Tensor:
        self.images.combine_processes()
        return self.texts.finish() + self.images.finish() / self.processes

    def gradient(self, logits: Tensor, tile: Tile) -> Tensor:
        if tile.is_negative:
            with _replaced(logits, tile.pairs, -torch.inf):
                return self.images.probabilities(logits, tile.columns)
        gradient = self.images.probabilities(logits, tile.columns)
        gradient += self.texts.probabilities(logits, tile.rows)
        if tile.are_pairs is not None:
            shares = self.texts.shares(logits, tile.rows) + self.images.shares(logits, tile.columns)
            return gradient.sub_(torch.where(tile.are_pairs, shares, 0.0))
        positives, width = logits.take(tile.pairs), logits.shape[1]
        shares = self.texts.shares_of(positives, tile.pairs // width, tile.rows)
        shares += self.images.shares_of(positives, tile.pairs % width, tile.columns)
        return gradient.put_(tile.pairs, -shares, accumulate=True)


@contextmanager
def _replaced(logits: Tensor, places: Tensor, value: float | None) -> Iterator[Tensor]:
    """Within the block, some logits are another value, or with None have the other sign; yields what they were."""
    before = logits.take(places)
    logits.put_(places, -before if value is None else torch.full_like(before, value))
    try:
        yield before
    finally:
        logits.put_(places, before)


# --- sigmoid --------------------------------------------------------------------------------------------------------


class Sigmoid:
    """SigLIP's loss: the sum of -log sigmoid(+-logit) over all pairs, divided by the number of texts.

    Args:
        sizes: rows of the batch.
        weight: factor of the loss.
        like: tensor of the device and type to use.
    """

    def __init__(self, sizes: Sizes, weight: float, like: Tensor):
        self.weight, self.like = weight / sizes.texts, like
        self.sums: list[Tensor] = []  # of each tile: added one by one, thousands would lose digits
        self.last: tuple[Tile | None, Tensor] = None, like  # a small tile, and the logits of its wrong answers

    def add(self, logits: Tensor, tile: Tile) -> None:
        with self._wrong_answers(logits, tile) as wrong:
            self.sums.append(softplus(wrong, threshold=SOFTPLUS_IS_LINEAR).sum())

    def finish(self) -> Tensor:
        if len(self.sums) == 1:
            return self.sums[0] * self.weight
        return (torch.stack(self.sums).sum() if self.sums else self.like.new_zeros(())) * self.weight

    def gradient(self, logits: Tensor, tile: Tile) -> Tensor:
        with self._wrong_answers(logits, tile) as wrong:
            gradient = wrong.sigmoid().mul_(self.weight)
        if tile.are_pairs is not None:
            return torch.where(tile.are_pairs, -gradient, gradient)
        return gradient.put_(tile.pairs, -gradient.take(tile.pairs))

    @contextmanager
    def _wrong_answers(self, logits: Tensor, tile: Tile) -> Iterator[Tensor]:
        """The logits of the wrong answer; a negative has none for an image that it belongs to."""
        if tile.are_pairs is not None:
            if self.last[0] is not tile:
                self.last = tile, torch.where(tile.are_pairs, -torch.inf if tile.is_negative else -logits, logits)
            yield self.last[1]
            return
        with _replaced(logits, tile.pairs, -torch.inf if tile.is_negative else None):
            yield logits


# --- distillation ---------------------------------------------------------------------------------------------------


class _Students:
    """Divergence between the teacher's and the student's distributions of the rows or the columns over all tiles."""

    def __init__(self, number: int, weight: float, like: Tensor):
        self.weight = weight
        self.student = like.new_full((number,), -torch.inf)  # logsumexp of the logits
        self.teacher = like.new_full((number,), -torch.inf)
        self.gap = like.new_zeros(number)  # mean difference of the logits, teacher - student, by the teacher

    def add(self, student: Tensor, teacher: Tensor, dim: int, part: slice) -> None:
        self.student[part] = torch.logaddexp(self.student[part], student.logsumexp(1 - dim))
        here = teacher.logsumexp(1 - dim)
        gap = ((teacher - here.unsqueeze(1 - dim)).exp_() * (teacher - student)).sum(1 - dim)
        before, self.teacher[part] = self.teacher[part].clone(), torch.logaddexp(self.teacher[part], here)
        whole = self.teacher[part]
        self.gap[part] = self.gap[part] * (before - whole).exp() + gap * (here - whole).exp()

    def combine_processes(self) -> None:
        whole = logsumexp_over_processes(self.teacher)
        self.gap = add_over_processes(self.gap * (self.teacher - whole).exp())
        self.teacher, self.student = whole, logsumexp_over_processes(self.student)

    def finish(self) -> Tensor:
        return (self.gap - self.teacher + self.student).sum() * self.weight

    def gradient(self, student: Tensor, teacher: Tensor, dim: int, part: slice) -> Tensor:
        gradient = (student - self.student[part].unsqueeze(1 - dim)).exp_()
        gradient -= (teacher - self.teacher[part].unsqueeze(1 - dim)).exp_()
        return gradient.mul_(self.weight)


class Distillation:
    """Pulls the student's distributions over texts and over images towards those of a teacher.

    The loss is the mean of both directions' Kullback-Leibler divergences from the teacher's softmax to the student's.
    Additional negatives take no part.

    Args:
        sizes: rows of the batch.
        weight: factor of the loss.
        text_embeds: `[n, width]`, the teacher's embeddings of this process's texts, times its inverse temperature.
        image_embeds: `[B, width]`, the teacher's embeddings of all images.
        like: tensor of the device and type to use.

    Attributes:
        found: this process's part of the loss, once it is finished.
    """

    def __init__(self, sizes: Sizes, weight: float, text_embeds: Tensor, image_embeds: Tensor, like: Tensor):
        self.processes = sizes.processes
        self.text_embeds, self.image_embeds = text_embeds.to(like.dtype), image_embeds.to(like.dtype)
        self.texts = _Students(sizes.own_texts, weight / 2 / sizes.texts, like)
        self.images = _Students(sizes.images, weight / 2 / sizes.images, like)
        self.found = like.new_zeros(())

    def add(self, logits: Tensor, tile: Tile) -> None:
        if not tile.is_negative:
            teacher = self._teacher(tile)
            self.texts.add(logits, teacher, 0, tile.rows)
            self.images.add(logits, teacher, 1, tile.columns)

    def finish(self) -> Tensor:
        self.images.combine_processes()
        self.found = self.texts.finish() + self.images.finish() / self.processes
        return self.found

    def gradient(self, logits: Tensor, tile: Tile) -> Tensor:
        if tile.is_negative:
            return torch.zeros_like(logits)
        teacher = self._teacher(tile)
        gradient = self.texts.gradient(logits, teacher, 0, tile.rows)
        return gradient.add_(self.images.gradient(logits, teacher, 1, tile.columns))

    def _teacher(self, tile: Tile) -> Tensor:
        return self.text_embeds[tile.rows] @ self.image_embeds[tile.columns].t()
