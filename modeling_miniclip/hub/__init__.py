"""Export a model with its code and card, push it, convert it to ONNX."""
