"""Load a trained model and embed images and texts.

loading.py: load an export, one tower of it, or the processor of a model
pickled.py: the command that converts pickled weights, which are never read
encode.py: `encode_images`, `encode_texts`
fit.py: embed batches in parts where memory is too short
"""
