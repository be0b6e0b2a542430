"""Attention over the buckets form of a layout: one gather and one batched attention per bucket.

Everything is plain torch on sizes that the layout's spec states, so the graph compilers see
through it; it is the portable implementation of `fxpress::sparse_attention`, and fast on CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.ops.mask_layout import Bucket, LayoutSpec
from fxpress.ops.masked_attention import additive, attend_backward, either, least, split_mask

__all__ = ["packed", "packed_backward"]

_SHORT = 256  # columns up to which two batched products beat the fused CPU kernel


@dataclass(frozen=True)
class _Piece:
    """A bucket with its tensors: G pairs (head, tile of R rows), each with C columns."""

    bucket: Bucket
    ids: Tensor | None  # (G,) head * T + tile; None where all pairs are there, in order
    heads: Tensor  # (G,)
    columns: Tensor | None  # (G, C); None where all keys are there, in order
    dropped: Tensor | None  # (G, 1 or R, C)

    def take_queries(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, G, R, D)."""
        cut = _cut(x, self.bucket.rows)
        return cut if self.ids is None else cut.index_select(1, self.ids)

    def take_keys(self, x: Tensor, group: int) -> Tensor:
        """(B, Hkv, N, D) -> (B, G, C, D)."""
        if self.columns is None:
            whole = self.bucket.natural and self.bucket.pairs == x.shape[1]
            return x if whole else x.index_select(1, self.heads // group)
        flat = x.flatten(1, 2).index_select(1, self._flat(x.shape[2], group))
        return flat.view(-1, *self.columns.shape, x.shape[3])

    def add_keys(self, total: Tensor, part: Tensor, group: int) -> None:
        """Add (B, G, C, D) into (B, Hkv, N, D), where `take_keys` took it."""
        if self.columns is None:
            total.index_add_(1, self.heads // group, part)
        else:
            flat = self._flat(total.shape[2], group)
            total.flatten(1, 2).index_add_(1, flat, part.flatten(1, 2))

    def take_mask(self, mask: Tensor, heads: int) -> Tensor:
        """A run-time mask (B or 1, H or 1, Nq or 1, Nk or 1) -> (.., G or 1, R or 1, C or 1)."""
        if mask.shape[2] > 1:
            mask = self.take_queries(mask.expand(-1, heads, -1, -1))
        elif mask.shape[1] > 1:
            mask = mask.index_select(1, self.heads)
        if self.columns is None or mask.shape[3] == 1:
            return mask
        pairs = self.columns.shape[0]
        index = self.columns[None, :, None].expand(mask.shape[0], -1, mask.shape[2], -1)
        return mask.expand(-1, pairs, -1, -1).gather(3, index)

    def _flat(self, keys: int, group: int) -> Tensor:
        assert self.columns is not None
        return (self.columns + (self.heads // group * keys).unsqueeze(1)).flatten()


def _cut(x: Tensor, rows: int) -> Tensor:
    """(B, H, N, D) -> tiles (B, H * T, rows, D), padded with zeros where rows are missing."""
    short = -x.shape[2] % rows
    x = F.pad(x, (0, 0, 0, short)) if short else x
    return x.reshape(x.shape[0], -1, rows, x.shape[3])


def _pieces(facts: LayoutSpec, tensors: list[Tensor]) -> Iterator[_Piece]:
    heads, queries, keys = facts.shape
    rest = iter(tensors[3 if facts.empty else 2 :])
    for bucket in facts.buckets:
        ids = None if bucket.natural else next(rest)
        source = next(rest) if bucket.shared else None
        columns = next(rest) if bucket.gathered else None
        dropped = next(rest) if bucket.mask in ("columns", "cells") else None
        if source is not None:
            columns = None if columns is None else columns.index_select(0, source)
            dropped = None if dropped is None else dropped.index_select(0, source)
        if bucket.mask == "causal":
            dropped = tensors[0].new_ones(queries, keys, dtype=torch.bool).triu(1)[None]
        tiles = -(-queries // bucket.rows)
        pair = torch.arange(heads * tiles, device=tensors[0].device) if ids is None else ids
        yield _Piece(bucket, ids, pair // tiles, columns, dropped)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, dropped: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    """Attention of q (B, G, R, D) over k, v (B, G, C, D); rows that keep nothing hold anything."""
    if k.shape[2] == 1 and dropped is None:
        return v.expand(-1, -1, q.shape[2], -1)
    wide = q.dtype in (torch.float32, torch.float64)
    if k.shape[2] > _SHORT or not wide or q.device.type != "cpu":
        mask = additive(dropped, bias, q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    flat = (x.flatten(0, 1) for x in (q, k.mT))
    scores = torch.baddbmm(q.new_zeros(()), *flat, beta=0, alpha=scale).view(*q.shape[:3], -1)
    scores = scores if bias is None else scores + bias
    scores = scores if dropped is None else scores.masked_fill_(dropped, least(scores.dtype))
    return scores.softmax(-1) @ v


def _attend_run_time(
    piece: _Piece, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, heads: int, scale: float
) -> Tensor:
    """`_attend` with a run-time mask on top; rows that keep nothing are 0."""
    dropped, bias = _masks(piece, attn_mask, heads)
    out = _attend(q, k, v, dropped, bias, scale)
    return out if dropped is None else out.masked_fill(dropped.all(-1, keepdim=True), 0.0)


def _masks(
    piece: _Piece, attn_mask: Tensor | None, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """What a piece drops in all, broadcastable to (B, G, R, C), and what is added."""
    taken = None if attn_mask is None else piece.take_mask(attn_mask, heads)
    dropped, bias = split_mask(taken)
    return either(piece.dropped, dropped), bias


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    facts: LayoutSpec,
    tensors: list[Tensor],
    attn_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention over a layout's buckets; shapes as in `sparse_attention`, sizes the layout's."""
    (batch, heads, queries, _), group = q.shape, q.shape[1] // k.shape[1]
    outs: dict[int, Tensor] = {}
    for piece in _pieces(facts, tensors):
        rows = piece.bucket.rows
        taken = piece.take_queries(q), piece.take_keys(k, group), piece.take_keys(v, group)
        if attn_mask is not None:
            part = _attend_run_time(piece, *taken, attn_mask, heads, scale)
        elif piece.bucket.mask == "causal":
            part = F.scaled_dot_product_attention(*taken, is_causal=True, scale=scale)
        else:
            part = _attend(*taken, piece.dropped, None, scale)
        if piece.ids is None:
            outs[rows] = part
        else:
            if rows not in outs:
                outs[rows] = q.new_zeros(batch, heads * -(-queries // rows), rows, v.shape[-1])
            outs[rows].index_copy_(1, piece.ids, part)
    out = _join(outs, heads, queries)
    if out is None:  # the layout keeps nothing at all
        return q.new_zeros(batch, heads, queries, v.shape[-1])
    return out.masked_fill(tensors[2][tensors[1]].unsqueeze(-1), 0.0) if facts.empty else out


def _join(outs: dict[int, Tensor], heads: int, queries: int) -> Tensor | None:
    """Tiles by height, each 0 where another height's heads are -> (B, H, Nq, D)."""
    parts = [o.unflatten(1, (heads, -1)).flatten(2, 3)[:, :, :queries] for o in outs.values()]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0].contiguous() if parts else None


def packed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    facts: LayoutSpec,
    tensors: list[Tensor],
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed` with respect to q, k and v."""
    (batch, heads, queries, width), group = q.shape, q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    outs: dict[int, Tensor] = {}
    for piece in _pieces(facts, tensors):
        rows = piece.bucket.rows
        dropped, bias = _masks(piece, attn_mask, heads)
        g = piece.take_queries(grad)
        g = g if dropped is None else g.masked_fill(dropped.all(-1, keepdim=True), 0.0)
        taken = piece.take_queries(q), piece.take_keys(k, group), piece.take_keys(v, group)
        parts = attend_backward(g, *taken, dropped, bias, scale)
        if rows not in outs:
            outs[rows] = torch.zeros(
                batch, heads * -(-queries // rows), rows, width, dtype=wide, device=q.device
            )
        outs[rows] = outs[rows].index_add(1, _ids(piece), parts[0])
        piece.add_keys(dk, parts[1], group)
        piece.add_keys(dv, parts[2], group)
    dq = _join(outs, heads, queries)
    return (torch.zeros_like(q) if dq is None else dq.to(q.dtype)), dk.to(k.dtype), dv.to(v.dtype)


def _ids(piece: _Piece) -> Tensor:
    if piece.ids is not None:
        return piece.ids
    return torch.arange(piece.bucket.pairs, device=piece.heads.device)
