"""Small language models over bytes: a decoder-only Transformer, and recurrent ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo import recurrent, rum
from fxpress.zoo.pretrained import no_pretrained
from fxpress.zoo.registry import Calibration, Entry, model
from fxpress.zoo.rum import State
from fxpress.zoo.samples import DATA, read_texts

__all__ = ["BYTES", "RecurrentLM", "TransformerLM", "byte_windows"]

BYTES = 256
CONTEXT, STEPS, ROWS = 256, 64, 4  # bytes of a window (Transformer, recurrent), windows of a batch

AttentionForm = Literal["sdpa", "math"]


class TransformerLM(nn.Module):
    """A decoder-only Transformer with pre-normalization (Radford et al. 2019, GPT-2's form).

    Args:
        vocabulary: number of tokens V.
        width: d, a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads.
        context: most positions; they are learned.
        attention: "sdpa" calls torch's fused attention, "math" spells it out.
        tied: the head's matrix is the tokens' embedding (Press and Wolf 2017).
        dropout: probability, in training, of what each layer adds and of the embeddings.

    Raises:
        ValueError: `width` is no multiple of `heads`, or `attention` is unknown.
    """

    def __init__(
        self,
        vocabulary: int = BYTES,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        context: int = CONTEXT,
        attention: AttentionForm = "sdpa",
        *,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, attention, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)
        self.dropout = dropped(dropout)
        self.scale = width**0.5
        if tied:  # unit logits and unit inputs (Vaswani et al. 2017), in which positions are small
            nn.init.normal_(self.tokens.weight, std=width**-0.5)
            nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, N, V) of the token after each of `ids` (B, N), N at most `context`."""
        tokens = self.tokens(ids)
        if self.head is None:
            tokens = tokens * self.scale
        x = self.dropout(tokens + self.positions.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return F.linear(x, self.tokens.weight if self.head is None else self.head.weight)


def dropped(probability: float) -> nn.Module:
    """Dropout, or nothing: a model that has none shows none."""
    return nn.Dropout(probability) if probability else nn.Identity()


class Block(nn.Module):
    """Causal self-attention and a feed-forward, each on normalized input, each added to x."""

    def __init__(
        self, width: int, heads: int, attention: AttentionForm, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropped(dropout)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, attention)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """States (B, N, d) to states."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        fed: Tensor = self.dropout(self.down(F.gelu(self.up(self.feed_forward_norm(x)))))
        return x + fed


class CausalAttention(nn.Module):
    """Multi-head attention of each position to itself and those before it."""

    def __init__(self, width: int, heads: int, attention: AttentionForm) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        if attention not in ATTENTION:
            raise ValueError(f"attention is {attention!r}: give one of {', '.join(ATTENTION)}")
        self.heads, self.attention = heads, attention
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """States (B, N, d) to states."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        y = ATTENTION[self.attention](q, k, v)
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    n = q.shape[-2]
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    weights: Tensor = scores.masked_fill(future, -torch.inf).softmax(-1)
    return weights @ v


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"sdpa": _sdpa, "math": _math}


class RecurrentLM(nn.Module):
    """Embedding, a recurrent layer, a linear head.

    Args:
        layer: called like `fxpress.zoo.RUM` with ``batch_first=True``, `width` wide inside and out.
        vocabulary: number of tokens V.
        width: d.
    """

    def __init__(self, layer: nn.Module, vocabulary: int = BYTES, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layer = layer
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `ids` (B, T)."""
        return self.advance(ids)[0]

    def advance(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`forward` from the state of an earlier call (None: from rest), and the last state."""
        y, state = self.layer(self.tokens(ids), state)
        logits: Tensor = self.head(y)
        return logits, state


def byte_windows(texts: list[str], length: int, rows: int = ROWS) -> list[Tensor]:
    """The texts' bytes in batches (rows, length) of int64: no overlap, the rest left out."""
    data = bytearray("\n".join(texts).encode())
    length = min(length, len(data))
    windows = torch.frombuffer(data, dtype=torch.uint8).long().unfold(0, length, length)
    return list(windows.split(rows))


def _calibration(length: int) -> Calibration:
    """Batches of 4 windows of so many bytes."""

    def read(path: Path | None = None, limit: int = 32) -> list[Tensor]:
        return byte_windows(read_texts(path or DATA / "austen" / "calibration.txt"), length)[:limit]

    return read


@model(
    "transformer-lm",
    description="a decoder-only Transformer over bytes, untrained",
    license="none",
    source="Radford et al. 2019",
    calibration=_calibration(CONTEXT),
    has_weights=False,
)
def transformer_lm(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`TransformerLM(**kwargs)`."""
    if pretrained:
        raise no_pretrained("transformer-lm")
    return TransformerLM(**kwargs).eval()


def _recurrent(name: str, layer_type: type[nn.Module], source: str) -> Entry:
    """The entry of a recurrent model: its layer's arguments, `vocabulary` and `width`."""

    def build(
        pretrained: bool = False, *, vocabulary: int = BYTES, width: int = 64, **kwargs: Any
    ) -> nn.Module:
        if pretrained:
            raise no_pretrained(name)
        layer = layer_type(width, width, batch_first=True, **kwargs)
        return RecurrentLM(layer, vocabulary, width).eval()

    offer = model(
        name,
        description=f"a recurrent language model over bytes ({layer_type.__name__}), untrained",
        license="none",
        source=source,
        calibration=_calibration(STEPS),
        has_weights=False,
    )
    return offer(build)


RUM_LM = _recurrent("rum-lm", rum.RUM, "Dangovski et al. 2019, arXiv 1710.09537")
LSTM_LM = _recurrent("lstm-lm", recurrent.LSTM, "Hochreiter and Schmidhuber 1997")
GRU_LM = _recurrent("gru-lm", recurrent.GRU, "Cho et al. 2014, arXiv 1406.1078")
RNN_LM = _recurrent("rnn-lm", recurrent.RNN, "Elman 1990")
