"""An LSTM encoder-decoder with attention (Luong et al. 2015, arXiv 1508.04025).

Global attention with the "general" score, on the states of a decoder that does not read the
attention of the step before (no input feeding), so that all its steps are one recurrent layer. The
encoder reads in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo.decoding import State
from fxpress.zoo.pretrained import no_pretrained
from fxpress.zoo.registry import model
from fxpress.zoo.tokenization import END, PAD, START
from fxpress.zoo.translation import sentences

__all__ = ["LSTMSeq2Seq"]


class LSTMSeq2Seq(nn.Module):
    """Source and target tokens to logits; source, target and output share their embedding.

    Args:
        vocabulary: V.
        width: d, even: half of a source state comes from each direction.
        layers: L, recurrent layers of the decoder, and pairs of them of the encoder.
        dropout: in training, of embeddings, between layers, and of what the output reads.
    """

    start, end = START, END

    def __init__(
        self, vocabulary: int = 4096, width: int = 128, layers: int = 1, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.layers = layers
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # it is the output's matrix too
        self.encoder = nn.ModuleList(BothDirections(width) for _ in range(layers))
        self.bridge = nn.Linear(width, 2 * layers * width)
        self.decoder = nn.LSTM(
            width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0
        )
        self.score = nn.Linear(width, width, bias=False)
        self.combine = nn.Linear(2 * width, width, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary))
        self.dropout = nn.Dropout(dropout)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `target` (B, T).

        Args:
            source: (B, N), each row its tokens, `END`, and `PAD` to the right.
            target: `START`, then tokens; what stands to the right of a row's end is not read by
                what stands before it.
        """
        memory, real, h, c = self.encode(source)
        y, _ = self.decoder(self._embedded(target), _layers_first(h, c))
        return self._logits(y, memory, real)

    def encode(self, source: Tensor) -> State:
        """The state before the first step.

        Returns:
            States of the source (B, N, d), which of them are real (B, N), and the state of the
            decoder: h and c (B, L, d).
        """
        real = source != PAD
        x = self._embedded(source)
        for layer in self.encoder:
            x, last = layer(x, real)
            x = self.dropout(x)
        h, c = self.bridge(last).tanh().unflatten(-1, (2, self.layers, -1)).unbind(1)
        return x, real, h, c

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, V) of what follows `tokens` (B,), and the state after them."""
        memory, real, h, c = state
        y, (h, c) = self.decoder(self._embedded(tokens[:, None]), _layers_first(h, c))
        after = memory, real, h.transpose(0, 1), c.transpose(0, 1)
        return self._logits(y, memory, real)[:, 0], after

    def _embedded(self, ids: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.embedding(ids) * self.embedding.embedding_dim**0.5)
        return x

    def _logits(self, y: Tensor, memory: Tensor, real: Tensor) -> Tensor:
        """Of decoder states (B, T, d): what they find in the source, and what that says."""
        scores = self.score(y) @ memory.transpose(1, 2)
        weights = scores.masked_fill(~real[:, None], -torch.inf).softmax(-1)
        found = self.combine(torch.cat([weights @ memory, y], -1)).tanh()
        # The embedding's rows are short: without the factor logits start small, and learning slow.
        scaled = self.dropout(found) * self.embedding.embedding_dim**0.5
        return F.linear(scaled, self.embedding.weight, self.output_bias)


class BothDirections(nn.Module):
    """Two recurrent layers over sequences of different lengths: from the left, from the right."""

    def __init__(self, width: int, layer: Callable[..., nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.forwards, self.backwards = (
            layer(width, width // 2, batch_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, N, d) of inputs (B, N, d), and what either has seen last (B, d).

        `real` (B, N) says where a sequence stands; it begins at the left. Each sequence is turned
        round on its own, so that neither direction reads padding before it.
        """
        turned = _turned(real)[..., None]
        left, _ = self.forwards(x)
        right, _ = self.backwards(x.gather(1, turned.expand_as(x)))
        last = real.sum(1)[:, None, None].expand(-1, 1, left.shape[-1]) - 1
        seen = torch.cat([left.gather(1, last), right.gather(1, last)], -1)[:, 0]
        return torch.cat([left, right.gather(1, turned.expand_as(right))], -1), seen


def _turned(real: Tensor) -> Tensor:
    """Of each step (B, N) the one that mirrors it in its sequence; padding stays in its place."""
    steps = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, real.sum(1, keepdim=True) - 1 - steps, steps)


def _layers_first(h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """A state (B, L, d) as torch's layers take it."""
    return h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()


@model(
    "lstm-seq2seq",
    description="an LSTM encoder-decoder with attention for translation, untrained",
    license="none",
    source="Luong et al. 2015, arXiv 1508.04025",
    calibration=sentences,
    has_weights=False,
)
def lstm_seq2seq(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`LSTMSeq2Seq(**kwargs)`."""
    if pretrained:
        raise no_pretrained("lstm-seq2seq")
    return LSTMSeq2Seq(**kwargs).eval()
