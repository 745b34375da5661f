"""From any source of captioned images to batches.

captions.py: load captioned images from any source as splits
load_rows.py: the same for the package itself: one or several sources, with a cache of tables
source_kinds.py: the kinds of sources, and which kind a source is
columns.py: the columns of a source, and the names and captions in its cells
text_files.py: lines of a text file as an editor counts them
layouts.py: where the captions of a folder are
recognise.py: what a source file is, by its content
listing.py: the files of a folder and below it
picture_formats.py: one list of picture formats, one function that decodes a picture
image_files.py: the images that a caption file names: where they are, which cannot be used
splits.py: which image belongs to which split
rows.py: what every reader of a source yields
shard_url.py: names for images inside a shard, and how to read them
table.py: the rows of a source as a table on disk
table_cache.py: tables that are built once and shared
assign_splits.py: which rows of a table belong to which split
shard_patterns.py: which shards a pattern or a folder stands for
remote_shards.py: shards that are elsewhere
tar_headers.py: members of a tar archive
tar_index.py: images of a tar archive with their captions, found once
table_rows.py: rows of Parquet and Arrow files
arrow_tables.py: datasets of the library `datasets` as such tables
same_images.py: which rows of a table show the same image
record_captions.py: captions in JSON and in nested columns
scenes.py: the built-in dataset of drawn scenes
sources.py: images of any source, for an index
problems.py: kinds of problems of a dataset
skipped.py: one report of images and folders that were skipped
check.py: `miniclip check`: all problems of a dataset
entries.py: images of any source with their captions and rows, to be checked
find_problems.py: what can be wrong with captions, images and splits
check_report.py: the report as text or JSON
fixed_copy.py: a CSV with only the valid rows
near_duplicates.py: decode every image once, find copies
augmentation.py: random crops, flips and colours
row_blocks.py: columns of a split in blocks of rows, and samples of it
image_places.py: where images are, and whether they changed, without opening them
dataset.py: the rows of a split as a torch dataset
order.py: the order of the rows of an epoch, computed
split_shards.py: where the shards of a split begin
mixing.py: several datasets in one epoch, by weights
batches.py: which rows are in each global batch
collation.py: rows as tensors, and tensors as inputs of the model
loader.py: loader processes
"""
