"""Decoding step by step: greedy, and by beam search, for any model that encodes and steps.

What a model remembers between two steps is passed in and out: a tuple of tensors, each with the
rows of the batch first, so that rows can be kept, dropped and repeated without knowing what they
hold. The source is part of it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["State", "Steps", "beam_search", "greedy"]

State = tuple[Tensor, ...]


class Steps(Protocol):
    """A model of sequences given sequences, a token at a time.

    Attributes:
        start: the token that the first step reads.
        end: the token that ends a sequence.
    """

    start: int
    end: int

    def encode(self, source: Tensor, /) -> State:
        """The state before the first step, of sources (B, N)."""
        ...

    def step(self, tokens: Tensor, state: State, /) -> tuple[Tensor, State]:
        """Logits (B, V) of what follows `tokens` (B,), and the state after them."""
        ...


@torch.no_grad()
def greedy(model: Steps, source: Tensor, limit: int) -> Tensor:
    """The likeliest token of each step.

    Args:
        model: in eval mode.
        source: (B, N), padded as the model wants it.
        limit: most tokens.

    Returns:
        Tokens (B, T), T at most `limit`; `end` fills the rows that have ended.
    """
    state = model.encode(source)
    token = source.new_full((len(source),), model.start)
    done = torch.zeros_like(token, dtype=torch.bool)
    said: list[Tensor] = []
    while len(said) < limit and not done.all():
        logits, state = model.step(token, state)
        token = logits.argmax(-1).masked_fill(done, model.end)
        done |= token == model.end
        said.append(token)
    return torch.stack(said, 1)


@torch.no_grad()
def beam_search(
    model: Steps, source: Tensor, limit: int, *, width: int = 4, alpha: float = 1.0
) -> Tensor:
    """The likeliest sequence found with `width` kept at every step.

    Sequences that have ended stay among the kept ones as they are. In the end log-probabilities are
    compared after division by length ** alpha (Wu et al. 2016 divide by a similar power).

    Args:
        model: in eval mode.
        source: (B, N), padded as the model wants it.
        limit: most tokens.
        width: K, sequences kept of a source; with one the search is `greedy`.
        alpha: 0 favours short sequences, 1 compares mean log-probabilities.

    Returns:
        Tokens (B, T), T at most `limit`; `end` fills the rows that have ended.
    """
    rows = len(source)
    first = torch.arange(rows, device=source.device)[:, None] * width  # of each source's K rows
    state = tuple(x.repeat_interleave(width, 0) for x in model.encode(source))
    said = source.new_full((rows * width, 1), model.start)
    done = torch.zeros(rows * width, dtype=torch.bool, device=source.device)
    scores = torch.full((rows, width), -torch.inf, device=source.device)
    scores[:, 0] = 0.0  # all K rows are the same yet
    lengths = torch.zeros_like(scores)
    while said.shape[1] <= limit and not done.all():
        logits, state = model.step(said[:, -1], state)
        scores, choice = _extended(logits, scores, done, model.end).topk(width)
        origin = (first + choice // logits.shape[-1]).flatten()
        token = (choice % logits.shape[-1]).flatten()
        lengths = (lengths.flatten() + ~done)[origin].view(rows, width)
        state = tuple(x.index_select(0, origin) for x in state)
        said = torch.cat([said[origin], token[:, None]], 1)
        done = done[origin] | (token == model.end)
    best = (scores / lengths**alpha).argmax(-1)
    return said[first[:, 0] + best, 1:]


def _extended(logits: Tensor, scores: Tensor, done: Tensor, end: int) -> Tensor:
    """Log-probabilities (B, K V) of the kept sequences (B, K), each with every token after it."""
    following = logits.log_softmax(-1)
    stay = torch.full_like(following[0], -torch.inf)
    stay[end] = 0.0
    following = torch.where(done[:, None], stay, following)
    return (scores[..., None] + following.view(*scores.shape, -1)).flatten(1)
