"""Building blocks of `train_miniclip.py`.

arguments.py: all flags with their defaults and help
parsing.py: the command line and its recipe as arguments
recipes.py: read a recipe, save arguments as one
check_arguments.py: check the values of arguments
launch.py: what the launcher was given: its command line, launch file and environment
launch_settings.py: each setting of the launcher, and what happens to it
setup.py: the steps of `prepare`
run.py: the state of a run, and when it saves and stops
row_order.py: `--shuffle`, and the order of the training images
create_model.py: a model from towers, from a preset or from an export
try_towers.py: run both towers once, to find sizes that they cannot take before any long work
layers.py: freezing, learning rates and training mode of a tower's layers
text_groups.py: run the text tower on texts of similar length together
optimizer.py: parameter groups, schedule, bound of the temperature
connections.py: between the processes of a run, for the heartbeat
distributed.py: the loss over all processes
heartbeat.py: notice a lost process or machine, and end the others
deepspeed.py: training with ZeRO of DeepSpeed
grad_cache.py: large batches in chunks, with exact gradients
ema.py: averaged weights
features.py: features of frozen towers, computed once
feature_cache.py: these features on disk
fold_batch_norm.py: faster frozen convolutions
bad_images.py: skip and count images that cannot be decoded
limit_splits.py: the first images for training, a sample for validation
fingerprint_rows.py: the rows of a fingerprint, block by block
fingerprint.py: what a run trains on and with, saved with each checkpoint
changes.py: what changed between the start of a run and its resumption
resume_rules.py: what happens to each flag that changed
checkpoints.py: save, find and delete checkpoints
output_dir.py: lock, check and empty the output folder
signals.py: save and exit at Ctrl-C and SIGTERM
reporting.py: log lines, metrics.jsonl, throughput
several_datasets.py: metrics and uses of each of several datasets
caption_probe.py: do captions belong to their images?
diagnostics.py: warn about a run that does not learn
figures.py: curves and retrieved images
overfit.py: `--overfit_batch`: can the model learn one batch?
reload_check.py: load the export again and compare its embeddings
publish.py: export and push the best model
"""
