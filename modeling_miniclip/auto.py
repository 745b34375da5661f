"""Importing this module registers MiniCLIP with transformers' Auto classes, and lets saved models include its code."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from .configuration_miniclip import MiniClipConfig
from .modeling_miniclip import MiniClipModel
from .processing_miniclip import MiniClipProcessor

AutoConfig.register(MiniClipConfig.model_type, MiniClipConfig, exist_ok=True)
AutoModel.register(MiniClipConfig, MiniClipModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(MiniClipConfig, MiniClipModel, exist_ok=True)
AutoProcessor.register(MiniClipConfig, MiniClipProcessor, exist_ok=True)

# From now on, save_pretrained writes the code and an auto_map together with the weights.
MiniClipConfig.register_for_auto_class()
MiniClipModel.register_for_auto_class("AutoModel")
MiniClipProcessor.register_for_auto_class()
