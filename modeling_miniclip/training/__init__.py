"""What the steps of `train_miniclip.py` are made of."""
