"""Views on the way of scores: dimensions that are reordered, merged, split, or of size one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpress.passes.products import unless_sorted

__all__ = ["VIEWS", "is_view", "turned"]

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
_PERMUTATIONS = {aten.permute.default, aten.transpose.int, aten.mT.default, aten.t.default}


def is_view(node: fx.Node) -> bool:
    """Whether a node merges or splits leading dimensions and leaves the last two alone."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or node.target not in VIEWS or not isinstance(source, fx.Node):
        return False
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return len(before) > 1 and [str(s) for s in before[-2:]] == [str(s) for s in after[-2:]]


def turned(node: fx.Node, order: tuple[int, ...] | None) -> tuple[fx.Node, Any] | None:
    """What a permutation is of, and the same order of dimensions there; None: no permutation.

    Dimensions of size one may come and go: -1 in the order is one that the source does not have.
    """
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return None
    if node.target in _PERMUTATIONS:
        dims = _permuted(node, source.meta["val"].ndim)
    elif node.target in (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims):
        dims = _kept_dimensions(node, source)
    else:
        return None
    places = [dims[place] if place >= 0 else -1 for place in order or range(len(dims))]
    for gone in sorted(set(range(source.meta["val"].ndim)) - set(dims)):
        if -1 not in places:
            return None
        places[places.index(-1)] = gone  # one size of one is as good as another
    return source, unless_sorted(places)


def _kept_dimensions(node: fx.Node, source: fx.Node) -> list[int]:
    """The dimension of the source at each place where ones come or go; -1: a new one."""
    rank, given = source.meta["val"].ndim, node.args[1]
    if node.target is aten.unsqueeze.default:
        assert isinstance(given, int)
        place = given % (rank + 1)
        return [*range(place), -1, *range(place, rank)]
    named = {dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])}
    gone = {dim for dim in named if str(source.meta["val"].shape[dim]) == "1"}
    return [dim for dim in range(rank) if dim not in gone]


def _permuted(node: fx.Node, rank: int) -> list[int]:
    """The dimension of the source at each place of its permutation."""
    dims = list(range(rank))
    if node.target is aten.permute.default:
        return [int(dim) % rank for dim in node.args[1]]  # type: ignore[arg-type, union-attr]
    first, second = node.args[1:3] if node.target is aten.transpose.int else (-1, -2)
    assert isinstance(first, int)
    assert isinstance(second, int)
    dims[first], dims[second] = dims[second], dims[first]
    return dims
