"""Attention under masks, plainly: the reference, and a portable form with bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.ops.mask_layout import LayoutSpec, unpack_bits

__all__ = [
    "additive",
    "attend_backward",
    "either",
    "least",
    "masked",
    "masked_backward",
    "per_query_head",
    "reference",
    "split_mask",
    "sum_groups",
]

_ROWS = 2048  # query rows taken at a time


def least(dtype: torch.dtype) -> float:
    """Additive mask values at or below this drop the key; a score can be added without overflow."""
    return torch.finfo(dtype).min / 2


def either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Cells in one of two optional bool masks."""
    return b if a is None else a if b is None else a | b


def split_mask(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A run-time mask, bool (True = kept) or additive -> (dropped cells, additive bias)."""
    if attn_mask is None:
        return None, None
    if attn_mask.dtype == torch.bool:
        return ~attn_mask, None
    return attn_mask <= least(attn_mask.dtype), attn_mask


def additive(dropped: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One additive mask of both parts."""
    if dropped is None:
        return None if bias is None else bias.to(dtype)
    if bias is None:
        return dropped.to(dtype).mul_(least(dtype))
    return torch.where(dropped, least(dtype), bias.to(dtype))


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, N, D) -> (B, H, N, D): each key head once per query head that reads it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def sum_groups(grad: Tensor, key_heads: int) -> Tensor:
    """(B, H, N, D) -> (B, Hkv, N, D): the gradient of `per_query_head`."""
    return grad if grad.shape[1] == key_heads else grad.unflatten(1, (key_heads, -1)).sum(2)


def _after(rows: Tensor, keys: int) -> Tensor:
    """Cells that causality drops: key index > row index."""
    return torch.arange(keys, device=rows.device) > rows.unsqueeze(-1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
) -> Tensor:
    """Plain dense attention under a bool mask: the definition that the operator is held to.

    Args:
        q: (B, H, Nq, D).
        k: (B, Hkv, Nk, D), H a multiple of Hkv.
        v: (B, Hkv, Nk, Dv).
        mask: bool (H, rows, keys), True = kept; row q_offset + i is that of query i, and keys
            past Nk are not there yet.
        attn_mask: bool or additive, broadcastable to (B, H, Nq, Nk). Additive values at or below
            half the dtype's least number drop the key, as -inf does.
        dropout_p: probability of dropping a weight.
        is_causal: drop keys after q_offset + row.
        scale: factor of the scores; 1 / sqrt(D) when None.
        q_offset: row of the mask that the first query has.

    Returns:
        (B, H, Nq, Dv) in q's dtype, computed in float32 (float64 for float64 inputs). A row that
        keeps no key is 0.
    """
    queries, keys = q.shape[2], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    dropped = ~mask[:, q_offset : q_offset + queries, :keys]
    if is_causal:
        dropped = dropped | _after(torch.arange(queries, device=q.device) + q_offset, keys)
    run_time, bias = split_mask(attn_mask)
    dropped = dropped if run_time is None else dropped | run_time
    k, v = (per_query_head(x, q.shape[1]).to(wide) for x in (k, v))
    scores = q.to(wide) @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(dropped, -math.inf)
    weights = (scores - scores.detach().amax(-1, keepdim=True).clamp_min(least(wide))).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    return (F.dropout(weights, dropout_p) @ v).to(q.dtype)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropped: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention of q (B, G, R, D) over k, v (B, G, C, D) with respect to the three.

    Recomputes the weights, in float32 at least. `grad` has to be 0 in rows that keep nothing.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v = (x.to(wide) for x in (grad, q, k, v))
    scores = q @ k.mT * scale
    scores = scores if bias is None else scores + bias
    scores = scores if dropped is None else scores.masked_fill(dropped, least(wide))
    p = scores.softmax(-1)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ grad


def _row_blocks(
    facts: LayoutSpec,
    tensors: list[Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
    q_offset: int,
    sizes: tuple[int, int],
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield (query rows, dropped cells (B or 1, H, r, Nk), bias) for all `sizes` = (Nq, Nk)."""
    bits, heads = tensors[:2]
    queries, keys = sizes
    run_time, bias = split_mask(attn_mask)
    for start in range(0, queries, _ROWS):
        rows = slice(start, min(start + _ROWS, queries))
        height = rows.stop - rows.start
        kept = unpack_bits(bits.narrow(1, q_offset + start, height), facts.shape[2])
        dropped = ~kept[heads][None, :, :, :keys]
        if is_causal and not facts.causal:
            index = torch.arange(height, device=bits.device) + (q_offset + start)
            dropped = dropped | _after(index, keys)
        part = [x if x is None or x.shape[-2] == 1 else x[..., rows, :] for x in (run_time, bias)]
        yield rows, dropped if part[0] is None else dropped | part[0], part[1]


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    facts: LayoutSpec,
    tensors: list[Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    q_offset: int,
) -> Tensor:
    """Attention with the layout's mask unpacked, by blocks of rows: any shape, any device."""
    k, v = (per_query_head(x, q.shape[1]) for x in (k, v))
    sizes = q.shape[2], k.shape[2]
    out = []
    for rows, dropped, bias in _row_blocks(facts, tensors, attn_mask, is_causal, q_offset, sizes):
        mask = additive(dropped, bias, q.dtype)
        part = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask, scale=scale)
        out.append(part.masked_fill(dropped.all(-1, keepdim=True), 0.0))
    return torch.cat(out, 2)


def masked_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    facts: LayoutSpec,
    tensors: list[Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked` with respect to q, k and v."""
    key_heads = k.shape[1]
    k, v = (per_query_head(x, q.shape[1]) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    sizes = q.shape[2], k.shape[2]
    dq = []
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for rows, dropped, bias in _row_blocks(facts, tensors, attn_mask, is_causal, q_offset, sizes):
        g = grad[:, :, rows].masked_fill(dropped.all(-1, keepdim=True), 0.0)
        parts = attend_backward(g, q[:, :, rows], k, v, dropped, bias, scale)
        dq.append(parts[0])
        dk, dv = dk + parts[1], dv + parts[2]
    dk, dv = (sum_groups(x, key_heads).to(k.dtype) for x in (dk, dv))
    return torch.cat(dq, 2).to(q.dtype), dk, dv
