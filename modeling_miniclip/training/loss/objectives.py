"""What is computed from a tile of similarities: the softmax and sigmoid losses, and the distillation of a teacher.

Each objective sees every tile twice. `add` collects what the loss of each query depends on, and `finish` completes
these sums over the processes. `gradient` then gives the derivative of the loss by the logits of a tile.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..processes.distributed import add_over_processes, logsumexp_over_processes

# From here on, softplus(x) = x in float64 as well. Torch's own threshold, 20, is only exact in float32.
SOFTPLUS_IS_LINEAR = 40


@dataclass
class Tile:
    """A part of the matrix of similarities, `[texts, images]`.

    Args:
        rows: texts, those of this process.
        columns: images of all processes.
        pairs: `[P]` places in the flattened tile where text and image belong together.
        is_negative: whether the texts are additional wrong captions: candidates for all images but those that they
            belong to, and never queries.
    """

    rows: slice
    columns: slice
    pairs: Tensor
    is_negative: bool


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


# --- softmax --------------------------------------------------------------------------------------------------------

# Up to this many logits, a few operations on all of them take less time than many on the pairs.
SMALL = 2**14


class _LogSums:
    """For each query, the logarithm of a sum of exponentials over all tiles.

    Args:
        number: number of queries.
        like: tensor of the device and type to use.
    """

    def __init__(self, number: int, like: Tensor):
        self.number, self.like = number, like
        self.values: Tensor | None = None

    def add(self, found: Tensor, part: slice) -> None:
        """Add what was found in a tile for a part of the queries; `found` is kept."""
        if self.values is None and len(found) == self.number:
            self.values = found
        else:
            values = self.so_far()
            values[part] = torch.logaddexp(values[part], found)

    def so_far(self) -> Tensor:
        """`[number]`, -inf before the first tile."""
        if self.values is None:
            self.values = self.like.new_full((self.number,), -torch.inf)
        return self.values

    def combine_processes(self) -> None:
        """Complete the sums of queries whose terms are in several processes."""
        self.values = logsumexp_over_processes(self.so_far())

    def probabilities(self, logits: Tensor, dim: int, part: slice) -> Tensor:
        """`[r, c]`, the share of each logit of a tile in the sum of its query."""
        return (logits - self.so_far()[part].unsqueeze(1 - dim)).exp_()


class _Queries:
    """Cross-entropy of the rows or the columns over all tiles.

    Args:
        number: number of queries.
        weight: weight of each query's loss, above 0.
        mean: whether several positives are combined by the mean of their log-probabilities.
        like: tensor of the device and type to use.
    """

    def __init__(self, number: int, weight: float, mean: bool, like: Tensor):
        self.weight, self.mean = weight, mean
        self.total = _LogSums(number, like)  # of the logits of all candidates
        self.positive = _LogSums(number, like)  # of those of the positives, without `mean`
        if mean:
            self.sum, self.count = like.new_zeros(2, number)  # of the positives: logits, and number

    def add_positives(self, logits: Tensor, query: Tensor, part: slice) -> None:
        """Take some positives into account: `[P]` logits, and their queries counted from the start of a part."""
        if self.mean:
            self.sum[part].index_add_(0, query, logits)
            self.count[part].index_add_(0, query, torch.ones_like(logits))
            return
        largest = logits.new_full((part.stop - part.start,), -torch.inf).scatter_reduce_(0, query, logits, "amax")
        sums = torch.zeros_like(largest).index_add_(0, query, (logits - largest[query]).exp_())
        self.positive.add(sums.log_().add_(largest), part)

    def combine_processes(self) -> None:
        """Complete the sums of queries whose candidates are in several processes."""
        self.total.combine_processes()
        if self.mean:
            self.sum, self.count = add_over_processes(torch.stack([self.sum, self.count]))
        else:
            self.positive.combine_processes()

    def finish(self) -> Tensor:
        """The sum of the weighted losses; from then on, the shares in the total are weighted."""
        total = self.total.so_far()
        positive = self.sum / self.count if self.mean else self.positive.so_far()
        loss = (total - positive).sum() * self.weight
        total -= math.log(self.weight)
        return loss

    def targets(self, logits: Tensor, query: Tensor, part: slice) -> Tensor:
        """`[P]`, the weighted share of each positive among those of its query."""
        if self.mean:
            return self.weight / self.count[part][query]
        return (logits - self.positive.so_far()[part][query]).exp_() * self.weight


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
        self.texts = _Queries(sizes.own_texts, weight / 2 / sizes.texts, mean, like)
        self.images = _Queries(sizes.images, weight / 2 / sizes.images, mean, like)

    def add(self, logits: Tensor, tile: Tile) -> None:
        if tile.is_negative:
            with _replaced(logits, tile.pairs, -torch.inf):
                self.images.total.add(logits.logsumexp(0), tile.columns)
            return
        self.texts.total.add(logits.logsumexp(1), tile.rows)
        self.images.total.add(logits.logsumexp(0), tile.columns)
        if not self.mean and logits.numel() <= SMALL:
            right = _without_others(logits, tile.pairs)
            self.texts.positive.add(right.logsumexp(1), tile.rows)
            self.images.positive.add(right.logsumexp(0), tile.columns)
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
                return self.images.total.probabilities(logits, 1, tile.columns)
        gradient = self.images.total.probabilities(logits, 1, tile.columns)
        gradient += self.texts.total.probabilities(logits, 0, tile.rows)
        if not self.mean and logits.numel() <= SMALL:
            right = _without_others(logits, tile.pairs)
            for queries, dim, part in ((self.texts, 0, tile.rows), (self.images, 1, tile.columns)):
                gradient.sub_(queries.positive.probabilities(right, dim, part), alpha=queries.weight)
            return gradient
        positives, width = logits.take(tile.pairs), logits.shape[1]
        targets = self.texts.targets(positives, tile.pairs // width, tile.rows)
        targets += self.images.targets(positives, tile.pairs % width, tile.columns)
        return gradient.put_(tile.pairs, -targets, accumulate=True)


def _without_others(logits: Tensor, places: Tensor) -> Tensor:
    """The logits at some places, and -inf everywhere else."""
    return torch.full_like(logits, -torch.inf).put_(places, logits.take(places))


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
        self.weight = weight / sizes.texts
        self.sums = like.new_zeros(sizes.images)

    def add(self, logits: Tensor, tile: Tile) -> None:
        with self._wrong_answers(logits, tile):
            self.sums[tile.columns] += softplus(logits, threshold=SOFTPLUS_IS_LINEAR).sum(0)

    def finish(self) -> Tensor:
        return self.sums.sum() * self.weight

    def gradient(self, logits: Tensor, tile: Tile) -> Tensor:
        with self._wrong_answers(logits, tile):
            gradient = logits.sigmoid().mul_(self.weight)
        return gradient.put_(tile.pairs, -gradient.take(tile.pairs))

    @staticmethod
    def _wrong_answers(logits: Tensor, tile: Tile) -> AbstractContextManager[Tensor]:
        """Turn the logits into those of the wrong answer; a negative has none for an image that it belongs to."""
        return _replaced(logits, tile.pairs, -torch.inf if tile.is_negative else None)


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
    """

    def __init__(self, sizes: Sizes, weight: float, text_embeds: Tensor, image_embeds: Tensor, like: Tensor):
        self.processes = sizes.processes
        self.text_embeds, self.image_embeds = text_embeds.to(like.dtype), image_embeds.to(like.dtype)
        self.texts = _Students(sizes.own_texts, weight / 2 / sizes.texts, like)
        self.images = _Students(sizes.images, weight / 2 / sizes.images, like)

    def add(self, logits: Tensor, tile: Tile) -> None:
        if not tile.is_negative:
            teacher = self._teacher(tile)
            self.texts.add(logits, teacher, 0, tile.rows)
            self.images.add(logits, teacher, 1, tile.columns)

    def finish(self) -> Tensor:
        self.images.combine_processes()
        return self.texts.finish() + self.images.finish() / self.processes

    def gradient(self, logits: Tensor, tile: Tile) -> Tensor:
        if tile.is_negative:
            return torch.zeros_like(logits)
        teacher = self._teacher(tile)
        gradient = self.texts.gradient(logits, teacher, 0, tile.rows)
        return gradient.add_(self.images.gradient(logits, teacher, 1, tile.columns))

    def _teacher(self, tile: Tile) -> Tensor:
        return self.text_embeds[tile.rows] @ self.image_embeds[tile.columns].t()
