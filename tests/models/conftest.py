"""The masked reference of transformers' models: their own code, with dense attention under masks.

It shares nothing with the compiler: no captured graph, no site, no layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Softmax over what the module's static mask and the run-time mask both keep."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    kept = module.get_buffer("static_mask")[:, : query.shape[2], : key.shape[2]]
    if attention_mask is not None:
        assert attention_mask.dtype is torch.bool
        kept = kept & attention_mask
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def masked() -> Callable[[Any, Mapping[str, Tensor]], Any]:
    """Copy a model of transformers; the copy's attention runs under masks (H, Nq, Nk) by path."""

    def copied(model: Any, masks: Mapping[str, Tensor]) -> Any:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register("masked", masked_attention)
        AttentionMaskInterface.register("masked", AttentionMaskInterface()["sdpa"])
        reference = copy.deepcopy(model)
        reference.set_attn_implementation("masked")
        for path, mask in masks.items():
            reference.get_submodule(path).register_buffer("static_mask", mask, persistent=False)
        return reference

    return copied
