"""Helpers that know nothing of models.

files.py: files and folders written whole or not at all
checksums.py: checksums of an export
resources.py: data files that come with the package
plain_yaml.py: YAML from users, plain values only
processes.py: rank of this process, without torch
performance.py: allocator, precision, memory format
html.py: HTML pages without scripts
thumbnails.py: small copies of images
match_grid.py: a picture of queries and the images found for them
"""
