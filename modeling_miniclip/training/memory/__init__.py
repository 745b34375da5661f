"""Steps that fit into memory: whole, or else in chunks.

steps.py: repeat a step that does not fit in smaller chunks, with the same random numbers
sizes.py: which steps are known to fit
agreement.py: all processes succeed at a step, or none does
activations.py: on a CPU, stop a step before it takes more memory than there is
"""
