"""Wrong captions from right ones: English captions with two words or phrases swapped.

words.py: English words by what they do in a caption
phrases.py: the noun phrases of a caption and what relates them
facts.py: what a caption says, as far as word order decides it
swaps.py: swap words so that the caption becomes wrong
english.py: recognise English captions
"""
