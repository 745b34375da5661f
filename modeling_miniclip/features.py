"""A whole split through the model: embeddings for validation, and the features of frozen towers, computed once."""

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .batches import CaptionRows, GlobalBatches, make_loader
from .distributed import gather_rows
from .modeling_miniclip import MiniClipModel
from .processing_miniclip import MiniClipProcessor
from .training import forward_inputs

EVALUATION_BATCH = 64  # images a forward pass


@torch.no_grad()
def embed_split(
    model: MiniClipModel, loader: Any, processor: MiniClipProcessor, device: torch.device, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of a whole split, gathered from all processes, in the order of its rows.

    Returns:
        `[B, dim]` image embeddings, `[N, dim]` text embeddings, `[N]` the row of each text's image, all on the CPU.
    """
    model.eval()
    parts: dict[str, list[Tensor]] = {"images": [], "image_id": [], "texts": [], "text_image_id": []}
    for batch in tqdm(loader, desc="validate", unit="batch", leave=False, disable=not progress):
        output = model(**forward_inputs(batch, processor, device))
        for name, values in (("images", output.image_embeds), ("image_id", batch["image_id"])):
            parts[name].append(values[batch["image_id"] >= 0].to(device))
        for name, values in (("texts", output.text_embeds), ("text_image_id", batch["text_image_id"])):
            parts[name].append(values[batch["text_image_id"] >= 0].to(device))
    whole = {name: gather_rows(torch.cat(tensors)).cpu() for name, tensors in parts.items()}
    image_order = whole["image_id"].argsort()
    text_order = whole["text_image_id"].argsort(stable=True)
    return whole["images"][image_order].float(), whole["texts"][text_order].float(), whole["text_image_id"][text_order]


@torch.no_grad()
def frozen_image_features(
    model: MiniClipModel, rows: CaptionRows, num_workers: int, device: torch.device, rank: int, world_size: int
) -> Tensor:
    """`[rows, width]`: pooled features of every image, each computed once, by all processes together."""
    model.vision_model.eval()
    batches = GlobalBatches(len(rows), EVALUATION_BATCH * world_size, shuffle=False, rank=rank, world_size=world_size)
    loader = make_loader(rows, batches, num_workers)
    features, indices = [], []
    for batch in tqdm(loader, desc="image features", unit="batch", disable=rank != 0):
        pixels = forward_inputs(batch, rows.processor, device)["pixel_values"]
        keep = batch["image_id"] >= 0
        features.append(model.pool_images(pixels).pooler_output[keep].float())
        indices.append(batch["image_id"][keep].to(device))
    order = gather_rows(torch.cat(indices)).argsort()
    return gather_rows(torch.cat(features))[order].cpu()


@torch.no_grad()
def frozen_text_features(
    model: MiniClipModel,
    captions: list[list[str]],
    processor: MiniClipProcessor,
    device: torch.device,
    rank: int,
    world_size: int,
) -> list[Tensor]:
    """One `[captions, width]` tensor an image: pooled features of every caption, each computed once.

    Captions are taken in the order of their length, so that almost nothing is padded.
    """
    model.text_model.eval()
    texts = [caption for row in captions for caption in row]
    mine = sorted(range(rank, len(texts), world_size), key=lambda i: len(texts[i]))
    features, indices = [], []
    for start in tqdm(range(0, len(mine), 256), desc="text features", unit="batch", disable=rank != 0):
        chunk = mine[start : start + 256]
        inputs = processor.tokenizer([texts[i] for i in chunk], padding=True, truncation=True, return_tensors="pt")
        features.append(model.pool_texts(**inputs.to(device)).pooler_output.float())
        indices.append(torch.tensor(chunk, device=device))
    width = model.config.text_config.hidden_size
    order = gather_rows(torch.cat(indices) if indices else torch.empty(0, dtype=torch.long, device=device)).argsort()
    whole = gather_rows(torch.cat(features) if features else torch.empty(0, width, device=device))[order].cpu()
    return list(whole.split([len(row) for row in captions]))
