"""The training loss over the batches of all processes, in memory that does not grow with the number of pairs.

global_loss.py: the loss of a batch, with every option, over all processes
tiles.py: the loops over tiles of similarities, forward and backward
objectives.py: what is computed from a tile: softmax and sigmoid losses, distillation
pairs.py: which texts and images belong together: those that share a key
"""
