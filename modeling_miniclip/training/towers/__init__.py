"""The model of a run and its towers.

create_model.py: a model from towers, from a preset or from an export
try_towers.py: run both towers once, to find sizes that they cannot take before any long work
image_size.py: a trained image tower for images of another size
layers.py: freezing, learning rates and training mode of a tower's layers
text_groups.py: run the text tower on texts of similar length together
features.py: features of frozen towers, computed once
feature_cache.py: these features on disk
fold_batch_norm.py: faster frozen convolutions
teacher.py: `--teacher`: another CLIP, whose similarities the model learns
"""
