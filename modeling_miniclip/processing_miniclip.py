"""Processor for images and texts: evaluation transform of the image tower, tokenizer of the text tower."""

import base64
import binascii
import math
import os
import warnings
from typing import Any

import numpy as np
import timm
import torch
import transformers
from huggingface_hub import get_session
from PIL import Image, UnidentifiedImageError
from timm.data import resolve_data_config
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ProcessingKwargs

from .configuration_miniclip import vision_tower_config
from .pictures_miniclip import middle, open_picture, to_rgb

# How to get the image processor that uses Pillow and NumPy alone in each release of transformers: 4 prefers it; 5.0 to
# 5.3 have a switch, which would also select a tokenizer in 4; from 5.4 on it has a name.
IS_VERSION_4 = not hasattr(ProcessorMixin, "get_attributes")
PilImageProcessor: Any = getattr(transformers, "CLIPImageProcessorPil", CLIPImageProcessor)
PIL_BACKEND = {"backend": "pil"} if PilImageProcessor is not CLIPImageProcessor else {"use_fast": False}
PIL_BACKEND = {} if IS_VERSION_4 else PIL_BACKEND

# Text encoders whose position table starts after the padding index (two of RoBERTa's 514 rows are never used).
OFFSET_POSITIONS = frozenset(
    "altclip_text_model camembert data2vec-text ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta "
    "xlm-roberta-xl xmod".split()
)
# Encoders with relative positions only: their configuration may state a length, but no table ends there.
RELATIVE_POSITIONS = frozenset("t5 mt5 umt5 t5gemma xlnet deberta-v2".split())

RESIZING = ("do_resize", "do_center_crop", "size", "crop_size")  # arguments of a call that change the visible part


def load_rgb(source: str | os.PathLike) -> Image.Image:
    """Load an RGB image (see [`to_rgb`]) from a file, a URL (`http://`, `https://`, `data:image/`) or base64.

    Raises:
        OSError: there is no such file, or it holds no image.
        httpx2.HTTPError: the URL cannot be fetched (by huggingface_hub's session, with its proxies).
    """
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        response = get_session().get(name)
        response.raise_for_status()
        return to_rgb(open_picture(response.content), name)
    if os.path.isfile(name):
        return to_rgb(open_picture(name), name)
    try:
        return to_rgb(open_picture(base64.b64decode(name.rpartition(",")[2], validate=True)))
    except (binascii.Error, ValueError, UnidentifiedImageError) as error:
        raise FileNotFoundError(
            f"{name[:200]}: no such image file, and not a URL (http://, https://) or base64 of an image either"
        ) from error


def image_processor_from_timm(vision_config: Any, image_size: int | None = None, crop_pct: float | None = None) -> Any:
    """A stock image processor that does what timm's evaluation transform does for this tower.

    It resizes the shorter edge, crops the centre, rescales and normalises. The result equals timm's bit for bit if
    the margin around the crop is even. If it is odd, transformers rounds the half pixel down and timm to the nearest
    even number, so the crop may be off by one pixel.

    Args:
        vision_config: `TimmWrapperConfig` of the image tower.
        image_size: pixels per side of the crop; None means the tower's default.
        crop_pct: fraction of the resized image's shorter edge that the crop keeps, in (0, 1]; None means the tower's
            default.

    Raises:
        ValueError: the tower's crop mode pads a border, or its input size is fixed and differs from `image_size`.

    Examples:
        >>> from modeling_miniclip import MiniClipConfig
        >>> image_processor_from_timm(MiniClipConfig().vision_config).size["shortest_edge"]
        235
    """
    cfg = getattr(vision_config, "pretrained_cfg", None)
    if cfg is None:
        cfg = timm.get_pretrained_cfg(vision_config.architecture).to_dict()
    model_args = vision_config.model_args or {}  # a tower from scratch may have another size than timm's
    data = resolve_data_config({"img_size": model_args.get("img_size"), "crop_pct": crop_pct}, pretrained_cfg=cfg)
    height, width = data["input_size"][1:]
    if image_size is not None and (height, width) != (image_size, image_size):
        if cfg.get("fixed_input_size"):
            raise ValueError(
                f"{vision_config.architecture} takes images of {height}x{width} pixels only, not image_size "
                f"{image_size}; leave it out or choose another image tower"
            )
        height = width = image_size
    if data["crop_mode"] not in ("center", "squash") or (data["crop_mode"] == "center" and height != width):
        raise ValueError(
            f"{vision_config.architecture}: crop mode {data['crop_mode']!r} with input size {height}x{width} has no "
            "equivalent among transformers' image processors; pass your own image_processor="
        )
    scaled = (math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"]))
    squash = data["crop_mode"] == "squash"
    return PilImageProcessor(
        size={"height": scaled[0], "width": scaled[1]} if squash else {"shortest_edge": scaled[0]},
        crop_size={"height": height, "width": width},
        resample=PILImageResampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


def stock_image_processor(own: Any, image_size: int | None = None, crop_pct: float | None = None) -> Any:
    """CLIP's image processor with the settings of another one of transformers, so that all towers have the same class.

    Args:
        own: image processor of an image tower. One that needs torchvision may differ by 2/255 before normalisation.
        image_size: pixels per side of the crop; None means that of `own`.
        crop_pct: fraction of the resized image's shorter edge that the crop keeps; None means that of `own`.

    Raises:
        ValueError: `own` does something else than resize, crop the centre, rescale and normalise.
    """
    size, crop = dict(own.size), dict(getattr(own, "crop_size", None) or {})
    edge, share = size.get("shortest_edge"), getattr(own, "crop_pct", None)
    if edge is not None and share is not None:  # ConvNeXT's crops small images only
        crop = {"height": edge, "width": edge}
        size = {"shortest_edge": int(edge / share)} if edge < 384 else crop
    elif not getattr(own, "do_center_crop", False):
        crop = size
    settings = {name: getattr(own, name) for name in ("resample", "rescale_factor", "image_mean", "image_std")}
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (301, 423, 3), dtype=np.uint8))
    try:
        found = PilImageProcessor(size=size, crop_size=crop, **settings)
        pixels = [np.asarray(one(noise, return_tensors="np")["pixel_values"][0]) for one in (own, found)]
        worst = np.abs((pixels[0] - pixels[1]) * np.reshape(own.image_std, (3, 1, 1))).max()
    except (TypeError, ValueError, KeyError):
        worst = math.inf
    if not worst < 3 / 255:
        raise ValueError(
            f"{type(own).__name__} does something else than resize, crop the centre, rescale and normalise an image; "
            "pass your own image_processor="
        )
    if image_size is not None or crop_pct is not None:
        side = image_size or crop["height"]
        edge = math.floor(side / (crop_pct or crop["height"] / min(size.values())))
        found.size = type(found.size)(**dict.fromkeys(size, edge))
        found.crop_size = type(found.crop_size)(height=side, width=side)
    return found


def image_processor_of(vision_config: Any, image_size: int | None = None, crop_pct: float | None = None) -> Any:
    """A stock image processor for an image tower; arguments and errors as for [`image_processor_from_timm`].

    For a tower of transformers it has the settings of the one in the tower's repository, or those of CLIP's for a
    tower that comes from none.
    """
    if vision_config.model_type == "timm_wrapper":
        return image_processor_from_timm(vision_config, image_size, crop_pct)
    if vision_config.name_or_path:
        own = AutoImageProcessor.from_pretrained(vision_config.name_or_path, trust_remote_code=False, **PIL_BACKEND)
    else:
        own, image_size = PilImageProcessor(), image_size or getattr(vision_config, "image_size", None)
    return stock_image_processor(own, image_size, crop_pct)


def max_text_length(text_config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest text in tokens, including special tokens: the smaller of the tokenizer's limit and the position table.

    RoBERTa and similar encoders do not use the rows up to the padding index (514 - 2 = 512). Encoders with relative
    positions are limited by the tokenizer only.
    """
    rows = getattr(text_config, "max_position_embeddings", None)
    if rows is None or text_config.model_type in RELATIVE_POSITIONS:
        return tokenizer.model_max_length
    if text_config.model_type in OFFSET_POSITIONS:
        rows -= text_config.pad_token_id + 1
    return min(rows, tokenizer.model_max_length)


def rgb_of_array(array: Any, channels: str | None = None) -> Image.Image:
    """The RGB image that an array or tensor holds.

    Args:
        array: `[H, W, C]`, `[C, H, W]` or `[H, W]` of any real type, where C is 1 (grey), 3, or 4 (the last one is the
            opacity, on white). Values are 0..255 and rounded; uint16 is 0..65535, bool is black and white.
        channels: `"channels_first"` or `"channels_last"`; by default first for a tensor and last for any other array
            if both are possible.

    Raises:
        ValueError: another shape, type or range.
    """
    pixels = _as_numpy(array)
    sides = {"channels_first": 0, "channels_last": -1}
    order = [sides[channels]] if channels else ([0, -1] if isinstance(array, torch.Tensor) else [-1, 0])
    axes = [axis for axis in order if pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4)]
    what = f"{type(array).__name__} of shape {pixels.shape} and type {pixels.dtype}"
    if (pixels.ndim != 2 and not axes) or not pixels.size:
        raise ValueError(f"{what}: expected pixels [H, W, C], [C, H, W] or [H, W] with 1, 3 or 4 channels")
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"{what}: expected real numbers 0..255")
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        wide = pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2
        if not (wide or -0.5 <= low <= high < 255.5):  # also if there is a NaN
            raise ValueError(f"{what} with values {low:g}..{high:g}: expected 0..255 (uint16: 0..65535)")
        pixels = np.rint(pixels / 257 if wide else pixels).clip(0, 255).astype(np.uint8)
    if axes:
        pixels = np.moveaxis(pixels, axes[0], -1)
        pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def _as_numpy(array: Any) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.double() if array.is_floating_point() and array.dtype != torch.float32 else array
    return np.asarray(array)


def _leaves(images: Any) -> list[Any]:
    # The single images in nested lists and batches; nested lists of numbers become arrays.
    if isinstance(images, list | tuple):
        depth, first = 0, images
        while isinstance(first, list | tuple) and first:
            depth, first = depth + 1, first[0]
        if depth in (2, 3) and isinstance(first, int | float):
            return [np.asarray(images)]
        return [leaf for image in images for leaf in _leaves(image)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _for_image_processor(image: Any, pil: bool, whole: bool, channels: str | None, scaled: bool) -> Any:
    # An RGB image for the image processor. For values that are scaled already, what the image processor accepts.
    if isinstance(image, np.ndarray | torch.Tensor) and scaled:
        return _checked_scaled(image, pil)
    if isinstance(image, np.ndarray | torch.Tensor):
        rgb = rgb_of_array(image, channels)
    elif isinstance(image, Image.Image | str | os.PathLike):
        rgb = to_rgb(image) if isinstance(image, Image.Image) else load_rgb(image)
    else:
        return image  # its type is rejected with a clear message
    rgb = rgb if whole else middle(rgb)
    if isinstance(image, torch.Tensor) and not pil:  # torchvision works on the tensor's device
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).to(image.device)
    return rgb


def _checked_scaled(array: Any, pil: bool) -> Any:
    values = _as_numpy(array)
    if values.dtype.kind == "f" and not ((values >= 0) & ((values <= 1) | (values == np.rint(values)))).all():
        raise ValueError(
            f"{type(array).__name__} of shape {values.shape} and type {array.dtype} with values {values.min():g}.."
            f"{values.max():g}: expected 0..1 with do_rescale=False"
        )
    if pil or not isinstance(array, torch.Tensor):
        array = values.astype(np.float32) if values.dtype.kind in "bf" else values
    stack: Any = torch.stack if isinstance(array, torch.Tensor) else np.stack
    return stack([array] * 3) if array.ndim == 2 else array  # grey


def is_between_0_and_1(image: Any) -> bool:
    """Whether this is an array or tensor whose values seem to be scaled to 0..1."""
    is_float = "float" in str(getattr(image, "dtype", "")) and 0 not in image.shape
    return is_float and bool(0 < image.max() <= 1) and bool(image.min() >= 0)


def _drop_settings_of_earlier_use(tokenizer: PreTrainedTokenizerBase) -> None:
    # A tokenizer.json keeps the lengths of the last call before it was saved (all-MiniLM-L6-v2: 128), and transformers
    # takes them for settings: every call would be padded to them and cut below the tower's limit. A setting that the
    # tokenizer was loaded with on purpose differs from them and stays.
    if not tokenizer.is_fast:
        return
    truncation, padding = tokenizer.backend_tokenizer.truncation or {}, tokenizer.backend_tokenizer.padding or {}
    earlier = {
        "max_length": truncation.get("max_length", padding.get("length")),
        "stride": truncation.get("stride"),
        "truncation_strategy": truncation.get("strategy"),
        "pad_to_multiple_of": padding.get("pad_to_multiple_of"),
    }
    for key, value in earlier.items():
        if tokenizer.init_kwargs.get(key) == value:
            tokenizer.init_kwargs.pop(key, None)
    tokenizer.backend = tokenizer.init_kwargs["backend"] = "tokenizers"  # instead of the image processor's "pil"


def _forget_last_call(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


TEXT_DEFAULTS: dict[str, Any] = {"padding": True, "truncation": True}


class MiniClipProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Where transformers before 5.23 looks for defaults."""

    _defaults = {"text_kwargs": TEXT_DEFAULTS}


class MiniClipProcessor(ProcessorMixin):
    """Turns images into `pixel_values`, and texts into `input_ids` and `attention_mask`.

    Texts are padded to the longest text of the call and truncated to the text tower's limit, the tokenizer's
    `model_max_length`; a warning counts the truncated texts. With `text_padding="max_length"` they are padded to that
    limit instead, as SigLIP was trained; see `text_length` in [`MiniClipConfig`].

    `from_pretrained` selects the PIL backend, which gives the same pixels as in training. `backend="torchvision"` is
    faster, but photographs differ by up to 2/255 before normalisation. `AutoImageProcessor` and pipelines load the
    image processor alone and select torchvision.

    Args:
        image_processor: image processor of transformers that resizes, crops, rescales and normalises.
        tokenizer: tokenizer of the text tower.
        text_padding: `"longest"` (or True) or `"max_length"`, see above.

    Raises:
        ValueError: `text_padding` has another value, or the tokenizer has no token to pad with.

    Examples:
        >>> processor = MiniClipProcessor.from_pretrained("export")  # doctest: +SKIP
        >>> inputs = processor(images=[image], text=["two dogs"], return_tensors="pt")  # doctest: +SKIP
    """

    if IS_VERSION_4:  # later versions read the arguments of __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"
    valid_processor_kwargs = MiniClipProcessorKwargs
    text_kwargs = TEXT_DEFAULTS

    def __init__(self, image_processor: Any, tokenizer: Any, text_padding: bool | str = True):
        super().__init__(image_processor, tokenizer)
        if text_padding not in (True, "longest", "max_length"):
            raise ValueError(f"text_padding must be 'longest' or 'max_length', not {text_padding!r}")
        self.text_padding = text_padding
        # Pipelines pass every output of the tokenizer to the model, which takes no token types.
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # saved with the tokenizer
        tokenizer.padding_side = "right"  # text_pooling="cls" takes the first token
        if tokenizer.pad_token is None:  # as for GPT-2; the attention mask, not the token, says what is padding
            if tokenizer.eos_token is None:
                raise ValueError("this tokenizer has neither a padding token nor an end-of-text token to pad with")
            tokenizer.pad_token = tokenizer.eos_token
        _drop_settings_of_earlier_use(tokenizer)
        _forget_last_call(tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Like `ProcessorMixin.save_pretrained`, but the files do not depend on earlier calls.

        Args:
            save_directory: folder to write.
            *args: as for `ProcessorMixin.save_pretrained`.
            **kwargs: as for `ProcessorMixin.save_pretrained`.

        Returns:
            What `ProcessorMixin.save_pretrained` returns.
        """
        _forget_last_call(self.tokenizer)
        files = super().save_pretrained(save_directory, *args, **kwargs)
        for part in (self, self.image_processor):  # saving has also set it in these objects
            part.__dict__.pop("auto_map", None)
        return files

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Like `ProcessorMixin.to_dict`, but without an `auto_map` of the stock image processor, which has no code.

        Args:
            *args: as for `ProcessorMixin.to_dict`.
            **kwargs: as for `ProcessorMixin.to_dict`.

        Returns:
            The settings of `processor_config.json`.
        """
        values = super().to_dict(*args, **kwargs)
        values.get("image_processor", {}).pop("auto_map", None)
        return {name: value for name, value in values.items() if (name, value) != ("text_padding", True)}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "MiniClipProcessor":
        """Like `ProcessorMixin.from_pretrained`, with `backend="pil"` by default.

        Args:
            pretrained_model_name_or_path: folder of an export, or its repository on the Hub.
            *args: as for `ProcessorMixin.from_pretrained`.
            **kwargs: as for `ProcessorMixin.from_pretrained`, such as `revision`.

        Returns:
            The processor.

        Raises:
            OSError: there is no such folder or repository, or it holds no processor.
        """
        return super().from_pretrained(pretrained_model_name_or_path, *args, **(PIL_BACKEND | kwargs))

    @classmethod
    def from_towers(
        cls,
        vision: str | os.PathLike | PretrainedConfig,
        text: str | os.PathLike,
        image_size: int | None = None,
        max_length: int | None = None,
        crop_pct: float | None = None,
    ) -> "MiniClipProcessor":
        """The processor of two pretrained towers.

        Args:
            vision: name or folder of the image tower as in `MiniClipModel.from_towers`, or its configuration.
            text: Hub name or local folder of the text encoder with its tokenizer.
            image_size: pixels per side of the crop; None means the image tower's default.
            max_length: longest text in tokens; None means the text tower's limit.
            crop_pct: fraction of the resized image's shorter edge that the crop keeps; None means the tower's default.

        Returns:
            The processor.

        Raises:
            ValueError: the image tower does not take `image_size`, or the text tower `max_length`.
        """
        if not isinstance(vision, PretrainedConfig):
            vision = vision_tower_config(os.fspath(vision))
        tokenizer = AutoTokenizer.from_pretrained(text)
        tokenizer.init_kwargs.pop("max_length", None)
        limit = max_text_length(AutoConfig.from_pretrained(text), tokenizer)
        if max_length is not None and not 0 < max_length <= limit:
            raise ValueError(f"max_length must be in 1..{limit}, the limit of {text}, not {max_length}")
        tokenizer.model_max_length = max_length or limit
        return cls(image_processor_of(vision, image_size, crop_pct), tokenizer)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: one image or a list: PIL images (any mode, see [`to_rgb`]), paths, URLs (see [`load_rgb`]), or
                arrays, tensors and nested lists of numbers `[H, W, C]`, `[C, H, W]` or `[H, W]`, the first two also in
                batches `[B, ...]`, with values 0..255 of any type (uint16: 0..65535, bool: black and white), see
                [`rgb_of_array`]. For values 0..1 pass `do_rescale=False`.
            text: one text or a list of texts.
            **kwargs: arguments of the image processor and the tokenizer, such as `return_tensors="pt"`.

        Returns:
            `pixel_values` `[B, 3, H, W]` and/or `input_ids`, `attention_mask` `[N, L]`.

        Raises:
            ValueError: an array has another shape, type or range.
            OSError: a file cannot be read.
        """
        if images is not None:
            images, kwargs = self._prepared(images, kwargs)
        if text is not None and self.text_padding == "max_length" and "padding" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("padding", self.text_padding)
        outputs = super().__call__(images=images, text=self.fill_empty(text), **kwargs)
        if text is not None and "attention_mask" in outputs:
            settings = self.tokenizer.init_kwargs | kwargs.get("text_kwargs", {}) | kwargs
            limit = settings.get("max_length") or self.tokenizer.model_max_length
            self._warn_of_truncation(text, outputs["attention_mask"], limit)
        return outputs

    def crop(self, image: Image.Image) -> np.ndarray:
        """Resize and crop an image, without normalising it.

        Args:
            image: RGB image.

        Returns:
            `[3, H, W]` uint8, the input of [`normalize`][modeling_miniclip.MiniClipProcessor.normalize]; a view of
            Pillow's `[H, W, 3]`.
        """
        if self._sees_the_middle():
            image = middle(image)
        processor, plan = self.image_processor, self._plan(image)
        if plan is None:
            outputs = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
            return outputs["pixel_values"][0]
        size, box = plan
        return np.array(image.resize(size, processor.resample).crop(box)).transpose(2, 0, 1)

    def _sees_the_middle(self) -> bool:
        # Whether the ends of a thin image are cut off after the resize.
        processor = self.image_processor
        size = getattr(processor, "size", None)
        edges = dict(size) if isinstance(size, dict | SizeDict) else {}
        return edges.keys() == {"shortest_edge"} and all(getattr(processor, name, False) for name in RESIZING[:2])

    def _rounds_margins(self) -> bool:
        # Whether half a pixel of an odd margin is rounded to the nearest even number, as torchvision and open_clip do.
        return bool(getattr(self.image_processor, "round_margins", False))

    def _plan(self, image: Image.Image) -> tuple[tuple[int, int], tuple[int, int, int, int]] | None:
        # Size and crop box that the image processor would use. Without its copies, this takes half the time.
        # None if the image processor does something else.
        processor = self.image_processor
        if type(processor) is not PilImageProcessor or processor.resample is None:
            return None
        if not (processor.do_resize and processor.do_center_crop and image.mode == "RGB"):
            return None
        if getattr(processor, "do_pad", None):
            return None
        if not all(isinstance(setting, dict | SizeDict) for setting in (processor.size, processor.crop_size)):
            return None
        size, crop = dict(processor.size), dict(processor.crop_size)
        if size.keys() == {"shortest_edge"}:
            width, height = (int(size["shortest_edge"] * side / min(image.size)) for side in image.size)
        elif size.keys() == {"height", "width"}:
            width, height = size["width"], size["height"]
        else:
            return None
        margins = width - crop["width"], height - crop["height"]
        left, top = (round(margin / 2) if self._rounds_margins() else margin // 2 for margin in margins)
        return (width, height), (left, top, left + crop["width"], top + crop["height"])

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rescale and normalise pixels on their device; moving them there as uint8 takes a quarter of the bytes.

        Args:
            pixels: `[B, 3, H, W]` uint8, from [`crop`][modeling_miniclip.MiniClipProcessor.crop].

        Returns:
            `[B, 3, H, W]` float32 `pixel_values`, equal to those of the image processor (PIL backend).
        """
        settings = torch.tensor([self.image_processor.image_mean, self.image_processor.image_std]).view(2, 3, 1, 1)
        mean, std = settings.to(pixels.device, non_blocking=pixels.is_cuda)  # without waiting for the device
        # A division, as in timm: multiplying by 1/255 rounds some of the 256 values differently.
        scaled = pixels.to(torch.float32, copy=True).div_(1 / self.image_processor.rescale_factor)
        return scaled.sub_(mean).div_(std)

    def count_truncated(self, texts: list[str], limit: int | None = None) -> int:
        """Count the texts that are longer than `limit` tokens, including special tokens.

        Args:
            texts: texts to count; may be empty.
            limit: largest number of tokens; None means the tokenizer's `model_max_length`.

        Returns:
            Number of texts.
        """
        ids = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
        return sum(len(row) > (limit or self.tokenizer.model_max_length) for row in ids)

    def fill_empty(self, text: Any) -> Any:
        """A text, or a list, with the padding token in place of empty texts, if these would have no token at all.

        That is so if the tokenizer adds no special tokens, as that of GPT-2.

        Args:
            text: a text, a list of texts, or None.

        Returns:
            The same, without empty texts.
        """
        if text is None or self.tokenizer.num_special_tokens_to_add() > 0:
            return text
        padding = self.tokenizer.pad_token
        return (text or padding) if isinstance(text, str) else [one or padding for one in text]

    def _prepared(self, images: Any, kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        # A list of images for the image processor, and the arguments for it.
        given = kwargs.get("images_kwargs", {}) | kwargs
        leaves = _leaves(images)
        scaled = not given.get("do_rescale", self.image_processor.do_rescale)
        if not scaled and any(map(is_between_0_and_1, leaves)):
            warnings.warn(
                "pixels between 0 and 1 are divided by 255 again: pass do_rescale=False, or values 0..255",
                stacklevel=3,
            )
        whole = not self._sees_the_middle() or any(name in given for name in RESIZING)
        pil = getattr(self.image_processor, "backend", "pil") == "pil"
        channels = given.get("input_data_format")
        prepared = [
            _for_image_processor(leaf, pil, whole, channels and str(getattr(channels, "value", channels)), scaled)
            for leaf in leaves
        ]
        if not scaled and channels:  # from now on all images have one layout
            kwargs = {name: value for name, value in kwargs.items() if name != "input_data_format"}
            if "images_kwargs" in kwargs:
                own = kwargs["images_kwargs"].items()
                kwargs["images_kwargs"] = {name: value for name, value in own if name != "input_data_format"}
        if self._rounds_margins() and not whole and all(isinstance(image, Image.Image) for image in prepared):
            prepared = [Image.fromarray(self.crop(image).transpose(1, 2, 0)) for image in prepared]
            kwargs = kwargs | {"do_resize": False, "do_center_crop": False}
        return prepared, kwargs

    def _warn_of_truncation(self, text: str | list[str], attention_mask: Any, limit: int) -> None:
        if isinstance(text, str):
            text, attention_mask = [text], np.atleast_2d(attention_mask)
        if len(attention_mask) != len(text):  # overflowing tokens were requested as extra rows: nothing is lost
            return
        # Only a text that fills the limit can have been cut; only those are tokenized again.
        rows = zip(text, attention_mask, strict=True)
        full = [caption for caption, mask in rows if np.asarray(mask).sum() == limit]
        cut = self.count_truncated(full, limit)
        if cut:
            warnings.warn(f"{cut} of {len(text)} captions were truncated to {limit} tokens", stacklevel=3)


__all__ = ["MiniClipProcessor"]
