"""The buckets form of a static mask: packed columns, grouped so that batched calls serve them.

A head's query rows are cut into tiles. What a (head, tile) pair computes is the list of columns
that any of its rows keeps, so a mask whose rows agree within a tile costs its density exactly.
Pairs of about equal length form a bucket; one gather and one batched attention serve a bucket.

The constants below were measured with PyTorch's fp32 attention on two x86 cores; only their ratios
matter, and `benchmarks/cpu_attention.py` shows whether the choices they lead to are good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxpress.ops.mask_layout import Bits, Bucket, LayoutSpec

__all__ = ["build"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Nanoseconds: per computed cell at r rows a tile (small tiles keep the cores less busy), more per
# cell where cells are masked, per gathered column (key and value), per pair, and per bucket.
_CELL, _CELL_SMALL, _MASKED, _COLUMN, _PAIR, _BUCKET = 1.5, 15.0, 0.8, 40.0, 7e3, 1e5
_TILE_ROWS = (16, 32, 64, 128, 256, 512)
_ALIGNED = 8  # padded columns are a multiple of it: whole vectors
_MAX_CELLS = 2**22  # masked cells of a bucket: masks that fit the allocator's reused memory
_MAX_LENGTHS = 64  # different column counts that the grouping tells apart


@dataclass(frozen=True)
class _Tiled:
    """One head mask cut into tiles of `rows`: what any, and what every, row of a tile keeps."""

    rows: int
    any: Bools  # (T, Nk)
    every: Bools  # (T, Nk)

    @property
    def lengths(self) -> Ints:
        lengths: Ints = self.any.sum(1)
        return lengths

    @property
    def clean(self) -> Bools:
        """Tiles that need no test of single cells (T,)."""
        clean: Bools = (self.any == self.every).all(1)
        return clean


def _cell_cost(rows: int) -> float:
    return _CELL + _CELL_SMALL / math.sqrt(rows)


def _cost(tiled: _Tiled) -> float:
    lengths, rows = tiled.lengths, tiled.rows
    cell = _cell_cost(rows) + _MASKED * ~tiled.clean
    per_column = rows * cell + _COLUMN * ~(tiled.clean & tiled.any.all(1))
    silent = lengths <= 1
    return float(np.where(silent, rows, _PAIR + lengths * per_column).sum())


def _cut(bits: Bits, rows: int, keys: int) -> _Tiled:
    """Cut one head's bits (Nq, W) into tiles of `rows`; missing rows change neither summary."""
    queries, width = bits.shape
    pad = ((0, -queries % rows), (0, 0))
    tiles = (-1, rows, width)
    kept = np.bitwise_or.reduce(np.pad(bits, pad).reshape(tiles), axis=1)
    every = np.bitwise_and.reduce(np.pad(bits, pad, constant_values=255).reshape(tiles), axis=1)
    return _Tiled(rows, *(_unpack(summary, keys) for summary in (kept, every)))


def _unpack(bits: Bits, keys: int) -> Bools:
    return np.unpackbits(bits, axis=-1, count=keys, bitorder="little").astype(bool)


def _row_choices(queries: int, tile: tuple[int, int] | None) -> list[int]:
    """Tile heights to try: the usual ones, and near them those that leave little over."""
    if tile is not None:
        return [min(tile[0], queries)]
    usual = {rows for rows in _TILE_ROWS if rows < queries}
    even = {-(-queries // -(-queries // rows)) for rows in usual}
    return sorted(usual | even | {queries})


def _choose(bits: Bits, keys: int, choices: list[int]) -> _Tiled:
    return min((_cut(bits, rows, keys) for rows in choices), key=_cost)


def _is_triangle(bits: Bits, keys: int) -> bool:
    queries = len(bits)
    return queries == keys and bool((_unpack(bits, keys) == np.tri(queries, dtype=bool)).all())


def _group(lengths: Ints, rows: int) -> list[Ints]:
    """Split pairs into buckets so that padding and calls together cost least.

    Dynamic programming over the different lengths, ascending: best[j] is the cheapest grouping of
    all pairs up to the j-th length.
    """
    step = max(1, -(-int(lengths.max()) // _MAX_LENGTHS))
    rounded = np.where(lengths <= 1, lengths, -(-lengths // step) * step)
    sizes, member = np.unique(rounded, return_inverse=True)
    until = np.concatenate([[0], np.cumsum(np.bincount(member))])
    per_column = rows * _cell_cost(rows) + _COLUMN
    best, cut = np.zeros(len(sizes) + 1), np.zeros(len(sizes) + 1, dtype=int)
    for j in range(1, len(sizes) + 1):
        costs = best[:j] + (until[j] - until[:j]) * sizes[j - 1] * per_column + _BUCKET
        cut[j], best[j] = int(costs.argmin()), costs.min()
    groups, j = [], len(sizes)
    while j:
        groups.append(np.flatnonzero((member >= cut[j]) & (member < j)))
        j = cut[j]
    return groups[::-1]


def _portions(pairs: _Pairs, group: Ints) -> list[Ints]:
    """Split a group whose mask of single cells would be too large."""
    if pairs.clean[group].all():
        return [group]
    each = pairs.rows * int(pairs.any[group].sum(1).max())
    return np.array_split(group, min(len(group), -(-len(group) * each // _MAX_CELLS)))


@dataclass(frozen=True)
class _Pairs:
    """Pairs of one tile height: which unique head, which tile, and their summaries."""

    rows: int
    unique: Ints  # (P,)
    tile: Ints  # (P,)
    any: Bools  # (P, Nk)
    clean: Bools  # (P,)

    def take(self, index: Ints | Bools) -> _Pairs:
        return _Pairs(
            self.rows, self.unique[index], self.tile[index], self.any[index], self.clean[index]
        )


def _pairs(tiled: dict[int, _Tiled], rows: int) -> _Pairs:
    mine = {u: t for u, t in tiled.items() if t.rows == rows}
    return _Pairs(
        rows,
        np.concatenate([np.full(len(t.any), u) for u, t in mine.items()]),
        np.concatenate([np.arange(len(t.any)) for t in mine.values()]),
        np.concatenate([t.any for t in mine.values()]),
        np.concatenate([t.clean for t in mine.values()]),
    )


def _columns(kept: Bools) -> tuple[Ints, Bools]:
    """Kept columns of each pair first, in order, padded to the longest; and which are padding."""
    lengths = kept.sum(1)
    longest = int(lengths.max())
    if lengths.min() < longest:
        longest = min(-(-longest // _ALIGNED) * _ALIGNED, kept.shape[1])
    order = np.argsort(~kept, axis=1, kind="stable")[:, :longest]
    padding = np.arange(longest) >= lengths[:, None]
    return np.where(padding, order[:, :1], order), padding


def _dropped(pairs: _Pairs, bits: Bits, columns: Ints, padding: Bools) -> Bools:
    """Cells (P, rows, C) that are not kept; rows past the end count as kept, harmlessly."""
    queries = bits.shape[1]
    rows = pairs.tile[:, None] * pairs.rows + np.arange(pairs.rows)
    inside = np.minimum(rows, queries - 1)
    byte, bit = columns // 8, (columns % 8).astype(np.uint8)
    words = bits[pairs.unique[:, None, None], inside[:, :, None], byte[:, None, :]]
    dropped: Bools = ((words >> bit[:, None, :]) & 1 == 0) | padding[:, None, :]
    return dropped


def _assemble(pairs: _Pairs, bits: Bits, heads: Ints, tiles: int) -> tuple[Bucket, list[Tensor]]:
    columns, padding = _columns(pairs.any)
    members = [np.flatnonzero(heads == u) for u in pairs.unique]
    source = np.repeat(np.arange(len(members)), [len(m) for m in members])
    ids = np.concatenate(members) * tiles + pairs.tile[source]
    order = np.argsort(ids, kind="stable")
    ids, source = ids[order], source[order]
    shared = len(source) > len(members)
    if not shared:  # the lists themselves are put in order, so that none is looked up
        pairs, columns, padding = pairs.take(source), columns[source], padding[source]
    mask = "none" if not padding.any() else "columns"
    if not pairs.clean.all():
        mask = "cells"
    bucket = Bucket(
        pairs.rows,
        len(ids),
        columns.shape[1],
        mask,
        gathered=not bool(pairs.any.all()),
        natural=len(ids) == len(heads) * tiles,
        shared=shared,
    )
    tensors: list[Ints | Bools] = [] if bucket.natural else [ids]
    tensors += [source] if shared else []
    tensors += [columns] if bucket.gathered else []
    if mask == "columns":
        tensors.append(padding[:, None, :])
    if mask == "cells":
        tensors.append(_dropped(pairs, bits, columns, padding))
    return bucket, [torch.from_numpy(np.ascontiguousarray(t)) for t in tensors]


def _triangles(heads: Ints, unique: list[int], size: int) -> tuple[Bucket, list[Tensor]]:
    ids = np.flatnonzero(np.isin(heads, unique))
    natural = len(ids) == len(heads)
    bucket = Bucket(size, len(ids), size, "causal", gathered=False, natural=natural)
    return bucket, [] if natural else [torch.from_numpy(ids)]


def _full(pairs: _Pairs, heads: Ints, tiles: int) -> list[tuple[Bucket, list[Tensor]]]:
    """Pairs that keep every column: a bucket per head, whose keys and values are taken as they are.

    One bucket for all heads that keep every cell, if all do.
    """
    keys = pairs.any.shape[1]
    if tiles == 1 and np.isin(heads, pairs.unique).all():
        return [(Bucket(pairs.rows, len(heads), keys, gathered=False, natural=True), [])]
    parts: list[tuple[Bucket, list[Tensor]]] = []
    for head, unique in enumerate(heads):
        mine = pairs.tile[pairs.unique == unique]
        if len(mine):
            alone = tiles == 1
            bucket = Bucket(pairs.rows, len(mine), keys, gathered=False, natural=alone, head=head)
            parts.append((bucket, [] if alone else [torch.from_numpy(head * tiles + mine)]))
    return parts


def build(
    facts: LayoutSpec, bits: Bits, heads: Ints, tile: tuple[int, int] | None, _head_dim: int
) -> tuple[LayoutSpec, list[Tensor]]:
    """Build the buckets of a packed mask.

    Args:
        facts: what is known already.
        bits: the different head masks (U, Nq, W), one bit a cell.
        heads: index into them per head (H,).
        tile: (query rows, ignored), or None to choose per head.

    Returns:
        The completed facts, and per bucket, each where the bucket's flags call for it: pair
        indices head * tiles + tile (G,), list indices (G,), columns (G', C) and dropped cells
        (G', 1 or rows, C).
    """
    _, queries, keys = facts.shape
    choices = _row_choices(queries, tile)
    triangles = [u for u in range(len(bits)) if tile is None and _is_triangle(bits[u], keys)]
    tiled = {u: _choose(bits[u], keys, choices) for u in range(len(bits)) if u not in triangles}
    parts = [_triangles(heads, triangles, queries)] if triangles else []
    for rows in sorted({t.rows for t in tiled.values()}):
        pairs = _pairs(tiled, rows)
        tiles = -(-queries // rows)
        live, full = pairs.any.any(1), pairs.clean & pairs.any.all(1)
        parts += _full(pairs.take(full), heads, tiles)
        for kind in (live & pairs.clean & ~full, live & ~pairs.clean):
            chosen = pairs.take(kind)
            if len(chosen.unique):
                groups = _group(chosen.any.sum(1), rows)
                groups = [part for group in groups for part in _portions(chosen, group)]
                parts += [_assemble(chosen.take(g), bits, heads, tiles) for g in groups]
    buckets = tuple(bucket for bucket, _ in parts)
    tallest = max((bucket.rows for bucket in buckets), default=queries)
    computed = sum(b.rows * b.pairs * b.columns for b in buckets)
    facts = replace(facts, tile=(tallest, 0), computed=computed, buckets=buckets)
    return facts, [tensor for _, tensors in parts for tensor in tensors]
