"""The losses of MiniCLIP: CLIP's cross-entropy with any number of positives, and SigLIP's sigmoid loss."""

import functools
from typing import Any

import torch
from torch import Tensor, nn


def _takes_arrays(loss: Any) -> Any:
    # Arrays and lists in place of tensors; a tensor keeps its graph.
    def tensor(value: Any) -> Any:
        return torch.tensor(value) if isinstance(value, list) or hasattr(value, "__array_interface__") else value

    @functools.wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        return loss(*map(tensor, args), **{name: tensor(value) for name, value in kwargs.items()})

    return wrapped


@_takes_arrays
def contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    query_id: Tensor,
    key_id: Tensor,
    reduction: str = "sum",
) -> Tensor:
    """Cross-entropy of each query over all keys (InfoNCE); every key with the query's id is a positive.

    Averaged over the queries of both directions this is CLIP's loss (Radford et al. 2021). The queries may be those
    of one process and the keys those of all processes.

    Args:
        queries: `[Q, dim]`, unit norm.
        keys: `[K, dim]`, unit norm.
        logit_scale: inverse temperature, the factor of the dot products.
        query_id: `[Q]` integer ids of the queries.
        key_id: `[K]` integer ids of the keys; each query needs at least one key with its id.
        reduction: how several positives are combined: `"sum"` is minus the logarithm of their summed probability
            (MIL-NCE, Miech et al. 2020, "End-to-End Learning of Visual Representations from Uncurated Videos"),
            `"mean"` is minus the mean of their log-probabilities (the "out" form of Khosla et al. 2020, "Supervised
            Contrastive Learning").

    Returns:
        `[Q]` losses in nats, one per query.

    Raises:
        ValueError: unknown `reduction`.
    """
    logits = logit_scale * queries @ keys.t()  # [Q, K]
    positives = query_id.unsqueeze(1) == key_id.unsqueeze(0)  # [Q, K]
    if reduction == "sum":
        positive = logits.masked_fill(~positives, -torch.inf).logsumexp(dim=1)
    elif reduction == "mean":
        positive = torch.where(positives, logits, 0).sum(dim=1) / positives.sum(dim=1)
    else:
        raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")
    return logits.logsumexp(dim=1) - positive


@_takes_arrays
def sigmoid_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    query_id: Tensor,
    key_id: Tensor,
) -> Tensor:
    """SigLIP's loss of each query: for every key, do the two belong together? (Zhai et al. 2023, algorithm 1)

    Args:
        queries: `[Q, dim]`, unit norm.
        keys: `[K, dim]`, unit norm.
        logit_scale: inverse temperature, the factor of the dot products.
        logit_bias: constant added to the scaled dot products; None means 0.
        query_id: `[Q]` integer ids of the queries.
        key_id: `[K]` integer ids of the keys; a query and a key with the same id belong together.

    Returns:
        `[Q]` losses in nats: for each query the sum of -log sigmoid(+-logit) over the keys.
    """
    logits = logit_scale * queries @ keys.t()  # [Q, K]
    if logit_bias is not None:
        logits = logits + logit_bias
    positives = query_id.unsqueeze(1) == key_id.unsqueeze(0)  # [Q, K]
    return -nn.functional.logsigmoid(torch.where(positives, logits, -logits)).sum(dim=1)


@_takes_arrays
def symmetric_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    image_id: Tensor,
    text_image_id: Tensor,
    loss_type: str = "softmax_sum",
    logit_bias: Tensor | float | None = None,
    candidates: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The loss of a batch: each image must find its texts, and each text its image.

    The softmax losses are the mean of the image-to-text and text-to-image [`contrastive_loss`]. The sigmoid loss is
    [`sigmoid_loss`] summed over all pairs and divided by the number of texts. With one text per image this is
    SigLIP's loss; with K captions per image it is the mean over K batches with one caption each.

    Args:
        image_embeds: `[B, dim]`, unit norm.
        text_embeds: `[N, dim]`, unit norm.
        logit_scale: inverse temperature, the factor of the dot products.
        image_id: `[B]` integer ids of the images.
        text_image_id: `[N]` ids of the images that the texts describe.
        loss_type: `"softmax_sum"`, `"softmax_mean"` or `"sigmoid"`, see [`MiniClipConfig`].
        logit_bias: constant added to the logits of the sigmoid loss.
        candidates: the whole batch, if the arguments above are only a share of it: image embeddings, text
            embeddings, image ids, text ids. The losses of all shares add up to that of the whole batch, and only
            pairs with at least one member in the share are compared.

    Returns:
        Scalar in nats. If all embeddings are equal, the default loss is ln(B) for B images and any number of texts.

    Raises:
        ValueError: unknown `loss_type`.

    Examples:
        >>> import torch
        >>> from modeling_miniclip import symmetric_contrastive_loss
        >>> pairs = torch.arange(4)
        >>> symmetric_contrastive_loss(torch.eye(4), torch.eye(4), 100.0, pairs, pairs)
        tensor(0.)
    """
    all_images, all_texts, all_image_id, all_text_image_id = candidates or (
        image_embeds, text_embeds, image_id, text_image_id
    )  # fmt: skip
    if loss_type == "sigmoid":
        losses = sigmoid_loss(text_embeds, all_images, logit_scale, logit_bias, text_image_id, all_image_id)
        return losses.sum() / len(all_texts)
    reduction = loss_type.removeprefix("softmax_")
    image_loss = contrastive_loss(image_embeds, all_texts, logit_scale, image_id, all_text_image_id, reduction).sum()
    text_loss = contrastive_loss(text_embeds, all_images, logit_scale, text_image_id, all_image_id, reduction).sum()
    return (image_loss / len(all_images) + text_loss / len(all_texts)) / 2


def ids_of_pairs(
    image_embeds: Tensor, text_embeds: Tensor, image_id: Tensor | None, text_image_id: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ids of the images and texts of a batch.

    Args:
        image_embeds: `[B, dim]`.
        text_embeds: `[N, dim]`.
        image_id: `[B]` ids of the images, or None if text i describes image i.
        text_image_id: `[N]` ids of the images that the texts describe, or None as well.

    Returns:
        `[B]` and `[N]`.

    Raises:
        ValueError: there are no ids for unequal numbers of images and texts, or only ids of one kind, or an image or a
            text has no partner.
    """
    if image_id is not None and text_image_id is not None:
        if len(image_id) != len(image_embeds) or len(text_image_id) != len(text_embeds):
            raise ValueError(
                f"image_id and text_image_id have {len(image_id)} and {len(text_image_id)} entries for "
                f"{len(image_embeds)} images and {len(text_embeds)} texts"
            )
        if not torch.equal(image_id.unique(), text_image_id.unique()):
            raise ValueError("each id in image_id must also be in text_image_id, and vice versa")
        return image_id, text_image_id
    if image_id is not None or text_image_id is not None:
        raise ValueError("image_id and text_image_id go together: pass both or neither")
    if len(image_embeds) != len(text_embeds):
        raise ValueError(
            f"return_loss=True with {len(image_embeds)} images and {len(text_embeds)} texts needs image_id and "
            "text_image_id to say which text describes which image"
        )
    pairs = torch.arange(len(image_embeds), device=image_embeds.device)
    return pairs, pairs
