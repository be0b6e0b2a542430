"""Search: ranks and BM25 by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fxpress.zoo import retrieval

TEXTS = ["a red fish", "a blue fish swims", "a bird"]


def test_ranks_by_hand() -> None:
    similarity = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 1, 2]])
    found = retrieval.ranks(similarity, TEXTS)
    assert found == pytest.approx(
        {"recall_at_1": 1 / 3, "mean_reciprocal_rank": (1 + 1 / 2 + 1 / 2) / 3}
    )


def test_a_copy_of_the_text_that_is_meant_is_as_good() -> None:
    found = retrieval.ranks(torch.tensor([[1.0, 2], [1, 2]]), ["the same", "the same"])
    assert found == {"recall_at_1": 1, "mean_reciprocal_rank": 1}


def test_bm25_by_hand() -> None:
    """Three texts of 3, 4 and 2 words; "red" is in one of them, "fish" in two."""
    found = retrieval.bm25(["Red FISH!", "unheard of"], TEXTS)
    red, fish = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    assert found[0, 0].item() == pytest.approx((red + fish) * 2.2 / (1 + 1.2))
    assert found[0, 1].item() == pytest.approx(fish * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 4 / 3)))
    assert found[0, 2].item() == 0
    assert found[1].tolist() == [0, 0, 0]
    assert found.argmax(1)[0] == 0
