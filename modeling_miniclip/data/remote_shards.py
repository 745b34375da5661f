"""Shards that are elsewhere, fetched whole into a cache folder."""

from pathlib import Path


def default_folder() -> Path:
    """The folder of indexes and fetched shards without an argument: `miniclip/shards` in HF_HOME."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "miniclip", "shards")
