"""Run the text tower on groups of texts of similar length, so that less of its work is padding."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...modeling_miniclip import MiniClipModel

# The longest text of a group sets its length: 256 captions of Flickr8k take 30 tokens each in one group, 18 in four.
TEXT_GROUPS = 4


def group_texts_by_length(model: MiniClipModel, groups: int = TEXT_GROUPS) -> None:
    """Let a model's `pool_texts` run the text tower once per group of texts of similar length while it trains.

    Padded to the longest text of the batch, half of the tokens would be padding. In evaluation mode nothing changes.

    Args:
        model: model whose `pool_texts` is replaced, for this object only.
        groups: number of groups per batch.
    """
    model.pool_texts = partial(_pool_texts_by_length, model, groups)  # type: ignore[method-assign]


def lengths_for_groups(model: MiniClipModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A further argument of a model with groups, from a batch on the CPU: without it, each step waits for the device.

    Args:
        model: model that may have been given groups.
        batch: collated batch.

    Returns:
        `text_lengths` `[N]` for a model with groups and a batch with texts, else nothing.
    """
    if "pool_texts" not in vars(model) or "attention_mask" not in batch:
        return {}
    return {"text_lengths": _lengths(batch["attention_mask"])}


def _lengths(attention_mask: Tensor) -> Tensor:
    """`[N]` number of tokens up to the last one: padding on the left is kept."""
    positions = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return (attention_mask * positions).amax(dim=1)


def _pool_texts_by_length(
    model: MiniClipModel,
    groups: int,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    text_lengths: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Like [`MiniClipModel.pool_texts`], but in training the output has only `pooler_output`."""
    if not model.training or attention_mask is None:
        return MiniClipModel.pool_texts(model, input_ids, attention_mask, **kwargs)
    lengths = _lengths(attention_mask) if text_lengths is None else text_lengths
    order = lengths.argsort()
    parts, pooled = order.chunk(groups), []
    longest = lengths[torch.stack([rows[-1] for rows in parts])].tolist()
    for rows, length in zip(parts, longest, strict=True):
        output = MiniClipModel.pool_texts(model, input_ids[rows, :length], attention_mask[rows, :length], **kwargs)
        pooled.append(output.pooler_output)
    return BaseModelOutputWithPooling(pooler_output=torch.cat(pooled)[order.argsort()])
