"""The generated attention kernel, run on CPU by Triton's interpreter (fp32 and fp16)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress.kernels.sparse_attention import AttentionKernel, emit, launch
from fxpress.ops import AttentionSite, compile_mask, reference
from fxpress.ops.attention_samples import attention_samples
from fxpress.testing import assert_equivalent

DTYPES = [torch.float32, torch.float16]
# The kernel declines these: a scale that is not positive, and rows that do not start at 0.
DECLINED = ("negative scale", "cache")
NAMES = [s.name for s in attention_samples(torch.float32, "cpu") if s.name not in DECLINED]


def interpreted(tile: tuple[int, int]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
        layout = compile_mask(mask, tile, device="cpu", form="tiles")
        scale = options.pop("scale", q.shape[-1] ** -0.5)
        site = AttentionSite.of(q, k, v, layout.facts, scale=scale, **options)
        kernel = AttentionKernel.of(site)
        module = emit(kernel).load()
        attn_mask = options.get("attn_mask")
        tensors = list(layout.tensors)
        return launch(module.kernel, kernel, layout.facts, (q, k, v), tensors, attn_mask, scale)

    return call


def test_this_process_interprets() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    (s,) = (s for s in attention_samples(dtype, "cpu") if s.name == name)
    tile = (64, 64) if dtype == torch.float32 else (32, 32)
    assert_equivalent(interpreted(tile), reference, (s.q, s.k, s.v, s.mask), s.options)
