"""Recall by the length of the caption."""

import torch

from modeling_miniclip.evaluation.by_length import group_edges, length_table, recall_by_length


def test_groups_have_similar_sizes_and_no_length_twice() -> None:
    lengths = torch.tensor([3] * 50 + [4] * 10 + [5] * 20 + [9] * 20)
    assert group_edges(lengths) == [(3, 3), (4, 4), (5, 8), (9, 9)] or group_edges(lengths) == [(3, 3), (4, 4), (5, 9)]
    assert group_edges(torch.arange(1, 101)) == [(1, 25), (26, 50), (51, 75), (76, 100)]
    assert group_edges(torch.tensor([7] * 30)) == [(7, 7)] and group_edges(torch.tensor([2, 8])) == [(2, 8)]


def test_recall_of_each_length_worked_by_hand() -> None:
    # 40 short captions, all found first; 40 long ones of the same images, found first, sixth or later
    texts = ["a red dog"] * 40 + ["a red dog that runs on the beach"] * 40
    rank = torch.tensor([1] * 40 + [1] * 10 + [6] * 10 + [30] * 20)
    found = recall_by_length(texts, rank, torch.arange(40).repeat(2), (1, 5, 10))
    assert found["unit"] == "words"
    short, long = found["groups"]
    assert (short["from"], short["to"], short["texts"]) == (3, 7, 40) and (long["from"], long["to"]) == (8, 8)
    assert short["metrics"] == {"R@1": 100.0, "R@5": 100.0, "R@10": 100.0} and short["intervals"]["R@1"] == (100, 100)
    assert long["metrics"] == {"R@1": 25.0, "R@5": 25.0, "R@10": 50.0}
    low, high = long["intervals"]["R@1"]  # binomial: 25 +- 1.96 * 6.8
    assert 10 <= low <= 15 and 36 <= high <= 42
    head, rows = length_table({"model": "m", "by_caption_length": found})
    assert head == ["words per caption", "captions", "R@1", "R@5", "R@10"]
    assert rows[0][:3] == ["3 to 7", "40", "100.0 [100.0, 100.0]"] and rows[1][0] == "8"
    both = {"model": "m", "baseline": "b", "by_caption_length": found, "baseline_by_caption_length": found}
    assert length_table(both)[0][2:] == ["m R@1", "m R@5", "m R@10", "b R@1", "b R@5", "b R@10"]


def test_captions_without_spaces_are_counted_in_characters() -> None:
    found = recall_by_length(["一只红色的狗", "两只狗"], torch.tensor([1, 2]), torch.arange(2), (1,))
    assert (found["unit"], found["groups"][0]["from"], found["groups"][0]["to"]) == ("characters", 3, 6)
