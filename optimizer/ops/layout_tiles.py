"""The tiles form of a static mask: what the generated CUDA kernel walks.

For each (head, tile of BM query rows), key columns fall into two lists:

- *full* tiles: BN aligned columns that every row keeps; no cell is tested;
- *packed* tiles: all other columns that any row keeps, in order, BN at a time. A row of keys is a
  whole cache line or more, so gathering rows costs little beside loading neighbors; a run of kept
  columns stays a run. One bit per cell, in words along the columns, says which rows keep which.

A job is one (head, tile of rows). Long jobs come first, so that the last wave of a launch holds
short ones; jobs of about one length are in the order of their heads, so that programs that run at
the same time read the same keys (head by head alone gained 4 to 9 % on random blocks of an H100
and lost as much on causal bands, which end in long rows).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxpress.errors import PlanError
from fxpress.ops.mask_layout import Bits, LayoutSpec

__all__ = ["COSTS", "TileCosts", "build"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_TILES = ((64, 64), (64, 32), (128, 64))


@dataclass(frozen=True)
class TileCosts:
    """The cost model of a query row, in full cells computed.

    Fitted to the times of all tiles of `benchmarks/run.py --tune` on an H100: its choice is within
    7 % of the fastest on each of those masks.

    Attributes:
        tile: what a key tile costs beside its cells.
        packed: how much a packed cell costs.
        row: what a row costs by itself.
        second_loop: what filling the pipeline again costs where there are both lists.
        tall: factor of tiles of 128 rows, which leave room for fewer programs at a time.
        tall_wide: the same where heads are wider than 64: there each key serves more rows.
    """

    tile: float = 4.5
    packed: float = 1.25
    row: float = 380.0
    second_loop: float = 35.0
    tall: float = 1.02
    tall_wide: float = 0.9


COSTS = TileCosts()
_WORD = 32


@dataclass(frozen=True)
class _Cut:
    """All unique heads cut to (BM, BN); P = U * T pairs in order."""

    tile: tuple[int, int]
    full: Bools  # (P, key tiles)
    rest: Bools  # (P, Nk): columns left to pack
    wide: bool  # heads are wider than 64

    @property
    def packed_tiles(self) -> Ints:
        tiles: Ints = -(-self.rest.sum(1) // self.tile[1])
        return tiles

    @property
    def work(self) -> NDArray[np.float64]:
        """Estimated cost of each pair, in cells."""
        full, packed = self.full.sum(1), self.packed_tiles
        both = COSTS.second_loop * ((full > 0) & (packed > 0))
        columns = self.tile[1] * (full + COSTS.packed * packed)
        rows = float(self.tile[0])
        if rows > 64:
            rows *= COSTS.tall_wide if self.wide and not packed.any() else COSTS.tall
        return np.asarray(rows * (columns + COSTS.tile * (full + packed) + COSTS.row + both))


def _summaries(bits: Bits, rows: int, keys: int) -> tuple[Bools, Bools]:
    """Columns that any, and that every, row of each pair keeps, (P, Nk) both."""
    pad = ((0, 0), (0, -bits.shape[1] % rows), (0, 0))
    tiles = (-1, rows, bits.shape[2])
    kept = np.bitwise_or.reduce(np.pad(bits, pad).reshape(tiles), axis=1)
    every = np.bitwise_and.reduce(np.pad(bits, pad, constant_values=255).reshape(tiles), axis=1)
    unpacked = (np.unpackbits(s, axis=-1, count=keys, bitorder="little") for s in (kept, every))
    any_row, every_row = (summary.astype(bool) for summary in unpacked)
    return any_row, every_row


def _cut(bits: Bits, tile: tuple[int, int], keys: int, split: bool, wide: bool) -> _Cut:
    """Cut at one tile size; without `split` even full tiles are packed, for a single loop."""
    kept, every = _summaries(bits, tile[0], keys)
    whole = keys // tile[1]
    aligned = every[:, : whole * tile[1]].reshape(len(every), whole, tile[1])
    full: Bools = np.logical_and(aligned.all(-1), split)
    rest = kept.copy()
    rest[:, : whole * tile[1]] &= ~full.repeat(tile[1], axis=1)
    return _Cut(tile, full, rest, wide)


def _choose(bits: Bits, keys: int, tile: tuple[int, int] | None, head_dim: int) -> _Cut:
    tiles = (tile,) if tile else _TILES
    wide = head_dim > 64
    cuts = [_cut(bits, size, keys, split, wide) for size in tiles for split in (True, False)]
    return min(cuts, key=lambda cut: float(cut.work.sum()))


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)])


def _and_one(tiles: Ints) -> Ints:
    """Append a tile that is read, ahead of its turn, but never used."""
    return np.concatenate([tiles, np.zeros_like(tiles[:1])])


def _pack_columns(cut: _Cut) -> tuple[Ints, Bools, Ints]:
    """Return columns (tiles, BN), which of them are padding, and the pair of each tile."""
    width = cut.tile[1]
    pair, column = np.nonzero(cut.rest)
    starts = _offsets(cut.rest.sum(1))
    rank = np.arange(len(pair)) - starts[pair]
    slot = _offsets(cut.packed_tiles)[pair] * width + rank
    tiles = int(cut.packed_tiles.sum())
    columns, padding = np.zeros(tiles * width, dtype=np.int64), np.ones(tiles * width, dtype=bool)
    columns[slot], padding[slot] = column, False
    owner = np.repeat(np.arange(len(cut.rest)), cut.packed_tiles)
    return columns.reshape(-1, width), padding.reshape(-1, width), owner


def _words(bits: Bits, cut: _Cut, columns: Ints, padding: Bools, owner: Ints) -> NDArray[np.int32]:
    """Kept cells of the packed tiles as int32 (tiles, BN / 32, BM), bit j = column j of a word."""
    rows, width = cut.tile
    per_head = -(-bits.shape[1] // rows)
    padded = np.pad(bits, ((0, 0), (0, per_head * rows - bits.shape[1]), (0, 0)))
    out = np.empty((len(owner), width // _WORD, rows), dtype=np.int32)
    byte, bit = columns // 8, (columns % 8).astype(np.uint8)
    chunk = max(1, 2**24 // (rows * width))
    for start in range(0, len(owner), chunk):
        part = slice(start, start + chunk)
        head, tile = np.divmod(owner[part], per_head)
        row = tile[:, None] * rows + np.arange(rows)
        cells = padded[head[:, None, None], row[:, :, None], byte[part, None, :]]
        kept = ((cells >> bit[part, None, :]) & 1).astype(bool) & ~padding[part, None, :]
        words = np.packbits(kept, axis=-1, bitorder="little").view(np.int32)
        out[part] = words.transpose(0, 2, 1)
    return out


def _check_tile(tile: tuple[int, int]) -> None:
    rows, columns = tile
    if rows not in (32, 64, 128) or columns not in (32, 64, 128):
        raise PlanError(f"tile {tile!r}: rows and columns are 32, 64 or 128")


def _jobs(cut: _Cut, heads: Ints) -> Ints:
    """A row per job, in the order of the launch: head, tile of rows, and its part of both lists."""
    per_head = len(cut.full) // (int(heads.max()) + 1)
    head, tile = np.divmod(np.arange(len(heads) * per_head), per_head)
    pair = heads[head] * per_head + tile
    spans = [_offsets(counts) for counts in (cut.full.sum(1), cut.packed_tiles)]
    ends = [ends[pair + i] for ends in spans for i in (0, 1)]
    work = cut.work[pair]
    # The last key is the first to sort by.
    order = np.lexsort((-work, head, -np.floor(np.log2(np.maximum(work, 1)))))
    return np.stack([head, tile, *ends], axis=1)[order]


def build(
    facts: LayoutSpec, bits: Bits, heads: Ints, tile: tuple[int, int] | None, head_dim: int
) -> tuple[LayoutSpec, list[Tensor]]:
    """Build the tile lists of a packed mask.

    Args:
        facts: what is known already.
        bits: the different head masks (U, Nq, W), one bit a cell.
        heads: index into them per head (H,).
        tile: (BM, BN), or None to choose by the cost model.
        head_dim: D, which the cost model minds.

    Returns:
        The completed facts, and int32 tensors: jobs (H * T, 6), each a head, a tile of rows, its
        first and last (exclusive) full tile and the same of packed ones; where full tiles exist,
        their indices; where packed ones do, columns (tiles + 1, BN) and words (tiles, BN / 32, BM).
        Tile indices and columns have one entry more than is used.
    """
    if tile is not None:
        _check_tile(tile)
    cut = _choose(bits, facts.shape[2], tile, head_dim)
    jobs = _jobs(cut, heads)
    lists: list[NDArray[np.int64] | NDArray[np.int32]] = [jobs]
    full, packed = bool(cut.full.any()), bool(cut.rest.any())
    if full:
        lists.append(_and_one(np.nonzero(cut.full)[1]))
    if packed:
        columns, padding, owner = _pack_columns(cut)
        lists += [_and_one(columns), _words(bits, cut, columns, padding, owner)]
    tiles = int((jobs[:, 3] - jobs[:, 2] + jobs[:, 5] - jobs[:, 4]).sum())
    computed = tiles * cut.tile[0] * cut.tile[1]
    facts = replace(facts, tile=cut.tile, computed=computed, full=full, packed=packed)
    return facts, [torch.from_numpy(np.ascontiguousarray(part.astype(np.int32))) for part in lists]
