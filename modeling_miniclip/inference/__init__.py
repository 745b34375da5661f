"""Load an exported model, or one tower of it; embed images and texts."""
