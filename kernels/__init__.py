"""Kernel generators, one operator per file. Importing this registers their lowerings."""

from __future__ import annotations

from fxpress.kernels.source import KernelSource
from fxpress.kernels.sparse_attention import AttentionKernel
from fxpress.kernels.vvma_linear import VvmaKernel
from fxpress.ops.mask_layout import MaskLayout, compile_mask
from fxpress.ops.sparse_attention import sparse_attention
from fxpress.ops.vvma_linear import vvma_linear

__all__ = [
    "AttentionKernel",
    "KernelSource",
    "MaskLayout",
    "VvmaKernel",
    "compile_mask",
    "sparse_attention",
    "vvma_linear",
]
