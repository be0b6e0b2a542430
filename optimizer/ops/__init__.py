"""Semantic operators: schema, reference, fake, autograd and FLOP formula of each."""

from __future__ import annotations

from fxpress.ops.mask_layout import LayoutSpec, MaskLayout, compile_mask
from fxpress.ops.sparse_attention import AttentionSite, reference, sparse_attention

__all__ = [
    "AttentionSite",
    "LayoutSpec",
    "MaskLayout",
    "compile_mask",
    "reference",
    "sparse_attention",
]
