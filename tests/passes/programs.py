"""Random small models for the laws that every pass keeps: `programs()` is the strategy.

A model is a stack of layers on a sequence (B, T, E), each drawn with its spelling: attention by
operator or written out, products with a weight in every form, norms, convolutions, residuals.
What was drawn is plain data, so that a counterexample can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Drawn", "programs"]

B, T, E, H, VOCABULARY = 2, 5, 8, 2, 11
D = E // H

ATTENTION = ("operator", "matmul", "einsum", "merged", "baddbmm", "module", "weights returned")
MASKS = ("none", "causal by fill", "causal by where", "causal by sum", "padding", "both")
SCALES = ("product", "quotient", "query", "key")
LINEAR = ("module", "matmul", "addmm", "einsum", "convolution", "transposed")
RECURRENT = ("loop", "loop back", "cells")
OTHER = ("layer norm", "rms norm", "gelu", "silu gate", "wide convolution", "dropout", "experts")


@dataclass(frozen=True)
class Layer:
    """One layer: what it is, how it is spelled, and whether its input is added to its output."""

    kind: str
    spelling: str
    mask: str = "none"
    scale: str = "product"
    residual: bool = False


@dataclass(frozen=True)
class Drawn:
    """A drawn model: its layers, and whether its head is tied to its embedding."""

    layers: tuple[Layer, ...]
    tied_head: bool
    seed: int

    def build(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """The model in eval mode, and the tokens (B, T) and kept positions (B, T) of a call."""
        torch.manual_seed(self.seed)
        model = Model(self).eval()
        kept = torch.ones(B, T, dtype=torch.bool)
        kept[1, T - 2 :] = False  # the first key is never padding: no row is left without keys
        return model, (torch.randint(VOCABULARY, (B, T)), kept)


def programs() -> st.SearchStrategy[Drawn]:
    """Small random models."""
    attention = st.builds(
        Layer,
        st.just("attention"),
        st.sampled_from(ATTENTION),
        st.sampled_from(MASKS),
        st.sampled_from(SCALES),
        st.booleans(),
    )
    linear = st.builds(Layer, st.just("linear"), st.sampled_from(LINEAR), residual=st.booleans())
    other = st.builds(Layer, st.just("other"), st.sampled_from(OTHER), residual=st.booleans())
    recurrent = st.builds(
        Layer, st.just("recurrent"), st.sampled_from(RECURRENT), residual=st.booleans()
    )
    layers = st.lists(attention | linear | recurrent | other, min_size=1, max_size=3).map(tuple)
    return st.builds(Drawn, layers, st.booleans(), st.integers(0, 7))


class Model(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn = drawn
        self.embedding = nn.Embedding(VOCABULARY, E)
        self.layers = nn.ModuleList(_LAYERS[layer.kind](layer) for layer in drawn.layers)
        self.head = nn.Linear(E, VOCABULARY)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for layer, module in zip(self.drawn.layers, self.layers, strict=True):
            y = module(x, kept)
            x = x + y if layer.residual else y
        logits: Tensor = x @ self.embedding.weight.t() if self.drawn.tied_head else self.head(x)
        return logits


# Products with a weight --------------------------------------------------------------------------


class Linear(nn.Module):
    """A map of the last axis, in one of many spellings."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.spelling = layer.spelling
        self.weight = nn.Parameter(torch.randn(E, E) / math.sqrt(E))
        self.bias = nn.Parameter(torch.randn(E))

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return _LINEAR[self.spelling](x, self.weight, self.bias)


_LINEAR: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "module": F.linear,
    "matmul": lambda x, w, b: x @ w + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, E), w).view(x.shape),
    "einsum": lambda x, w, b: torch.einsum("btn,nm->btm", x, w) + b,
    "convolution": lambda x, w, b: F.conv1d(x.transpose(1, 2), w[..., None], b).transpose(1, 2),
    "transposed": lambda x, w, b: F.linear(x, w.t(), b),
}


# Attention ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention, in one of many spellings."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        if layer.spelling == "module":
            self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        else:
            self.project = nn.Linear(E, 3 * E)
            self.out = nn.Linear(E, E)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        if self.layer.spelling == "module":
            return self._torch(x, kept)
        q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        context = _ATTENTION[self.layer.spelling](q, k, v, kept, self.layer)
        out: Tensor = self.out(context.transpose(1, 2).reshape(B, T, E))
        return out

    def _torch(self, x: Tensor, kept: Tensor) -> Tensor:
        causal = torch.ones(T, T, dtype=torch.bool).triu(1) if "causal" in self.layer.mask else None
        padding = ~kept if self.layer.mask in ("padding", "both") else None
        out: Tensor
        out, _ = self.attention(x, x, x, attn_mask=causal, key_padding_mask=padding)
        return out


def _causal() -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def _masked(scores: Tensor, kept: Tensor, mask: str) -> Tensor:
    """Scores (B, H, T, T) under a mask."""
    if mask == "causal by fill":
        return scores.masked_fill(~_causal(), -math.inf)
    if mask == "causal by where":
        return torch.where(_causal(), scores, torch.finfo(scores.dtype).min)
    if mask == "causal by sum":
        return scores + torch.full((T, T), -math.inf, dtype=scores.dtype).triu(1)
    if mask in ("padding", "both"):
        scores = scores.masked_fill(~kept[:, None, None], -math.inf)
    return scores.masked_fill(~_causal(), -math.inf) if mask == "both" else scores


def _bool_mask(kept: Tensor, mask: str) -> Tensor | None:
    """The same masks for the operator: True is kept."""
    padding = kept[:, None, None]
    if mask == "none":
        return None
    if mask == "padding":
        return padding
    return _causal() & padding if mask == "both" else _causal()


def _scaled(
    q: Tensor, k: Tensor, layer: Layer
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Queries, keys, and what is done to their product, so that it is divided by sqrt(D)."""
    root = math.sqrt(D)
    if layer.scale == "query":
        return q / root, k, lambda scores: scores
    if layer.scale == "key":
        return q, k * root**-1, lambda scores: scores
    if layer.scale == "quotient":
        return q, k, lambda scores: scores / root
    return q, k, lambda scores: scores * root**-1


def _operator(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, layer: Layer) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, _bool_mask(kept, layer.mask))


def _matmul(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, layer: Layer) -> Tensor:
    q, k, scale = _scaled(q, k, layer)
    scores = _masked(scale(q @ k.transpose(-1, -2)), kept, layer.mask)
    return F.dropout(scores.float().softmax(-1).to(q.dtype), 0.1, training=False) @ v


def _einsum(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, layer: Layer) -> Tensor:
    q, k, scale = _scaled(q, k, layer)
    scores = scale(torch.einsum("bhqd,bhkd->bhqk", q, k))
    weights = _masked(scores, kept, layer.mask).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def _merged(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, layer: Layer) -> Tensor:
    """Heads merged into the batch."""
    q, k, scale = _scaled(q, k, layer)
    q, k, v = (part.reshape(B * H, T, D) for part in (q, k, v))
    scores = scale(torch.bmm(q, k.transpose(1, 2))).view(B, H, T, T)
    weights = _masked(scores, kept, layer.mask).softmax(-1).view(B * H, T, T)
    return torch.bmm(weights, v).view(B, H, T, D)


def _baddbmm(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, layer: Layer) -> Tensor:
    """Scores and mask in one operation."""
    zeros = q.new_zeros(B, H, T, T)
    mask = _masked(zeros, kept, layer.mask).view(B * H, T, T)
    q, k, v = (part.reshape(B * H, T, D) for part in (q, k, v))
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)


def _returned(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, layer: Layer) -> Tensor:
    """The weights are used for more than the product with v."""
    q, k, scale = _scaled(q, k, layer)
    weights = _masked(scale(q @ k.transpose(-1, -2)), kept, layer.mask).softmax(-1)
    return weights @ v + weights.mean(-1, keepdim=True)


_ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Layer], Tensor]] = {
    "operator": _operator,
    "matmul": _matmul,
    "einsum": _einsum,
    "merged": _merged,
    "baddbmm": _baddbmm,
    "weights returned": _returned,
}


# Loops over time ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrence in a loop of Python, written out or by a cell of torch."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.spelling = layer.spelling
        self.cell = nn.GRUCell(E, E)
        self.of_input, self.of_state = nn.Linear(E, E), nn.Linear(E, E, bias=False)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        h, outputs = x.new_zeros(len(x), E), [x[:, 0]] * T
        for t in range(T)[:: -1 if self.spelling == "loop back" else 1]:
            if self.spelling == "cells":
                h = self.cell(x[:, t], h)
            else:
                h = torch.tanh(self.of_input(x[:, t]) + self.of_state(h))
            outputs[t] = h
        return torch.stack(outputs, 1)


# What stands between -----------------------------------------------------------------------------


class Other(nn.Module):
    """A layer that no pass rewrites, or only a part of it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.spelling = layer.spelling
        self.norm = nn.LayerNorm(E)
        self.gate = nn.Linear(E, E)
        self.convolution = nn.Conv1d(E, E, 3, padding=1)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        y: Tensor = getattr(self, "_" + self.spelling.replace(" ", "_"))(x)
        return y

    def _layer_norm(self, x: Tensor) -> Any:
        return self.norm(x)

    def _rms_norm(self, x: Tensor) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.norm.weight

    def _gelu(self, x: Tensor) -> Any:
        return F.gelu(self.gate(x))

    def _silu_gate(self, x: Tensor) -> Any:
        return x * F.silu(self.gate(x))

    def _wide_convolution(self, x: Tensor) -> Any:
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)

    def _dropout(self, x: Tensor) -> Any:
        return F.dropout(x, 0.5, training=self.training)

    def _experts(self, x: Tensor) -> Any:
        """A softmax that is no attention."""
        weights = self.gate(x).softmax(-1)
        return torch.einsum("bte,ef->btf", weights, self.gate.weight)


_LAYERS: dict[str, Callable[[Layer], nn.Module]] = {
    "attention": Attention,
    "linear": Linear,
    "recurrent": Recurrent,
    "other": Other,
}
