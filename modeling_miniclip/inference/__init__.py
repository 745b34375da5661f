"""Load a trained model and embed images and texts.

loading.py: load an export, or one tower of it
encode.py: `encode_images`, `encode_texts`
"""
