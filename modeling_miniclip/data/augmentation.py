"""Random crops, flips and colours for training images, from a list of albumentations transforms."""

import inspect
from typing import Any

import numpy as np

from ..errors import UsageError, did_you_mean

# What a run that names no augmentation gets: mild, for captions name colours and what is at the edge. Flips are usual,
# though they make captions wrong that say left or right.
DEFAULT_AUGMENTATION: list[dict[str, Any]] = [
    {"name": "RandomResizedCrop", "scale": [0.6, 1.0], "ratio": [0.8, 1.25]},
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "ColorJitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02, "p": 0.5},
]


def build_augmentation(transforms: list[dict[str, Any]], image_size: tuple[int, int]) -> Any:
    """An albumentations pipeline for training images.

    Args:
        transforms: one dictionary a transform: `name` of an albumentations class and its arguments. A transform that
            takes a `size` and names none gets `image_size`.
        image_size: `(height, width)` in pixels that every image has afterwards.

    Returns:
        `albumentations.Compose` from `[H, W, 3]` uint8 to `image_size`; None for an empty list.

    Raises:
        UsageError: no such transform, arguments that it does not take, or a result that is no 8-bit RGB image.
    """
    if not transforms:
        return None
    import albumentations

    steps = [_build_transform(transform, image_size) for transform in transforms]
    steps.append(albumentations.Resize(*image_size))  # does nothing to an image of that size
    try:
        # None is left to chance, so that what is wrong is seen now.
        certain = albumentations.Compose(
            [_build_transform({**t, "p": 1.0}, image_size) for t in transforms] + steps[-1:]
        )
        trial = certain(image=np.zeros((1024, 1024, 3), dtype=np.uint8))["image"]
        if trial.dtype != np.uint8 or trial.shape != (*image_size, 3):
            raise ValueError(f"it gives {trial.dtype} of shape {tuple(trial.shape)}")
    except Exception as error:  # whatever a transform raises that needs more than an image
        raise UsageError(
            f"augmentation ({', '.join(transform['name'] for transform in transforms)}) must turn an image alone into "
            "an 8-bit RGB image; the processor normalises and makes the tensor, so leave out Normalize, ToFloat and "
            f"ToTensorV2: {error}"
        ) from error
    return albumentations.Compose(steps)


def _build_transform(transform: dict[str, Any], image_size: tuple[int, int]) -> Any:
    import albumentations

    arguments = dict(transform)
    name = str(arguments.pop("name", None))
    known = {
        key: value
        for key, value in vars(albumentations).items()
        if isinstance(value, type) and issubclass(value, albumentations.BasicTransform)
    }
    if name not in known:
        raise UsageError(f"augmentation: albumentations has no transform {name!r}{did_you_mean(name, known)}")
    accepted = inspect.signature(known[name]).parameters
    for argument in arguments:
        if argument not in accepted:
            raise UsageError(
                f"augmentation: {name} takes no {argument}{did_you_mean(argument, accepted)}; it takes "
                f"{', '.join(accepted)}"
            )
    if "size" in accepted:
        arguments.setdefault("size", image_size)
    try:
        return known[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    except Exception as error:  # a wrong value, a missing argument, an abstract class
        raise UsageError(f"augmentation: {name}: {error}") from error
