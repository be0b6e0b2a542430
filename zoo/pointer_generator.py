"""The pointer-generator network (See et al. 2017, arXiv 1704.04368), of LSTM or of RUM.

Each word of a summary is said or copied: with probability p it is taken from the vocabulary, else
from the source, where attention points.

    e_ti = v·tanh(W_h h_i + W_s s_t + b),   a_t = softmax(e_t),   c_t = Σ_i a_ti h_i
    p_t  = σ(w_c·c_t + w_s·s_t + w_x·x_t + b_p)
    P(w) = p_t P_vocabulary(w) + (1 - p_t) Σ_(i: w_i = w) a_ti

Unlike theirs, words are pieces of words, so that none is unknown and to copy one needs no place
beyond the vocabulary; the decoder does not read the attention of the step before, so that all its
steps are one recurrent layer; and there is no coverage. RUM in place of LSTM as in Dangovski et al.
2019, who try it in the encoder, the decoder, and both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo.decoding import State
from fxpress.zoo.lm import dropped
from fxpress.zoo.pretrained import no_pretrained
from fxpress.zoo.recurrent import LSTM
from fxpress.zoo.registry import model
from fxpress.zoo.rum import RUM
from fxpress.zoo.seq2seq_lstm import BothDirections
from fxpress.zoo.summaries import descriptions
from fxpress.zoo.tokenization import END, PAD, START

__all__ = ["PointerGenerator"]

LAYERS: dict[str, Callable[..., nn.Module]] = {"lstm": LSTM, "rum": RUM}
PARTS = {"lstm": 2, "rum": 1}  # tensors of a state


class PointerGenerator(nn.Module):
    """Source and target tokens to log-probabilities; all share one embedding.

    Args:
        vocabulary: V.
        width: d, even: half of a source state comes from each direction.
        encoder: "lstm" or "rum".
        decoder: "lstm" or "rum".
        dropout: in training, of embeddings, source states, and of what the output reads.

    Raises:
        ValueError: a layer is unknown, or `width` is odd.
    """

    start, end = START, END

    def __init__(
        self,
        vocabulary: int = 4096,
        width: int = 128,
        encoder: str = "lstm",
        decoder: str = "lstm",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if unknown := {encoder, decoder} - LAYERS.keys():
            raise ValueError(f"the layer is {unknown.pop()!r}: give one of {', '.join(LAYERS)}")
        if width % 2:
            raise ValueError(f"width {width} is odd")
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # it is the output's matrix too
        self.encoder = BothDirections(width, LAYERS[encoder])
        self.parts = PARTS[decoder]
        self.bridge = nn.Linear(width, self.parts * width)
        self.decoder = LAYERS[decoder](width, width, batch_first=True)
        self.key, self.query = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.energy = nn.Linear(width, 1, bias=False)
        self.combine = nn.Linear(2 * width, width)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary))
        self.says = nn.Linear(3 * width, 1)
        self.dropout = dropped(dropout)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of the token after each of `target` (B, T).

        Args:
            source: (B, N), each row its tokens, `END`, and `PAD` to the right.
            target: `START`, then tokens; what stands to the right of a row's end is not read by
                what stands before it.
        """
        return self._read(target, self.encode(source))[0]

    def encode(self, source: Tensor) -> State:
        """The state before the first step.

        Returns:
            The source (B, N), its states and their keys (B, N, d), and the parts of the decoder's
            state (B, 1, d).
        """
        real = source != PAD
        states, last = self.encoder(self._embedded(source), real)
        states = self.dropout(states)
        parts = self.bridge(last).tanh()[:, None].chunk(self.parts, -1)
        return source, states, self.key(states), *parts

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Log-probabilities (B, V) of what follows `tokens` (B,), and the state after them."""
        said, state = self._read(tokens[:, None], state)
        return said[:, 0], state

    def _read(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Log-probabilities (B, T, V) after each of `tokens` (B, T), and the state after all."""
        source, states, keys, *parts = state
        x = self._embedded(tokens)
        y, after = self.decoder(x, tuple(part.transpose(0, 1).contiguous() for part in parts))
        weights = self._attention(y, keys, source != PAD)
        context = weights @ states
        p = self.says(torch.cat([context, y, x], -1)).sigmoid()
        said, copied = p * self._from_vocabulary(y, context), (1 - p) * weights
        mixed = said.scatter_add(-1, source[:, None].expand_as(copied), copied)
        log = mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()
        return log, (source, states, keys, *(part.transpose(0, 1) for part in after))

    def _attention(self, y: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """Weights (B, T, N) of decoder states (B, T, d) over the source."""
        energies = self.energy((self.query(y)[:, :, None] + keys[:, None]).tanh())[..., 0]
        weights: Tensor = energies.masked_fill(~real[:, None], -torch.inf).softmax(-1)
        return weights

    def _from_vocabulary(self, y: Tensor, context: Tensor) -> Tensor:
        """Probabilities (B, T, V) of words that are said."""
        found = self.dropout(self.combine(torch.cat([context, y], -1)))
        return F.linear(found, self.embedding.weight, self.output_bias).softmax(-1)

    def _embedded(self, ids: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.embedding(ids) * self.embedding.embedding_dim**0.5)
        return x


@model(
    "pointer-generator",
    description="a pointer-generator for summaries, of LSTM or of RUM, untrained",
    license="none",
    source="See et al. 2017, arXiv 1704.04368",
    calibration=descriptions,
    has_weights=False,
)
def pointer_generator(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`PointerGenerator(**kwargs)`."""
    if pretrained:
        raise no_pretrained("pointer-generator")
    return PointerGenerator(**kwargs).eval()
