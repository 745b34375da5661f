"""How many times smaller an image may be decoded, because it is shrunk afterwards anyway.

libjpeg decodes a JPEG at a half, a quarter or an eighth of its size in a fraction of the time, without the finest
frequencies. The result is close to an average of the pixels; benchmarks/jpeg.py measures the difference.
"""

import math
from dataclasses import dataclass
from typing import Any

FLIPS = frozenset(("HorizontalFlip", "VerticalFlip"))  # albumentations that do not depend on the size


@dataclass(frozen=True)
class CropReduction:
    """How many times smaller an image may be, so that the shorter side of no crop gets below a number of pixels.

    Args:
        side: the number of pixels.
        smallest: square of the shorter side of the smallest crop, as a part of the area of the image.
        whole: shorter side of the crop of a very long image, as a part of the shorter side of the image.
    """

    side: float
    smallest: float = math.inf
    whole: float = 1.0

    def __call__(self, width: int, height: int) -> float:
        """The reduction for an image of this size in pixels; below 1, the image is too small already."""
        return min(math.sqrt(width * height * self.smallest), min(width, height) * self.whole) / self.side


def reduction_before(augmentation: Any) -> CropReduction | None:
    """How many times smaller images may be before an augmentation, so that no crop is smaller than its result.

    The random crop has the same place in the smaller image, to the nearest pixel; rarely, one that just fits into the
    larger image does not fit into the smaller one, and another is drawn. None if the first transform is another one,
    which may depend on the size, or if there is no augmentation.

    Args:
        augmentation: transforms of [`build_augmentation`][modeling_miniclip.data.loading.augmentation], or None.
    """
    transforms = () if augmentation is None else augmentation.transforms
    crop = next((transform for transform in transforms if type(transform).__name__ not in FLIPS), None)
    if crop is None or type(crop).__name__ != "RandomResizedCrop" or crop.p < 1:
        return None
    low, high = crop.ratio
    return CropReduction(max(crop.size), crop.scale[0] * min(low, 1 / high), min(1.0, 1 / low, high))


def reduction_before_crop(processor: Any) -> CropReduction | None:
    """How many times smaller images may be before a processor resizes and crops them.

    None if the processor does not resize to a shortest edge or to a height and width.

    Args:
        processor: a [`MiniClipProcessor`][modeling_miniclip.MiniClipProcessor].
    """
    settings = processor.image_processor
    size = dict(getattr(settings, "size", None) or {})
    if not getattr(settings, "do_resize", False) or size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        return None
    return CropReduction(max(size.values()))
