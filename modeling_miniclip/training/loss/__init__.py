"""The training loss over the batches of all processes, in memory that does not grow with the number of pairs.

global_loss.py: the loss of a batch, with every option, over all processes
batch_rows.py: the rows of a batch that count, over all processes
pair_counts.py: how many pairs a batch has, on which the loss of guessing depends
tiles.py: the loops over tiles of similarities, forward and backward
objectives.py: what is computed from a tile: softmax and sigmoid losses, distillation
"""
