"""Model and processor as a run's arguments ask for them."""

from typing import Any

from torch import nn

from .arguments import TrainingArguments
from .configuration_miniclip import MiniClipConfig
from .errors import UsageError
from .modeling_miniclip import MiniClipModel
from .processing_miniclip import MiniClipProcessor, image_processor_from_timm
from .resources import named_file

DEFAULT_VISION, DEFAULT_TEXT = "resnet50.a1_in1k", "distilbert-base-uncased"


def build_model(arguments: TrainingArguments, captions: list[list[str]]) -> tuple[MiniClipModel, MiniClipProcessor]:
    """Model and processor as the arguments ask: from a preset, from an export or from two pretrained towers.

    Args:
        arguments: of the run.
        captions: of the training images; a preset trains its vocabulary on them.

    Raises:
        UsageError: the weights cannot be found or do not fit the arguments.
    """
    overrides = {
        name: getattr(arguments, name)
        for name in ("text_pooling", "projection_dim", "projection_depth")
        if getattr(arguments, name) is not None
    }
    if arguments.dropout is not None:
        overrides["projection_dropout"] = arguments.dropout
    try:
        if arguments.preset is not None:
            model, processor = _from_preset(arguments, overrides, captions)
        elif arguments.model_name_or_path is not None:
            model, processor = _from_export(arguments, overrides)
        else:
            vision, text = arguments.vision_model or DEFAULT_VISION, arguments.text_model or DEFAULT_TEXT
            processor = MiniClipProcessor.from_towers(vision, text, arguments.image_size, arguments.max_length)
            model = MiniClipModel.from_towers(vision, text, **overrides)
    except (OSError, ValueError) as error:
        raise UsageError(f"the model cannot be built: {error}") from error
    if arguments.dropout is not None:
        set_dropout(model, arguments.dropout)
    return model, processor


def _from_preset(
    arguments: TrainingArguments, overrides: dict[str, Any], captions: list[list[str]]
) -> tuple[MiniClipModel, MiniClipProcessor]:
    path = named_file(str(arguments.preset), "presets", ".json")
    config = MiniClipConfig.from_pretrained(path, **overrides)
    tokenizer = train_tokenizer(captions, config.text_config.vocab_size)
    limit = config.text_config.max_position_embeddings
    if arguments.max_length is not None and not 0 < arguments.max_length <= limit:
        raise ValueError(f"--max_length must be in 1..{limit}, the limit of {path}, not {arguments.max_length}")
    tokenizer.model_max_length = arguments.max_length or limit
    processor = MiniClipProcessor(image_processor_from_timm(config.vision_config, arguments.image_size), tokenizer)
    return MiniClipModel(config), processor


def _from_export(arguments: TrainingArguments, overrides: dict[str, Any]) -> tuple[MiniClipModel, MiniClipProcessor]:
    overrides.pop("projection_dropout", None)
    if overrides:
        raise ValueError(
            f"--{' --'.join(overrides)} cannot change a trained model; leave out --model_name_or_path or them"
        )
    source = str(arguments.model_name_or_path)
    processor = MiniClipProcessor.from_pretrained(source)
    if arguments.max_length is not None:
        processor.tokenizer.model_max_length = min(arguments.max_length, processor.tokenizer.model_max_length)
    model, info = MiniClipModel.from_pretrained(source, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{source} lacks weights: {', '.join(sorted(info['missing_keys']))}")
    return model, processor


def train_tokenizer(captions: list[list[str]], vocab_size: int) -> Any:
    """A lower-casing WordPiece tokenizer as BERT's, its vocabulary learnt from the captions.

    Args:
        captions: lists of texts.
        vocab_size: upper bound of the vocabulary, special tokens included.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator((text for row in captions for text in row), vocab_size=vocab_size, show_progress=False)
    return BertTokenizerFast(tokenizer_object=trained._tokenizer, do_lower_case=True)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of heads and towers: modules, attention dropout kept as a number, and stochastic depth."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, probability)
