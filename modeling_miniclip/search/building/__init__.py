"""Build an index or update it.

plan.py: what an update will do, checked before the long work
pool.py: embeddings that exist already
shards.py: encode images, and keep what an unfinished update has encoded
merge.py: which images are in the new index, what unrelated captions score there, and writing it
"""
