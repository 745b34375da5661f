"""What a run says about itself, and how it notices that something is wrong.

reporting.py: log lines, metrics.jsonl, throughput
measure.py: the figures of the steps and of a validation
callbacks.py: functions of a Python program that a run calls
word_order.py: word order in the card of a run with hard negatives
shared_captions.py: recall with captions that several images share
several_datasets.py: metrics and uses of each of several datasets
short_embeddings.py: metrics of the short embeddings of `--matryoshka_dims`
caption_probe.py: do captions belong to their images?
diagnostics.py: warn about a run that does not learn
figures.py: curves and retrieved images
overfit.py: `--overfit_batch`: can the model learn one batch?
reload_check.py: load the export again and compare its embeddings
"""
