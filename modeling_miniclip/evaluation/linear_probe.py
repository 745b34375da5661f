"""`miniclip eval --linear_probe`: logistic regression on features of images, of all and of a few per class.

The protocol is that of CLIP (Radford et al. 2021, section 3.2 and appendix A.3): features before the projection,
scikit-learn's L-BFGS with at most 1,000 iterations, and a regularisation that is chosen on images which are neither
trained nor tested on, first on a coarse grid of powers of ten, then around its best value.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, MiniClipError
from .encoders import ClipEncoder
from .eval_sets import EvalSet, ReadableImages
from .metrics import named_intervals, ranks, resampled_recalls, student_interval
from .zero_shot import ensemble_weights

SHOTS = (1, 4, 16)  # training images per class
DRAWS = 10  # of these images
ITERATIONS = 1000
PROBE_NOTE = "in brackets: 95 % interval, over draws of the images per class, or over test images if there is one draw"
COARSE = tuple(10.0**power for power in range(-6, 7, 2))  # inverse strength of the regularisation
FINEST = 10 ** (1 / 8)  # step of the search: eight per power of ten
HELD_OUT = 5  # every fifth training image chooses the regularisation, if there is no split for it


@dataclass(frozen=True)
class ProbeSets:
    """Images to train, to choose the regularisation and to test on; all have the same classes.

    Args:
        train, chosen_by, test: features `[n, width]` and class `[n]` of each image.
    """

    train: tuple[np.ndarray, np.ndarray]
    chosen_by: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def check_probe() -> None:
    """Check that scikit-learn is installed.

    Raises:
        MiniClipError: it is not.
    """
    if find_spec("sklearn") is None:
        raise MiniClipError("--linear_probe needs scikit-learn: pip install scikit-learn")


def linear_probe(
    encoder: ClipEncoder,
    parts: Mapping[str, EvalSet],
    templates: str | Sequence[str] = "ensemble",
    batch_size: int = 32,
    progress: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of linear probes next to zero-shot classification.

    Args:
        encoder: model to measure.
        parts: `train` and `test`, perhaps `validation`, from
            [`probe_sets`][modeling_miniclip.evaluation.eval_sets.probe_sets].
        templates: sentences for class names.
        batch_size: images per forward pass.
        progress: whether to show progress bars.
        seed: random seed of the draws.

    Returns:
        `train_images`, `test_images`, `classes`, `width` of the features; `skipped`, what could not be read, with the
        reasons; and `rows`: `zero-shot`, `1`, `4` and `16` images per class, and `all`, each with its `top-1` in
        percent, a 95 % `interval` and the number of `draws` of training images. With several draws, `top-1` is their
        mean and the interval that of Student's t; with one, it is a bootstrap over test images. Numbers that not every
        class has more images than are left out.

    Raises:
        DataError: no image of a split can be read.
    """
    data, found, skipped = _read_features(encoder, parts, batch_size, progress)
    sets, test = split_features(found, seed), data["test"]
    classes = ensemble_weights(
        lambda texts: encoder.encode_texts(texts, 4 * batch_size, progress), test.texts, templates
    )
    images = encoder.encode_images(test.images, batch_size, progress)
    rank = ranks(images, classes, test.image_group, torch.arange(len(test.texts)))
    rows = [{"images_per_class": "zero-shot", **_of_test_images(rank == 1)}]
    smallest = int(np.bincount(sets.train[1]).min())
    rows += [few_shot(sets, shots, seed) for shots in SHOTS if shots < smallest]
    right = fit(sets.train, best_c(sets.train, sets.chosen_by)).predict(sets.test[0]) == sets.test[1]
    rows.append({"images_per_class": "all", **_of_test_images(torch.from_numpy(right))})
    return {
        "dataset": test.name,
        "skipped": skipped,
        "train_images": len(sets.train[1]),
        "test_images": len(sets.test[1]),
        "classes": len(test.texts),
        "width": sets.test[0].shape[1],
        "rows": rows,
    }


def _read_features(
    encoder: ClipEncoder, parts: Mapping[str, EvalSet], batch_size: int, progress: bool
) -> tuple[dict[str, EvalSet], dict[str, tuple[np.ndarray, np.ndarray]], dict[str, str]]:
    """For each split, what can be read of it, and its features and classes; and what was skipped, with the reasons."""
    data: dict[str, EvalSet] = {}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    skipped: dict[str, str] = {}
    for name, part in parts.items():
        readable = ReadableImages(part.images)
        try:
            features = encoder.image_features(readable, batch_size, progress)
        except ValueError as error:
            if len(readable.unreadable) < len(readable):
                raise
            raise DataError(f"none of the {len(readable)} images of {name} can be read") from error
        data[name] = part = part.without(readable.unreadable)
        found[name] = features.numpy(), part.image_group.numpy()
        skipped |= part.skipped | part.unlisted
    return data, found, skipped


def split_features(found: dict[str, tuple[np.ndarray, np.ndarray]], seed: int) -> ProbeSets:
    """The parts of a probe; without `validation`, a fifth of each class of `train` chooses the regularisation."""
    if "validation" in found:
        return ProbeSets(found["train"], found["validation"], found["test"])
    features, label = found["train"]
    place = np.empty(len(label), dtype=np.int64)  # of each image within its class, at random
    order = np.random.default_rng(seed).permutation(len(label))
    for each in np.unique(label):
        rows = order[label[order] == each]
        place[rows] = np.arange(len(rows))
    held = place % HELD_OUT == HELD_OUT - 1
    if not held.any():  # a few images per class: they choose it themselves
        held = np.ones_like(held)
        return ProbeSets(found["train"], found["train"], found["test"])
    return ProbeSets((features[~held], label[~held]), (features[held], label[held]), found["test"])


def few_shot(sets: ProbeSets, shots: int, seed: int) -> dict[str, Any]:
    """The row of the report for some images per class, drawn several times."""
    accuracy, c = [], None
    for draw in range(DRAWS):
        rng = np.random.default_rng([seed, shots, draw])
        of_class = [np.flatnonzero(sets.train[1] == each) for each in np.unique(sets.train[1])]
        rows = np.concatenate([rng.choice(numbers, shots, replace=False) for numbers in of_class])
        drawn = sets.train[0][rows], sets.train[1][rows]
        c = best_c(drawn, sets.chosen_by) if c is None else c
        accuracy.append(100 * float(fit(drawn, c).score(*sets.test)))
    mean = float(np.mean(accuracy))
    return {"images_per_class": str(shots), "top-1": mean, "interval": student_interval(accuracy), "draws": DRAWS}


def _of_test_images(right: Tensor) -> dict[str, Any]:
    rank, image = {"": torch.where(right, 1, 2)}, {"": torch.arange(len(right))}
    interval = named_intervals(["top-1"], resampled_recalls(rank, image, len(right), (1,)), None)["top-1"]
    return {"top-1": 100 * right.double().mean().item(), "interval": interval, "draws": 1}


def fit(train: tuple[np.ndarray, np.ndarray], c: float) -> Any:
    """A classifier that predicts the classes of features; `c` is the inverse strength of its regularisation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol ends after 1,000 iterations
        return LogisticRegression(C=c, max_iter=ITERATIONS, random_state=0).fit(*train)


def best_c(train: tuple[np.ndarray, np.ndarray], chosen_by: tuple[np.ndarray, np.ndarray]) -> float:
    """The inverse strength of the regularisation with the best accuracy; of equals, the smallest."""
    return search(lambda c: float(fit(train, c).score(*chosen_by)))


def search(score: Callable[[float], float]) -> float:
    """The value with the best score: a coarse grid, then both neighbours at half the distance, again and again."""
    scores = {c: score(c) for c in COARSE}
    step = COARSE[1] / COARSE[0]
    while step > FINEST * 1.001:
        step **= 0.5
        best = max(sorted(scores), key=scores.__getitem__)
        for c in (best / step, best * step):
            if c not in scores and COARSE[0] <= c <= COARSE[-1]:
                scores[c] = score(c)
    return max(sorted(scores), key=scores.__getitem__)


def probe_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of `linear_probe` and, if there is one, `baseline_linear_probe`."""
    sides = [(report["model"], report["linear_probe"])]
    if "baseline_linear_probe" in report:
        sides.append((report["baseline"], report["baseline_linear_probe"]))
    rows = []
    for i, row in enumerate(sides[0][1]["rows"]):
        cells = [side["rows"][i] for _, side in sides]
        texts = [f"{cell['top-1']:.1f} [{cell['interval'][0]:.1f}, {cell['interval'][1]:.1f}]" for cell in cells]
        rows.append([row["images_per_class"], str(row["draws"]), *texts])
    return ["images per class", "draws", *(f"{model} top-1" for model, _ in sides)], rows
