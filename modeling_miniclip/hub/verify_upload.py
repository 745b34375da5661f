"""Check that a commit on the Hub holds the model of a folder: load both in this fresh process, compare bit for bit.

    python -m modeling_miniclip.hub.verify_upload FOLDER USER/NAME COMMIT

The Auto classes run the code of that commit, which `push` has just uploaded from the folder.
"""

import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

from ..errors import one_line

TEXTS = ["a dog runs through the snow", "two children and a red ball on the beach, seen from above"]


@torch.inference_mode()
def logits_of(source: str, **where: Any) -> torch.Tensor:
    """`[1, 2]` logits of a fixed random image and [`TEXTS`]."""
    model = AutoModel.from_pretrained(source, trust_remote_code=True, **where).eval()
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **where)
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    return model(**processor(images=image, text=TEXTS, return_tensors="pt")).logits_per_image


def main(folder: str, repo_id: str, commit: str) -> None:
    """Exit with an error message unless both models load and compute the same logits."""
    logits = []
    for source, where in ((folder, {}), (repo_id, {"revision": commit})):
        try:
            logits.append(logits_of(source, **where))
        except Exception as error:  # the code and files of a model can raise anything
            sys.exit(f"{source} does not load: {type(error).__name__}: {one_line(error)}")
    wanted, found = logits
    if not torch.equal(wanted, found):
        difference = (wanted - found).abs().max().item() if wanted.shape == found.shape else float("nan")
        sys.exit(f"the uploaded model gives other logits than {folder} (largest difference {difference:g})")


if __name__ == "__main__":
    main(*sys.argv[1:])
