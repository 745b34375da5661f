"""How many times smaller an image may be decoded, because it is shrunk afterwards anyway.

libjpeg decodes a JPEG at a half, a quarter or an eighth of its size in a fraction of the time, without the finest
frequencies. The result is close to an average of the pixels; benchmarks/jpeg.py measures the difference.
"""

import math
from typing import Any

from ..picture_formats import Reduction

FLIPS = frozenset(("HorizontalFlip", "VerticalFlip"))  # albumentations that do not depend on the size


def reduction_before(augmentation: Any) -> Reduction | None:
    """How many times smaller images may be before an augmentation, so that no crop is smaller than its result.

    The random crop has the same place in the smaller image. None if the first transform is another one, which may
    depend on the size, or if there is no augmentation.

    Args:
        augmentation: transforms of [`build_augmentation`][modeling_miniclip.data.loading.augmentation], or None.
    """
    transforms = () if augmentation is None else augmentation.transforms
    crop = next((transform for transform in transforms if type(transform).__name__ not in FLIPS), None)
    if type(crop).__name__ != "RandomResizedCrop" or crop.p < 1:
        return None
    side, (low, high) = max(crop.size), crop.ratio
    smallest = crop.scale[0] * min(low, 1 / high)  # square of the shorter side of the smallest crop, for an area of 1
    whole = min(1, 1 / low, high)  # shorter side of the crop of a very long image, as a part of its shorter side

    def reduction(width: int, height: int) -> float:
        return min(math.sqrt(width * height * smallest), min(width, height) * whole) / side

    return reduction


def reduction_before_crop(processor: Any) -> Reduction | None:
    """How many times smaller images may be before a processor resizes and crops them.

    None if the processor does not resize to a shortest edge or to a height and width.

    Args:
        processor: a [`MiniClipProcessor`][modeling_miniclip.MiniClipProcessor].
    """
    settings = processor.image_processor
    size = dict(getattr(settings, "size", None) or {})
    if not getattr(settings, "do_resize", False) or size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        return None
    side = max(size.values())
    return lambda width, height: min(width, height) / side
