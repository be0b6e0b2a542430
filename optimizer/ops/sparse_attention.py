"""`fxpress::sparse_attention`: attention under a static mask that was compiled once.

    o_i = sum_j softmax_j(scale * q_i . k_j + attn_mask_ij) v_j    over the keys j that row i keeps

Row i keeps what row `q_offset + i` of the static mask keeps, less what a run-time mask or causality
drops. A row that keeps nothing returns 0, with zero gradient.

On CUDA a generated kernel serves the call (`fxpress.lowering`). Elsewhere `packed_attention` does;
a call that covers only part of the layout (a growing cache) goes to `masked_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxpress import lowering
from fxpress.errors import LoweringError
from fxpress.ops.define import define
from fxpress.ops.mask_layout import LayoutSpec, MaskLayout
from fxpress.ops.masked_attention import masked, masked_backward, reference
from fxpress.ops.packed_attention import packed, packed_backward

__all__ = ["AttentionSite", "reference", "sparse_attention"]

_OPERATOR = "fxpress::sparse_attention"


@dataclass(frozen=True)
class AttentionSite:
    """What a lowering may depend on: everything about a call but its numbers.

    Attributes:
        facts: the layout's plain facts.
        dtype: of q, k and v.
        head_dim: D of q and k.
        value_dim: Dv of v.
        group: query heads per key head.
        mask: dtype of the run-time mask, or "none".
        mask_per_row: whether that mask differs between query rows.
        causal: whether causality drops keys that the layout keeps.
        short: whether there are fewer queries than the layout's rows.
        clipped: whether there are fewer keys than the layout's.
        shifted: whether the first query is not the layout's first row.
        positive: whether the scale is above 0.
    """

    facts: LayoutSpec
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    group: int
    mask: str = "none"
    mask_per_row: bool = False
    causal: bool = False
    short: bool = False
    clipped: bool = False
    shifted: bool = False
    positive: bool = True

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        facts: LayoutSpec,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float = 1.0,
        q_offset: int = 0,
    ) -> AttentionSite:
        """Describe a call."""
        mask = "none" if attn_mask is None else str(attn_mask.dtype).removeprefix("torch.")
        return cls(
            facts=facts,
            dtype=q.dtype,
            head_dim=int(q.shape[-1]),  # compilers may hand over sizes as symbols
            value_dim=int(v.shape[-1]),
            group=int(q.shape[1] // k.shape[1]),
            mask=mask,
            mask_per_row=attn_mask is not None and bool(attn_mask.shape[-2] != 1),
            causal=is_causal and not facts.causal,
            short=bool(q.shape[2] != facts.shape[1]),
            clipped=bool(k.shape[2] != facts.shape[2]),
            shifted=bool(q_offset != 0),
            positive=scale > 0,
        )


def _fits_buckets(facts: LayoutSpec, q: Tensor, k: Tensor, is_causal: bool, q_offset: int) -> bool:
    """Whether a call covers a buckets layout exactly."""
    covers = q.shape[2] == facts.shape[1] and k.shape[2] == facts.shape[2] and q_offset == 0
    return facts.form == "buckets" and covers and (facts.causal or not is_causal)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: list[Tensor],
    spec: str,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    q_offset: int,
) -> Tensor:
    facts = LayoutSpec.parse(spec)
    if facts.form == "tiles":
        site = AttentionSite.of(q, k, v, facts, attn_mask, is_causal, scale, q_offset)
        chosen = lowering.choose(_OPERATOR, q.device.type, site)
        if chosen is not None:
            result: Tensor = chosen.run(site, q, k, v, layout, attn_mask, scale)
            return result
    if _fits_buckets(facts, q, k, is_causal, q_offset):
        out = packed(q, k, v, facts, layout, attn_mask, scale)
    else:
        out = masked(q, k, v, facts, layout, attn_mask, is_causal, scale, q_offset)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: list[Tensor],
    spec: str,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    facts = LayoutSpec.parse(spec)
    if _fits_buckets(facts, q, k, is_causal, q_offset):
        grads = packed_backward(grad, q, k, v, facts, layout, attn_mask, scale)
    else:
        rest = (attn_mask, is_causal, scale, q_offset)
        grads = masked_backward(grad, q, k, v, facts, layout, *rest)
    dq, dk, dv = (x.contiguous() for x in grads)
    return dq, dk, dv


def _fake(q: Tensor, _k: Tensor, v: Tensor, *_rest: Any) -> Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)


def _backward_fake(
    _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    q, k, v, layout, spec, attn_mask, *options = inputs
    ctx.save_for_backward(q, k, v, attn_mask, *layout)
    ctx.spec, ctx.options = spec, options


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, attn_mask, *layout = ctx.saved_tensors
    grads = torch.ops.fxpress.sparse_attention_backward(
        grad.contiguous(), q, k, v, layout, ctx.spec, attn_mask, *ctx.options
    )
    return *grads, [None] * len(layout), None, None, None, None, None


define(f"{_OPERATOR}_backward", _backward, _backward_fake)
define(_OPERATOR, _forward, _fake).register_autograd(_gradients, setup_context=_save)


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: MaskLayout, attn_mask: Tensor | None, q_offset: int
) -> None:
    heads, queries, keys = layout.shape
    problem = ""
    if not q.dim() == k.dim() == v.dim() == 4:
        problem = "q, k and v have four dimensions (B, H, N, D)"
    elif not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        problem = f"q, k and v have one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
    elif not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1:3] != v.shape[1:3]:
        problem = "batch sizes agree, and k and v have the same heads and length"
    elif q.shape[3] != k.shape[3]:
        problem = f"q and k have one head width, not {q.shape[3]} and {k.shape[3]}"
    elif q.shape[1] != heads or heads % k.shape[1]:
        problem = f"q has the layout's {heads} heads, a multiple of k's"
    elif q_offset < 0 or q_offset + q.shape[2] > queries or k.shape[2] > keys:
        problem = (
            f"rows {q_offset} to {q_offset + q.shape[2]} and {k.shape[2]} keys "
            f"lie inside the layout's {queries} rows and {keys} keys"
        )
    elif layout.device != q.device:
        problem = f"the layout is on {layout.device}, q on {q.device}: use layout.to({q.device})"
    elif attn_mask is not None:
        problem = _mask_problem(attn_mask, (*q.shape[:3], k.shape[2]))
    if problem:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise LoweringError(f"sparse_attention: {problem}; got q, k, v {shapes}")


def _mask_problem(attn_mask: Tensor, full: tuple[int, ...]) -> str:
    sizes = zip(attn_mask.shape, full, strict=False)
    if attn_mask.dim() != 4 or any(size not in (1, whole) for size, whole in sizes):
        return f"attn_mask {tuple(attn_mask.shape)} has four dimensions and broadcasts to {full}"
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        return f"attn_mask is bool or floating, not {attn_mask.dtype}"
    return ""


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: MaskLayout,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
) -> Tensor:
    """Attention under a compiled static mask, composed with a run-time mask.

    Args:
        q: (B, H, Nq, D).
        k: (B, Hkv, Nk, D), H a multiple of Hkv. Nk may be less than the layout's (a growing
            cache): later columns are not there yet.
        v: (B, Hkv, Nk, Dv).
        layout: from `compile_mask`, on q's device; row q_offset + i is that of query i.
        attn_mask: bool (True = kept) or additive, broadcastable to (B, H, Nq, Nk) and of at most
            four dimensions. Cheapest where it does not differ between rows. Additive values at or
            below half their dtype's least number drop the key.
        dropout_p: probability of dropping a weight. Above 0 the call takes a dense masked path,
            differentiable but with none of the layout's savings; so does an `attn_mask` that
            requires a gradient.
        is_causal: drop keys after row q_offset + i. Costs nothing where the mask itself keeps none
            of those, so put causality into the mask where possible.
        scale: factor of the scores; 1 / sqrt(D) when None.
        q_offset: row of the layout that the first query has.

    Returns:
        (B, H, Nq, Dv), in memory as (B, Nq, H, Dv): joining the heads is free. A row that
        keeps no key is 0 and has zero gradient.

    Raises:
        LoweringError: if shapes, dtypes, heads or devices do not fit together.
    """
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    _check(q, k, v, layout, attn_mask, q_offset)
    if dropout_p > 0 or (attn_mask is not None and attn_mask.requires_grad):
        mask = layout.to_dense()
        return reference(q, k, v, mask, attn_mask, dropout_p, is_causal, scale, q_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.fxpress.sparse_attention(
        q, k, v, list(layout.tensors), layout.spec, attn_mask, is_causal, scale, q_offset
    )
    return out
