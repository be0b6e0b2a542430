"""Attention over the buckets form of a layout: one gather and one batched attention per bucket.

Everything is plain torch on sizes that the layout's spec states, so the graph compilers see
through it; it is the portable implementation of `fxpress::sparse_attention`, and fast on CPU.

Operands and result are looked at as rows (B * H * N, D), in whichever order of heads and positions
they lie in memory: a gather of rows then needs no copy before it. Rows come first because PyTorch
gathers along the first dimension on all threads, along others on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from fxpress.ops.mask_layout import Bucket, LayoutSpec
from fxpress.ops.masked_attention import additive, attend_backward, either, split_mask

__all__ = ["packed", "packed_backward"]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A bucket with its tensors: G pairs (head, tile of R rows), each with C columns.

    Where all pairs are of one head, which keep all columns, they are one pair of many rows. Rows
    that a tile has past the end repeat the last row, so that writing them changes nothing.
    """

    bucket: Bucket
    heads: Tensor  # (G, 1)
    rows: Tensor  # (G, R)
    columns: Tensor | None  # (G, C); None where all keys are there, in order
    cells: Tensor | None  # (G or fewer, 1 or R, C), True where dropped
    source: Tensor | None  # (G,), which of `cells` is whose; None where they are in order
    repeats: Tensor | None  # (G, R, 1), True at repeated rows; None where there are none
    whole: bool  # every head, undivided; where the bucket is of one head, that head
    indices: dict[tuple[int | bool, ...], Tensor] | None  # where rows are, if they are kept

    def take_queries(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, G, R, D)."""
        return self._part_of(x) if self.whole else _take(x, self.rows, self.query_index(x))

    def put_queries(self, out: Tensor, part: Tensor) -> None:
        """Write (B, G, R, D) into (B, H, N, D), where `take_queries` takes it from."""
        if self.whole:
            self._part_of(out).copy_(part)
        else:
            _flat(out).index_copy_(0, self.query_index(out), part.flatten(0, 2))

    def take_keys(self, k: Tensor, v: Tensor, group: int) -> list[Tensor]:
        """Two of (B, Hkv, N, D) -> two of (B, G, C, D)."""
        if self.columns is not None:
            return [_take(x, self.columns, self._key_index(x, group)) for x in (k, v)]
        if self.bucket.head is not None or (self.whole and group == 1):
            return [self._part_of(x, group) for x in (k, v)]
        return [x.index_select(1, (self.heads // group).flatten()) for x in (k, v)]

    def add_keys(self, total: Tensor, part: Tensor, group: int) -> None:
        """Add (B, G, C, D) into contiguous (B, Hkv, N, D), where `take_keys` takes it from."""
        if self.columns is None:
            total.index_add_(1, (self.heads // group).flatten(), part)
        else:
            _flat(total).index_add_(0, self._key_index(total, group), part.flatten(0, 2))

    def query_index(self, x: Tensor) -> Tensor:
        """Where the rows are in `_flat(x)`, x (B, H, N, D): (B * G * R,)."""
        return self._index(x, self.heads, self.rows, 0)

    def masks(self, attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """All that is dropped, and what is added, both broadcastable to (B, G, R, C)."""
        mine = self.dropped
        if attn_mask is None:
            return mine, None
        dropped, bias = split_mask(self._take_mask(attn_mask))
        return either(mine, dropped), bias

    @property
    def dropped(self) -> Tensor | None:
        """Which cells are dropped (1, G, 1 or R, C); made anew, since they may be many."""
        if self.bucket.mask == "causal":
            size = (1, self.bucket.rows, self.bucket.columns)
            return torch.ones(size, dtype=torch.bool, device=self.rows.device).triu(1)[None]
        if self.cells is None or self.source is None:
            return None if self.cells is None else self.cells[None]
        return self.cells.index_select(0, self.source)[None]

    def _part_of(self, x: Tensor, group: int = 1) -> Tensor:
        """The heads of an undivided bucket, or for keys and values those that serve them."""
        head = self.bucket.head
        return x if head is None else x.narrow(1, head // group, 1)

    def _key_index(self, x: Tensor, group: int) -> Tensor:
        assert self.columns is not None
        return self._index(x, self.heads, self.columns, group)

    def _index(self, x: Tensor, heads: Tensor, rows: Tensor, group: int) -> Tensor:
        """Where rows (G, R) of heads (G, 1), or of the groups that they are in, are in x."""
        if self.indices is None:
            return _index(x, heads // group if group else heads, rows)
        key = (group, _by_position(x), *x.shape[:3])
        if key not in self.indices:
            self.indices[key] = _index(x, heads // group if group else heads, rows)
        return self.indices[key]

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
    """(B, H, N, D) -> rows (B * H * N, D) in the order of memory."""
    return (x.transpose(1, 2) if _by_position(x) else x).flatten(0, 2)


def _index(x: Tensor, heads: Tensor, rows: Tensor) -> Tensor:
    """Where rows (G, R) of heads (G, 1) are in `_flat(x)`, (B * G * R,)."""
    batch, count, length, _ = x.shape
    index = (rows * count + heads if _by_position(x) else heads * length + rows).flatten()
    if batch == 1:
        return index
    first = torch.arange(0, batch * count * length, count * length, device=index.device)
    return (first[:, None] + index).flatten()


def _take(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Gather rows (G, R) from (B, H, N, D), given where they are in `_flat(x)`."""
    return _flat(x).index_select(0, index).view(x.shape[0], *rows.shape, -1)


@dataclass(frozen=True, eq=False)
class _Known:
    """Pieces of a layout that was used before, and what they were made from."""

    facts: LayoutSpec
    others: tuple[Tensor, ...]  # all but the first, by which this is found
    versions: tuple[int, ...]
    pieces: list[_Piece]

    def holds(self, facts: LayoutSpec, tensors: list[Tensor]) -> bool:
        """Whether the layout is the same, and no tensor was written to since."""
        return (
            self.facts is facts
            and self.versions == tuple(t._version for t in tensors)
            and all(a is b for a, b in zip(self.others, tensors[1:], strict=True))
        )


_KNOWN: WeakIdKeyDictionary = WeakTensorKeyDictionary()


def _pieces(facts: LayoutSpec, tensors: list[Tensor]) -> list[_Piece]:
    """The pieces of a layout. They are constants: made once, and again where a tensor has changed.

    Not kept where a graph is traced or a tensor counts no versions.
    """
    if any(type(t) is not Tensor or t.is_inference() for t in tensors):
        return list(_make_pieces(facts, tensors, kept=False))
    known: _Known | None = _KNOWN.get(tensors[0])
    if known is None or not known.holds(facts, tensors):
        with torch.inference_mode(mode=False):  # else no gradient could use them later
            pieces = list(_make_pieces(facts, tensors, kept=True))
        versions = tuple(t._version for t in tensors)
        _KNOWN[tensors[0]] = known = _Known(facts, tuple(tensors[1:]), versions, pieces)
    return known.pieces


def _make_pieces(facts: LayoutSpec, tensors: list[Tensor], *, kept: bool) -> Iterator[_Piece]:
    queries = facts.shape[1]
    device = tensors[0].device
    rest = iter(tensors[3 if facts.empty else 2 :])
    for bucket in facts.buckets:
        tiles = -(-queries // bucket.rows)
        first = bucket.head or 0
        every = (first, first + bucket.pairs)
        ids = torch.arange(*every, device=device) if bucket.natural else next(rest)
        source = next(rest) if bucket.shared else None
        columns = next(rest) if bucket.gathered else None
        cells = next(rest) if bucket.mask in ("columns", "cells") else None
        if source is not None and columns is not None:
            columns = columns.index_select(0, source)
        rows = (ids % tiles * bucket.rows)[:, None] + torch.arange(bucket.rows, device=device)
        heads = (ids // tiles)[:, None]
        if bucket.head is not None:
            heads, rows = heads[:1], rows.view(1, -1)
        ragged = queries % bucket.rows > 0
        yield _Piece(
            bucket,
            heads=heads,
            rows=rows.clamp_max(queries - 1) if ragged else rows,
            columns=columns,
            cells=cells,
            source=source,
            repeats=(rows >= queries).unsqueeze(-1) if ragged else None,
            whole=bucket.natural and tiles == 1,
            indices={} if kept else None,
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
        if piece.whole and piece.bucket.head is None:
            out = part
        else:
            piece.put_queries(out, part)
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
        _flat(dq).index_add_(0, piece.query_index(dq), parts[0].flatten(0, 2))
        piece.add_keys(dk, parts[1], group)
        piece.add_keys(dv, parts[2], group)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
