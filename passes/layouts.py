"""Batch dimensions of attention, brought to (B, H) and back.

Operands of attention may have any number of leading dimensions: none, heads merged into the batch,
windows, groups of heads that share their keys. One attention call has two: batch and heads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxpress.passes.products import Product, Strided, emit
from fxpress.program import captured
from fxpress.rewrite import Decline

__all__ = ["Layout", "Placed", "four", "layout_of", "placed", "restored", "same_batch"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Placed:
    """A tensor that broadcasts against scores.

    Attributes:
        node: the tensor.
        lead: batch sizes of the scores there.
        order: the dimension of the scores there at each place of (..., Nq, Nk), -1 where they have
            none; None: as they are.
        split: sizes of the scores there, where queries and keys are split into more dimensions.
        cells: (Nq, Nk), where they are.
    """

    node: fx.Node
    lead: tuple[Any, ...]
    order: tuple[int, ...] | None = None
    split: tuple[int, ...] | None = None
    cells: tuple[Any, ...] = ()

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes in the order (..., Nq, Nk), with ones in front as broadcasting has them."""
        if self.split is not None:
            return (*self.lead, *self.cells)
        own = tuple(self.node.meta["val"].shape)
        whole = (1,) * (self.rank - len(own)) + own
        if self.order is None:
            return whole
        return tuple(whole[dim] if dim >= 0 else 1 for dim in self.order)

    @property
    def rank(self) -> int:
        """Number of dimensions of the scores there."""
        if self.order is None:
            return len(self.lead) + 2
        return sum(dim >= 0 for dim in self.order)


@dataclass(frozen=True)
class Layout:
    """How the batch sizes of one attention are brought to (B, H).

    Attributes:
        lead: the batch sizes that its operands broadcast to.
        split: how many of them are batch, where there are more than two.
        batch: B, as captured.
        heads: H, as captured.
        sizes: for each of them, a node and its dimension that have the size.
        built: the queries (B, H, Nq, D), once they are there; dynamic sizes are read off them.
    """

    lead: tuple[Any, ...]
    split: int
    batch: int
    heads: int
    sizes: tuple[tuple[fx.Node, int], ...] = ()
    built: fx.Node | None = None

    def split_of(self, lead: Sequence[Any]) -> int | None:
        """How many of other batch sizes are batch; None where they are not B * H."""
        known = [captured(size) for size in lead]
        fits = (
            at
            for at in range(len(known) + 1)
            if (math.prod(known[:at]), math.prod(known[at:])) == (self.batch, self.heads)
        )
        return next(fits, None)

    def takes(self, mask: Placed) -> bool:
        """Whether a tensor that broadcasts against scores can be brought to (B, H, Nq, Nk)."""
        lead = mask.lead
        if len(lead) == 1:
            return captured(lead[0]) == self.batch * self.heads
        if not any(captured(size) != 1 for size in mask.shape[:-2]):
            return True
        split = self.split_of(lead)
        if split is None or len(lead) == 2:
            return split is not None
        parts = (range(split), range(split, len(lead)))
        return all(_widens(mask, part) for part in parts)


def _widens(mask: Placed, part: Sequence[int]) -> bool:
    """Whether what has to be expanded has a size that is known or follows from the others."""
    dynamic = [d for d in part if not isinstance(mask.lead[d], int)]
    return len(dynamic) < 2 or not any(_is_widened(mask, part, d) for d in dynamic)


def _is_widened(mask: Placed, part: Sequence[int], dim: int) -> bool:
    """Whether a dimension has to be expanded before it is merged with the others of its part."""
    some = any(captured(mask.shape[d]) != 1 for d in part)
    return some and captured(mask.shape[dim]) == 1 != captured(mask.lead[dim])


def layout_of(
    q: Strided, k: Strided, v: Strided, heads: int | None, at: fx.Node
) -> Layout | Decline:
    """The layout of one attention.

    Args:
        q: (..., Nq, D).
        k: (..., Nk, D).
        v: (..., Nk, Dv).
        heads: H, where batch and heads are merged and it is known.
        at: the node to blame.
    """
    leads = [operand.shape[:-2] for operand in (q, k, v)]
    ranks = {len(lead) for lead in leads}
    if ranks == {1, 2}:
        whole = next(lead for lead in leads if len(lead) == 2)
        merged = whole[0] * whole[1]
        if any(len(lead) == 1 and not statically_known_true(lead[0] == merged) for lead in leads):
            return Decline("batch sizes of queries, keys and values differ", at)
        leads = [lead for lead in leads if len(lead) == 2]
    elif len(ranks) > 1:
        return Decline("queries, keys and values differ in their number of dimensions", at)
    if not _batches_fit(leads):
        return Decline("batch sizes of queries, keys and values differ", at)
    lead = tuple(next((s for s in c if str(s) != "1"), 1) for c in zip(*leads, strict=True))
    sizes = tuple(_sized(size, dim, (q, k, v)) for dim, size in enumerate(lead))
    known = [captured(size) for size in lead]
    if len(lead) == 1:
        divides = heads is not None and known[0] % heads == 0 and len({*map(str, leads)}) == 1
        count = heads if heads is not None and divides else 1
        return Layout(lead, 1, known[0] // count, count, sizes)
    split = _batch_dimensions(leads)
    if any(sum(not isinstance(s, int) for s in p) > 1 for p in (lead[:split], lead[split:])):
        return Decline("more than one dynamic size among the batch dimensions of attention", at)
    return Layout(lead, split, math.prod(known[:split]), math.prod(known[split:]), sizes)


def _sized(size: Any, dim: int, operands: Sequence[Strided]) -> tuple[fx.Node, int]:
    """A node and its dimension that have a size of the batch."""
    for operand in operands:
        shape = operand.shape[:-2]
        if dim < len(shape) and str(shape[dim]) == str(size):
            return operand.node, operand.order[dim] if operand.order is not None else dim
    return operands[0].node, 0  # an operand of merged batch and heads: none is expanded to it


def _batches_fit(leads: Sequence[tuple[Any, ...]]) -> bool:
    """Equal, but for sizes of one, which broadcast."""
    return all(len({str(s) for s in column} - {"1"}) <= 1 for column in zip(*leads, strict=True))


def _batch_dimensions(leads: Sequence[tuple[Any, ...]]) -> int:
    """How many dimensions are batch: all but the last, or the first before groups of heads."""
    rank = len(leads[0])
    grouped = rank > 2 and len({str(lead[-1]) for lead in leads}) > 1
    return 1 if grouped else max(rank - 1, 0)


def four(graph: fx.Graph, operand: Strided, layout: Layout, dtype: torch.dtype) -> fx.Node:
    """An operand as (B, H, N, D)."""
    node, lead = emit(graph, operand), operand.shape[:-2]
    if node.meta.get("val", operand.node.meta["val"]).dtype != dtype:
        node = graph.call_function(aten.to.dtype, (node, dtype))
    if not lead:
        node = graph.call_function(aten.unsqueeze.default, (node, 0))
    if len(lead) < 2:
        return graph.call_function(aten.unflatten.int, (node, 0, [-1, layout.heads]))
    if len(lead) == 2:
        return node
    want = [
        size if isinstance(size, int) or str(have) == str(size) else _size_of(graph, *where)
        for have, size, where in zip(lead, layout.lead, layout.sizes, strict=True)
    ]
    return _merged(graph, node, lead, want, layout.split)


def _size_of(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    return graph.call_function(aten.sym_size.int, (node, dim))


def _merged(
    graph: fx.Graph, node: fx.Node, have: Sequence[Any], want: Sequence[Any], split: int
) -> fx.Node:
    """Expand leading dimensions from `have` to `want`, and merge them to two."""
    size = [w if str(h) != str(w) else -1 for h, w in zip(have, want, strict=True)]
    if any(s != -1 for s in size):
        node = graph.call_function(aten.expand.default, (node, [*size, -1, -1]))
    for start, end in ((split, len(want) - 1), (0, split - 1)):
        if end > start:
            node = graph.call_function(aten.flatten.using_ints, (node, start, end))
    return node


def placed(graph: fx.Graph, mask: Placed, layout: Layout) -> fx.Node:
    """A tensor that broadcasts against scores, as one that does so against (B, H, Nq, Nk)."""
    node, shape = mask.node, mask.shape
    ndim = node.meta["val"].ndim
    if mask.split is not None:
        node, ndim = _whole(graph, mask), len(shape)
    wanted = len(mask.lead) + 2 if mask.order is not None or ndim > 2 else 2
    for _ in range((wanted if mask.order is None else mask.rank) - ndim):
        node = graph.call_function(aten.unsqueeze.default, (node, 0))
    node = emit(graph, Strided(node, mask.order))
    if wanted == 3:
        if captured(shape[0]) == 1:
            return graph.call_function(aten.unsqueeze.default, (node, 0))
        return graph.call_function(aten.unflatten.int, (node, 0, [-1, layout.heads]))
    if wanted <= 4:
        return node
    have, split = shape[:-2], layout.split_of(mask.lead)
    if split is None:  # all of them are one
        have, split = (1,) * len(mask.lead), len(mask.lead) - 1
    parts = (range(split), range(split, len(have)))
    want = []
    for place, part in enumerate(parts):  # of (B, H)
        for dim in part:
            size = mask.lead[dim] if _is_widened(mask, part, dim) else have[dim]
            if not isinstance(size, int) and size is not have[dim]:
                rest = math.prod(mask.lead[d] for d in part if d != dim)
                size = _quotient(graph, layout, place, rest)
            want.append(size)
    return _merged(graph, node, have, want, split)


def _whole(graph: fx.Graph, mask: Placed) -> fx.Node:
    """A tensor that is met where queries and keys are split, with both whole."""
    node, split = mask.node, mask.split or ()
    for _ in range(len(split) - node.meta["val"].ndim):
        node = graph.call_function(aten.unsqueeze.default, (node, 0))
    for call, sizes in ((aten.expand.default, split), (aten.reshape.default, mask.shape)):
        fixed = [size if isinstance(size, int) else -1 for size in sizes]
        node = graph.call_function(call, (node, fixed))
    return node


def _quotient(graph: fx.Graph, layout: Layout, place: int, by: int) -> fx.Node:
    """B or H, divided."""
    assert layout.built is not None
    whole = _size_of(graph, layout.built, place)
    return whole if by == 1 else graph.call_function(operator.floordiv, (whole, by))


def same_batch(graph: fx.Graph, *nodes: fx.Node) -> list[fx.Node]:
    """Operands (B, H, N, D) expanded to the same batch and heads."""
    shapes = [node.meta["val"].shape for node in nodes]
    result = []
    for given, shape in zip(nodes, shapes, strict=True):
        size = [_broadcast(graph, nodes, dim) if str(shape[dim]) == "1" else -1 for dim in (0, 1)]
        node = given
        if size != [-1, -1]:
            node = graph.call_function(aten.expand.default, (node, [*size, -1, -1]))
        result.append(node)
    return result


def _broadcast(graph: fx.Graph, nodes: Sequence[fx.Node], dim: int) -> Any:
    """The size that one is expanded to along a dimension; -1: to none."""
    for node in nodes:
        size = node.meta["val"].shape[dim]
        if str(size) != "1":
            return size if isinstance(size, int) else _size_of(graph, node, dim)
    return -1


def _reordered(graph: fx.Graph, node: fx.Node, values: Product) -> fx.Node:
    """A result (..., N, M) in the order of the product, without the row that it does not show."""
    order = list(values.order or ())
    if len(order) < values.rank:
        (gone,) = set(range(values.rank)) - set(order)
        node = graph.call_function(aten.squeeze.dim, (node, gone))
        order = [dim - (dim > gone) for dim in order]
    if order == sorted(order):
        return node
    return graph.call_function(aten.permute.default, (node, order))


def restored(
    graph: fx.Graph, fused: fx.Node, values: Product, layout: Layout, dtype: torch.dtype
) -> fx.Node:
    """The result (B, H, Nq, Dv) in rank, order and dtype of the product that it replaces."""
    if values.rank < 4:
        fused = graph.call_function(aten.flatten.using_ints, (fused, 0, 1))
    if values.rank == 2:
        fused = graph.call_function(aten.squeeze.dim, (fused, 0))
    if values.rank > 4:
        for dim, part in ((1, layout.lead[layout.split :]), (0, layout.lead[: layout.split])):
            size = [s if isinstance(s, int) else -1 for s in part]
            if len(size) > 1:
                fused = graph.call_function(aten.unflatten.int, (fused, dim, size))
    if values.order is not None:
        fused = _reordered(graph, fused, values)
    wanted: torch.dtype = values.node.meta["val"].dtype
    if dtype != wanted:
        fused = graph.call_function(aten.to.dtype, (fused, wanted))
    return fused
