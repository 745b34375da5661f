"""Building blocks of `train_miniclip.py`.

arguments.py: all flags with their defaults and help
parsing.py: the command line and its recipe as arguments
recipes.py: read a recipe, save arguments as one
check_arguments.py: check the values of arguments
setup.py: the steps of `prepare`
run.py: the state of a run
create_model.py: a model from towers, from a preset or from an export
layers.py: layers of a tower: freezing, learning rates, training mode
text_groups.py: texts of about the same length through the text tower together
optimizer.py: parameter groups, schedule, bound of the temperature
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
publish.py: export and push the best model
"""
