"""Random crops, flips and colours for training images, from a list of albumentations transforms."""

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

# The default of a run. It is mild, because captions mention colours and things at the edge. Flips are common practice,
# although they make captions with "left" or "right" wrong.
DEFAULT_AUGMENTATION: list[dict[str, Any]] = [
    {"name": "RandomResizedCrop", "scale": [0.6, 1.0], "ratio": [0.8, 1.25]},
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "ColorJitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02, "p": 0.5},
]


def build_augmentation(transforms: list[dict[str, Any]], image_size: tuple[int, int]) -> Any:
    """Build an albumentations pipeline for training images.

    Args:
        transforms: one dictionary per transform, with the `name` of an albumentations class and its arguments. A
            transform with an argument `size` gets `image_size` by default.
        image_size: `(height, width)` of the resulting images in pixels.

    Returns:
        `albumentations.Compose` from `[H, W, 3]` uint8 to `image_size`; None for an empty list.

    Raises:
        UsageError: a transform does not exist or does not accept its arguments, or the result is not an 8-bit RGB
            image.
    """
    if not transforms:
        return None
    import albumentations

    steps = [_build_transform(transform, image_size) for transform in transforms]
    steps.append(albumentations.Resize(*image_size))  # does nothing to images of this size
    try:
        # With p=1 every transform is applied, so that any error occurs now.
        certain = albumentations.Compose(
            [_build_transform({**t, "p": 1.0}, image_size) for t in transforms] + steps[-1:]
        )
        trial = certain(image=np.zeros((1024, 1024, 3), dtype=np.uint8))["image"]
        if trial.dtype != np.uint8 or trial.shape != (*image_size, 3):
            raise ValueError(f"the result is {trial.dtype} of shape {tuple(trial.shape)}")
    except Exception as error:  # transforms that need more than an image raise errors of many classes
        raise UsageError(
            f"augmentation ({', '.join(transform['name'] for transform in transforms)}) must turn an image alone into "
            "an 8-bit RGB image; the processor normalises it and makes the tensor, so leave out Normalize, ToFloat "
            f"and ToTensorV2: {error}"
        ) from error
    return albumentations.Compose(steps)


def pixels_of(image: "Image.Image") -> np.ndarray:
    """The pixels `[H, W, 3]` uint8 of an RGB image: `np.array(image)` in less time.

    Pillow stores four bytes per pixel. It lends them to Arrow, unless a large image is in several blocks of memory;
    otherwise it copies them three times.
    """
    import cv2  # with albumentations

    try:
        lent = pa.array(image).flatten().buffers()[1]
    except ValueError:
        return np.array(image)
    return cv2.cvtColor(np.frombuffer(lent, np.uint8).reshape(image.height, image.width, 4), cv2.COLOR_RGBA2RGB)


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
                f"augmentation: {name} has no argument {argument}{did_you_mean(argument, accepted)}; it has "
                f"{', '.join(accepted)}"
            )
    if "size" in accepted:
        arguments.setdefault("size", image_size)
    try:
        return known[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    except Exception as error:  # a wrong value, a missing argument, an abstract class
        raise UsageError(f"augmentation: {name}: {error}") from error
