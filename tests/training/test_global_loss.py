"""The training loss and its gradients against a plain loop over pairs, for every option, in tiles and processes."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from modeling_miniclip.configuration_miniclip import LOSS_TYPES
from modeling_miniclip.data.loading.pair_keys import NO_KEY
from modeling_miniclip.data.loading.pairs import Pairs
from modeling_miniclip.loss_miniclip import symmetric_contrastive_loss
from modeling_miniclip.training.loss.global_loss import Teacher, global_contrastive_loss
from modeling_miniclip.training.loss.tiles import parts
from tests.training.test_distributed import LargestTensor, in_processes

COUNTS = [2, 1, 3, 1, 2, 1, 1]  # captions of each image
DIM, WIDTH = 6, 4
INPUTS = ("images", "texts", "scale", "bias")
OPTIONS = ("keys", "negatives", "prefixes", "teacher")
A, B, C, D, E = (2**62 + i for i in range(5))  # keys


def batch() -> dict[str, Any]:
    """Seven images with eleven captions and four additional negatives among them, and what every option needs."""
    generator = torch.Generator().manual_seed(0)

    def units(rows: int, width: int) -> Tensor:
        return normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)

    image_id = torch.tensor([4, 0, 9, 2, 7, 5, 3])
    owner = image_id.repeat_interleave(torch.tensor(COUNTS))
    is_negative = torch.zeros(15, dtype=torch.bool)
    is_negative[[0, 4, 9, 14]] = True
    text_image_id = torch.empty(15, dtype=torch.long)
    text_image_id[~is_negative], text_image_id[is_negative] = owner, torch.tensor([4, 9, 9, 3])
    # Images 4 and 9 share the caption A, 9 and 2 the caption B, and 7 and 5 are of one group, E. C belongs to image 3.
    image_keys = torch.full((7, 3), NO_KEY)
    for row, keys in enumerate([(A,), (), (A, B), (B,), (E, D), (E,), (C,)]):
        image_keys[row, : len(keys)] = torch.tensor(keys)
    text_keys = torch.full((15, 2), NO_KEY)
    texts = (~is_negative).nonzero().flatten().tolist()
    for place, keys in zip(texts, [(A,), (), (), (A,), (B,), (), (B,), (E, D), (E,), (E,), (C,)], strict=True):
        text_keys[place, : len(keys)] = torch.tensor(keys)
    text_keys[4, 1] = B  # this negative is a caption of images 9 and 2
    return {
        "images": units(7, DIM),
        "texts": units(15, DIM),
        "scale": torch.tensor([9.0], dtype=torch.float64),
        "bias": torch.tensor([-3.0], dtype=torch.float64),
        "image_id": image_id,
        "text_image_id": text_image_id,
        "is_negative": is_negative,
        "image_keys": image_keys,
        "text_keys": text_keys,
        "prefixes": {2: 1.0, 4: 0.5, DIM: 2.0},
        "teacher_images": units(7, WIDTH),
        "teacher_texts": units(15, WIDTH),
    }


def without_negatives(b: dict[str, Any]) -> dict[str, Any]:
    kept = ~b["is_negative"]
    by_text = ("texts", "text_image_id", "is_negative", "text_keys", "teacher_texts")
    return b | {name: b[name][kept] for name in by_text}


# --- the definition, pair by pair -----------------------------------------------------------------------------------


def reference(b: dict[str, Any], loss_type: str, options: tuple[str, ...]) -> Tensor:
    prefixes = b["prefixes"] if "prefixes" in options else {DIM: 1.0}
    return sum(
        weight / sum(prefixes.values()) * reference_of_prefix(b, loss_type, options, dim)
        for dim, weight in prefixes.items()
    )


def reference_of_prefix(b: dict[str, Any], loss_type: str, options: tuple[str, ...], dim: int) -> Tensor:
    def first(vector: Tensor) -> Tensor:
        return vector if dim == DIM else vector[:dim] / vector[:dim].square().sum().sqrt()

    images, texts = [first(x) for x in b["images"]], [first(x) for x in b["texts"]]
    bias = b["bias"][0] if loss_type == "sigmoid" else 0.0
    logits = [[b["scale"][0] * (x * t).sum() + bias for t in texts] for x in images]

    def pair(i: int, j: int) -> bool:
        if not b["is_negative"][j] and b["image_id"][i] == b["text_image_id"][j]:
            return True
        shared = set(b["image_keys"][i].tolist()) & set(b["text_keys"][j].tolist()) - {NO_KEY}
        return "keys" in options and bool(shared)

    rows = range(len(images))
    queries = [j for j in range(len(texts)) if not b["is_negative"][j]]
    negatives = [j for j in range(len(texts)) if b["is_negative"][j]]
    if loss_type == "sigmoid":
        total = -sum((logits[i][j] if pair(i, j) else -logits[i][j]).sigmoid().log() for i in rows for j in queries)
        total -= sum((-logits[i][j]).sigmoid().log() for i in rows for j in negatives if not pair(i, j))
        loss = total / len(queries)
    else:
        of_images, of_texts = [], []
        for i in rows:
            others = [logits[i][j] for j in negatives if not pair(i, j)]
            own = [logits[i][j] for j in queries if pair(i, j)]
            of_images.append(cross_entropy(own, [logits[i][j] for j in queries] + others, loss_type))
        for j in queries:
            own = [logits[i][j] for i in rows if pair(i, j)]
            of_texts.append(cross_entropy(own, [logits[i][j] for i in rows], loss_type))
        loss = (sum(of_images) / len(rows) + sum(of_texts) / len(queries)) / 2
    if "teacher" in options:
        teacher = [[5.0 * (x * t).sum() for t in b["teacher_texts"]] for x in b["teacher_images"]]
        by_image = sum(divergence([teacher[i][j] for j in queries], [logits[i][j] for j in queries]) for i in rows)
        by_text = sum(divergence([teacher[i][j] for i in rows], [logits[i][j] for i in rows]) for j in queries)
        loss = loss + 0.7 * (by_image / len(rows) + by_text / len(queries)) / 2
    return loss


def cross_entropy(positives: list[Tensor], candidates: list[Tensor], loss_type: str) -> Tensor:
    whole = sum(logit.exp() for logit in candidates)
    if loss_type == "softmax_sum":
        return -(sum(logit.exp() for logit in positives) / whole).log()
    return -sum((logit.exp() / whole).log() for logit in positives) / len(positives)


def divergence(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    p = [logit.exp() / sum(other.exp() for other in teacher) for logit in teacher]
    q = [logit.exp() / sum(other.exp() for other in student) for logit in student]
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


# --- the loss under test --------------------------------------------------------------------------------------------


def loss_of(b: dict[str, Any], loss_type: str, options: tuple[str, ...], rank: int = 0, world_size: int = 1,
            tile: int | None = None) -> Tensor:  # fmt: skip
    """The part of the loss of one of several processes, among which the images are dealt; the last has a filler."""
    rows = torch.arange(7) if world_size == 1 else torch.arange(rank, 7, world_size - 1)
    if 0 < rank == world_size - 1:
        rows = rows[:0]
    mine = torch.isin(b["text_image_id"], b["image_id"][rows]).nonzero().flatten()
    image_id, text_image_id = b["image_id"][rows], b["text_image_id"][mine]
    if not len(rows):
        rows, mine, image_id, text_image_id = *torch.tensor([[0], [1]]), *torch.tensor([[-1], [-1]])
    further: dict[str, Any] = {}
    if "keys" in options:
        own = b["image_keys"][rows]
        width = int((own != NO_KEY).sum(1).max()) if len(rows) else 0  # as many as a loader process finds
        further |= {"image_keys": own[:, :width], "text_keys": b["text_keys"][mine]}
    if "negatives" in options:
        further["is_negative"] = b["is_negative"][mine]
    if "prefixes" in options:
        further["prefixes"] = b["prefixes"]
    if "teacher" in options:
        further["teacher"] = Teacher(b["teacher_images"][rows], b["teacher_texts"][mine], 5.0, 0.7)
    bias = b["bias"] if loss_type == "sigmoid" else None
    ids = (image_id, text_image_id)
    return global_contrastive_loss(
        b["images"][rows], b["texts"][mine], b["scale"], *ids, loss_type, bias, tile=tile, **further
    )


def loss_and_gradients(compute: Any, b: dict[str, Any], loss_type: str, *arguments: Any) -> list[Tensor]:
    names = INPUTS if loss_type == "sigmoid" else INPUTS[:3]
    leaves = {name: b[name].clone().requires_grad_() for name in names}
    loss = compute(b | leaves, loss_type, *arguments)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def batch_for(options: tuple[str, ...]) -> dict[str, Any]:
    return batch() if "negatives" in options else without_negatives(batch())


def assert_equal(found: list[Tensor], expected: list[Tensor], relative: float, what: Any) -> None:
    for name, one, other in zip(("loss", *INPUTS), found, expected, strict=False):
        assert (one - other).abs().max() <= relative * other.abs().max(), (what, name)


CHOICES = [(), *((option,) for option in OPTIONS), OPTIONS]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("options", CHOICES, ids=lambda options: "+".join(options) or "plain")
def test_loss_and_gradients_equal_a_loop_over_pairs(
    options: tuple[str, ...], loss_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = batch_for(options)
    expected = loss_and_gradients(reference, b, loss_type, options)
    for small in (True, False):  # small tiles have fewer and larger operations
        if not small:
            monkeypatch.setattr("modeling_miniclip.data.loading.pairs.COMPARED", 0)
        for tile in (1, 2, 3, 100):
            found = loss_and_gradients(loss_of, b, loss_type, options, 0, 1, tile)
            assert_equal(found, expected, 1e-12, (loss_type, options, tile, small))


def results_of(cases: list[Any], rank: int, world_size: int) -> list[list[list[float]]]:
    results = []
    for loss_type, options in cases:
        found = loss_and_gradients(loss_of, batch_for(options), loss_type, options, rank, world_size, 2)
        for tensor in found if world_size > 1 else ():
            torch.distributed.all_reduce(tensor)
        results.append([tensor.flatten().tolist() for tensor in found])
    return results


ALL_CASES = list(itertools.product(LOSS_TYPES, CHOICES))
FEW_CASES = list(itertools.product(LOSS_TYPES, [OPTIONS]))


@pytest.mark.parametrize(
    ("world_size", "cases"), [(3, FEW_CASES), pytest.param(5, ALL_CASES, marks=pytest.mark.slow)], ids=["3", "5"]
)
def test_processes_compute_what_one_computes(world_size: int, cases: list[Any]) -> None:
    compute = partial(results_of, cases)
    for case, one, many in zip(cases, compute(0, 1), in_processes(compute, world_size), strict=True):
        assert_equal(*([torch.tensor(x, dtype=torch.float64) for x in found] for found in (many, one)), 1e-12, case)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_single_precision_equals_the_loss_over_the_whole_matrix(loss_type: str) -> None:
    generator = torch.Generator().manual_seed(1)
    images = normalize(torch.randn(150, 32, generator=generator), dim=-1)
    texts = normalize(images.repeat_interleave(3, 0) + torch.randn(450, 32, generator=generator), dim=-1)
    b = {"images": images, "texts": texts, "scale": torch.tensor([20.0]), "bias": torch.tensor([-10.0])}
    ids = (torch.arange(150), torch.arange(150).repeat_interleave(3))

    def whole(b: dict[str, Any], loss_type: str) -> Tensor:
        return symmetric_contrastive_loss(b["images"], b["texts"], b["scale"], *ids, loss_type, b["bias"])

    def tiled(b: dict[str, Any], loss_type: str) -> Tensor:
        return global_contrastive_loss(b["images"], b["texts"], b["scale"], *ids, loss_type, b["bias"], tile=64)

    found, expected = (loss_and_gradients(f, b, loss_type) for f in (tiled, whole))
    for name, one, other in zip(("loss", *INPUTS), found, expected, strict=False):
        assert (one - other).norm() <= 1e-6 * other.norm(), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_extreme_logits_stay_finite_and_exact(loss_type: str) -> None:
    b = without_negatives(batch())
    b |= {"texts": -b["texts"], "scale": torch.tensor([100.0], dtype=torch.float64)}
    expected = loss_and_gradients(reference, b, loss_type, OPTIONS)
    for dtype, relative in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        single = {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in b.items()}
        found = loss_and_gradients(loss_of, single, loss_type, OPTIONS, 0, 1, 3)
        assert_equal(found, expected, relative, (loss_type, dtype))


def test_a_tile_is_the_largest_tensor() -> None:
    # 40 images and 80 texts: their similarities would be 3,200 numbers.
    ids = (torch.arange(40), torch.arange(40).repeat_interleave(2))
    keys = {"image_keys": torch.full((40, 2), A), "text_keys": torch.full((80, 2), A)}  # all are pairs
    for loss_type in LOSS_TYPES:
        images, texts = (torch.randn(len(x), 2, requires_grad=True) for x in ids)
        scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
        with LargestTensor() as noted:
            global_contrastive_loss(images, texts, scale, *ids, loss_type, bias, tile=10).backward()
            assert noted.elements == 80 * 2  # the embeddings of the texts; a tile is 10 x 10
            global_contrastive_loss(images, texts, scale, *ids, loss_type, bias, tile=10, **keys).backward()
        assert noted.elements <= 80 * 2 * 3  # the keys of the texts


@pytest.mark.parametrize("size", [2, 3])
def test_pairs_share_any_key_but_not_through_others(size: int) -> None:
    images = torch.tensor([[1, A, B], [2, B, NO_KEY], [3, NO_KEY, NO_KEY]])
    texts = torch.tensor([[1, A], [2, B], [3, NO_KEY], [9, B], [1, NO_KEY], [NO_KEY, NO_KEY]])
    columns = parts(0, 3, size)
    pairs = Pairs(texts, images, columns)
    assert pairs.compares == (size == 3)
    found = [
        (rows.start + place // (part.stop - part.start), part.start + place % (part.stop - part.start))
        for rows in parts(0, 6, 4)
        for part in columns
        for place in pairs.in_tile(rows, part).tolist()
    ]
    assert sorted(found) == [(0, 0), (1, 0), (1, 1), (2, 2), (3, 0), (3, 1), (4, 0)]


def test_a_negative_is_a_candidate_for_every_image_and_no_query() -> None:
    # All similarities are 0: 2 images choose among 2 captions and 3 negatives, a caption chooses among 2 images.
    images, texts = torch.eye(8)[:2], torch.eye(8)[2:7]
    owner = torch.tensor([0, 1, 0, 0, 1])
    is_negative = torch.tensor([False, False, True, True, True])
    arguments = (images, texts, torch.tensor(5.0), torch.arange(2), owner)
    loss = global_contrastive_loss(*arguments, is_negative=is_negative)
    assert loss.item() == pytest.approx((torch.tensor(5.0).log() + torch.tensor(2.0).log()).item() / 2)
    # If one of the negatives is also a caption of image 1, it is no candidate for that image.
    keys = {"image_keys": torch.tensor([[NO_KEY], [A]]), "text_keys": torch.tensor([[NO_KEY]] * 3 + [[A], [NO_KEY]])}
    loss = global_contrastive_loss(*arguments, is_negative=is_negative, **keys)
    by_image = (torch.tensor(5.0).log() + torch.tensor(4.0).log()) / 2
    assert loss.item() == pytest.approx((by_image + torch.tensor(2.0).log()).item() / 2)


def test_teacher_is_given_the_divergence_that_it_adds() -> None:
    b = batch()
    teacher = Teacher(b["teacher_images"], b["teacher_texts"], 5.0, 0.7)
    rows = (b["images"], b["texts"], b["scale"], b["image_id"], b["text_image_id"])
    options = {"is_negative": b["is_negative"], "prefixes": b["prefixes"]}
    plain = global_contrastive_loss(*rows, **options).item()
    both = global_contrastive_loss(*rows, **options, teacher=teacher).item()
    assert teacher.divergence is not None and teacher.divergence > 0.01
    assert 0.7 * teacher.divergence.item() == pytest.approx(both - plain, rel=1e-9)
