"""From a softmax back to the product of queries and keys, over scales, masks, casts and views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.dataflow import (
    RESHAPES,
    Constants,
    argument,
    captured,
    is_closed,
    is_noop,
    peel,
)
from fxpress.passes.layouts import Layout, Placed, placed
from fxpress.passes.products import Product, Strided, product, unless_sorted
from fxpress.passes.softmax import is_cast
from fxpress.program import Program
from fxpress.rewrite import Decline

__all__ = ["VIEWS", "Bias", "Keep", "Scores", "Stretch", "is_view", "scores_of", "turned"]

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
_WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}
_MASKED_FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
_MIXING = {aten.linear.default, aten.permute.default, aten.transpose.int, aten.conv2d.default}
_PERMUTATIONS = {aten.permute.default, aten.transpose.int, aten.mT.default, aten.t.default}
_FLOORS = {aten.maximum.default, aten.max.other, aten.clamp_min.default, aten.clamp.default}
_MODEST = -1e4  # scores come nowhere near it: float16 could hardly hold them
_NEAR = 8  # operations behind one that mixes heads within which the scores are looked for


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
    """The dimension of the source at each place of what it is with or without ones; -1: a new one."""
    rank, given = source.meta["val"].ndim, node.args[1]
    if node.target is aten.unsqueeze.default:
        assert isinstance(given, int)
        place = given % (rank + 1)
        return [*range(place), -1, *range(place, rank)]
    named = {dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])}  # type: ignore[operator]
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


@dataclass(frozen=True)
class Stretch:
    """Scores are multiplied (divided, where inverse) by a tensor of size one along the keys.

    Where `by_key`, it is of size one along the queries instead.
    """

    tensor: Placed
    inverse: bool
    by_key: bool


@dataclass(frozen=True)
class Bias:
    """factor * tensor, stretched, added to scores."""

    tensor: Placed
    factor: float
    stretches: tuple[Stretch, ...] = ()


@dataclass(frozen=True)
class Keep:
    """Scores are `fill` where a tensor is False (True, where negated)."""

    tensor: Placed
    negated: bool
    fill: float


@dataclass(frozen=True)
class Scores:
    """What goes into a softmax: scale * q @ k^T, masked.

    Attributes:
        at: the product of queries and keys.
        q: (..., Nq, D).
        k: (..., Nk, D).
        scale: factor of the product.
        biases: what is added.
        keeps: what is kept.
        stretches: what queries and keys are multiplied by.
        heads: H, where a view on the way shows it.
    """

    at: fx.Node
    q: Strided
    k: Strided
    scale: float | None
    biases: tuple[Bias, ...] = ()
    keeps: tuple[Keep, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    heads: int | None = None

    @property
    def tensors(self) -> list[Placed]:
        """All that was met between product and softmax."""
        by_bias = [stretch for bias in self.biases for stretch in bias.stretches]
        met = (*self.biases, *self.keeps, *self.stretches, *by_bias)
        return [part.tensor for part in met]

    def mask(self, program: Program, layout: Layout, dtype: torch.dtype) -> fx.Node | None:
        """Build one mask, boolean or of `dtype`, that broadcasts to (B, H, Nq, Nk)."""
        graph = program.graph
        bias = _sum_of([_bias(graph, bias, layout, dtype) for bias in self.biases], graph)
        kept = [_keep(graph, keep, layout) for keep in self.keeps]
        program.refresh()
        if bias is None and self._is_boolean(program, kept):
            return _all_of(graph, kept)
        for node, keep in zip(kept, self.keeps, strict=True):
            bias = _where(graph, node, bias, _fill(keep.fill, dtype), dtype)
        return bias

    def stretched(
        self, program: Program, layout: Layout, q: fx.Node, k: fx.Node
    ) -> tuple[fx.Node, fx.Node]:
        """Queries and keys (B, H, N, D) times what scales their scores."""
        graph, dtype = program.graph, q.meta["val"].dtype
        for stretch in self.stretches:
            if stretch.by_key:
                k = stretched(graph, k, stretch, layout, dtype, of_rows=False)
            else:
                q = stretched(graph, q, stretch, layout, dtype)
        program.refresh()
        return q, k

    def _is_boolean(self, program: Program, kept: Sequence[fx.Node]) -> bool:
        """Whether a boolean mask is the same: a row that keeps nothing is uniform when filled."""
        if all(math.isinf(keep.fill) for keep in self.keeps):
            return True
        constants = Constants(program)
        values = [constants.value(node) for node in kept]
        if any(value is None for value in values):
            return False
        together = values[0]
        for value in values[1:]:
            together = together & value
        return bool(together.any(-1).all())


def _fill(fill: float, dtype: torch.dtype) -> float:
    """A fill in the mask's dtype, so low that a row which keeps nothing averages all values."""
    if math.isinf(fill):
        return fill
    lowest = torch.finfo(dtype).min
    return max(fill, lowest) if is_closed(fill, dtype) else lowest


def stretched(
    graph: fx.Graph,
    node: fx.Node,
    stretch: Stretch,
    layout: Layout,
    dtype: torch.dtype,
    of_rows: bool = True,
) -> fx.Node:
    """A node times a stretch (B, H, Nq, 1) or (B, H, 1, Nk); not `of_rows`: (B, H, Nk, 1)."""
    by = _in_dtype(graph, stretch.tensor, layout, dtype)
    if not of_rows:
        by = graph.call_function(aten.transpose.int, (by, -1, -2))
    operator = aten.div.Tensor if stretch.inverse else aten.mul.Tensor
    return graph.call_function(operator, (node, by))


def _in_dtype(graph: fx.Graph, tensor: Placed, layout: Layout, dtype: torch.dtype) -> fx.Node:
    node = placed(graph, tensor, layout)
    if tensor.node.meta["val"].dtype != dtype:
        node = graph.call_function(aten.to.dtype, (node, dtype))
    return node


def _bias(graph: fx.Graph, bias: Bias, layout: Layout, dtype: torch.dtype) -> fx.Node:
    node = _in_dtype(graph, bias.tensor, layout, dtype)
    if bias.factor != 1.0:
        node = graph.call_function(aten.mul.Tensor, (node, bias.factor))
    for stretch in bias.stretches:
        node = stretched(graph, node, stretch, layout, dtype)
    return node


def _keep(graph: fx.Graph, keep: Keep, layout: Layout) -> fx.Node:
    node = placed(graph, keep.tensor, layout)
    if keep.tensor.node.meta["val"].dtype != torch.bool:
        node = graph.call_function(aten.ne.Scalar, (node, 0))
    return graph.call_function(aten.logical_not.default, (node,)) if keep.negated else node


def _sum_of(nodes: Sequence[fx.Node], graph: fx.Graph) -> fx.Node | None:
    total: fx.Node | None = None
    for node in nodes:
        total = node if total is None else graph.call_function(aten.add.Tensor, (total, node))
    return total


def _all_of(graph: fx.Graph, nodes: Sequence[fx.Node]) -> fx.Node | None:
    both: fx.Node | None = None
    for node in nodes:
        both = node if both is None else graph.call_function(aten.bitwise_and.Tensor, (both, node))
    return both


def _where(
    graph: fx.Graph, keep: fx.Node, bias: fx.Node | None, fill: float, dtype: torch.dtype
) -> fx.Node:
    if bias is not None:
        return graph.call_function(aten.where.ScalarOther, (keep, bias, fill))
    node = graph.call_function(aten.where.Scalar, (keep, 0.0, fill))
    if dtype == torch.get_default_dtype():
        return node
    return graph.call_function(aten.to.dtype, (node, dtype))


# The way back ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """What was met on the way from the softmax.

    Attributes:
        order: the dimension of the node reached at each place of (..., Nq, Nk).
        whole: sizes of the scores before queries and keys were split; None where they are not.
        factor: numbers that the scores are multiplied by.
        biases, keeps, stretches, heads: as in `Scores`.
    """

    order: tuple[int, ...] | None
    whole: tuple[int, ...] | None = None
    factor: float = 1.0
    biases: tuple[Bias, ...] = ()
    keeps: tuple[Keep, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    heads: int | None = None

    def viewed(self, node: fx.Node) -> _Way | None:
        """The way behind a view that splits or merges queries and keys; None where it ends."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, after = (tuple(n.meta["val"].shape) for n in (source, node))
        if self.order is not None or not all(isinstance(s, int) for s in (*before, *after)):
            return None
        whole = self.whole or after
        return replace(self, whole=None if before == whole else whole)

    def scaled(self, factor: float) -> _Way:
        return replace(self, factor=self.factor * factor)

    def placed(self, tensor: fx.Node, at: fx.Node) -> Placed:
        """A tensor that is applied to the scores `at`."""
        shape = tuple(at.meta["val"].shape)
        if self.whole is not None:
            return Placed(tensor, self.whole[:-2], None, shape, self.whole[-2:])
        order = self.order or tuple(range(len(shape)))
        return Placed(tensor, tuple(shape[d] if d >= 0 else 1 for d in order[:-2]), self.order)

    def added(self, node: fx.Node, at: fx.Node, factor: float = 1.0) -> _Way:
        bias = Bias(self.placed(node, at), self.factor * factor, self.stretches)
        return replace(self, biases=(*self.biases, bias))

    def kept(self, keep: Keep) -> _Way:
        return replace(self, keeps=(*self.keeps, keep))

    def stretched(self, stretch: Stretch) -> _Way:
        return replace(self, stretches=(*self.stretches, stretch))

    def seen(self, node: fx.Node) -> _Way:
        shape = node.meta["val"].shape
        if len(shape) != 4 or self.heads is not None or self.whole is not None:
            return self
        order = self.order or (0, 1, 2, 3)
        if len(order) != 4 or order[1] < 0:
            return self
        return replace(self, heads=captured(shape[order[1]]))


@dataclass
class _Walk:
    """A walk back through one program."""

    program: Program
    constants: Constants = field(init=False)

    def __post_init__(self) -> None:
        self.constants = Constants(self.program)

    def back(self, node: fx.Node, way: _Way) -> Scores | Decline:
        """Follow the scores back to their product."""
        while True:
            way = way.seen(node)
            plain = way.order is None and way.whole is None
            if is_noop(node) or is_cast(node) or (is_view(node) and plain):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                node = source
                continue
            if (found := product(node)) is not None:
                return self._end(found, way) if way.whole is None else _refusal(node)
            if way.whole is None and (earlier := turned(node, way.order)) is not None:
                node, way = earlier[0], replace(way, order=earlier[1])
                continue
            if node.target in VIEWS and (further := way.viewed(node)) is not None:
                node, way = node.args[0], further  # type: ignore[assignment]
                continue
            step = self._step(node, way)
            if not isinstance(step, tuple):
                return step
            node, way = step

    def _step(self, node: fx.Node, way: _Way) -> tuple[fx.Node, _Way] | Scores | Decline:
        """One scale or mask further back."""
        if node.op == "call_function":
            if node.target in (aten.mul.Tensor, aten.div.Tensor):
                return self._scale(node, way)
            if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
                return self._add(node, way)
            if node.target in _MASKED_FILL or node.target in _WHERE:
                return self._fill(node, way)
            if node.target in _FLOORS:
                return self._floor(node, way)
            if node.target is aten.neg.default and isinstance(node.args[0], fx.Node):
                return node.args[0], way.scaled(-1.0)
        return _refusal(node)

    def _scale(self, node: fx.Node, way: _Way) -> tuple[fx.Node, _Way] | Scores | Decline:
        """A number, or a tensor that queries or keys can be multiplied by instead."""
        left, right = node.args
        divides = node.target is aten.div.Tensor
        nearest = Decline("scores are scaled by a tensor that differs by query and key", node)
        sides = ((left, right), (right, left))[: 1 if divides else 2]
        for chain, other in sides:
            number = self.constants.scalar(other)
            if number and isinstance(chain, fx.Node) and _is_whole(chain, node):
                return chain, way.scaled(1 / number if divides else number)
        for chain, other in sides:
            if not isinstance(chain, fx.Node) or not _is_whole(chain, node):
                continue
            if not isinstance(other, fx.Node):
                continue
            if (cut := self._cut(node, other, way)) is not None:
                return chain, cut
            shape = [captured(size) for size in way.placed(other, node).shape]
            if 1 in shape[-2:] and way.whole is None:
                stretch = Stretch(way.placed(other, node), divides, shape[-1] != 1)
                found = self.back(chain, way.stretched(stretch))
                if isinstance(found, Scores):
                    return found
                nearest = found
        return nearest

    def _cut(self, node: fx.Node, kept: fx.Node, way: _Way) -> _Way | None:
        """What is kept in scores * m + (1 - m) * low, with a constant m of zeros and ones."""
        ones = self.constants.value(kept)
        if not isinstance(ones, Tensor) or not bool(((ones == 0) | (ones == 1)).all()):
            return None
        for bias in way.biases:
            low = self.constants.value(bias.tensor.node)
            if isinstance(low, Tensor) and _is_low_where(low * bias.factor, ones == 0):
                rest = tuple(other for other in way.biases if other is not bias)
                keep = Keep(way.placed(kept, node), False, _MODEST)
                return replace(way, biases=rest).kept(keep)
        return None

    def _add(self, node: fx.Node, way: _Way) -> Scores | Decline:
        """Either addend may be the scores; the other one is a mask."""
        nearest: Decline | None = None
        left, right = node.args
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        for chain, other, turn in ((left, right, way), (right, left, way.scaled(sign))):
            if not isinstance(chain, fx.Node) or not _is_whole(chain, node):
                continue
            if not isinstance(other, fx.Node):
                return self.back(chain, turn)  # a number shifts all scores alike
            found = self.back(chain, turn.added(other, node, sign))
            if isinstance(found, Scores):
                return found
            nearest = nearest or found
        return nearest or _refusal(node)

    def _fill(self, node: fx.Node, way: _Way) -> tuple[fx.Node, _Way] | Decline:
        if node.target in _MASKED_FILL:
            chain, condition, filled = node.args
            negated = True
        else:
            condition, chain, filled = node.args
            negated = self._filling(filled) is None
            if negated:
                chain, filled = filled, chain
        number = self._filling(filled)
        dtype = node.meta["val"].dtype
        # A bias that is added to what was filled could be as low as a modest fill.
        low = number is not None and (
            is_closed(number, dtype) or (number <= _MODEST and not way.biases)
        )
        if way.stretches:
            return Decline("masked scores are scaled by a tensor", node)
        if not low or way.factor <= 0:
            return Decline("masked scores are filled with more than minus infinity", node)
        if not isinstance(chain, fx.Node) or not _is_whole(chain, node):
            return _refusal(node)
        assert isinstance(condition, fx.Node)
        assert number is not None
        return chain, way.kept(Keep(way.placed(condition, node), negated, number))

    def _floor(self, node: fx.Node, way: _Way) -> tuple[fx.Node, _Way] | Decline:
        """A lower bound that no score falls below, unless it was dropped."""
        chain, bound = node.args[:2]
        number = self._filling(bound)
        capped = node.target is aten.clamp.default and argument(node, 2, "max") is not None
        if capped or number is None or not is_closed(number, node.meta["val"].dtype):
            return _refusal(node)
        assert isinstance(chain, fx.Node)
        return (chain, way) if _is_whole(chain, node) else _refusal(node)

    def _filling(self, value: Any) -> float | None:
        """A number, or a constant tensor that holds one number only."""
        if (number := self.constants.scalar(value)) is not None:
            return number
        tensor = self.constants.value(value) if isinstance(value, fx.Node) else None
        if isinstance(tensor, Tensor) and tensor.numel() and bool((tensor == tensor.min()).all()):
            return float(tensor.min())
        return None

    def _end(self, found: Product, way: _Way) -> Scores | Decline:
        """The product of queries and keys."""
        if self._mixes(found):
            return _mixed(found.node)
        if found.addend is not None:
            way = way.added(found.addend, found.node, found.beta)
        rank = found.rank
        batch, cells = _places(found, way.order)
        if cells == (rank - 1, rank - 2):
            found = found.swapped()
        elif cells != (rank - 2, rank - 1):
            return Decline("rows of the scores are not those of the product with v", found.node)
        if _is_weight(found.right.node):
            return Decline("keys are a weight of the model", found.node)
        way = way.scaled(found.alpha)
        straight = [*batch, rank - 2, rank - 1]
        q, by_q = self._unscaled(found.left)
        k, by_k = self._unscaled(found.right.transposed())
        return Scores(
            found.node,
            q.reordered(straight),
            k.reordered(straight),
            way.factor * by_q * by_k,
            way.biases,
            way.keeps,
            way.stretches,
            way.heads,
        )

    def _mixes(self, found: Product) -> bool:
        """Whether a product of scores is with what no call decides."""
        operands = found.left.node, found.right.node
        return any(
            _reaches_product(other) and (_is_weight(one) or self.constants.value(one) is not None)
            for one, other in (operands, operands[::-1])
        )

    def _unscaled(self, operand: Strided) -> tuple[Strided, float]:
        """An operand without the constant factor that it was multiplied by last."""
        node = operand.node
        if node.op == "call_function" and node.target in (aten.mul.Tensor, aten.div.Tensor):
            source, number = node.args[0], self.constants.scalar(node.args[1])
            if number and isinstance(source, fx.Node) and _is_whole(source, node):
                divides = node.target is aten.div.Tensor
                return replace(operand, node=source), 1 / number if divides else number
        return operand, 1.0


def scores_of(
    program: Program, node: fx.Node, order: tuple[int, ...] | None = None
) -> Scores | Decline:
    """The scores that a softmax is taken of.

    Args:
        program: the program of the node.
        node: input of the softmax.
        order: the dimension of the node at each place of (..., Nq, Nk); None: as they are.
    """
    return _Walk(program).back(node, _Way(order))


def _places(found: Product, order: tuple[int, ...] | None) -> tuple[list[int], tuple[int, int]]:
    """The dimension of (..., N, M) of a product at each place of the scores (..., Nq, Nk)."""
    have = found.order or tuple(range(found.rank))
    places = [have[place] if place >= 0 else -1 for place in order or range(len(have))]
    for hidden in sorted(set(range(found.rank)) - set(have)):
        if -1 in places:
            places[places.index(-1)] = hidden
    *batch, row, column = places
    return batch, (row, column)


def _is_low_where(bias: Tensor, dropped: Tensor) -> bool:
    """Whether a bias is zero, and as low as a fill where something is dropped."""
    bias, dropped = torch.broadcast_tensors(bias, dropped)
    return bool((bias[dropped] <= _MODEST).all()) and bool((bias[~dropped] == 0).all())


def _is_whole(source: fx.Node, node: fx.Node) -> bool:
    """Whether an operand is as large as the result and of its dtype: it is not broadcast."""
    before, after = source.meta["val"], node.meta["val"]
    same = [str(s) for s in before.shape] == [str(s) for s in after.shape]
    return same and before.dtype == after.dtype


def _is_weight(node: fx.Node) -> bool:
    return peel(node, RESHAPES).op == "get_attr"


def _mixed(node: fx.Node) -> Decline:
    return Decline("heads are mixed between scores and softmax", node)


def _refusal(node: fx.Node) -> Decline:
    """Why the way back ends at a node that attention has not."""
    if node.target is aten.tanh.default:
        return Decline("a soft cap (tanh) stands between scores and softmax", node)
    if node.target in _MIXING and _reaches_product(node):
        return _mixed(node)
    name = str(node.target).removesuffix(".default")
    return Decline(f"softmax is not of a product of queries and keys, but of {name}", node)


def _reaches_product(node: fx.Node) -> bool:
    """Whether the scores lie behind operations that reorder, scale or mix them."""
    for _ in range(_NEAR):
        if (found := product(node)) is not None and not _is_weight(found.right.node):
            return True
        inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
        passes = is_noop(node) or is_cast(node) or node.target in VIEWS or node.target in _MIXING
        if not inputs or not (passes or node.target in (aten.mul.Tensor, aten.div.Tensor)):
            return False
        node = inputs[0]
    return False
