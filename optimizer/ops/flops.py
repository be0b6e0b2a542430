"""FLOP formulas of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

A module of its own: PyTorch's counter imports Triton, which importing fxpress must not. Import this
one before counting.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import fxpress.ops.low_rank_linear
import fxpress.ops.sparse_attention
import fxpress.ops.vvma_linear  # noqa: F401 - these define the operators
from fxpress.ops.mask_layout import LayoutSpec

__all__ = [
    "low_rank_linear",
    "low_rank_linear_backward",
    "sparse_attention",
    "sparse_attention_backward",
    "vvma_linear",
    "vvma_linear_backward",
]


def sparse_attention(q: Any, _k: Any, v: Any, _layout: Any, spec: str, *_: Any, **_out: Any) -> int:
    """Two per multiply-add of every cell computed: scores over D, sums over Dv."""
    return 2 * int(q[0]) * LayoutSpec.parse(spec).computed * int(q[-1] + v[-1])


def sparse_attention_backward(
    _grad: Any, q: Any, _k: Any, v: Any, _layout: Any, spec: str, *_: Any, **_out: Any
) -> int:
    """Recomputed scores, dq and dk over D; dv and the gradient of the weights over Dv."""
    return 2 * int(q[0]) * LayoutSpec.parse(spec).computed * int(3 * q[-1] + 2 * v[-1])


def _rows(x: Any) -> int:
    return int(prod(x[:-1]))


def vvma_linear(x: Any, _core: Any, vectors: Any, *_: Any, **_out: Any) -> int:
    """Two per multiply-add, for each row: of every vector, and of a core per term and piece."""
    terms, p, q, block = (int(size) for size in vectors)
    return 2 * _rows(x) * terms * p * block * (q + block)


def vvma_linear_backward(
    _grad: Any, x: Any, _core: Any, vectors: Any, _bias: Any, activation: Any, *_: Any, **_out: Any
) -> int:
    """Both stages for both of their factors; sums again, and products where an activation asks."""
    terms, p, q, block = (int(size) for size in vectors)
    sums, products = 3 * q, (2 if activation is None else 3) * block
    return 2 * _rows(x) * terms * p * block * (sums + products)


def low_rank_linear(x: Any, down: Any, up: Any, *_: Any, **_out: Any) -> int:
    """Two per multiply-add of both products."""
    return 2 * _rows(x) * int(down[0]) * int(down[1] + up[0])


def low_rank_linear_backward(
    _grad: Any, x: Any, down: Any, up: Any, _bias: Any, activation: Any, *_: Any, **_out: Any
) -> int:
    """Both products for both of their factors; the first again, the second for an activation."""
    (rank, n), m = down, up[0]
    return 2 * _rows(x) * int(rank) * int(3 * n + (2 if activation is None else 3) * m)


for _formula in (
    sparse_attention,
    sparse_attention_backward,
    vvma_linear,
    vvma_linear_backward,
    low_rank_linear,
    low_rank_linear_backward,
):
    register_flop_formula(getattr(torch.ops.fxpress, _formula.__name__))(_formula)
