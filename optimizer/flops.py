"""Multiply-adds of a call, with attention on CPU counted as it is on CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxpress.capture import Call

__all__ = ["multiply_adds"]


def multiply_adds(module: nn.Module, call: Call) -> int:
    """Multiply-adds of matrix products, convolutions and attention in one call of a module."""
    # torch's counter imports Triton, which importing fxpress must not.
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    import fxpress.ops.flops  # noqa: F401  (registers the formulas of our operators)

    def attention(q: Any, k: Any, v: Any, *_rest: Any, **_out: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    # The fused kernels of CUDA are counted by torch, that of the CPU is not.
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter, torch.no_grad():
        module(*call[0], **call[1])
    return int(counter.get_total_flops()) // 2
