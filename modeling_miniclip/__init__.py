"""MiniCLIP: train, measure and share your own CLIP.

Names are imported on first use: `import modeling_miniclip` loads neither torch nor transformers. Using any of them
registers MiniCLIP with `AutoConfig`, `AutoModel` and `AutoProcessor`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULE_OF = {
    "MiniClipConfig": "configuration_miniclip",
    "MiniClipModel": "modeling_miniclip",
    "MiniClipOutput": "modeling_miniclip",
    "contrastive_loss": "loss_miniclip",
    "sigmoid_loss": "loss_miniclip",
    "symmetric_contrastive_loss": "loss_miniclip",
    "MiniClipProcessor": "processing_miniclip",
    "load_captions": "data.captions",
    "retrieval_metrics": "evaluation.metrics",
    "encode_images": "inference.encode",
    "encode_texts": "inference.encode",
    "find_matches": "search.in_memory",
    "keep_freed_memory": "utils.performance",
    "zero_shot_weights": "evaluation.zero_shot",
    "zero_shot_accuracy": "evaluation.zero_shot",
    "classify": "evaluation.zero_shot",
    "export": "hub.export",
    "from_clip": "clips.from_clip",
    "train": "api.train",
    "TrainResult": "api.result",
    "PairCollator": "api.trainer",
    "gathered_loss": "api.trainer",
    "recall_of_prediction": "api.trainer",
    "push": "hub.push",
    "ImageIndex": "search.index",
    "EntryFilter": "search.filters",
    "update_index": "search.update",
    "packaged_file": "utils.resources",
    "MiniClipError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "UsageError": "errors",
}

__all__ = [*_MODULE_OF, "__version__"]

if TYPE_CHECKING:
    from .api.result import TrainResult as TrainResult
    from .api.train import train as train
    from .api.trainer import PairCollator as PairCollator
    from .api.trainer import gathered_loss as gathered_loss
    from .api.trainer import recall_of_prediction as recall_of_prediction
    from .clips.from_clip import from_clip as from_clip
    from .configuration_miniclip import MiniClipConfig as MiniClipConfig
    from .data.captions import load_captions as load_captions
    from .errors import DataError as DataError
    from .errors import MiniClipError as MiniClipError
    from .errors import ModelError as ModelError
    from .errors import UsageError as UsageError
    from .evaluation.metrics import retrieval_metrics as retrieval_metrics
    from .evaluation.zero_shot import classify as classify
    from .evaluation.zero_shot import zero_shot_accuracy as zero_shot_accuracy
    from .evaluation.zero_shot import zero_shot_weights as zero_shot_weights
    from .hub.export import export as export
    from .hub.push import push as push
    from .inference.encode import encode_images as encode_images
    from .inference.encode import encode_texts as encode_texts
    from .loss_miniclip import contrastive_loss as contrastive_loss
    from .loss_miniclip import sigmoid_loss as sigmoid_loss
    from .loss_miniclip import symmetric_contrastive_loss as symmetric_contrastive_loss
    from .modeling_miniclip import MiniClipModel as MiniClipModel
    from .modeling_miniclip import MiniClipOutput as MiniClipOutput
    from .processing_miniclip import MiniClipProcessor as MiniClipProcessor
    from .search.filters import EntryFilter as EntryFilter
    from .search.in_memory import find_matches as find_matches
    from .search.index import ImageIndex as ImageIndex
    from .search.update import update_index as update_index
    from .utils.performance import keep_freed_memory as keep_freed_memory
    from .utils.resources import packaged_file as packaged_file


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".auto", __name__)  # registers the Auto classes, once
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
