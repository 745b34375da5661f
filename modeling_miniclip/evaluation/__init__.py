"""Measure a model.

metrics.py: recall@K, median rank, loss and intervals
zero_shot.py: classification by class names
eval_sets.py: datasets and class folders to measure on
encoders.py: models to measure: exports and other CLIPs
evaluate.py: `miniclip eval`: all metrics of several models
failure_page.py: an HTML page of the worst mistakes
"""
