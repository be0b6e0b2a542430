"""FLOP formulas of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

A module of its own: PyTorch's counter imports Triton, which importing fxpress must not. Import this
one before counting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import fxpress.ops.sparse_attention  # noqa: F401 - defines the operators
from fxpress.ops.mask_layout import LayoutSpec

__all__ = ["sparse_attention", "sparse_attention_backward"]


def sparse_attention(q: Any, _k: Any, v: Any, _layout: Any, spec: str, *_: Any, **_out: Any) -> int:
    """Two per multiply-add of every cell computed: scores over D, sums over Dv."""
    return 2 * int(q[0]) * LayoutSpec.parse(spec).computed * int(q[-1] + v[-1])


def sparse_attention_backward(
    _grad: Any, q: Any, _k: Any, v: Any, _layout: Any, spec: str, *_: Any, **_out: Any
) -> int:
    """Recomputed scores, dq and dk over D; dv and the gradient of the weights over Dv."""
    return 2 * int(q[0]) * LayoutSpec.parse(spec).computed * int(3 * q[-1] + 2 * v[-1])


for _formula in (sparse_attention, sparse_attention_backward):
    register_flop_formula(getattr(torch.ops.fxpress, _formula.__name__))(_formula)
