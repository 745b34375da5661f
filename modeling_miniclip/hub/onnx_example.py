"""Score images against texts with a MiniCLIP model in ONNX. Needs only `pip install onnxruntime pillow tokenizers`.

    python example.py photo.jpg other.png --text "two dogs on a beach" "a bowl of soup"

From Python: `from example import MiniClip`.
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


class MiniClip:
    """Both encoders, the tokenizer and the settings in a folder written by `miniclip export --onnx`."""

    def __init__(self, folder: Path = Path(__file__).parent):
        providers = ["CPUExecutionProvider"]  # with onnxruntime-gpu: CUDAExecutionProvider
        self.image_encoder = InferenceSession(str(folder / "image_encoder.onnx"), providers=providers)
        self.text_encoder = InferenceSession(str(folder / "text_encoder.onnx"), providers=providers)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # truncates and pads as the model needs
        self.settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.empty_text = str(model["empty_text"])  # what stands for a text without characters
        self.logit_scale, self.logit_bias = float(model["logit_scale"]), float(model["logit_bias"])

    def prepare_image(self, image: Image.Image) -> np.ndarray:
        """Resize, crop the centre and normalise: `[3, H, W]` float32."""
        image, size, crop = to_rgb(image), self.settings["size"], self.settings["crop_size"]
        if "shortest_edge" in size:
            image = middle(image)
            long = int(size["shortest_edge"] * max(image.size) / min(image.size))
            width, height = (size["shortest_edge"] if edge == min(image.size) else long for edge in image.size)
        else:
            width, height = size["width"], size["height"]
        image = image.resize((width, height), self.settings["resample"])
        margins = width - crop["width"], height - crop["height"]
        rounds = self.settings.get("round_margins")  # as open_clip does
        left, top = (round(margin / 2) if rounds else margin // 2 for margin in margins)
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
        pixels = (np.asarray(image, np.float64) * self.settings["rescale_factor"]).astype(np.float32)
        mean, std = (np.float32(self.settings[name]) for name in ("image_mean", "image_std"))
        return ((pixels - mean) / std).transpose(2, 0, 1)

    def prepare_images(self, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """`pixel_values` `[B, 3, H, W]`."""
        return {"pixel_values": np.stack([self.prepare_image(image) for image in images])}

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """`input_ids` and `attention_mask` `[N, L]`, padded to the longest text."""
        rows = self.tokenizer.encode_batch([text or self.empty_text for text in texts])
        ids, masks = [row.ids for row in rows], [row.attention_mask for row in rows]
        return {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(masks, np.int64)}

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """`[B, dim]` embeddings, unit norm. All images of a call form one batch."""
        return self.image_encoder.run(None, self.prepare_images(images))[0]

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """`[N, dim]` embeddings, unit norm. All texts of a call form one batch."""
        return self.text_encoder.run(None, self.prepare_texts(texts))[0]

    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """`[B, N]` logits, the model's `logits_per_image`; softmax over the texts gives zero-shot probabilities."""
        return self.logit_scale * self.encode_images(images) @ self.encode_texts(texts).T + self.logit_bias


def main(argv: Any = None) -> None:
    """Print the scores of each image under its name."""
    parser = argparse.ArgumentParser(description="Score images against texts: the higher, the better they match.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--text", nargs="+", required=True, metavar="TEXT", help="texts to compare them with")
    args = parser.parse_args(argv)
    scores = MiniClip().scores([to_rgb(open_picture(name), name) for name in args.images], args.text)
    for name, row in zip(args.images, scores, strict=True):
        print(name)
        for text, score in zip(args.text, row, strict=True):
            print(f"{score:10.4f}  {text}")


# --- decode any picture ---------------------------------------------------------------------------------------------

from ..pictures_miniclip import middle, open_picture, to_rgb  # noqa: E402  (the export puts that file's code here)

if __name__ == "__main__":
    main()
