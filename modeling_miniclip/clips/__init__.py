"""Start from any published CLIP, and go back to one. None of this travels with an export.

source.py: find out what a CLIP is, from its configuration alone
families.py: for each family of transformers, where its parts go in a `MiniClipModel`
preprocessing.py: the processor of a CLIP of transformers
open_clip_towers.py: towers of open_clip as towers of timm and transformers
open_clip_tokenizer.py: tokenizers of open_clip
from_open_clip.py: a model of open_clip as a `MiniClipModel`
from_clip.py: `from_clip`, any of these as a `MiniClipModel`
take_tower.py: one tower of a CLIP
to_transformers.py: a model as one of transformers' own classes
to_open_clip.py: a model in open_clip's layout
compare.py: compare a model with its converted copy
run_original.py: the program of the other process, which loads the copy
convert.py: `miniclip convert`
exported.py: any CLIP as the folder of an export, converted once
"""
