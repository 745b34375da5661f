"""Readers, one file per kind of source: each yields rows, see `data/rows.py`.

caption_file.py: caption files (CSV, TSV, JSON, Flickr8k tokens)
coco.py: COCO's caption annotations, and Karpathy's splits
image_folder.py: folders of images with metadata files, text files or class folders
tars.py: tar archives (WebDataset, img2dataset)
parquet.py: Parquet files
saved.py: folders of `Dataset.save_to_disk`
hub.py: datasets on the Hub
memory.py: data that a Python program passes, held under a name
layouts.py: where the captions of a folder are
recognise.py: what a source file is, by its content
text_files.py: lines of a text file as an editor counts them
image_files.py: the images that a caption file names: where they are, which cannot be used
record_captions.py: captions in JSON and in nested columns
"""
