"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860): attention that reaches beyond its segment.

Each layer remembers its inputs at the M positions before the segment. Positions are told by
distance alone, so that they mean the same in every segment:

    score(i, j) = ((q_i + u)·k_j + (q_i + w)·r_(i-j)) / sqrt(D),   r_t = W_r sinusoid(t)

The second term is computed for every query and every distance, and shifted into place. Each
position sees itself and the M positions before it (`same_length` in the authors' code, which they
evaluate with), so that a text gives the same however it is cut into segments. Unlike theirs, the
layers normalize what they read, and not what they give.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo.lm import BYTES, byte_windows, dropped
from fxpress.zoo.pretrained import no_pretrained
from fxpress.zoo.registry import model
from fxpress.zoo.samples import DATA, read_texts

__all__ = ["Memory", "Segment", "TransformerXL", "relative_shift"]

Memory = tuple[Tensor, ...]  # of each layer its inputs (B, m, d) at the m positions before
LONGEST = 10_000  # the base of the sinusoids' wavelengths (Vaswani et al. 2017)
SEGMENT, ROWS = 32, 4


class TransformerXL(nn.Module):
    """A language model that remembers earlier segments.

    Args:
        vocabulary: number of tokens V; their embedding is the matrix of the head too.
        width: d, a multiple of twice `heads`.
        layers: L; what is remembered of L layers reaches back L M positions.
        heads: attention heads H.
        memory: M, positions that each one sees before itself.
        dropout: probability, in training, of what each layer adds and of the embeddings.

    Raises:
        ValueError: `width` is no multiple of `heads`, or odd.
    """

    def __init__(
        self,
        vocabulary: int = BYTES,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        memory: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(f"width {width} is odd, or no multiple of {heads} heads")
        self.width, self.memory = width, memory
        self.tokens = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)  # it is the head's matrix too
        self.layers = nn.ModuleList(Layer(width, heads, memory, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = dropped(dropout)

    def forward(self, ids: Tensor, earlier: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) of the token after each of `ids` (B, N).

        `earlier` (B, E), the tokens before them, fills the memory; no gradient flows there.
        """
        memory = None
        if earlier is not None:
            with torch.no_grad():
                _, memory = self._states(earlier, None, len(self.layers) - 1)
        return self.advance(ids, memory)[0]

    def advance(self, ids: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """`forward`, given the memory of an earlier call (None: nothing before), and the next."""
        x, memory = self._states(ids, memory, len(self.layers))
        return F.linear(self.norm(x), self.tokens.weight), memory

    def _states(self, ids: Tensor, memory: Memory | None, depth: int) -> tuple[Tensor, Memory]:
        """The states (B, N, d) of that many layers, and the memory for the next segment."""
        x = self.dropout(self.tokens(ids) * self.width**0.5)
        remembered = []
        for index, layer in enumerate(self.layers):
            context = x if memory is None else torch.cat([memory[index], x], 1)
            remembered.append(context[:, -self.memory :].detach())
            if index < depth:  # what only fills the memory needs no last layer
                x = layer(x, context)
        return x, tuple(remembered)


class Segment(nn.Module):
    """A Transformer-XL as a module of one segment: its memory goes in and comes out."""

    def __init__(self, model: TransformerXL) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Logits (B, N, V) and the memory after `ids` (B, N)."""
        return self.model.advance(ids, memory)


class Layer(nn.Module):
    """Relative attention to the context and a feed-forward, each on normalized input."""

    def __init__(self, width: int, heads: int, memory: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = RelativeAttention(width, heads, memory)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropped(dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """States (B, N, d) to states; `context` (B, m + N, d) ends in x."""
        read = self.attention_norm(context)
        x = x + self.dropout(self.attention(read, x.shape[1]))
        fed: Tensor = self.dropout(self.down(F.gelu(self.up(self.feed_forward_norm(x)))))
        return x + fed


class RelativeAttention(nn.Module):
    """Attention of the last N positions of a context, scored by content and by distance."""

    def __init__(self, width: int, heads: int, memory: int) -> None:
        super().__init__()
        self.heads, self.memory = heads, memory
        self.q, self.k, self.v, self.r = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.out = nn.Linear(width, width)
        self.u, self.w = (nn.Parameter(torch.zeros(heads, 1, width // heads)) for _ in range(2))

    def forward(self, context: Tensor, n: int) -> Tensor:
        """What the last n of `context` (B, K, d) find there: (B, n, d)."""
        q = self._split(self.q(context[:, -n:]))
        k, v = self._split(self.k(context)), self._split(self.v(context))
        r = self._split(self.r(_sinusoids(context)))
        scores = (q + self.u) @ k.mT + relative_shift((q + self.w) @ r.mT)
        unseen = ~_band(n, k.shape[-2], self.memory, context.device)
        weights = (scores / q.shape[-1] ** 0.5).masked_fill(unseen, -torch.inf).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        """(..., N, d) to (..., H, N, D)."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        return heads


def _sinusoids(context: Tensor) -> Tensor:
    """Of the distances K-1, ..., 0 within `context` (B, K, d): (K, d), sines and then cosines."""
    distances = torch.arange(context.shape[1], device=context.device).flip(0).to(context.dtype)
    half = context.shape[-1] // 2
    steps = torch.arange(half, device=context.device).to(context.dtype) / half
    wavelengths = torch.exp(steps * math.log(LONGEST))
    angles = distances[:, None] / wavelengths
    return torch.cat([angles.sin(), angles.cos()], -1)


def relative_shift(x: Tensor) -> Tensor:
    """From distances to keys: the shift of Dai et al. 2019, appendix B.

    Args:
        x: (..., N, K), N at most K: column c is of the distance K - 1 - c, whatever the query.

    Returns:
        The same shape: column j of row i is of the distance from query K - N + i to key j. Keys
        after the query hold what belongs to no distance.
    """
    n, k = x.shape[-2:]
    padded = F.pad(x, (1, 0)).reshape(*x.shape[:-2], k + 1, n)
    return padded[..., 1:, :].reshape(x.shape)


def _band(n: int, keys: int, memory: int, device: torch.device) -> Tensor:
    """Which keys (n, K) the last n positions see: themselves and `memory` positions before."""
    distance = torch.arange(keys - n, keys, device=device)[:, None] - torch.arange(
        keys, device=device
    )
    return (distance >= 0) & (distance <= memory)


def _calibration(path: Path | None = None, limit: int = 32) -> list[Any]:
    """Batches of 4 segments of 32 bytes, and the 32 before them."""
    texts = read_texts(path or DATA / "austen" / "calibration.txt")
    windows = byte_windows(texts, 2 * SEGMENT, ROWS)[:limit]
    return [(w[:, -SEGMENT:], w[:, :-SEGMENT]) for w in windows]


@model(
    "transformer-xl",
    description="a Transformer-XL over bytes, untrained",
    license="none",
    source="Dai et al. 2019, arXiv 1901.02860",
    calibration=_calibration,
    has_weights=False,
)
def transformer_xl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`TransformerXL(**kwargs)`."""
    if pretrained:
        raise no_pretrained("transformer-xl")
    return TransformerXL(**kwargs).eval()
