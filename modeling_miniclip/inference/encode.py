"""Embed images and texts with a trained model."""

import os
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import CLIPImageProcessorPil

from ..data.loading.collation import model_inputs, stack_pixels
from ..data.loading.reduced_size import reduction_before_crop
from ..data.picture_formats import Reduction, decode_picture, decode_row
from ..errors import DataError, UsageError
from ..modeling_miniclip import MiniClipModel
from ..pictures_miniclip import to_rgb
from ..processing_miniclip import MiniClipProcessor, is_between_0_and_1, load_rgb, rgb_of_array
from .fit import Parts, device_of
from .loading import processor_of

UNDECODED = {"bytes", "path"}  # keys of an image in a column `datasets.Image(decode=False)`


def open_image(image: Any, reduction: Reduction | None = None) -> Image.Image:
    """Open an image as RGB.

    Args:
        image: path, URL, PIL image, array or tensor (values 0..255, see
            [`rgb_of_array`][modeling_miniclip.processing_miniclip.rgb_of_array]), an undecoded image of a dataset
            (`{"bytes", "path"}`), or a dictionary with one of these as `image`.
        reduction: how many times smaller an encoded JPEG may be decoded, see
            [`decode_picture`][modeling_miniclip.data.picture_formats.decode_picture].

    Raises:
        DataError: the file does not exist or is not an image, or the array has another shape, type or range.
    """
    if isinstance(image, dict) and image.keys() != UNDECODED:
        if "image" not in image:
            raise DataError(
                f"a row without the key 'image': it has {', '.join(map(str, image)) or 'none'}; rename the right one"
            )
        image = image["image"]
    name = os.fspath(image) if isinstance(image, str | os.PathLike) else getattr(image, "filename", "")
    try:
        if isinstance(image, dict):
            name = image["path"] or ""
            return decode_row(image, reduction=reduction)
        if isinstance(image, str | os.PathLike):
            if not os.path.isfile(image):
                return load_rgb(image)
            return to_rgb(decode_picture(image, reduction=reduction), name)
        return to_rgb(image if isinstance(image, Image.Image) else _image_of_array(image))
    except (DataError, MemoryError):  # too little memory is not the image's fault
        raise
    except Exception as error:  # Pillow's decoders raise errors of many classes
        raise DataError(f"{name or type(image).__name__}: this image cannot be read: {error}; replace it") from error


def _image_of_array(array: Any) -> Image.Image:
    pixels = np.asarray(array) if isinstance(array, list | tuple) else array
    if not hasattr(pixels, "__array__"):
        raise DataError(f"{type(array).__name__}: expected a path, a PIL image, an array or a tensor")
    if is_between_0_and_1(pixels):
        what = f"{type(array).__name__} of type {pixels.dtype} with values up to {float(pixels.max()):g}"
        raise DataError(f"{what}: expected 0..255; multiply them by 255")
    try:
        return rgb_of_array(pixels)
    except ValueError as error:
        raise DataError(str(error)) from error


def encode_images(
    model: MiniClipModel,
    images: Iterable[Any],
    processor: MiniClipProcessor | None = None,
    batch_size: int = 32,
    progress: bool = True,
    truncate_dim: int | None = None,
    reduced: bool = False,
) -> Tensor:
    """Unit-norm embeddings of images.

    Args:
        model: model on any device; not changed.
        images: paths, URLs, PIL images, arrays or rows with the key `image`; each is opened when it is needed.
        processor: processor of the model; by default the one saved with it.
        batch_size: number of images per forward pass.
        progress: whether to show a progress bar.
        truncate_dim: number of dimensions to keep, the first ones, normalised again; by default all. Models trained
            with `--matryoshka_dims` lose little by it.
        reduced: whether to decode JPEGs that are at least twice as large as needed at a half, a quarter or an eighth
            of their size, which is faster. It changes their embeddings a little, see benchmarks/jpeg.py.

    Returns:
        `[len(images), dim]` float32 on the CPU.

    Raises:
        DataError: an image cannot be read.
        UsageError: `truncate_dim` is not from 1 to the dimensions of the model.
        ValueError: there is no image, a single image is not in a list, or there is no processor.

    Examples:
        >>> encode_images(model, Path("photos").glob("*.jpg"))  # doctest: +SKIP
    """
    processor = processor_of(model, processor)
    check_truncate_dim(truncate_dim, model.config.projection_dim)
    reduction = reduction_before_crop(processor) if reduced else None

    def embed(batch: list[Any]) -> Tensor:
        pixels = _pixel_values((open_image(image, reduction) for image in batch), processor, model.device)
        return truncate_embeddings(model(pixel_values=pixels).image_embeds, truncate_dim)

    return encode_batches(model, images, embed, batch_size, "images", progress)


def encode_features(
    model: MiniClipModel, images: Iterable[Any], processor: MiniClipProcessor, batch_size: int, progress: bool
) -> Tensor:
    """`[images, width]` outputs of the image tower, before the projection; arguments as in [`encode_images`]."""

    def pool(batch: list[Any]) -> Tensor:
        pixels = _pixel_values(map(open_image, batch), processor, model.device)
        return model.pool_images(pixels).pooler_output

    return encode_batches(model, images, pool, batch_size, "images", progress)


def _pixel_values(images: Iterable[Image.Image], processor: MiniClipProcessor, device: torch.device) -> Tensor:
    """The processor's `pixel_values`, computed as in training, which is faster, if the result is the same.

    Then only one image at a time is in memory at its full size.
    """
    settings = processor.image_processor
    if type(settings) is not CLIPImageProcessorPil or not (settings.do_rescale and settings.do_normalize):
        return processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
    pixels = stack_pixels([processor.crop(image) for image in images])
    return model_inputs({"pixel_values": pixels}, processor, device)["pixel_values"]


def encode_texts(
    model: MiniClipModel,
    texts: Iterable[str],
    processor: MiniClipProcessor | None = None,
    batch_size: int = 128,
    progress: bool = True,
    truncate_dim: int | None = None,
) -> Tensor:
    """Unit-norm embeddings of texts.

    Args:
        model: model on any device; not changed.
        texts: texts; those longer than the text tower's limit are truncated.
        processor: processor of the model; by default the one saved with it.
        batch_size: number of texts per forward pass.
        progress: whether to show a progress bar.
        truncate_dim: number of dimensions to keep, as in [`encode_images`].

    Returns:
        `[len(texts), dim]` float32 on the CPU.

    Raises:
        DataError: an item, which the message numbers from 0, is not a text or has half a character (a lone surrogate).
        UsageError: `truncate_dim` is not from 1 to the dimensions of the model.
        ValueError: there is no text, a single text is not in a list, or there is no processor.
    """
    processor = processor_of(model, processor)
    check_truncate_dim(truncate_dim, model.config.projection_dim)

    def embed(batch: list[str]) -> Tensor:
        embeds = model(**processor(text=batch, return_tensors="pt").to(model.device)).text_embeds
        return truncate_embeddings(embeds, truncate_dim)

    return encode_batches(model, texts, embed, batch_size, "texts", progress, _check_text)


def check_truncate_dim(dim: int | None, width: int) -> None:
    """Check that embeddings of `width` dimensions can be cut to `dim`.

    Raises:
        UsageError: they cannot.
    """
    if dim is not None and not 1 <= dim <= width:
        raise UsageError(f"truncate_dim {dim}: expected a number from 1 to {width}, the dimensions of the embeddings")


def truncate_embeddings(embeddings: Tensor, dim: int | None) -> Tensor:
    """The first `dim` dimensions of embeddings, normalised again; None keeps all, as they are.

    Args:
        embeddings: `[n, width]`, unit norm.
        dim: number of dimensions to keep.

    Returns:
        `[n, dim]`, unit norm, in float32 unless all dimensions are kept.

    Raises:
        UsageError: `dim` is not from 1 to `width`.
    """
    check_truncate_dim(dim, embeddings.shape[-1])
    if dim is None or dim == embeddings.shape[-1]:
        return embeddings
    return normalize(embeddings[..., :dim].float(), dim=-1)


def _check_text(text: Any, number: int) -> None:
    if not isinstance(text, str):
        raise DataError(f"text {number}: expected a text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text {number}: half a character (a lone surrogate), which no tokenizer accepts; remove it: {error}"
        ) from error


@torch.no_grad()
def encode_batches(
    model: nn.Module,
    items: Iterable[Any],
    embed: Callable[[list[Any]], Tensor],
    batch_size: int,
    what: str,
    progress: bool,
    check: Callable[[Any, int], None] | None = None,
) -> Tensor:
    """Embed items batch by batch with a model in evaluation mode, then restore its former mode.

    A batch that does not fit into memory is embedded in parts, see [`Parts`][modeling_miniclip.inference.fit.Parts].

    Args:
        model: model that `embed` uses.
        items: items to embed; each is read when it is needed.
        embed: function from a list of n items to their `[n, dim]` embeddings.
        batch_size: number of items per call of `embed`.
        what: name of the items in the plural, such as `images`.
        progress: whether to show a progress bar.
        check: function that is called with each item and its number, and raises an error if the item is unusable.

    Returns:
        `[len(items), dim]` float32 on the CPU.

    Raises:
        MiniClipError: there is not enough memory for a single item.
        ValueError: there is no item, a single item is not in a list, or `batch_size` is below 1.
    """
    if isinstance(items, str | os.PathLike | Image.Image | dict):  # a text would be split into its letters
        raise ValueError(f"expected a list of {what}, got one {type(items).__name__}: put it in a list, [...]")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    modes = [(module, module.training) for module in model.modules()]  # of each part, as some may be frozen
    model.eval()
    parts, fitting, done = [], Parts(what, device_of(model)), 0
    total = len(items) if isinstance(items, Sized) else None
    try:
        with tqdm(total=total, desc=f"encode {what}", unit=what[:-1], disable=not progress) as bar:
            for batch in _batches(items, batch_size):
                for number, item in enumerate(batch, done):
                    if check is not None:
                        check(item, number)
                parts.append(fitting.of(batch, embed).float())
                if len(parts) > 1:  # not the last one: an accelerator computes it while the next batch is read
                    parts[-2] = parts[-2].cpu()
                done += len(batch)
                bar.update(len(batch))
    finally:
        for module, training in modes:
            module.training = training
    if not parts:
        raise ValueError(f"no {what} to encode")
    return torch.cat([*parts[:-1], parts[-1].cpu()])


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
