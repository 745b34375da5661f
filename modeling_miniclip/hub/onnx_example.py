"""Scores of images and texts by a MiniCLIP model in ONNX. `pip install onnxruntime pillow tokenizers` is all it needs.

    python example.py photo.jpg other.png --text "two dogs on a beach" "a bowl of soup"

From Python: `from example import MiniClip`; see its methods.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from tokenizers import Tokenizer

from ..processing_miniclip import to_rgb


class MiniClip:
    """Both encoders, the tokenizer and the settings of a folder that `miniclip export --onnx` wrote."""

    def __init__(self, folder: Path = Path(__file__).parent):
        providers = ["CPUExecutionProvider"]  # with the package onnxruntime-gpu: CUDAExecutionProvider
        self.image_encoder = InferenceSession(str(folder / "image_encoder.onnx"), providers=providers)
        self.text_encoder = InferenceSession(str(folder / "text_encoder.onnx"), providers=providers)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # truncates and pads as the model wants
        self.settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.logit_scale, self.logit_bias = float(model["logit_scale"]), float(model["logit_bias"])

    def prepare_image(self, image: Image.Image) -> np.ndarray:
        """`[3, H, W]` float32: resized, cropped in the middle, normalised."""
        image, size, crop = to_rgb(image), self.settings["size"], self.settings["crop_size"]
        if "shortest_edge" in size:
            long = int(size["shortest_edge"] * max(image.size) / min(image.size))
            width, height = (size["shortest_edge"] if edge == min(image.size) else long for edge in image.size)
        else:
            width, height = size["width"], size["height"]
        image = image.resize((width, height), self.settings["resample"])
        left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
        pixels = (np.asarray(image, np.float64) * self.settings["rescale_factor"]).astype(np.float32)
        mean, std = (np.float32(self.settings[name]) for name in ("image_mean", "image_std"))
        return ((pixels - mean) / std).transpose(2, 0, 1)

    def prepare_images(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """`pixel_values` `[B, 3, H, W]`."""
        return {"pixel_values": np.stack([self.prepare_image(image) for image in images])}

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """`input_ids` and `attention_mask` `[N, L]`, padded to the longest of these texts."""
        rows = self.tokenizer.encode_batch(list(texts))
        ids, masks = [row.ids for row in rows], [row.attention_mask for row in rows]
        return {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(masks, np.int64)}

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """`[B, dim]`, unit norm. The images of a call are one batch."""
        return self.image_encoder.run(None, self.prepare_images(images))[0]

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """`[N, dim]`, unit norm. The texts of a call are one batch."""
        return self.text_encoder.run(None, self.prepare_texts(texts))[0]

    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """`[B, N]`: the model's `logits_per_image`; its softmax over the texts are zero-shot probabilities."""
        return self.logit_scale * self.encode_images(images) @ self.encode_texts(texts).T + self.logit_bias


def main(argv: Any = None) -> None:
    """Print the scores, those of an image under its name."""
    parser = argparse.ArgumentParser(description="Scores of images and texts: the higher, the better they match.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--text", nargs="+", required=True, metavar="TEXT", help="texts to compare them with")
    args = parser.parse_args(argv)
    scores = MiniClip().scores([Image.open(name) for name in args.images], args.text)
    for name, row in zip(args.images, scores, strict=True):
        print(name)
        for text, score in zip(args.text, row, strict=True):
            print(f"{score:10.4f}  {text}")


if __name__ == "__main__":
    main()
