"""Which text is meant by a query? Search, as sentence encoders are scored (Thakur et al. 2021)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["bm25", "ranks"]

K1, B = 1.2, 0.75  # of BM25: how soon counts saturate, how much long texts lose


def ranks(similarity: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Recall at 1 and mean reciprocal rank, where query i means text i.

    Args:
        similarity: of each query to each text, (n, n).
        texts: n of them; one that is the same as the text that is meant is as good.
    """
    same = torch.tensor([[a == b for b in texts] for a in texts])
    best = similarity.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
    rank = 1 + (similarity > best).sum(1).double()
    return {
        "recall_at_1": (rank == 1).double().mean().item(),
        "mean_reciprocal_rank": (1 / rank).mean().item(),
    }


def bm25(queries: Sequence[str], texts: Sequence[str]) -> Tensor:
    """How well the words of each query suit each text, (m, n) (Robertson and Zaragoza 2009)."""
    found = [_words(text) for text in texts]
    number = {word: i for i, word in enumerate(sorted(set().union(*found)))}
    counts = _table(found, number)
    seen, length = (counts > 0).sum(0), counts.sum(1, keepdim=True)
    idf = (1 + (len(texts) - seen + 0.5) / (seen + 0.5)).log()
    worn = counts + K1 * (1 - B + B * length / length.mean())
    return _table([_words(query) for query in queries], number) @ (idf * (K1 + 1) * counts / worn).T


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _table(found: Sequence[Counter[str]], number: dict[str, int]) -> Tensor:
    """How often each known word stands in each text, (n, words)."""
    return torch.tensor([[float(words[word]) for word in number] for words in found])
