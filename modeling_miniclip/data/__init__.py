"""From any source of captioned images to batches.

captions.py: load captioned images from any source as splits
load_rows.py: the same for the package itself: one or several sources, with a cache of tables
source_kinds.py: the kinds of sources, and which kind a source is
columns.py: the columns of a source, and the names and captions in its cells
listing.py: the files of a folder and below it
picture_formats.py: one list of picture formats, one function that decodes a picture
splits.py: which image belongs to which split
rows.py: what every reader of a source yields
scenes.py: the built-in dataset of drawn scenes
find_images.py: all images of a source, with captions or without, for an index
all_images.py: these images in a table on disk
problems.py: kinds of problems of a dataset
faults.py: sources that cannot be read, are damaged, or change while they are read
skipped.py: one report of images and folders that were skipped
shards/: shards: archives and tables that hold many images each, here or elsewhere
tables/: rows as tables on disk, built once and shared by all processes
readers/: one file per kind of source
checking/: `miniclip check`: what is wrong with a dataset
word_swaps/: English captions with words swapped, so that they are wrong
loading/: from rows to batches: order, augmentation, loader processes
"""
