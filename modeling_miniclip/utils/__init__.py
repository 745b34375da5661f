"""Helpers that do not depend on models.

files.py: files and folders that are written completely or not at all
locks.py: a lock on a file that ends with its process
names.py: names of files as text, whatever their bytes, and without the folders of this machine
checksums.py: checksums of weights and indexes
resources.py: paths of the data files in the package
plain_yaml.py: YAML from users, plain values only
processes.py: rank of this process, and the end of the processes that it starts, without torch
interrupts.py: one line and exit code 130 at Ctrl-C
commands.py: run a command; how it ends after an error, Ctrl-C or a closed pipe
performance.py: memory allocator, precision, memory format, compilation, threads
memory.py: how much memory is left, and which errors say that there was too little
arrays.py: tensors and arrays of each other, and of lists
html.py: HTML pages without scripts
thumbnails.py: small copies of images
match_grid.py: a figure of queries and the images found for them
"""
