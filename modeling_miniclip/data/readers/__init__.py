"""Readers, one file per kind of source: each yields rows, see `data/rows.py`."""
