"""`miniclip check`: what is wrong with a dataset.

check.py: `miniclip check`: all problems of a dataset
entries.py: images of any source with their captions and rows, to be checked
find_problems.py: what can be wrong with captions, images and splits
near_duplicates.py: decode every image once, find copies
check_report.py: the report as text or JSON
fixed_copy.py: a CSV with only the valid rows
"""
