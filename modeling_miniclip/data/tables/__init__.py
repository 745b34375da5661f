"""Rows as tables on disk, built once and shared by all processes.

table.py: the rows of a source as a table on disk
table_cache.py: tables that are built once and shared
assign_splits.py: which rows of a table belong to which split
table_rows.py: rows of Parquet and Arrow files
arrow_tables.py: datasets of the library `datasets`, and tables in memory, as such tables
memory_tables.py: DataFrames, lists of dictionaries and datasets of a Python program as tables in memory
image_copies.py: which rows of a split show one image under several names
same_images.py: which rows of a table show the same image
row_blocks.py: columns of a split in blocks of rows, and samples of it
image_places.py: where images are, and whether they changed, without opening them
garbage.py: the garbage collector while many rows come and go
"""
