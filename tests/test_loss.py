"""The losses against hand-worked numbers, a loop in float64, and transformers' CLIP and SigLIP."""

import math

import pytest
import torch
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from modeling_miniclip import contrastive_loss, sigmoid_loss, symmetric_contrastive_loss
from modeling_miniclip.configuration_miniclip import LOSS_TYPES

E1, E2 = [1.0, 0.0], [0.0, 1.0]
LN = math.log


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    torch.manual_seed(0)


def dot(a, b) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def loop_reference(loss_type: str, images, texts, scale: float, image_id, text_image_id, bias: float = 0.0) -> float:
    """The definitions word for word, in Python floats.

    Softmax: per query, minus the mean log-probability of its right keys, or minus the log of their summed probability.
    Sigmoid: minus the log-probability of the right answer for each pair, divided by the number of texts.
    """
    if loss_type == "sigmoid":
        total = 0.0
        for text, own in zip(texts.tolist(), text_image_id.tolist(), strict=True):
            for image, other in zip(images.tolist(), image_id.tolist(), strict=True):
                is_pair = 1 / (1 + math.exp(-(scale * dot(image, text) + bias)))
                total -= math.log(is_pair if own == other else 1 - is_pair)
        return total / len(texts)

    def one_way(queries, keys, query_id, key_id) -> float:
        losses = []
        for query, own in zip(queries.tolist(), query_id.tolist(), strict=True):
            exponentials = [math.exp(scale * dot(query, key)) for key in keys.tolist()]
            probabilities = [e / math.fsum(exponentials) for e in exponentials]
            right = [p for p, other in zip(probabilities, key_id.tolist(), strict=True) if other == own]
            mean_log, log_sum = sum(math.log(p) for p in right) / len(right), math.log(sum(right))
            losses.append(-mean_log if loss_type == "softmax_mean" else -log_sum)
        return sum(losses) / len(losses)

    return (one_way(images, texts, image_id, text_image_id) + one_way(texts, images, text_image_id, image_id)) / 2


def random_batch(num_images: int, most_captions: int, seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most_captions + 1, (num_images,), generator=generator)
    image_id = torch.randperm(10 * num_images, generator=generator)[:num_images]  # any integers, in no order
    text_image_id = image_id.repeat_interleave(counts)
    text_image_id = text_image_id[torch.randperm(len(text_image_id), generator=generator)]
    images = normalize(torch.randn(num_images, 6, generator=generator, dtype=torch.float64), dim=-1)
    texts = normalize(torch.randn(len(text_image_id), 6, generator=generator, dtype=torch.float64), dim=-1)
    return images.to(dtype), texts.to(dtype), image_id, text_image_id


def test_one_caption_an_image_by_hand():
    # logits [[ln 3, 0], [0, ln 3]]: each right one has probability 3/4
    pairs = torch.arange(2)
    rows = contrastive_loss(torch.tensor([E1, E2]), torch.tensor([E1, E2]), LN(3), pairs, pairs)
    assert rows.tolist() == pytest.approx([LN(4 / 3)] * 2)
    # the second text is like the first image: both images prefer text 0 and 1 alike, both texts image 0
    images, texts = torch.tensor([E1, E2]), torch.tensor([E1, E1])
    assert contrastive_loss(images, texts, LN(3), pairs, pairs).tolist() == pytest.approx([LN(2), LN(2)])
    assert contrastive_loss(texts, images, LN(3), pairs, pairs).tolist() == pytest.approx([LN(4 / 3), LN(4)])
    loss = symmetric_contrastive_loss(images, texts, LN(3), pairs, pairs)
    assert loss.item() == pytest.approx((LN(2) + (LN(4 / 3) + LN(4)) / 2) / 2)


def test_several_captions_an_image_by_hand():
    images, texts = torch.tensor([E1, E2]), torch.tensor([E1, E2, E2])
    image_id, text_image_id = torch.tensor([7, 3]), torch.tensor([7, 7, 3])
    # image 7: logits [ln 2, 0, 0], log-probabilities of its two captions -ln 2 and -ln 4
    # image 3: logits [0, ln 2, ln 2], its caption has probability 2/5
    rows = contrastive_loss(images, texts, LN(2), image_id, text_image_id, "mean")
    assert rows.tolist() == pytest.approx([(LN(2) + LN(4)) / 2, LN(5 / 2)])
    # texts: probability 2/3 of the right image but 1/3 for the second, which looks like image 3
    rows = contrastive_loss(texts, images, LN(2), text_image_id, image_id)
    assert rows.tolist() == pytest.approx([LN(3 / 2), LN(3), LN(3 / 2)])
    loss = symmetric_contrastive_loss(images, texts, LN(2), image_id, text_image_id, "softmax_mean")
    assert loss.item() == pytest.approx(((1.5 * LN(2) + LN(5 / 2)) / 2 + (2 * LN(3 / 2) + LN(3)) / 3) / 2)


def test_sum_over_several_captions_by_hand():
    images, texts = torch.tensor([E1, E2]), torch.tensor([E1, E2, E2])
    image_id, text_image_id = torch.tensor([7, 3]), torch.tensor([7, 7, 3])
    # probabilities of the captions: for image 7 1/2, 1/4, 1/4, its own being the first two; for image 3 1/5, 2/5, 2/5
    rows = contrastive_loss(images, texts, LN(2), image_id, text_image_id, "sum")
    assert rows.tolist() == pytest.approx([LN(4 / 3), LN(5 / 2)])
    # a text has one image: nothing to reduce
    back = (texts, images, LN(2), text_image_id, image_id)
    assert contrastive_loss(*back, "sum").tolist() == pytest.approx(contrastive_loss(*back, "mean").tolist())
    loss = symmetric_contrastive_loss(images, texts, LN(2), image_id, text_image_id, "softmax_sum")
    assert loss.item() == pytest.approx(((LN(4 / 3) + LN(5 / 2)) / 2 + (2 * LN(3 / 2) + LN(3)) / 3) / 2)


def test_sigmoid_by_hand():
    images, texts = torch.tensor([E1, E2]), torch.tensor([E1, E2, E2])
    image_id, text_image_id = torch.tensor([7, 3]), torch.tensor([7, 7, 3])
    # scale ln 6, bias -ln 2: a logit is ln 3 for embeddings that agree, -ln 2 for others. sigmoid(ln 3) = 3/4,
    # sigmoid(-ln 2) = 1/3. Yes is right for (0, 7), (1, 7) and (2, 3).
    rows = sigmoid_loss(texts, images, LN(6), -LN(2), text_image_id, image_id)
    yes, no, wrong_yes, wrong_no = LN(4 / 3), LN(3 / 2), LN(4), LN(3)
    assert rows.tolist() == pytest.approx([yes + no, wrong_no + wrong_yes, yes + no])
    loss = symmetric_contrastive_loss(images, texts, LN(6), image_id, text_image_id, "sigmoid", -LN(2))
    assert loss.item() == pytest.approx((2 * yes + 2 * no + wrong_yes + wrong_no) / 3)


def test_sigmoid_loss_averages_over_captions():
    images, texts, image_id, _ = random_batch(5, 1, seed=6)
    sets = [texts, texts.flip(0), texts.roll(1, 0)]  # three captions an image
    single = [symmetric_contrastive_loss(images, t, 10.0, image_id, image_id, "sigmoid", -10.0) for t in sets]
    together = symmetric_contrastive_loss(images, torch.cat(sets), 10.0, image_id, image_id.repeat(3), "sigmoid", -10)
    torch.testing.assert_close(together, torch.stack(single).mean(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("most_captions", [1, 5])
def test_equals_the_loop_reference(most_captions, loss_type):
    for seed in range(5):
        images, texts, image_id, text_image_id = random_batch(7, most_captions, seed)
        expected = loop_reference(loss_type, images, texts, 14.3, image_id, text_image_id, -3.0)
        arguments = (14.3, image_id, text_image_id, loss_type, -3.0)
        assert symmetric_contrastive_loss(images, texts, *arguments).item() == pytest.approx(expected, rel=1e-12)
        single = symmetric_contrastive_loss(images.float(), texts.float(), *arguments)
        assert single.item() == pytest.approx(expected, rel=1e-5)


def test_unknown_loss_raises():
    pairs = torch.arange(2)
    with pytest.raises(ValueError, match="'sum' or 'mean', not 'median'"):
        symmetric_contrastive_loss(torch.eye(2), torch.eye(2), 1.0, pairs, pairs, "softmax_median")


@pytest.mark.parametrize("batch", [1, 2, 32, 1000])
def test_identical_embeddings_give_the_logarithm_of_the_batch(batch):
    same = normalize(torch.ones(batch, 8), dim=-1)
    pairs = torch.arange(batch)
    assert symmetric_contrastive_loss(same, same, 100.0, pairs, pairs).item() == pytest.approx(LN(batch), abs=1e-4)


def test_identical_embeddings_with_several_captions_by_hand():
    # 3 images with 4 captions each: an image chooses among 12 captions, 4 of them its own, a caption among 3 images
    image_id = torch.arange(3)
    images, texts = normalize(torch.ones(3, 4), dim=-1), normalize(torch.ones(12, 4), dim=-1)
    arguments = (images, texts, 5.0, image_id, image_id.repeat_interleave(4))
    assert symmetric_contrastive_loss(*arguments).item() == pytest.approx(LN(3))
    assert symmetric_contrastive_loss(*arguments, "softmax_mean").item() == pytest.approx((LN(12) + LN(3)) / 2)


@pytest.mark.parametrize("loss_type", ["softmax_mean", "softmax_sum"])
def test_loss_is_symmetric_in_images_and_texts(loss_type):
    images, texts, image_id, text_image_id = random_batch(6, 4, seed=1)
    there = symmetric_contrastive_loss(images, texts, 20.0, image_id, text_image_id, loss_type)
    back = symmetric_contrastive_loss(texts, images, 20.0, text_image_id, image_id, loss_type)
    torch.testing.assert_close(there, back, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_order_and_values_of_ids_do_not_matter(loss_type):
    images, texts, image_id, text_image_id = random_batch(6, 4, seed=2)
    loss = symmetric_contrastive_loss(images, texts, 20.0, image_id, text_image_id, loss_type)
    image_order, text_order = torch.randperm(len(images)), torch.randperm(len(texts))
    shuffled = symmetric_contrastive_loss(
        images[image_order], texts[text_order], 20.0, image_id[image_order], text_image_id[text_order], loss_type
    )
    renamed = symmetric_contrastive_loss(images, texts, 20.0, image_id * 3 - 100, text_image_id * 3 - 100, loss_type)
    torch.testing.assert_close(shuffled, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(renamed, loss, rtol=0, atol=0)


def test_shares_give_the_rows_of_the_whole():
    images, texts, image_id, text_image_id = random_batch(8, 3, seed=3)
    whole = contrastive_loss(images, texts, 9.0, image_id, text_image_id)
    shares = [contrastive_loss(images[r::3], texts, 9.0, image_id[r::3], text_image_id) for r in range(3)]
    for rank, share in enumerate(shares):
        torch.testing.assert_close(share, whole[rank::3], rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_of_shares_add_up(loss_type):
    images, texts, image_id, text_image_id = whole = random_batch(8, 3, seed=3)
    expected = symmetric_contrastive_loss(images, texts, 9.0, image_id, text_image_id, loss_type, -1.0)
    parts = [
        symmetric_contrastive_loss(
            images[r::3], texts[r::3], 9.0, image_id[r::3], text_image_id[r::3], loss_type, -1.0, whole
        )
        for r in range(3)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_captions_of_same_image_are_not_pushed_apart(loss_type):
    # The gradient with regard to the similarity of image 0 to each caption: negative where nearness lowers the loss.
    image_id, text_image_id = torch.tensor([0, 1]), torch.tensor([0, 0, 1])
    images = torch.eye(5)[:2]
    texts = torch.eye(5)[2:].clone().requires_grad_()  # all similarities 0: no caption is better than another
    symmetric_contrastive_loss(images, texts, 5.0, image_id, text_image_id, loss_type, -1.0).backward()
    assert [[g < 0 for g in row] for row in (texts.grad @ images.T).tolist()] == [
        [True, False], [True, False], [False, True]
    ]  # fmt: skip


def test_caption_of_same_image_is_no_negative():
    # Two captions of one image, both perfect, and nothing else: the texts have nothing left to distinguish.
    images, texts = torch.tensor([E1]), torch.tensor([E1, E1])
    ids = torch.tensor([0]), torch.tensor([0, 0])
    assert contrastive_loss(texts, images, 50.0, ids[1], ids[0]).tolist() == [0.0, 0.0]
    # With a second image far away, bringing a second caption of the first to its image lowers the loss.
    images = torch.tensor([E1, E2])
    ids = torch.tensor([0, 1]), torch.tensor([0, 0, 1])
    near = symmetric_contrastive_loss(images, torch.tensor([E1, E1, E2]), 5.0, *ids)
    far = symmetric_contrastive_loss(images, torch.tensor([E1, E2, E2]), 5.0, *ids)
    assert near < far


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_equal_finite_differences(loss_type):
    images, texts, image_id, text_image_id = random_batch(4, 3, seed=4)
    scale, bias = torch.tensor([3.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    tensors = (images, texts, scale, bias) if loss_type == "sigmoid" else (images, texts, scale)
    arguments = [tensor.requires_grad_() for tensor in tensors]

    def loss(images, texts, scale, bias=None):
        return symmetric_contrastive_loss(images, texts, scale, image_id, text_image_id, loss_type, bias)

    assert torch.autograd.gradcheck(loss, arguments)


def test_hard_logits_stay_finite_in_float32():
    images = torch.tensor([E1, E2])
    pairs = torch.arange(2)
    loss = symmetric_contrastive_loss(images, -images, 100.0, pairs, pairs)  # right pairs at -100, wrong ones at 0
    assert loss.item() == pytest.approx(100.0)
    loss = symmetric_contrastive_loss(images, -images, 100.0, pairs, pairs, "softmax_sum")
    assert loss.item() == pytest.approx(100.0)
    # the right pair of each text has the logit -110, the wrong one -10
    loss = symmetric_contrastive_loss(images, -images, 100.0, pairs, pairs, "sigmoid", -10.0)
    assert loss.item() == pytest.approx(110.0)


def test_equals_the_loss_of_transformers_clip():
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 50, "eos_token_id": 49, "bos_token_id": 0, "pad_token_id": 1},
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    clip = CLIPModel(config).eval()
    ids = torch.randint(2, 49, (5, 6))
    output = clip(input_ids=ids, pixel_values=torch.randn(5, 3, 8, 8), return_loss=True)
    pairs = torch.arange(5)
    ours = symmetric_contrastive_loss(output.image_embeds, output.text_embeds, clip.logit_scale.exp(), pairs, pairs)
    torch.testing.assert_close(ours, output.loss)


def test_equals_the_loss_of_transformers_siglip():
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=tower | {"vocab_size": 50, "max_position_embeddings": 6, "projection_size": 16},
        vision_config=tower | {"image_size": 8, "patch_size": 4},
    )
    siglip = SiglipModel(config).eval()
    siglip.logit_scale.data.fill_(LN(10))
    siglip.logit_bias.data.fill_(-10.0)
    ids = torch.randint(2, 49, (5, 6))
    output = siglip(input_ids=ids, pixel_values=torch.randn(5, 3, 8, 8), return_loss=True)
    pairs = torch.arange(5)
    ours = symmetric_contrastive_loss(output.image_embeds, output.text_embeds, 10.0, pairs, pairs, "sigmoid", -10.0)
    torch.testing.assert_close(ours, output.loss)
