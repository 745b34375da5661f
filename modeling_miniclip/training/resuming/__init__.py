"""Output folders, checkpoints, and what a resumed run may change.

output_dir.py: lock, check and empty the output folder
checkpoints.py: save, find and delete checkpoints
fingerprint.py: what a run trains on and with, saved with each checkpoint
fingerprint_rows.py: the rows of a fingerprint, block by block
changes.py: what changed between the start of a run and its resumption
resume_rules.py: what happens to each flag that changed
signals.py: save and exit at Ctrl-C and SIGTERM
"""
