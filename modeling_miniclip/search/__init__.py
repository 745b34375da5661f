"""Search images with a model.

index.py: `ImageIndex`: open, search and write an index
update.py: `update_index`: add, change and remove images
embeddings_file.py: write and memory-map embeddings
fingerprints.py: hashes that identify the model of an index
exact.py: exact nearest neighbours
approximate.py: approximate neighbours with FAISS
filters.py: conditions on the entries of an index
unrelated.py: how well results fit, compared with unrelated captions
unrelated_texts.py: these captions
in_memory.py: `find_matches`: search without an index
query.py: `miniclip search`: a query of text, image or both
formatting.py: results as text or JSON
mine.py: `miniclip mine`: hard negatives
duplicates.py: `miniclip duplicates`
space.py: `miniclip space`: the search page as a Hugging Face Space
building/: the parts of an update
page/: the search page in a browser
"""
