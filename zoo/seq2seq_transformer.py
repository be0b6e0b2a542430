"""An encoder-decoder Transformer (Vaswani et al. 2017), in pre-norm form (Xiong et al. 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo.decoding import State
from fxpress.zoo.pretrained import no_pretrained
from fxpress.zoo.registry import model
from fxpress.zoo.tokenization import END, PAD, START
from fxpress.zoo.translation import sentences

__all__ = ["TransformerSeq2Seq", "sinusoids"]

Cache = tuple[Tensor, Tensor]  # keys and values, (B, H, N, D)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Encodings (..., width) of positions (...): all sines, then all cosines; no longest one."""
    half = width // 2
    rate = torch.exp(torch.arange(half, device=positions.device) * (-math.log(1e4) / (half - 1)))
    angle = positions[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1)


class TransformerSeq2Seq(nn.Module):
    """Source and target tokens to logits; source, target and output share their embedding.

    Args:
        vocabulary: V.
        width: d, a multiple of `heads`, even.
        heads: attention heads H.
        encoder_layers: blocks of the encoder.
        decoder_layers: blocks of the decoder.
        inner: width of the feed-forwards.
        dropout: in training, of embeddings and of what each block adds.

    Raises:
        ValueError: `width` is no multiple of `heads`.
    """

    start, end = START, END

    def __init__(
        self,
        vocabulary: int = 4096,
        width: int = 128,
        heads: int = 4,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        inner: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # it is the output's matrix too
        sizes = width, heads, inner, dropout
        self.encoder = nn.ModuleList(EncoderBlock(*sizes) for _ in range(encoder_layers))
        # Any: a list of modules says nothing of their methods.
        self.decoder: Any = nn.ModuleList(DecoderBlock(*sizes) for _ in range(decoder_layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `target` (B, T).

        Args:
            source: (B, N), each row its tokens, `END`, and `PAD` to the right.
            target: `START`, then tokens; what stands to the right of a row's end is not read by
                what stands before it.
        """
        memory, real = self._memory(source)
        x = self._embedded(target, 0)
        for block in self.decoder:
            x, _ = block(x, block.cross_attention.keys_values(memory), real)
        return self._logits(x)

    def encode(self, source: Tensor) -> State:
        """The state before the first step.

        Returns:
            Which source tokens are real, (B, 1, 1, N), and of each block the keys and values of the
            source (B, H, N, D) and those of the target so far (B, H, t, D): none.
        """
        memory, real = self._memory(source)
        state = [real]
        for block in self.decoder:
            k, v = block.cross_attention.keys_values(memory)
            state += [k, v, k[:, :, :0], v[:, :, :0]]
        return tuple(state)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, V) of what follows `tokens` (B,), and the state with them."""
        real, *caches = state
        x = self._embedded(tokens[:, None], caches[2].shape[2])
        after = [real]
        for index, block in enumerate(self.decoder):
            k, v, past_k, past_v = caches[4 * index : 4 * index + 4]
            x, past = block(x, (k, v), real, (past_k, past_v))
            after += [k, v, *past]
        return self._logits(x)[:, 0], tuple(after)

    def _memory(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """States of the source (B, N, d), and which of them are real, (B, 1, 1, N)."""
        real = (source != PAD)[:, None, None]
        x = self._embedded(source, 0)
        for block in self.encoder:
            x = block(x, real)
        return self.encoder_norm(x), real

    def _embedded(self, ids: Tensor, first: int) -> Tensor:
        """Embeddings of tokens (B, N), the first of which stands at position `first`."""
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        x = self.embedding(ids) * math.sqrt(self.width)
        embedded: Tensor = self.dropout(x + sinusoids(positions, self.width).to(x.dtype))
        return embedded

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.decoder_norm(x), self.embedding.weight)


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward, each on normalized input, each added to x."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, inner)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """States (B, N, d) to states; `real` (B, 1, 1, N) says which may be looked at."""
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, self.attention.keys_values(y), real))
        fed: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x + fed


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the source, a feed-forward."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.cross_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.self_attention, self.cross_attention = Attention(width, heads), Attention(width, heads)
        self.feed_forward = FeedForward(width, inner)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, source: Cache, real: Tensor, past: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """All of the target at once, or one step after `past`.

        Args:
            x: states (B, T, d); of one token with `past`.
            source: keys and values of the source.
            real: which of them may be looked at, (B, 1, 1, N).
            past: keys and values of the tokens before.

        Returns:
            States, and the keys and values of the target up to here.
        """
        y = self.self_norm(x)
        keys_values = self.self_attention.keys_values(y)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past, keys_values, strict=True))
            keys_values = k, v
        x = x + self.dropout(self.self_attention(y, keys_values, is_causal=past is None))
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), source, real))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x, keys_values


class Attention(nn.Module):
    """Multi-head attention from x to keys and values made elsewhere."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def keys_values(self, x: Tensor) -> Cache:
        """Of states (B, N, d): keys and values (B, H, N, D)."""
        return self._split(self.k(x)), self._split(self.v(x))

    def forward(
        self, x: Tensor, keys_values: Cache, real: Tensor | None = None, *, is_causal: bool = False
    ) -> Tensor:
        """States (B, T, d) to states; `real` (B, 1, 1, N) says which keys may be looked at."""
        k, v = keys_values
        y = F.scaled_dot_product_attention(
            self._split(self.q(x)), k, v, attn_mask=real, is_causal=is_causal
        )
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear maps with a ReLU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """States (B, N, d) to states."""
        y: Tensor = self.down(F.relu(self.up(x)))
        return y


@model(
    "transformer-seq2seq",
    description="an encoder-decoder Transformer for translation, untrained",
    license="none",
    source="Vaswani et al. 2017, arXiv 1706.03762",
    calibration=sentences,
    has_weights=False,
)
def transformer_seq2seq(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`TransformerSeq2Seq(**kwargs)`."""
    if pretrained:
        raise no_pretrained("transformer-seq2seq")
    return TransformerSeq2Seq(**kwargs).eval()
