"""Choose, per head and tile of query rows, which key columns to keep, by the effect on the output.

Kept attention mass does not predict quality. So each head's tile is offered several nested families
of columns (by mean attention, by effect, a window with the first keys), each cut at several sizes;
the error of the tile's output under every cut is measured on calibration data, and one Lagrange
multiplier trades error against cost over all tiles of all sites at once.

    error(tile, cut) = sum over rows i of w_i |o'_i - o_i|^2,    o' = attention over the cut
    choice(tile)     = argmin over cuts of error + lambda * cost

w_i is what the model's output minds of an error in row i (`sensitivity`). The effect of one column,
to first order, is w_i p_ij^2 |v_j - o_i|^2. Errors of rows are additive, which is what makes the
choice per tile independent of all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxpress.passes.attention_maps import AttentionCall, attention_calls
from fxpress.passes.masks import live_cells
from fxpress.passes.sites import AttentionSite

__all__ = ["ColumnErrors", "ColumnRanks", "choose_columns"]

_SIZES = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_ROW_STRIDE = 4  # every fourth row is enough to measure a tile's error
_PROHIBITIVE = 1e30  # a price at which only the cheapest is bought
SINKS = 4  # first keys, which many heads rest on


def _tiles(x: Tensor, rows: int, tiles: int) -> Tensor:
    """(H, Nq, ...) -> (H, T, rows, ...), missing rows zero."""
    missing = tiles * rows - x.shape[1]
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    return torch.unflatten(padded, 1, (tiles, rows))


def _valid_p(call: AttentionCall) -> Tensor:
    """Probabilities, zero in rows of padding."""
    whole = bool(call.valid_queries.all())
    return call.p if whole else call.p * call.valid_queries[:, None]


@dataclass
class ColumnRanks:
    """Orders the key columns of every (head, tile of rows) of a site, most valuable first.

    Attributes:
        site: the attention.
        queries, keys: sizes of the longest call.
        rows: query rows of a tile.
        unit: neighboring columns that are kept or dropped together.
        weights: (H, Nq), what an error in each row counts; ones when None.
    """

    site: AttentionSite
    queries: int
    keys: int
    rows: int
    unit: int = 1
    weights: Tensor | None = None
    mass: Tensor = field(init=False)
    effect: Tensor = field(init=False)
    row_weights: Tensor = field(init=False)  # (H, T, rows, 1)

    def __post_init__(self) -> None:
        shape = (self.site.heads, self.tiles, self.keys)
        plain = torch.ones(self.site.heads, self.queries)
        weights = plain if self.weights is None else self.weights
        self.row_weights = _tiles(weights[..., None], self.rows, self.tiles)
        self.mass, self.effect = torch.zeros(shape), torch.zeros(shape)

    @property
    def node(self) -> fx.Node:
        """The attention node."""
        return self.site.node

    @property
    def tiles(self) -> int:
        """Tiles of query rows."""
        return -(-self.queries // self.rows)

    def observe(self, inputs: Mapping[str, Any], _output: Any) -> None:
        """Add one call."""
        for call in attention_calls(self.site, inputs):
            p, v = _valid_p(call), call.v
            o = p @ v
            p, o = _tiles(p, self.rows, self.tiles), _tiles(o, self.rows, self.tiles)
            self.mass[..., : p.shape[-1]] += p.sum(2)
            # sum_i w_i p_ij^2 |v_j - o_i|^2, multiplied out: one product with (o, 1, |o|^2).
            length = o.square().sum(-1, keepdim=True)
            columns = torch.cat([o, torch.ones_like(length), length], -1) * self.row_weights
            sums = p.square().transpose(-1, -2) @ columns
            cross, near, far = sums[..., :-2], sums[..., -2], sums[..., -1]
            near = near * v.square().sum(-1)[:, None]
            effect = near - 2 * (cross * v[:, None]).sum(-1) + far
            self.effect[..., : p.shape[-1]] += effect.clamp_min(0)

    def live(self) -> Tensor:
        """Columns that some row of a tile can see, bool (T, Nk)."""
        cells = live_cells(self.queries, self.keys, self.site.is_causal)
        return _tiles(cells[None], self.rows, self.tiles)[0].any(1)

    def fill(self) -> Tensor:
        """Share of each tile's rows that exist (T,)."""
        first = torch.arange(self.tiles) * self.rows
        return (self.queries - first).clamp_max(self.rows).double() / self.rows

    def orders(self) -> Tensor:
        """Column indices by falling value, (families, H, T, Nk); dead columns last."""
        window = self._window().expand_as(self.mass)
        families = torch.stack([self._per_unit(x) for x in (self.mass, self.effect)] + [window])
        families = families.masked_fill(~self.live(), -math.inf)
        return families.sort(dim=-1, descending=True, stable=True).indices

    def _per_unit(self, value: Tensor) -> Tensor:
        if self.unit == 1:
            return value
        padded = F.pad(value, (0, -self.keys % self.unit)).unflatten(-1, (-1, self.unit))
        total: Tensor = padded.sum(-1)
        return total.repeat_interleave(self.unit, -1)[..., : self.keys]

    def _window(self) -> Tensor:
        """Nearness of columns to a tile's rows (T, Nk), the first keys nearest of all."""
        first = torch.arange(self.tiles)[:, None] * self.rows
        last = (first + self.rows - 1).clamp_max(self.queries - 1)
        column = torch.arange(self.keys)[None] // self.unit * self.unit
        distance = (first - column).clamp_min(0) + (column - last).clamp_min(0)
        return torch.where(column < SINKS, 1, -distance).float()


@dataclass
class ColumnErrors:
    """Measures the output error of every cut of every family, per (head, tile of rows).

    Attributes:
        ranks: the finished orders.
        order: `ranks.orders()`.
        sizes: columns kept by each cut, rising; the last keeps all.
        errors: sums over rows and calls, (families, H, T, cuts).
    """

    ranks: ColumnRanks
    order: Tensor = field(init=False)
    sizes: tuple[int, ...] = field(init=False)
    errors: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.order = self.ranks.orders()
        unit, keys = self.ranks.unit, self.ranks.keys
        cuts = {min(keys, -(-size // unit) * unit) for size in _SIZES}
        self.sizes = (*sorted(cuts - {keys}), keys)
        self.errors = torch.zeros(*self.order.shape[:3], len(self.sizes))

    @property
    def node(self) -> fx.Node:
        """The attention node."""
        return self.ranks.node

    def observe(self, inputs: Mapping[str, Any], _output: Any) -> None:
        """Add one call."""
        ranks = self.ranks
        for call in attention_calls(ranks.site, inputs):
            p, v = _valid_p(call), call.v
            o = _tiles(p @ v, ranks.rows, ranks.tiles)[:, :, ::_ROW_STRIDE]
            p = _tiles(p, ranks.rows, ranks.tiles)[:, :, ::_ROW_STRIDE]
            p = F.pad(p, (0, ranks.keys - p.shape[-1]))
            v = F.pad(v, (0, 0, 0, ranks.keys - v.shape[1]))
            for family, order in enumerate(self.order):
                self.errors[family] += self._family(p, v, o, order) * _ROW_STRIDE

    def _family(self, p: Tensor, v: Tensor, o: Tensor, order: Tensor) -> Tensor:
        """Errors (H, T, cuts) of one nested family, by sums over its growing parts."""
        rows = self.ranks.row_weights[:, :, ::_ROW_STRIDE]
        total, weight = torch.zeros_like(o), torch.zeros_like(o[..., :1])
        errors, start = [], 0
        for size in self.sizes:
            part = order[:, :, start:size]
            kept = p.gather(3, part[:, :, None].expand(-1, -1, p.shape[2], -1))
            flat = part.flatten(1)[..., None].expand(-1, -1, v.shape[-1])
            total = total + kept @ v.gather(1, flat).unflatten(1, part.shape[1:])
            weight = weight + kept.sum(-1, keepdim=True)
            error = (total / weight.clamp_min(1e-20) - o).square() * rows
            errors.append(error.sum((-1, -2)))
            start = size
        return torch.stack(errors, -1)

    def costs(self, tile_cost: Any) -> Tensor:
        """Cost of each cut (T, cuts); a cut of all live columns costs what dense tiles cost."""
        live = self.ranks.live().sum(-1)
        sizes = torch.tensor(self.sizes)
        kept = torch.minimum(sizes[None], live[:, None])
        cost = tile_cost(kept.double(), live[:, None].double())
        cost = torch.where(kept >= live[:, None], live[:, None].double(), cost)
        return cost * self.ranks.fill()[:, None]

    def mask(self, family: Tensor, cut: Tensor) -> Tensor:
        """The mask (H, Nq, Nk) of a choice of family and cut per (H, T); no row is left empty."""
        ranks = self.ranks
        order = self.order.gather(0, family[None, ..., None].expand(1, *self.order.shape[1:]))[0]
        size = torch.tensor(self.sizes)[cut]
        position = torch.empty_like(order)
        position.scatter_(-1, order, torch.arange(ranks.keys).expand_as(order))
        tiles = position < size[..., None]
        live = live_cells(ranks.queries, ranks.keys, ranks.site.is_causal)
        mask = tiles.repeat_interleave(ranks.rows, 1)[:, : ranks.queries] & live
        return mask | (_own_key(ranks.queries, ranks.keys) & ~mask.any(-1, keepdim=True))


def _own_key(queries: int, keys: int) -> Tensor:
    """For each row the key at its own position (or the last one), bool (Nq, Nk)."""
    index = torch.arange(queries).clamp_max(keys - 1)
    return torch.zeros(queries, keys, dtype=torch.bool).scatter_(1, index[:, None], True)


def choose_columns(
    scored: Sequence[ColumnErrors], tile_cost: Any, share: float
) -> list[tuple[Tensor, Tensor]]:
    """For each site, family and cut per (head, tile), of least error at a share of the dense cost.

    Args:
        scored: measured errors, one per site.
        tile_cost: (kept columns, live columns) -> cost of a tile in dense columns.
        share: total cost of all tiles over their dense cost; where that is less than the cheapest
            choice costs, the best of the cheapest is taken.
    """
    costs = [s.costs(tile_cost)[None, None] for s in scored]
    errors = [s.errors.double() for s in scored]
    dense = sum(float(c[..., -1].sum()) * e.shape[1] for c, e in zip(costs, errors, strict=True))

    def pick(price: float) -> tuple[list[Tensor], float]:
        picks, used = [], 0.0
        for error, cost in zip(errors, costs, strict=True):
            value = (error + price * cost).movedim(0, 2).flatten(2)
            best = value.argmin(-1)
            picks.append(best)
            expanded = cost.expand_as(error).movedim(0, 2).flatten(2)
            used += float(expanded.gather(-1, best[..., None]).sum())
        return picks, used

    # At so high a price errors vanish beside costs.
    budget = max(share * dense, pick(_PROHIBITIVE)[1])
    low, high = 0.0, 1.0
    while pick(high)[1] > budget and high < _PROHIBITIVE:
        high *= 8
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if pick(middle)[1] > budget else (low, middle)
    cuts = [e.shape[-1] for e in errors]
    return [(p // n, p % n) for p, n in zip(pick(high)[0], cuts, strict=True)]
