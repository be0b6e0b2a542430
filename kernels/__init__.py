"""Kernel generators, one operator per file. Importing this registers their lowerings."""

from __future__ import annotations

from fxpress.kernels.source import KernelSource
from fxpress.kernels.sparse_attention import AttentionKernel
from fxpress.ops.mask_layout import MaskLayout, compile_mask
from fxpress.ops.sparse_attention import sparse_attention

__all__ = ["AttentionKernel", "KernelSource", "MaskLayout", "compile_mask", "sparse_attention"]
