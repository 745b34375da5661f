"""Create model and processor from pretrained towers, a preset or an export."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from tqdm.auto import tqdm

from ...clips.from_clip import load_clip
from ...clips.take_tower import take_tower
from ...configuration_miniclip import FIELDS, TOWERS, MiniClipConfig
from ...errors import ModelError, UsageError, did_you_mean, one_line
from ...evaluation.encoders import OPEN_CLIP_FILE
from ...inference.loading import check_export_folder
from ...inference.pickled import reject_pickled
from ...modeling_miniclip import MiniClipModel
from ...processing_miniclip import (
    MiniClipProcessor,
    image_processor_from_timm,
    image_processor_of,
    max_text_length,
    stock_image_processor,
)
from ...utils.performance import hide_advice_for_gpus
from ...utils.processes import process_rank
from ...utils.resources import named_file
from ..command_line.arguments import MODEL_SOURCES, TrainingArguments
from .feature_cache import cache_of
from .image_size import with_image_size
from .try_towers import LARGEST_SIDE, image_problem, try_towers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def create_model(
    arguments: TrainingArguments, captions: Iterable[list[str]]
) -> tuple[MiniClipModel, MiniClipProcessor]:
    """Create the model that the arguments describe: from a preset, from an export or from two pretrained towers.

    Args:
        arguments: flags of the run.
        captions: captions of each training image, or of a sample; a preset trains its vocabulary on them. They can be
            iterated several times.

    Returns:
        The model in evaluation mode and float32, and its processor.

    Raises:
        ModelError: the weights cannot be found, are damaged or do not fit.
        UsageError: the arguments or the preset describe no possible model.
    """
    asked = {
        "text_pooling": arguments.text_pooling,
        "projection_dim": arguments.projection_dim,
        "projection_depth": arguments.projection_depth,
        "loss_type": arguments.loss_type,
    }
    overrides = {name: value for name, value in asked.items() if value is not None}
    hide_advice_for_gpus()
    try:
        if arguments.preset is not None:
            model, processor = _from_preset(arguments, overrides, captions)
        elif arguments.model_name_or_path is not None:
            model, processor = _from_export(arguments, overrides)
        else:
            model, processor = _from_towers(arguments, overrides)
        if arguments.train_image_size is not None and hasattr(model.vision_model, "timm_model"):
            # an error for a tower of another, fixed size
            image_processor_from_timm(model.config.vision_config, arguments.train_image_size)
        try_towers(model, processor, arguments, cache_of(arguments))
    except Exception as error:  # the libraries raise errors of many classes for wrong values
        named = [f"--{name} {getattr(arguments, name)}" for names in MODEL_SOURCES for name in names]
        sources = " and ".join(text for text in named if not text.endswith(" None"))
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        wrong = UsageError if isinstance(error, UsageError) else ModelError
        raise wrong(f"cannot create a model from {sources}: {kind}{one_line(error)}") from error
    if arguments.dropout is not None:
        set_dropout(model, arguments.dropout)
    if arguments.projection_dropout is not None:
        for head in (model.visual_projection, model.text_projection):
            set_dropout(head, arguments.projection_dropout)
        model.config.projection_dropout = arguments.projection_dropout
    return model, processor


def _from_towers(arguments: TrainingArguments, overrides: dict[str, Any]) -> tuple[MiniClipModel, MiniClipProcessor]:
    vision, text = str(arguments.vision_model), str(arguments.text_model)
    for flag, source in (("--vision_model", vision), ("--text_model", text)):
        if not Path(source, OPEN_CLIP_FILE).is_file():
            check_export_folder(flag, source)
    names: list[str] = []
    fields: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for flag, source in (("--vision_model", vision), ("--text_model", text)):
            taken = take_tower(source, flag, Path(folder, flag))
            names.append(source if taken is None else str(taken.folder))
            fields |= {} if taken is None else taken.fields
        model, processor = _from_names(names, arguments, fields | overrides)
    if names[0] != vision:
        model.config.vision_config.name_or_path = vision
    if names[1] != text:
        model.config.text_config.name_or_path = text
    return model, processor


def _from_names(
    names: list[str], arguments: TrainingArguments, fields: dict[str, Any]
) -> tuple[MiniClipModel, MiniClipProcessor]:
    sizes = (arguments.image_size, arguments.max_length, arguments.crop_pct)
    vision, text = names
    processor = MiniClipProcessor.from_towers(vision, text, *sizes)
    if fields.get("text_length"):
        processor = MiniClipProcessor(processor.image_processor, processor.tokenizer, text_padding="max_length")
    try:
        return MiniClipModel.from_towers(vision, text, **fields), processor
    except OSError:
        for flag, name in zip(("--vision_model", "--text_model"), names, strict=True):
            reject_pickled(flag, name)
        raise


def _from_preset(
    arguments: TrainingArguments, overrides: dict[str, Any], captions: Iterable[list[str]]
) -> tuple[MiniClipModel, MiniClipProcessor]:
    config = read_preset(named_file(str(arguments.preset), "presets", ".json"), overrides)
    tokenizer = train_tokenizer(captions, config.text_config.vocab_size)
    config.text_config.pad_token_id = tokenizer.pad_token_id
    limit = max_text_length(config.text_config, tokenizer)
    tokenizer.model_max_length = _text_length(arguments, limit)
    images = image_processor_of(config.vision_config, arguments.image_size, arguments.crop_pct)
    processor = MiniClipProcessor(images, tokenizer)
    return MiniClipModel(config).eval(), processor


def read_preset(path: Path, overrides: dict[str, Any] | None = None) -> MiniClipConfig:
    """The configuration in a preset's JSON file.

    Args:
        path: path of the file.
        overrides: fields that override those of the file.

    Raises:
        UsageError: the file is not JSON, or has an unknown key or an invalid value for [`MiniClipConfig`].
        OSError: the file cannot be read.
    """
    try:
        preset = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    if not isinstance(preset, dict):
        raise UsageError(f"{path}: expected the fields of a MiniClipConfig, found {type(preset).__name__}")
    known = ["model_type", *TOWERS, *FIELDS]
    for key in preset:
        if key not in known:  # the configuration would silently keep it
            expected = f"; expected one of {', '.join(known)}"
            raise UsageError(f"{path}: unknown key {key!r}{did_you_mean(key, known, expected)}")
    try:
        return MiniClipConfig.from_dict(preset | (overrides or {}))
    except (ValueError, StrictDataclassError) as error:
        raise UsageError(f"{path}: {one_line(error)}") from error


def _from_export(arguments: TrainingArguments, overrides: dict[str, Any]) -> tuple[MiniClipModel, MiniClipProcessor]:
    source = str(arguments.model_name_or_path)
    model, processor = load_clip(source, "--model_name_or_path")
    for name, value in overrides.items():
        own = getattr(model.config, name)
        if value != own:
            raise UsageError(f"--{name} {value} cannot change a trained model: {source} has {own}")
    processor.tokenizer.model_max_length = _text_length(arguments, processor.tokenizer.model_max_length)
    if arguments.image_size is not None:
        model = _for_size(model, arguments.image_size)
    if arguments.image_size is not None or arguments.crop_pct is not None:
        own = processor.image_processor
        size = arguments.image_size or own.crop_size["height"]
        processor.image_processor = _other_size(own, model.config.vision_config, size, arguments.crop_pct)
    return model, processor


def _for_size(model: MiniClipModel, size: int) -> MiniClipModel:
    """The model, or one with resized position embeddings if its tower takes images of its own size only."""
    if size > LARGEST_SIDE:
        return model
    if image_problem(model, (size, size)) is None:
        tower = model.config.vision_config
        known = getattr(tower, "pretrained_cfg", None) or {}
        if known.get("fixed_input_size"):  # as a converted open_clip says of each timm tower
            tower.pretrained_cfg = known | {"input_size": [3, size, size]}
        return model
    try:
        resized = with_image_size(model, size)
    except Exception:  # of many classes; `try_towers` says which sizes the tower takes
        return model
    return resized if image_problem(resized, (size, size)) is None else model


def _other_size(own: Any, tower: Any, size: int, crop_pct: float | None) -> Any:
    """An image processor like that of a trained model, for images of another size or with another crop.

    Without another crop it keeps the model's own, which may differ from that of its tower.
    """
    if crop_pct is None:
        side = own.crop_size["height"]
        if size == side:
            return own
        crop_pct = side / min(dict(own.size).values())
    if tower.model_type == "timm_wrapper":
        made = image_processor_from_timm(tower, size, crop_pct)
        settings = [[*one.image_mean, *one.image_std, one.resample, *dict(one.size)] for one in (own, made)]
        if settings[0] == settings[1]:
            return made
    return stock_image_processor(own, size, crop_pct)  # a CLIP may prepare images in another way than timm


def _text_length(arguments: TrainingArguments, limit: int) -> int:
    if arguments.max_length is None:
        return limit
    if not 0 < arguments.max_length <= limit:
        raise UsageError(f"--max_length must be in 1..{limit}, the limit of this model, not {arguments.max_length}")
    return arguments.max_length


def train_tokenizer(captions: Iterable[list[str]], vocab_size: int) -> Any:
    """A lower-casing WordPiece tokenizer like BERT's, with a vocabulary learned from the captions.

    It knows every character of the captions. The same captions give the same vocabulary in every process and run.

    Args:
        captions: captions of each image; they are iterated twice.
        vocab_size: largest size of the vocabulary, special tokens included.

    Raises:
        ValueError: the captions have too many different characters for a vocabulary of that size.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bar = partial(tqdm, captions, unit="image", delay=2, leave=False, disable=process_rank() != 0)
    normal = (learner.normalizer.normalize_str(text) for row in bar(desc="find the words") for text in row)
    words = {word for text in normal for word, _ in learner.pre_tokenizer.pre_tokenize_str(text)}
    inner = {character for word in words for character in word[1:]}
    # The library numbers single characters in the order of a hash table, and breaks ties between pieces by these
    # numbers. As special tokens they get fixed numbers; in the final tokenizer they are plain pieces.
    alphabet = sorted({word[0] for word in words} | inner) + sorted(f"##{character}" for character in inner)
    fixed = [*SPECIAL_TOKENS, *alphabet]
    if len(fixed) > vocab_size:
        raise ValueError(
            f"the captions need {len(fixed)} tokens for their single characters alone, more than the vocab_size "
            f"{vocab_size} in the preset's text_config: raise it"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed, limit_alphabet=vocab_size, show_progress=False
    )
    learner.train_from_iterator((text for row in bar(desc="learn the vocabulary") for text in row), trainer)
    return BertTokenizer(vocab=learner.get_vocab(), do_lower_case=True)


def set_dropout(part: nn.Module, probability: float) -> None:
    """Set every dropout of a model or a part: modules, attention dropout stored as a number, and stochastic depth."""
    if isinstance(part, MiniClipModel):
        part.config.projection_dropout = probability
    for module in part.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(module, name, probability)
