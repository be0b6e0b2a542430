"""From a softmax back to the product of queries and keys, over scales, masks, casts and views."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.dataflow import (
    RESHAPES,
    Constants,
    argument,
    is_closed,
    is_noop,
    peel,
)
from fxpress.passes.indicators import affine, is_indicator, value_key
from fxpress.passes.layouts import Placed
from fxpress.passes.products import Product, Strided, product
from fxpress.passes.scores import Bias, Keep, Scores, Stretch
from fxpress.passes.softmax import Softmax, is_cast
from fxpress.passes.views import VIEWS, is_view, turned
from fxpress.program import Program, captured, same_sizes
from fxpress.rewrite import Decline

__all__ = ["FILLS", "Way", "filled", "is_whole", "scores_of"]

aten = torch.ops.aten

_WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}
_MASKED_FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
FILLS = _WHERE | _MASKED_FILL
_MIXING = {aten.linear.default, aten.permute.default, aten.transpose.int, aten.conv2d.default}
_FLOORS = {aten.maximum.default, aten.max.other, aten.clamp_min.default, aten.clamp.default}
_MODEST = -1e4  # scores come nowhere near it: float16 could hardly hold them
_NEAR = 8  # operations behind one that mixes heads within which the scores are looked for


@dataclass(frozen=True)
class Way:
    """What was met on the way from the softmax.

    Attributes:
        order: the dimension of the node reached at each place of (..., Nq, Nk), -1 where it has
            none; None: as they are.
        whole: sizes of the scores before queries and keys were split; None where they are not.
        factor: numbers that the scores are multiplied by.
        biases, keeps, stretches, heads: as in `Scores`.
        settled: whether what is no number was made zero.
    """

    order: tuple[int, ...] | None
    whole: tuple[int, ...] | None = None
    factor: float = 1.0
    biases: tuple[Bias, ...] = ()
    keeps: tuple[Keep, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    heads: int | None = None
    settled: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the node reached has the dimensions of the scores."""
        return self.order is None and self.whole is None

    def viewed(self, node: fx.Node) -> Way | None:
        """The way behind a view that splits or merges queries and keys; None where it ends.

        One size may be dynamic, the first: what broadcasts along it is left to do so.
        """
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, after = (tuple(n.meta["val"].shape) for n in (source, node))
        dynamic = [s for s in (*before, *after) if not isinstance(s, int)]
        is_first = [str(s) for s in dynamic] == [str(s[0]) for s in (before, after)]
        if self.order is not None or (dynamic and (not is_first or len({*map(str, dynamic)}) > 1)):
            return None
        whole = self.whole or after
        same = [str(s) for s in before] == [str(s) for s in whole]
        return replace(self, whole=None if same else whole)

    def scaled(self, factor: float) -> Way:
        """The way behind a number that multiplies."""
        return replace(self, factor=self.factor * factor)

    def placed(self, tensor: fx.Node, at: fx.Node) -> Placed:
        """A tensor that is applied to the scores `at`."""
        shape = tuple(at.meta["val"].shape)
        if self.whole is not None:
            return Placed(tensor, self.whole[:-2], None, shape, self.whole[-2:])
        order = self.order or tuple(range(len(shape)))
        return Placed(tensor, tuple(shape[d] if d >= 0 else 1 for d in order[:-2]), self.order)

    def added(self, node: fx.Node, at: fx.Node, factor: float = 1.0) -> Way:
        """The way behind something that is added."""
        bias = Bias(self.placed(node, at), self.factor * factor, self.stretches)
        return replace(self, biases=(*self.biases, bias))

    def kept(self, keep: Keep) -> Way:
        """The way behind a mask that fills."""
        return replace(self, keeps=(*self.keeps, keep))

    def stretched(self, stretch: Stretch) -> Way:
        """The way behind a tensor that multiplies."""
        return replace(self, stretches=(*self.stretches, stretch))

    def seen(self, node: fx.Node) -> Way:
        """The way at a node that may show the number of heads."""
        shape = node.meta["val"].shape
        if len(shape) != 4 or self.heads is not None or self.whole is not None:
            return self
        order = self.order or (0, 1, 2, 3)
        if len(order) != 4 or order[1] < 0:
            return self
        return replace(self, heads=captured(shape[order[1]]))


Step = Callable[[fx.Node, Way], "tuple[fx.Node, Way] | Scores | Decline"]


@dataclass
class _Walk:
    """A walk back through one program."""

    program: Program
    constants: Constants = field(init=False)
    _steps: dict[frozenset[Any], Step] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.constants = Constants(self.program)
        self._steps = {
            frozenset({aten.mul.Tensor, aten.div.Tensor}): self._scale,
            frozenset({aten.add.Tensor, aten.sub.Tensor}): self._add,
            frozenset(FILLS): self._fill,
            frozenset({aten.index_put.default}): self._put,
            frozenset(_FLOORS): self._floor,
            frozenset({aten.slice_scatter.default}): self._written,
        }

    def back(self, node: fx.Node, way: Way) -> Scores | Decline:
        """Follow the scores back to their product."""
        while True:
            way = way.seen(node)
            if is_noop(node) or is_cast(node) or (is_view(node) and way.is_plain):
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

    def _step(self, node: fx.Node, way: Way) -> tuple[fx.Node, Way] | Scores | Decline:
        """One scale or mask further back."""
        if node.op != "call_function":
            return _refusal(node)
        if node.target is aten.neg.default and isinstance(node.args[0], fx.Node):
            return node.args[0], way.scaled(-1.0)
        for targets, step in self._steps.items():
            if node.target in targets:
                return step(node, way)
        return _refusal(node)

    def _scale(self, node: fx.Node, way: Way) -> tuple[fx.Node, Way] | Scores | Decline:
        """A number, or a tensor that queries or keys can be multiplied by instead."""
        left, right = node.args
        divides = node.target is aten.div.Tensor
        nearest = Decline("scores are scaled by a tensor that differs by query and key", node)
        sides = ((left, right), (right, left))[: 1 if divides else 2]
        for chain, other in sides:
            number = self.constants.scalar(other)
            if number and isinstance(chain, fx.Node) and is_whole(chain, node):
                return chain, way.scaled(1 / number if divides else number)
        for chain, other in sides:
            if not isinstance(chain, fx.Node) or not is_whole(chain, node):
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

    def _cut(self, node: fx.Node, kept: fx.Node, way: Way) -> Way | None:
        """What is kept in scores * m + (1 - m) * low, with m of zeros and ones."""
        if not is_indicator(kept, self.constants):
            return None
        for bias in way.biases:
            if not bias.stretches and self._is_low_where_dropped(bias, kept):
                rest = tuple(other for other in way.biases if other is not bias)
                keep = Keep(way.placed(kept, node), False, _MODEST)
                return replace(way, biases=rest).kept(keep)
        return None

    def _is_low_where_dropped(self, bias: Bias, kept: fx.Node) -> bool:
        """Whether a bias is zero where m is one, and as low as a fill where m is zero."""
        low, ones = (self.constants.value(n) for n in (bias.tensor.node, kept))
        if isinstance(low, Tensor) and isinstance(ones, Tensor):
            return _is_low_where(low * bias.factor, ones == 0)
        of, slope, offset = affine(bias.tensor.node, self.constants)
        dropped, remaining = offset * bias.factor, (offset + slope) * bias.factor
        return of == value_key(kept) and dropped <= _MODEST and remaining == 0.0

    def _add(self, node: fx.Node, way: Way) -> Scores | Decline:
        """Either addend may be the scores; the other one is a mask."""
        nearest: Decline | None = None
        left, right = node.args
        sign = float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
        sign = -sign if node.target is aten.sub.Tensor else sign
        for chain, other, by, of_other in ((left, right, 1.0, sign), (right, left, sign, 1.0)):
            if not isinstance(chain, fx.Node) or not is_whole(chain, node):
                continue
            if not isinstance(other, fx.Node):
                return self.back(chain, way.scaled(by))  # a number shifts all scores alike
            found = self.back(chain, way.added(other, node, of_other).scaled(by))
            if isinstance(found, Scores):
                return found
            nearest = nearest or found
        return nearest or _refusal(node)

    def _fill(self, node: fx.Node, way: Way) -> tuple[fx.Node, Way] | Decline:
        chain, keep = filled(node, way, self.constants)
        if keep is None:
            return Decline("masked scores are filled with more than minus infinity", node)
        if way.stretches:
            return Decline("masked scores are scaled by a tensor", node)
        # A bias that is added to what was filled could be as low as a modest fill.
        closed = is_closed(keep.fill, node.meta["val"].dtype)
        low = closed or (keep.fill <= _MODEST and not way.biases)
        if not low or way.factor <= 0:
            return Decline("masked scores are filled with more than minus infinity", node)
        return (chain, way.kept(keep)) if chain is not None else _refusal(node)

    def _put(self, node: fx.Node, way: Way) -> tuple[fx.Node, Way] | Decline:
        """A number put where a condition on the last dimensions says so."""
        given: Any = node.args
        chain, (*before, last), value = given[:3]
        number, rank = _filling(value, self.constants), chain.meta["val"].ndim
        is_mask = isinstance(last, fx.Node) and last.meta["val"].dtype == torch.bool
        whole = not any(before) and is_mask and len(before) + last.meta["val"].ndim == rank
        if not whole or number is None or not is_closed(number, node.meta["val"].dtype):
            return _refusal(node)
        if way.stretches or way.factor <= 0:
            return Decline("masked scores are scaled by a tensor", node)
        return chain, way.kept(Keep(way.placed(last, node), True, number))

    def _written(self, node: fx.Node, way: Way) -> tuple[fx.Node, Way] | Decline:
        """What was written over all of the scores in place."""
        chain = node.args[1]
        assert isinstance(chain, fx.Node)
        return (chain, way) if is_whole(chain, node) else _refusal(node)

    def _floor(self, node: fx.Node, way: Way) -> tuple[fx.Node, Way] | Decline:
        """A lower bound that no score falls below, unless it was dropped."""
        chain, bound = node.args[:2]
        number = _filling(bound, self.constants)
        capped = node.target is aten.clamp.default and argument(node, 2, "max") is not None
        if capped or number is None or not is_closed(number, node.meta["val"].dtype):
            return _refusal(node)
        assert isinstance(chain, fx.Node)
        return (chain, way) if is_whole(chain, node) else _refusal(node)

    def _end(self, found: Product, way: Way) -> Scores | Decline:
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
            if number and isinstance(source, fx.Node) and is_whole(source, node):
                divides = node.target is aten.div.Tensor
                return replace(operand, node=source), 1 / number if divides else number
        return operand, 1.0


def scores_of(program: Program, softmax: Softmax, way: Way) -> Scores | Decline:
    """The scores that a softmax is taken of.

    Args:
        program: the program of the softmax.
        softmax: the softmax.
        way: the way to it; only its dimensions count.
    """
    walk, way = _Walk(program), Way(way.order, way.whole, softmax.factor)
    if softmax.cut is None:
        return walk.back(softmax.scores, way)
    keep = _cut_by(softmax.cut, way, walk.constants)
    if keep is None:
        return Decline("exponentials are changed before they are summed", softmax.node)
    return walk.back(softmax.scores, way.kept(replace(keep, fill=-math.inf)))


def _cut_by(cut: fx.Node, way: Way, constants: Constants) -> Keep | None:
    """What is kept where exponentials are set to zero."""
    if cut.target in FILLS:
        return filled(cut, way, constants, 0.0)[1]
    by = [n for n in cut.args if is_indicator(n, constants)]
    return Keep(way.placed(by[0], cut), False, 0.0) if len(by) == 1 else None  # type: ignore[arg-type]


def _places(found: Product, order: tuple[int, ...] | None) -> tuple[list[int], tuple[int, int]]:
    """The dimension of (..., N, M) of a product at each place of the scores (..., Nq, Nk)."""
    have = found.order or tuple(range(found.rank))
    places = [have[place] if place >= 0 else -1 for place in order or range(len(have))]
    for hidden in sorted(set(range(found.rank)) - set(have)):
        if -1 in places:
            places[places.index(-1)] = hidden
    *batch, row, column = places
    return batch, (row, column)


def filled(
    node: fx.Node, way: Way, constants: Constants, by: float | None = None
) -> tuple[fx.Node | None, Keep | None]:
    """What a number fills where a condition says so, and the condition; None where none does.

    Args:
        node: a call of `masked_fill` or `where`.
        way: the way to it.
        constants: of its program.
        by: the number, where only one counts.
    """
    if node.target in _MASKED_FILL:
        chain, condition, other = node.args
        negated = True
    else:
        condition, chain, other = node.args
        number = _filling(other, constants)
        negated = number is None or (by is not None and number != by)
        if negated:
            chain, other = other, chain
    number = _filling(other, constants)
    if number is None or by not in (None, number):
        return None, None
    assert isinstance(condition, fx.Node)
    keep = Keep(way.placed(condition, node), negated, number)
    return (chain if isinstance(chain, fx.Node) and is_whole(chain, node) else None), keep


def _filling(value: Any, constants: Constants) -> float | None:
    """A number, or a constant tensor that holds one number only."""
    if (number := constants.scalar(value)) is not None:
        return number
    tensor = constants.value(value) if isinstance(value, fx.Node) else None
    if isinstance(tensor, Tensor) and tensor.numel() and bool((tensor == tensor.min()).all()):
        return float(tensor.min())
    return None


def _is_low_where(bias: Tensor, dropped: Tensor) -> bool:
    """Whether a bias is zero, and as low as a fill where something is dropped."""
    bias, dropped = torch.broadcast_tensors(bias, dropped)
    return bool((bias[dropped] <= _MODEST).all()) and bool((bias[~dropped] == 0).all())


def is_whole(source: fx.Node, node: fx.Node) -> bool:
    """Whether an operand is as large as the result and of its dtype: it is not broadcast."""
    before, after = source.meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype) and same_sizes(before, after)


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
