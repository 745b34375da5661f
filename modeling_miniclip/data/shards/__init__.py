"""Shards: archives and tables that hold many images each, here or elsewhere.

shard_url.py: names for images inside a shard, and how to read them
shard_patterns.py: which shards a pattern or a folder stands for
remote_files.py: files that are elsewhere, as fsspec reads them
remote_shards.py: shards that are elsewhere, fetched and kept for a while
sidecars.py: rows of remote archives, from the tables that img2dataset writes next to them
tar_headers.py: members of a tar archive
tar_index.py: images of a tar archive with their captions, found once
split_shards.py: where the shards of a split begin
"""
