"""Building blocks of `train_miniclip.py`.

setup.py: the steps of `prepare`
run.py: the state of a run, and when it saves and stops
row_order.py: `--shuffle`, and the order of the training images
hard_negatives.py: `--hard_negatives`: where they come from
matryoshka.py: `--matryoshka_dims`: short embeddings in the loss
settings.py: derived settings, or those of the checkpoint
pace.py: how long steps, validations and checkpoints take
time_limit.py: `--time_limit`, and the line that says how long a run will take
optimizer.py: parameter groups, schedule, bound of the temperature
grad_cache.py: large batches in chunks, with exact gradients
ema.py: averaged weights
bad_images.py: skip and count images that cannot be decoded
limit_splits.py: the first images for training, a sample for validation
zero_shot.py: `--zero_shot_dataset`, classified at each validation
publish.py: export and push the best model
command_line/: flags, recipes and what the launcher was given
loss/: the loss over the batches of all processes, in tiles
resuming/: output folders, checkpoints, and what a resumed run may change
finetune/: fine-tuning that keeps what a model knew
towers/: the model of a run and its towers
memory/: steps that fit into memory, in chunks if they must
processes/: several processes and machines
reports/: what a run says about itself, and how it notices that something is wrong
"""
