"""Zero-shot classification: the class whose name, put into a sentence, is most similar to the image.

Several sentences per class form an ensemble: their embeddings are averaged and normalised again, as in CLIP (Radford
et al. 2021, section 3.1.4).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Sized
from string import Formatter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, UsageError
from ..inference.encode import encode_images, encode_texts
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import MiniClipProcessor
from ..utils.arrays import as_tensor
from .metrics import BLOCK, ranks

# Sets of sentences by name. "pipeline" is the default of transformers' zero-shot-image-classification pipeline.
PROMPT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "pipeline": ("This is a photo of {}.",),
    "ensemble": (
        "a photo of a {}.",
        "a picture of the {}.",
        "a {} in the background.",
        "there is a {} here.",
        "a close view of a {}.",
        "a {} seen from far away.",
        "a blurry snapshot of a {}.",
        "a drawing of a {}.",
    ),
}


def zero_shot_weights(
    model: MiniClipModel,
    class_names: Sequence[str],
    templates: str | Sequence[str] = "ensemble",
    processor: MiniClipProcessor | None = None,
    batch_size: int = 128,
    progress: bool = False,
    truncate_dim: int | None = None,
) -> Tensor:
    """One unit-norm embedding per class: the mean embedding of its sentences, normalised again.

    Args:
        model: model on any device; it is not changed.
        class_names: distinct names of the classes, at least one.
        templates: `ensemble` (eight sentences), `photo`, `pipeline` (that of transformers) or `name` (the name alone),
            or a sentence with one `{}` for the class name, or a list of sentences.
        processor: processor of the model; by default the one saved with it.
        batch_size: sentences per forward pass.
        progress: whether to show a progress bar.
        truncate_dim: number of dimensions to keep, as in [`encode_images`][modeling_miniclip.encode_images].

    Returns:
        `[classes, dim]` float32 on the CPU.

    Raises:
        UsageError: there are no classes, a name is empty or repeated, or a template does not have exactly one `{}`.
        ValueError: there is no processor.

    Examples:
        >>> zero_shot_weights(model, ["dog", "cat"], "a drawing of a {}.").shape  # doctest: +SKIP
        torch.Size([2, 256])
    """
    return ensemble_weights(
        lambda texts: encode_texts(model, texts, processor, batch_size, progress, truncate_dim), class_names, templates
    )


def ensemble_weights(
    encode: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: str | Sequence[str] = "ensemble"
) -> Tensor:
    """[`zero_shot_weights`] with any text encoder; same result and errors.

    Args:
        encode: function that returns the `[n, dim]` unit-norm embeddings of n texts.
        class_names: distinct names of the classes, at least one.
        templates: sentences, as in [`zero_shot_weights`].
    """
    sentences = class_sentences(class_names, templates)
    embeddings = encode([sentence for several in sentences for sentence in several])
    per_class = embeddings.view(len(sentences), len(sentences[0]), -1).mean(dim=1)  # [classes, dim]
    return torch.nn.functional.normalize(per_class, dim=-1)


def class_sentences(class_names: Sequence[str], templates: str | Sequence[str] = "ensemble") -> list[list[str]]:
    """The sentences of each class; arguments and errors as in [`zero_shot_weights`]."""
    names, sentences = _checked_names(class_names), _sentences(templates)
    return [[sentence.format(name) for sentence in sentences] for name in names]


def classify(
    model: MiniClipModel,
    images: Iterable[Any],
    class_names: Sequence[str],
    templates: str | Sequence[str] = "ensemble",
    weights: Any = None,
    top_k: int = 5,
    processor: MiniClipProcessor | None = None,
    batch_size: int = 32,
    progress: bool = False,
    truncate_dim: int | None = None,
) -> list[list[dict[str, Any]]]:
    """Find the most likely classes of images, in the format of transformers' zero-shot-image-classification pipeline.

    Args:
        model: model on any device; it is not changed.
        images: paths, URLs, PIL images, arrays or rows, as for [`encode_images`][modeling_miniclip.encode_images].
        class_names: distinct names of the classes, at least one.
        templates: sentences, as in [`zero_shot_weights`].
        weights: `[classes, dim]` tensor or array from [`zero_shot_weights`] for these class names, to
            encode them only once; `templates` are then ignored.
        top_k: number of classes per image; all classes if there are fewer.
        processor: processor of the model; by default the one saved with it.
        batch_size: images per forward pass.
        progress: whether to show a progress bar.
        truncate_dim: number of dimensions to keep, as in [`encode_images`][modeling_miniclip.encode_images].

    Returns:
        For each image at most `top_k` of `{"score": ..., "label": ...}`, best first. The scores are the softmax, over
        all classes, of the cosine similarities divided by the model's temperature.

    Raises:
        UsageError: `top_k` is below 1, the weights have another shape, or as in [`zero_shot_weights`].
        DataError: an image cannot be read.

    Examples:
        >>> classify(model, ["beach.jpg"], ["dog", "cat"], top_k=1)[0][0]["label"]  # doctest: +SKIP
        'dog'
    """
    if top_k < 1:
        raise UsageError(f"top_k must be at least 1, not {top_k}")
    names = _checked_names(class_names)
    weights = _weights(model, names, templates, weights, processor, truncate_dim)
    embeddings = encode_images(model, images, processor, batch_size, progress, truncate_dim)
    scale = model.inverse_temperature().detach().float().cpu()
    found = []
    for block in embeddings.split(BLOCK):
        scores, order = (scale * block @ weights.t()).softmax(dim=-1).sort(descending=True, stable=True)
        for row, indices in zip(scores[:, :top_k].tolist(), order[:, :top_k].tolist(), strict=True):
            found.append([{"score": score, "label": names[i]} for score, i in zip(row, indices, strict=True)])
    return found


def zero_shot_accuracy(
    model: MiniClipModel,
    images: Iterable[Any],
    labels: Any,
    class_names: Sequence[str],
    templates: str | Sequence[str] = "ensemble",
    weights: Any = None,
    top_k: Sequence[int] = (1, 5),
    processor: MiniClipProcessor | None = None,
    batch_size: int = 32,
    progress: bool = True,
    truncate_dim: int | None = None,
) -> dict[str, float]:
    """Percentage of images whose right class is among the first K. Ties count against the model.

    Args:
        model: model on any device; it is not changed.
        images: paths, URLs, PIL images, arrays or rows, as for [`encode_images`][modeling_miniclip.encode_images].
        labels: list, array or tensor with one per image: the name of its class, or its index in `class_names`.
        class_names: distinct names of the classes, at least two.
        templates: sentences, as in [`zero_shot_weights`].
        weights: `[classes, dim]` or None, as in [`classify`].
        top_k: values of K. Those not below the number of classes are left out: any model would score 100.
        processor: processor of the model; by default the one saved with it.
        batch_size: images per forward pass.
        progress: whether to show a progress bar.
        truncate_dim: number of dimensions to keep, as in [`encode_images`][modeling_miniclip.encode_images].

    Returns:
        Percentages by name, such as `{"top-1": ..., "top-5": ...}`.

    Raises:
        UsageError: a K is below 1, no K is below the number of classes, or as in [`classify`].
        DataError: a label is not a class, images and labels differ in number, or an image cannot be read.

    Examples:
        >>> split = load_dataset("imagefolder", data_dir="animals")["train"]  # doctest: +SKIP
        >>> names = split.features["label"].names  # doctest: +SKIP
        >>> sorted(zero_shot_accuracy(model, split, split["label"], names))  # doctest: +SKIP
        ['top-1', 'top-5']
    """
    names = _checked_names(class_names)
    measured = [k for k in top_k if k < len(names)]
    if not measured or min(top_k) < 1:
        raise UsageError(f"top_k {tuple(top_k)} with {len(names)} classes: expected 1 <= K < number of classes")
    targets = _targets(labels, names)
    if isinstance(images, Sized) and len(images) != len(targets):
        raise DataError(f"{len(images)} images but {len(targets)} labels; each image needs one")
    weights = _weights(model, names, templates, weights, processor, truncate_dim)
    embeddings = encode_images(model, images, processor, batch_size, progress, truncate_dim)
    if len(embeddings) != len(targets):
        raise DataError(f"{len(embeddings)} images but {len(targets)} labels; each image needs one")
    rank = ranks(embeddings, weights, targets, torch.arange(len(names)))  # [images]
    return {f"top-{k}": 100 * (rank <= k).double().mean().item() for k in measured}


def _checked_names(class_names: Sequence[str]) -> list[str]:
    names = [class_names] if isinstance(class_names, str) else list(class_names)
    if not names or isinstance(class_names, str) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"class_names must be a list of at least one name, not {class_names!r}")
    for i, name in enumerate(names):
        if not name.strip():
            raise UsageError(f"class_names[{i}] is empty; give the class a name or leave it out")
    twice = [repr(name) for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"class_names has {', '.join(twice)} more than once; each class needs a different name")
    return names


def _sentences(templates: str | Sequence[str]) -> list[str]:
    given = PROMPT_TEMPLATES.get(templates, (templates,)) if isinstance(templates, str) else templates
    for template in given:
        try:
            fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        except (ValueError, TypeError):  # a single brace, or not a text
            fields = []
        if fields != [""]:
            raise UsageError(
                f"template {template!r}: expected a sentence with one {{}} for the class, or one of "
                f"{', '.join(PROMPT_TEMPLATES)}"
            )
    if not given:
        raise UsageError("templates is empty: expected at least one sentence with {} for the class")
    return list(given)


def _weights(
    model: MiniClipModel,
    names: list[str],
    templates: str | Sequence[str],
    weights: Any,
    processor: MiniClipProcessor | None,
    truncate_dim: int | None,
) -> Tensor:
    if weights is None:
        return zero_shot_weights(model, names, templates, processor, truncate_dim=truncate_dim)
    weights = as_tensor(weights)
    expected = (len(names), truncate_dim or model.config.projection_dim)
    if tuple(weights.shape) != expected:
        raise UsageError(
            f"weights of shape {tuple(weights.shape)}, but {len(names)} classes of this model need {expected}: "
            "compute them with zero_shot_weights, and short ones with the same truncate_dim"
        )
    return weights.detach().float().cpu()


def _targets(labels: Any, names: list[str]) -> Tensor:
    """`[images]`, index of the right class of each image."""
    index_of: dict[Any, int] = {key: i for i, name in enumerate(names) for key in (i, name)}
    numbers = (Tensor, np.ndarray, np.generic)
    given = labels.tolist() if isinstance(labels, numbers) else list(labels)
    given = [label.item() if isinstance(label, numbers) else label for label in given]
    for row, label in enumerate(given):
        if label not in index_of:
            raise DataError(
                f"labels[{row}] is {label!r}: neither one of class_names nor an index from 0 to {len(names) - 1}"
            )
    return torch.tensor([index_of[label] for label in given], dtype=torch.long)
