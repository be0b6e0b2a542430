"""Kernel generators, one operator per file."""

from __future__ import annotations

from fxpress.ops.mask_layout import MaskLayout, compile_mask
from fxpress.ops.sparse_attention import sparse_attention

__all__ = ["MaskLayout", "compile_mask", "sparse_attention"]
