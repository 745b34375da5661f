"""One interface for all CLIP models: MiniCLIP exports, models of transformers, and models of open_clip."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..configuration_miniclip import MiniClipConfig
from ..errors import MiniClipError, ModelError, UsageError, one_line
from ..inference.encode import (
    check_truncate_dim,
    encode_batches,
    encode_features,
    encode_images,
    encode_texts,
    open_image,
    truncate_embeddings,
)
from ..inference.loading import export_hint, load_export
from ..modeling_miniclip import MiniClipModel
from ..processing_miniclip import PIL_BACKEND, MiniClipProcessor

OPEN_CLIP = "open_clip:"
OPEN_CLIP_FILE = "open_clip_config.json"  # in open_clip's layout
# Models trained with all texts padded to one length, which need the same here (see SigLIP in transformers' docs).
PADDED_TO_FULL = frozenset({"siglip", "siglip2"})
LONGEST_TEXT = 512  # tokens, if the model does not name a limit


class ClipEncoder(Protocol):
    """Encodes images and texts into one space. Embeddings are unit norm, float32, `[n, dim]`, on the CPU."""

    def encode_images(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        """Embed images, in any form that [`open_image`][modeling_miniclip.inference.encode.open_image] takes."""
        ...

    def image_features(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        """What the image tower returns before the projection, `[n, width]`; of open_clip the embeddings."""
        ...

    def encode_texts(self, texts: list[str], batch_size: int, progress: bool) -> Tensor:
        """Embed texts, truncating those that are too long."""
        ...


@dataclass
class MiniClipEncoder:
    """An export of this package."""

    model: MiniClipModel
    processor: MiniClipProcessor

    def encode_images(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        return encode_images(self.model, images, self.processor, batch_size, progress)

    def image_features(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        return encode_features(self.model, images, self.processor, batch_size, progress)

    def encode_texts(self, texts: list[str], batch_size: int, progress: bool) -> Tensor:
        return encode_texts(self.model, texts, self.processor, batch_size, progress)


@dataclass
class TransformersEncoder:
    """A model of transformers that has `get_image_features` and `get_text_features`."""

    model: Any
    processor: Any

    def encode_images(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        def embed(batch: list[Any]) -> Tensor:
            inputs = self.processor(images=[open_image(image) for image in batch], return_tensors="pt")
            return _features(self.model.get_image_features(**inputs.to(self.model.device)))

        return encode_batches(self.model, images, embed, batch_size, "images", progress)

    def image_features(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        tower = getattr(self.model, "vision_model", None)
        if tower is None:
            return self.encode_images(images, batch_size, progress)

        def pool(batch: list[Any]) -> Tensor:
            inputs = self.processor(images=[open_image(image) for image in batch], return_tensors="pt")
            pooled = tower(**inputs.to(self.model.device)).pooler_output
            return pooled.flatten(1)

        return encode_batches(self.model, images, pool, batch_size, "images", progress)

    def encode_texts(self, texts: list[str], batch_size: int, progress: bool) -> Tensor:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", LONGEST_TEXT)
        rules = {
            "padding": "max_length" if self.model.config.model_type in PADDED_TO_FULL else True,
            "truncation": True,
            "max_length": min(positions, self.processor.tokenizer.model_max_length),
        }

        def embed(batch: list[str]) -> Tensor:
            inputs = self.processor(text=batch, return_tensors="pt", **rules).to(self.model.device)
            if rules["padding"] == "max_length":  # the text tower sees the padding
                inputs = {"input_ids": inputs["input_ids"]}
            return _features(self.model.get_text_features(**inputs))

        return encode_batches(self.model, texts, embed, batch_size, "texts", progress)


@dataclass
class OpenClipEncoder:
    """A model of open_clip with its own preprocessing and tokenizer."""

    model: nn.Module
    transform: Any
    tokenizer: Any
    device: torch.device

    def encode_images(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        def embed(batch: list[Any]) -> Tensor:
            pixels = torch.stack([self.transform(open_image(image)) for image in batch])
            return normalize(self.model.encode_image(pixels.to(self.device)), dim=-1)  # type: ignore[operator]

        return encode_batches(self.model, images, embed, batch_size, "images", progress)

    def image_features(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        return self.encode_images(images, batch_size, progress)

    def encode_texts(self, texts: list[str], batch_size: int, progress: bool) -> Tensor:
        def embed(batch: list[str]) -> Tensor:
            ids = self.tokenizer(batch).to(self.device)
            return normalize(self.model.encode_text(ids), dim=-1)  # type: ignore[operator]

        return encode_batches(self.model, texts, embed, batch_size, "texts", progress)


@dataclass
class TruncatedEncoder:
    """The first dimensions of another encoder's embeddings, normalised again; its image features stay whole."""

    encoder: ClipEncoder
    dim: int

    def encode_images(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        return truncate_embeddings(self.encoder.encode_images(images, batch_size, progress), self.dim)

    def image_features(self, images: Iterable[Any], batch_size: int, progress: bool) -> Tensor:
        return self.encoder.image_features(images, batch_size, progress)

    def encode_texts(self, texts: list[str], batch_size: int, progress: bool) -> Tensor:
        return truncate_embeddings(self.encoder.encode_texts(texts, batch_size, progress), self.dim)


def open_encoder(source: str, flag: str, truncate_dim: int | None = None) -> ClipEncoder:
    """Load a model in float32 onto the accelerator, if there is one.

    Args:
        source: folder of a MiniCLIP export; folder or Hub repository of any CLIP model of transformers (CLIP, SigLIP,
            ...) or in open_clip's layout; or `open_clip:ARCHITECTURE/CHECKPOINT`, where the checkpoint is a file or a
            name known to open_clip.
        flag: flag or argument that named the source, for error messages.
        truncate_dim: number of dimensions to keep, the first ones, normalised again; by default all.

    Raises:
        ModelError: there is no such model, it does not load, or it does not embed both images and texts.
        MiniClipError: open_clip is not installed.
        UsageError: the names after `open_clip:` are missing, the architecture is unknown, or the embeddings do not
            have `truncate_dim` dimensions.
    """
    encoder = _load_encoder(source, flag)
    if truncate_dim is None:
        return encoder
    width = encoder.encode_texts(["a photo"], 1, False).shape[1]  # now, and not after the long work
    try:
        check_truncate_dim(truncate_dim, width)
    except UsageError as error:
        raise UsageError(f"{flag} {source}: --{error}") from error
    return TruncatedEncoder(encoder, truncate_dim)


def _load_encoder(source: str, flag: str) -> ClipEncoder:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if source.startswith(OPEN_CLIP):
        return _open_clip(source, flag, device)
    try:
        return _open_transformers(source, flag, device)
    except MiniClipError:
        raise
    except (HTTPError, OSError, ValueError, KeyError, StrictDataclassError) as error:
        if _has_open_clip_layout(source):
            return _open_clip(source, flag, device)
        raise ModelError(f"{flag} {source}: cannot load a model: {one_line(error)}") from error


def _open_transformers(source: str, flag: str, device: torch.device) -> ClipEncoder:
    from transformers import AutoConfig, AutoModel, AutoProcessor

    from .. import auto  # noqa: F401  (so that an export loads without the code in its folder)

    is_complete = any((Path(source) / name).is_file() for name in ("config.json", OPEN_CLIP_FILE))
    if Path(source).is_dir() and not is_complete:
        raise ModelError(f"{flag} {source}: this folder has no config.json{export_hint(source)}")
    if AutoConfig.from_pretrained(source).model_type == MiniClipConfig.model_type:
        model, processor = load_export(source, flag)
        return MiniClipEncoder(model.to(device), processor)
    other, info = AutoModel.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    if not (hasattr(other, "get_image_features") and hasattr(other, "get_text_features")):
        raise ModelError(
            f"{flag} {source}: {type(other).__name__} does not embed images and texts; expected a CLIP model, such as "
            "an export, openai/clip-vit-base-patch32 or google/siglip-base-patch16-224"
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ModelError(f"{flag} {source} lacks weights: {missing}; choose a complete model")
    # Pictures as the model was trained with: torchvision's differ by up to 2/255.
    processor = AutoProcessor.from_pretrained(source, **PIL_BACKEND)
    return TransformersEncoder(other.to(device).eval(), processor)


def _features(output: Any) -> Tensor:
    # transformers 4 returns a tensor, transformers 5 an output with the embedding as `pooler_output`.
    return normalize(output if isinstance(output, Tensor) else output.pooler_output, dim=-1)


def _has_open_clip_layout(source: str) -> bool:
    """Whether a folder or a repository on the Hub holds a model in open_clip's layout."""
    from transformers.utils import cached_file

    quiet = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_gated_repo"), False)
    try:
        return cached_file(source, OPEN_CLIP_FILE, **quiet) is not None
    except (HTTPError, OSError, ValueError):
        return False


def _open_clip(source: str, flag: str, device: torch.device) -> ClipEncoder:
    if source.startswith(OPEN_CLIP):
        open_clip, name, checkpoint = find_open_clip(source, flag)
        options = {"pretrained": checkpoint}
    else:
        open_clip, options = _installed_open_clip(source, flag), {}
        name = f"{'local-dir' if Path(source).is_dir() else 'hf-hub'}:{source}"
    try:
        model, transform = open_clip.create_model_from_pretrained(name, **options)
        tokenizer = open_clip.get_tokenizer(name)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{flag} {source}: open_clip cannot load it: {one_line(error)}") from error
    return OpenClipEncoder(model.to(device).float().eval(), transform, tokenizer, device)


def find_open_clip(source: str, flag: str) -> tuple[Any, str, str]:
    """open_clip itself, and the architecture and checkpoint in `open_clip:ARCHITECTURE/CHECKPOINT`.

    Args:
        source: the name.
        flag: flag or argument that named it, for error messages.

    Raises:
        UsageError: the names are missing, or the architecture is unknown.
        MiniClipError: open_clip is not installed.
        ModelError: the checkpoint is neither a file nor known.
    """
    architecture, _, checkpoint = source.removeprefix(OPEN_CLIP).partition("/")
    if not architecture or not checkpoint:
        raise UsageError(
            f"{flag} {source}: expected {OPEN_CLIP}ARCHITECTURE/CHECKPOINT, such as "
            f"{OPEN_CLIP}ViT-B-32/laion2b_s34b_b79k or {OPEN_CLIP}ViT-B-32/my/epoch_30.pt"
        )
    open_clip = _installed_open_clip(source, flag)
    if architecture not in open_clip.list_models():
        raise UsageError(
            f"{flag} {source}: open_clip has no architecture {architecture!r}; see open_clip.list_models()"
        )
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if checkpoint not in known and not os.path.isfile(checkpoint):
        names = ", ".join(known) or "none"
        raise ModelError(
            f"{flag} {source}: {checkpoint!r} is neither a file nor one of the checkpoints of {architecture}: {names}"
        )
    return open_clip, architecture, checkpoint


def _installed_open_clip(source: str, flag: str) -> Any:
    if find_spec("open_clip") is None:
        hint = "" if source.startswith(OPEN_CLIP) else f", or convert it once: miniclip convert {source} DIR"
        raise MiniClipError(f"{flag} {source}: open_clip is not installed: pip install open-clip-torch{hint}")
    return import_module("open_clip")  # optional: neither a dependency nor an extra
