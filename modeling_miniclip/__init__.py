"""MiniCLIP: train, measure and share your own CLIP.

Names are imported when first used (`import modeling_miniclip` loads neither torch nor transformers); using any of
them makes `AutoConfig`, `AutoModel` and `AutoProcessor` know MiniCLIP.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULE_OF = {
    "MiniClipConfig": "configuration_miniclip",
    "MiniClipModel": "modeling_miniclip",
    "MiniClipOutput": "modeling_miniclip",
    "contrastive_loss": "modeling_miniclip",
    "sigmoid_loss": "modeling_miniclip",
    "symmetric_contrastive_loss": "modeling_miniclip",
    "MiniClipProcessor": "processing_miniclip",
    "load_captions": "data",
    "retrieval_metrics": "evaluation",
    "encode_images": "retrieval",
    "encode_texts": "retrieval",
    "find_matches": "retrieval",
    "keep_freed_memory": "performance",
    "zero_shot_weights": "zero_shot",
    "zero_shot_accuracy": "zero_shot",
    "classify": "zero_shot",
    "export": "hub",
    "push": "pushing",
    "ImageIndex": "image_index",
    "EntryFilter": "entry_filter",
    "update_index": "indexing",
    "packaged_file": "resources",
    "MiniClipError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "UsageError": "errors",
}

__all__ = [*_MODULE_OF, "__version__"]

if TYPE_CHECKING:
    from .configuration_miniclip import MiniClipConfig as MiniClipConfig
    from .data import load_captions as load_captions
    from .entry_filter import EntryFilter as EntryFilter
    from .errors import DataError as DataError
    from .errors import MiniClipError as MiniClipError
    from .errors import ModelError as ModelError
    from .errors import UsageError as UsageError
    from .evaluation import retrieval_metrics as retrieval_metrics
    from .hub import export as export
    from .image_index import ImageIndex as ImageIndex
    from .indexing import update_index as update_index
    from .modeling_miniclip import MiniClipModel as MiniClipModel
    from .modeling_miniclip import MiniClipOutput as MiniClipOutput
    from .modeling_miniclip import contrastive_loss as contrastive_loss
    from .modeling_miniclip import sigmoid_loss as sigmoid_loss
    from .modeling_miniclip import symmetric_contrastive_loss as symmetric_contrastive_loss
    from .performance import keep_freed_memory as keep_freed_memory
    from .processing_miniclip import MiniClipProcessor as MiniClipProcessor
    from .pushing import push as push
    from .resources import packaged_file as packaged_file
    from .retrieval import encode_images as encode_images
    from .retrieval import encode_texts as encode_texts
    from .retrieval import find_matches as find_matches
    from .zero_shot import classify as classify
    from .zero_shot import zero_shot_accuracy as zero_shot_accuracy
    from .zero_shot import zero_shot_weights as zero_shot_weights


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".auto", __name__)  # registers the Auto classes, once
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
