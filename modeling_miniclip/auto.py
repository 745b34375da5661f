"""Makes transformers' Auto classes know MiniCLIP, and saved models carry its code. Importing the module does it."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

from .configuration_miniclip import MiniClipConfig
from .modeling_miniclip import MiniClipModel
from .processing_miniclip import MiniClipProcessor

AutoConfig.register(MiniClipConfig.model_type, MiniClipConfig, exist_ok=True)
AutoModel.register(MiniClipConfig, MiniClipModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(MiniClipConfig, MiniClipModel, exist_ok=True)
AutoProcessor.register(MiniClipConfig, MiniClipProcessor, exist_ok=True)

# From here on save_pretrained writes the defining modules and an auto_map beside the weights.
MiniClipConfig.register_for_auto_class()
MiniClipModel.register_for_auto_class("AutoModel")
MiniClipProcessor.register_for_auto_class()
