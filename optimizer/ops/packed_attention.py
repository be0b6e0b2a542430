"""Attention over the buckets form of a layout: one gather and one batched attention per bucket.

Everything is plain torch on sizes that the layout's spec states, so the graph compilers see
through it; it is the portable implementation of `fxpress::sparse_attention`, and fast on CPU.

Operands and result are looked at as rows (B, H * N, D), in whichever order of heads and positions
they lie in memory: a gather of rows then needs no copy before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.ops.mask_layout import Bucket, LayoutSpec
from fxpress.ops.masked_attention import additive, attend_backward, either, split_mask

__all__ = ["packed", "packed_backward"]


@dataclass(frozen=True)
class _Piece:
    """A bucket with its tensors: G pairs (head, tile of R rows), each with C columns.

    Rows that a tile has past the end repeat the last row, so that writing them changes nothing.
    """

    bucket: Bucket
    heads: Tensor  # (G, 1)
    rows: Tensor  # (G, R)
    columns: Tensor | None  # (G, C); None where all keys are there, in order
    dropped: Tensor | None  # (1, G, 1 or R, C)
    repeats: Tensor | None  # (G, R, 1), True at repeated rows; None where there are none
    whole: bool  # every head, undivided

    def take_queries(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, G, R, D)."""
        return x if self.whole else _take(self.heads, self.rows, x)[0]

    def take_keys(self, k: Tensor, v: Tensor, group: int) -> list[Tensor]:
        """Two of (B, Hkv, N, D) -> two of (B, G, C, D)."""
        if self.columns is not None:
            return _take(self.heads // group, self.columns, k, v)
        if self.whole and group == 1:
            return [k, v]
        return [x.index_select(1, (self.heads // group).flatten()) for x in (k, v)]

    def add_keys(self, total: Tensor, part: Tensor, group: int) -> None:
        """Add (B, G, C, D) into contiguous (B, Hkv, N, D), where `take_keys` takes it from."""
        if self.columns is None:
            total.index_add_(1, (self.heads // group).flatten(), part)
        else:
            index = (self.heads // group * total.shape[2] + self.columns).flatten()
            total.flatten(1, 2).index_add_(1, index, part.flatten(1, 2))

    def masks(self, attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """All that is dropped, and what is added, both broadcastable to (B, G, R, C)."""
        if attn_mask is None:
            return self.dropped, None
        dropped, bias = split_mask(self._take_mask(attn_mask))
        return either(self.dropped, dropped), bias

    def _take_mask(self, mask: Tensor) -> Tensor:
        """(B or 1, H or 1, Nq or 1, Nk or 1) -> (B or 1, G or 1, R or 1, C or 1)."""
        first = torch.zeros_like(self.heads)
        heads = self.heads if mask.shape[1] > 1 else first
        rows = self.rows if mask.shape[2] > 1 else first
        mask = mask[:, heads, rows]
        if self.columns is None or mask.shape[3] == 1:
            return mask
        index = self.columns[None, :, None].expand(mask.shape[0], -1, mask.shape[2], -1)
        return mask.gather(3, index)


def _by_position(x: Tensor) -> bool:
    """Whether (B, H, N, D) lies in memory as (B, N, H, D)."""
    return x.transpose(1, 2).is_contiguous()


def _flat(x: Tensor) -> Tensor:
    """(B, H, N, D) -> rows (B, H * N, D) in the order of memory."""
    return (x.transpose(1, 2) if _by_position(x) else x).flatten(1, 2)


def _index(x: Tensor, heads: Tensor, rows: Tensor) -> Tensor:
    """Where rows (G, R) of heads (G, 1) are in `_flat(x)`, (G * R,)."""
    index = rows * x.shape[1] + heads if _by_position(x) else heads * x.shape[2] + rows
    return index.flatten()


def _take(heads: Tensor, rows: Tensor, *operands: Tensor) -> list[Tensor]:
    """Gather rows (G, R) of heads (G, 1) from operands (B, H, N, D) of one H and N."""
    orders = {_by_position(x): x for x in operands}
    index = {order: _index(x, heads, rows) for order, x in orders.items()}
    taken = [_flat(x).index_select(1, index[_by_position(x)]) for x in operands]
    return [rows_taken.view(-1, *rows.shape, rows_taken.shape[2]) for rows_taken in taken]


def _pieces(facts: LayoutSpec, tensors: list[Tensor]) -> Iterator[_Piece]:
    heads, queries, keys = facts.shape
    device = tensors[0].device
    rest = iter(tensors[3 if facts.empty else 2 :])
    for bucket in facts.buckets:
        tiles = -(-queries // bucket.rows)
        ids = torch.arange(heads * tiles, device=device) if bucket.natural else next(rest)
        source = next(rest) if bucket.shared else None
        columns = next(rest) if bucket.gathered else None
        dropped = next(rest) if bucket.mask in ("columns", "cells") else None
        if source is not None:
            columns = None if columns is None else columns.index_select(0, source)
            dropped = None if dropped is None else dropped.index_select(0, source)
        if bucket.mask == "causal":
            dropped = torch.ones(1, queries, keys, dtype=torch.bool, device=device).triu(1)
        rows = (ids % tiles * bucket.rows)[:, None] + torch.arange(bucket.rows, device=device)
        ragged = queries % bucket.rows > 0
        yield _Piece(
            bucket,
            heads=(ids // tiles)[:, None],
            rows=rows.clamp_max(queries - 1) if ragged else rows,
            columns=columns,
            dropped=None if dropped is None else dropped[None],
            repeats=(rows >= queries).unsqueeze(-1) if ragged else None,
            whole=bucket.natural and tiles == 1,
        )


def _attend_piece(
    piece: _Piece, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of one piece; what a run-time mask empties is 0."""
    if piece.bucket.mask == "causal" and attn_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    dropped, bias = piece.masks(attn_mask)
    if k.shape[2] == 1 and dropped is None and not piece.whole:
        return v.expand(-1, -1, q.shape[2], -1)
    mask = additive(dropped, bias, q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if attn_mask is None or dropped is None:
        return out
    return out.masked_fill(dropped.all(-1, keepdim=True), 0.0)


def _covers(facts: LayoutSpec) -> bool:
    """Whether the buckets hold every query row."""
    heads, queries, _ = facts.shape
    return sum(Fraction(b.pairs, -(-queries // b.rows)) for b in facts.buckets) == heads


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
    group = q.shape[1] // k.shape[1]
    batch, heads, queries, _ = q.shape
    make = q.new_empty if _covers(facts) else q.new_zeros
    out = make(batch, queries, heads, v.shape[3]).transpose(1, 2)
    for piece in _pieces(facts, tensors):
        keys, values = piece.take_keys(k, v, group)
        part = _attend_piece(piece, piece.take_queries(q), keys, values, attn_mask, scale)
        if piece.whole:
            out = part
        else:
            index = _index(out, piece.heads, piece.rows)
            _flat(out).index_copy_(1, index, part.flatten(1, 2))
    return out.masked_fill(tensors[2][tensors[1]].unsqueeze(-1), 0.0) if facts.empty else out


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
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for piece in _pieces(facts, tensors):
        dropped, bias = piece.masks(attn_mask)
        idle = None if dropped is None else dropped.all(-1, keepdim=True)
        idle = either(idle, piece.repeats)
        g = piece.take_queries(grad)
        g = g if idle is None else g.masked_fill(idle, 0.0)
        keys, values = piece.take_keys(k, v, group)
        parts = attend_backward(g, piece.take_queries(q), keys, values, dropped, bias, scale)
        index = _index(dq, piece.heads, piece.rows)
        _flat(dq).index_add_(1, index, parts[0].flatten(1, 2))
        piece.add_keys(dk, parts[1], group)
        piece.add_keys(dv, parts[2], group)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
