"""Classifiers of texts from scratch: a Transformer encoder, and a bag of words beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxpress.zoo.lm import BYTES, byte_windows
from fxpress.zoo.minilm import embed
from fxpress.zoo.pretrained import no_pretrained
from fxpress.zoo.registry import model
from fxpress.zoo.samples import DATA, read_texts
from fxpress.zoo.seq2seq_transformer import EncoderBlock

__all__ = ["BagClassifier", "EncoderClassifier", "bytes_of_texts"]

CONTEXT = 128  # tokens


class EncoderClassifier(nn.Module):
    """A pre-norm Transformer encoder (Vaswani et al. 2017), the mean of its states, a linear head.

    Args:
        vocabulary: number of tokens V.
        classes: C.
        width: d, a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads.
        context: most positions; they are learned.
        dropout: in training, of embeddings, of what a block adds, and of the mean.

    Raises:
        ValueError: `width` is no multiple of `heads`.
    """

    def __init__(
        self,
        vocabulary: int = BYTES,
        classes: int = 2,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        context: int = CONTEXT,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, heads, 4 * width, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, C) of texts.

        Args:
            ids: tokens (B, N), N at most `context`.
            mask: (B, N), 1 for a token and 0 for padding.
        """
        x = self.dropout(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        real = mask.bool()[:, None, None]
        for block in self.blocks:
            x = block(x, real)
        logits: Tensor = self.head(self.dropout(embed(self.norm(x), mask)))
        return logits


class BagClassifier(nn.Module):
    """The mean of the embeddings of a text, and a linear head (Joulin et al. 2017, fastText).

    Args:
        vocabulary: number of tokens V.
        classes: C.
        width: d.
    """

    def __init__(self, vocabulary: int = BYTES, classes: int = 2, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        # Small, so that tokens hardly seen in training add hardly anything to a mean.
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, C) of texts: tokens (B, N), and a mask (B, N), 1 for each of them."""
        logits: Tensor = self.head(embed(self.tokens(ids), mask))
        return logits


def bytes_of_texts(path: Path | None = None, limit: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Batches of 4 windows of bytes, and their masks."""
    texts = read_texts(path or DATA / "austen" / "calibration.txt")
    return [(ids, torch.ones_like(ids)) for ids in byte_windows(texts, CONTEXT)[:limit]]


@model(
    "text-encoder",
    description="a Transformer encoder that classifies texts, untrained",
    license="none",
    source="Vaswani et al. 2017, arXiv 1706.03762",
    calibration=bytes_of_texts,
    has_weights=False,
)
def text_encoder(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`EncoderClassifier(**kwargs)`."""
    if pretrained:
        raise no_pretrained("text-encoder")
    return EncoderClassifier(**kwargs).eval()


@model(
    "text-bag",
    description="a classifier of the mean of a text's embeddings, untrained",
    license="none",
    source="Joulin et al. 2017, arXiv 1607.01759",
    calibration=bytes_of_texts,
    has_weights=False,
)
def text_bag(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`BagClassifier(**kwargs)`."""
    if pretrained:
        raise no_pretrained("text-bag")
    return BagClassifier(**kwargs).eval()
