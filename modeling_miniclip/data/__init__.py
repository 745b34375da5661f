"""From any source of captioned images to batches.

sources.py: folders, archives and tables of images for an index
captions.py: `load_captions`: any dataset as splits of rows `{image, image_id, captions}`
caption_files.py: caption files (CSV, TSV, JSON, JSON Lines, Flickr8k tokens)
hub_datasets.py: datasets of the Hub
scenes.py: the built-in drawn scenes
image_files.py: which files are images, where they are, which cannot be read
splits.py: which image belongs to which split
problems.py: kinds of problems, and the error that lists them
check.py: `miniclip check`: every problem of a dataset, and a copy without them
near_duplicates.py: decode images once, find copies
augmentation.py: random crops, flips and colours
dataset.py: a split as a torch dataset
loader.py: global batches, collation, loader processes
"""
