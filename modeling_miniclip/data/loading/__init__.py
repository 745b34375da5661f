"""From rows to batches: order, augmentation, loader processes.

order.py: the order of the rows of an epoch, computed
mixing.py: several datasets in one epoch, by weights
batches.py: which rows are in each global batch
dataset.py: the rows of a split as a torch dataset
hard_negatives.py: wrong captions as additional candidates
augmentation.py: random crops, flips and colours
collation.py: rows as tensors, and tensors as inputs of the model
loader.py: loader processes
pair_keys.py: what an image and a text share if they belong together
pairs.py: which texts and images share such a key, in tiles
pixel_memory.py: memory in which loader processes leave pixels for the trainer
reduced_size.py: how many times smaller an image may be decoded
"""
