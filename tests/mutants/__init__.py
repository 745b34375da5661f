"""Small faults that the fast tests must catch: `faults.py` lists them, `python -m tests.mutants` applies each."""
