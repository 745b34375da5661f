"""Texts computed in groups of similar length give what one padded batch gives."""

import copy

import pytest
import torch

from modeling_miniclip.training.towers.create_model import set_dropout
from modeling_miniclip.training.towers.text_groups import group_texts_by_length
from tests.helpers.towers import tiny_model


@pytest.mark.parametrize(("text", "pooling"), [("distilbert", "mean"), ("t5", "mean"), ("gpt2", "last")])
def test_groups_give_the_features_and_gradients_of_one_batch(text: str, pooling: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(text=text, text_pooling=pooling)
    model.train()
    set_dropout(model, 0.0)
    lengths = torch.tensor([3, 9, 5, 9, 2, 7, 4])
    mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    ids = torch.where(mask.bool(), torch.randint(5, 200, (7, 9)), model.config.text_config.pad_token_id or 0)
    found = []
    for groups in (1, 3):
        model.zero_grad()
        if groups > 1:  # the first result is that of the model as it is
            group_texts_by_length(model, groups)
        widths = []
        hook = model.text_model.register_forward_pre_hook(
            lambda _, args, kwargs, widths=widths: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        embeds = model(input_ids=ids, attention_mask=mask).text_embeds
        hook.remove()
        (embeds * torch.linspace(-1, 1, embeds.numel()).view_as(embeds)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((widths, embeds.detach(), gradients))
    assert found[0][0] == [9] and found[1][0] == [4, 9, 9]
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[0][2].keys() == found[1][2].keys()
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(gradient, found[1][2][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("text", ["distilbert", "gpt2"])
def test_left_padding_is_not_cut(text: str) -> None:
    model = tiny_model(text=text, text_pooling="mean")
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8], [0, 6, 7, 8]])
    expected = model(input_ids=ids, attention_mask=mask).text_embeds
    model.train()
    set_dropout(model, 0.0)
    group_texts_by_length(model, 3)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).text_embeds, expected)


def test_evaluation_and_texts_without_mask_are_one_batch() -> None:
    model = tiny_model()
    group_texts_by_length(model, 2)
    ids = torch.tensor([[2, 7, 3, 0], [2, 7, 8, 3]])
    assert model.pool_texts(ids, (ids > 0).long()).last_hidden_state.shape[:2] == (2, 4)
    assert model.train().pool_texts(ids).last_hidden_state.shape[:2] == (2, 4)


def test_copy_of_a_grouped_model_uses_its_own_weights() -> None:
    model = tiny_model().train()
    set_dropout(model, 0.0)
    group_texts_by_length(model, 2)
    ids = torch.tensor([[2, 7, 3, 0], [2, 7, 8, 3]])
    before = model.pool_texts(ids, (ids > 0).long()).pooler_output
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    torch.testing.assert_close(other.pool_texts(ids, (ids > 0).long()).pooler_output, before)
