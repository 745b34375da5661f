"""Training from Python programs and notebooks.

train.py: `train`: the training script as a function
keywords.py: its keyword arguments with their types, made from the flags
describe_keywords.py: make these, and the signature and the docstring of `train`, from the flags
sources.py: datasets of a Python program as names of sources
result.py: a finished run: model, metrics, history, and how a notebook shows it
clean_process.py: leave a process as it was before a run
trainer.py: for transformers' `Trainer`: collator, loss over all processes, recall
"""
