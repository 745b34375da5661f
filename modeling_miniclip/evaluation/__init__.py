"""Evaluate a model.

metrics.py: recall@K, median rank, loss and intervals
zero_shot.py: classification by class names
by_length.py: recall by the length of the caption
linear_probe.py: logistic regression on features of images
shared.py: texts that belong to several images
eval_sets.py: data sets and class folders to evaluate on
encoders.py: models to evaluate: exports and other CLIPs
evaluate.py: `miniclip eval`: scores of one or two models
failure_page.py: an HTML page of the worst mistakes
order_pairs.py: pairs of a true and a false caption of an image
order_test.py: how often the true one scores above the false one
order_page.py: an HTML page of such pairs
"""
