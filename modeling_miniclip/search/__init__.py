"""Search images with a model.

index.py: `ImageIndex`: open, search, filter
update.py: `update_index`: add, change and remove images
shards.py: embeddings of an unfinished update
embeddings_file.py: embeddings on disk
fingerprints.py: hashes that identify the model of an index
exact.py: exact nearest neighbours
approximate.py: approximate neighbours with FAISS
filters.py: conditions on the entries of an index
pictures.py: the picture of an entry
in_memory.py: `find_matches`: search without an index
query.py: `miniclip search`
formatting.py: results as text or JSON
results_page.py: results as an HTML page
duplicates.py: `miniclip duplicates`
app.py: `miniclip app`: the search page
space.py: `miniclip space`: the page as a Hugging Face Space
"""
