"""Helpers that do not depend on models.

files.py: files and folders that are written completely or not at all
checksums.py: checksums of weights and indexes
resources.py: paths of the data files in the package
plain_yaml.py: YAML from users, plain values only
processes.py: rank of this process, without torch
performance.py: memory allocator, precision, memory format, compilation, threads
html.py: HTML pages without scripts
thumbnails.py: small copies of images
match_grid.py: a figure of queries and the images found for them
"""
