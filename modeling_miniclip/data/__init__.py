"""Any source of captioned images: one row per image with its captions, checks, augmentation, batches."""
