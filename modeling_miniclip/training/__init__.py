"""What the steps of `train_miniclip.py` are made of.

arguments.py: all flags with their defaults and help
parsing.py: flags and recipes become arguments
build_model.py: a model from towers, from a preset or from an export
layers.py: layers of a tower: freezing, learning rates, training mode
text_groups.py: the text tower on texts of similar length
optimizer.py: parameter groups, schedule, temperature
distributed.py: the loss over all processes
grad_cache.py: large batches in chunks, with exact gradients
ema.py: averaged weights
features.py: features of frozen towers, computed once
feature_cache.py: these features on disk
fold_batch_norm.py: faster frozen convolutions
bad_images.py: images that cannot be decoded during a run
checkpoints.py: resumable state
output_dir.py: the output folder: one run at a time
signals.py: Ctrl-C and SIGTERM
reporting.py: log lines, metrics.jsonl, throughput
diagnostics.py: warnings: loss stuck, collapse, not finite
figures.py: curves and retrieved images
overfit.py: `--overfit_batch`
publish.py: what a card says of a run
"""
