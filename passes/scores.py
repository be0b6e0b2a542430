"""From a softmax back to the product of queries and keys, over scales, masks, casts and views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.dataflow import CASTS, RESHAPES, Constants, is_closed, is_noop, peel, sizes
from fxpress.passes.products import Product, Strided, product
from fxpress.program import Program
from fxpress.rewrite import Decline

__all__ = ["Bias", "Keep", "Scores", "is_cast", "is_view", "scores_of"]

aten = torch.ops.aten

_VIEWS = {
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
_NEAR = 8  # operations behind one that mixes heads within which the scores are looked for


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes the dtype between two floating-point ones."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or node.target not in CASTS or not isinstance(source, fx.Node):
        return False
    return bool(node.meta["val"].is_floating_point() and source.meta["val"].is_floating_point())


def is_view(node: fx.Node) -> bool:
    """Whether a node merges or splits leading dimensions and leaves the last two alone."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or node.target not in _VIEWS or not isinstance(source, fx.Node):
        return False
    before, after = source.meta["val"].shape, node.meta["val"].shape
    return len(before) > 1 and [str(s) for s in before[-2:]] == [str(s) for s in after[-2:]]


@dataclass(frozen=True)
class Bias:
    """factor * node, added to scores of `rank` dimensions."""

    node: fx.Node
    rank: int
    factor: float


@dataclass(frozen=True)
class Keep:
    """Scores of `rank` dimensions are `fill` where `node` is False (True, where negated)."""

    node: fx.Node
    rank: int
    negated: bool
    fill: float


@dataclass(frozen=True)
class Scores:
    """What goes into a softmax: scale * q @ k^T, masked.

    Attributes:
        product: the product of queries and keys.
        q: (..., Nq, D).
        k: (..., Nk, D).
        scale: factor of the product.
        biases: what is added.
        keeps: what is kept.
        heads: H, where a view on the way shows it.
    """

    product: Product
    q: Strided
    k: Strided
    scale: float
    biases: tuple[Bias, ...] = ()
    keeps: tuple[Keep, ...] = ()
    heads: int | None = None

    def mask(self, program: Program, heads: int, dtype: torch.dtype) -> fx.Node | None:
        """Build one mask, boolean or of `dtype`, that broadcasts to (B, H, Nq, Nk)."""
        graph = program.graph
        bias = _sum_of([_bias(graph, bias, heads, dtype) for bias in self.biases], graph)
        kept = [_keep(graph, keep, heads) for keep in self.keeps]
        program.refresh()
        if bias is None and self._is_boolean(program, kept):
            return _all_of(graph, kept)
        for node, keep in zip(kept, self.keeps, strict=True):
            bias = _where(graph, node, bias, _fill(keep.fill, dtype), dtype)
        return bias

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
    return fill if math.isinf(fill) else max(fill, torch.finfo(dtype).min)


def _four(graph: fx.Graph, node: fx.Node, rank: int, heads: int) -> fx.Node:
    """A mask of merged scores as one of (B, H, Nq, Nk); what broadcasts anyway stays."""
    ndim = node.meta["val"].ndim
    if ndim == 3 and rank == 3 and sizes(node)[0] != 1:
        return graph.call_function(aten.unflatten.int, (node, 0, [-1, heads]))
    for _ in range({0: 2, 1: 1, 3: 1}.get(ndim, 0)):
        node = graph.call_function(aten.unsqueeze.default, (node, 0))
    return node


def _bias(graph: fx.Graph, bias: Bias, heads: int, dtype: torch.dtype) -> fx.Node:
    node = _four(graph, bias.node, bias.rank, heads)
    if bias.node.meta["val"].dtype != dtype:
        node = graph.call_function(aten.to.dtype, (node, dtype))
    if bias.factor != 1.0:
        node = graph.call_function(aten.mul.Tensor, (node, bias.factor))
    return node


def _keep(graph: fx.Graph, keep: Keep, heads: int) -> fx.Node:
    node = _four(graph, keep.node, keep.rank, heads)
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
    """What was met on the way from the softmax."""

    factor: float = 1.0
    biases: tuple[Bias, ...] = ()
    keeps: tuple[Keep, ...] = ()
    heads: int | None = None

    def scaled(self, factor: float) -> _Way:
        return replace(self, factor=self.factor * factor)

    def added(self, node: fx.Node, rank: int, factor: float = 1.0) -> _Way:
        bias = Bias(node, rank, self.factor * factor)
        return replace(self, biases=(*self.biases, bias))

    def kept(self, keep: Keep) -> _Way:
        return replace(self, keeps=(*self.keeps, keep))

    def seen(self, node: fx.Node) -> _Way:
        shape = sizes(node)
        return replace(self, heads=shape[1]) if len(shape) == 4 and self.heads is None else self


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
            if is_noop(node) or is_cast(node) or is_view(node):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                node = source
                continue
            if (found := product(node)) is not None:
                return self._end(found, way)
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
        return _refusal(node)

    def _scale(self, node: fx.Node, way: _Way) -> tuple[fx.Node, _Way] | Decline:
        left, right = node.args
        divides = node.target is aten.div.Tensor
        for chain, other in ((left, right), (right, left))[: 1 if divides else 2]:
            number = self.constants.scalar(other)
            if number and isinstance(chain, fx.Node) and _is_whole(chain, node):
                return chain, way.scaled(1 / number if divides else number)
        return Decline("scores are scaled by something that is not a constant number", node)

    def _add(self, node: fx.Node, way: _Way) -> Scores | Decline:
        """Either addend may be the scores; the other one is a mask."""
        nearest: Decline | None = None
        left, right = node.args
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        for chain, other in ((left, right), (right, left))[: 1 if sign < 0 else 2]:
            if not isinstance(chain, fx.Node) or not _is_whole(chain, node):
                continue
            if not isinstance(other, fx.Node):
                return self.back(chain, way)  # a number shifts all scores alike
            found = self.back(chain, way.added(other, node.meta["val"].ndim, sign))
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
            negated = self.constants.scalar(filled) is None
            if negated:
                chain, filled = filled, chain
        number = self._filling(filled)
        dtype = node.meta["val"].dtype
        if number is None or not is_closed(number, dtype) or way.factor <= 0:
            return Decline("masked scores are filled with more than minus infinity", node)
        if not isinstance(chain, fx.Node) or not _is_whole(chain, node):
            return _refusal(node)
        assert isinstance(condition, fx.Node)
        return chain, way.kept(Keep(condition, node.meta["val"].ndim, negated, number))

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
        if refused := _no_scores(found):
            return refused
        rank = found.node.meta["val"].ndim
        if found.addend is not None:
            way = way.added(found.addend, rank, found.beta)
        way = way.scaled(found.alpha)
        ranks = [bias.rank for bias in way.biases] + [keep.rank for keep in way.keeps]
        if max(ranks, default=0) > 4:
            return Decline("a mask is applied in more than four dimensions", found.node)
        q, by_q = self._unscaled(found.left)
        k, by_k = self._unscaled(found.right.transposed())
        scale = way.factor * by_q * by_k
        return Scores(found, q, k, scale, way.biases, way.keeps, way.heads)

    def _unscaled(self, operand: Strided) -> tuple[Strided, float]:
        """An operand without the constant factor that it was multiplied by last."""
        node = operand.node
        if node.op == "call_function" and node.target in (aten.mul.Tensor, aten.div.Tensor):
            source, number = node.args[0], self.constants.scalar(node.args[1])
            if number and isinstance(source, fx.Node) and _is_whole(source, node):
                divides = node.target is aten.div.Tensor
                return replace(operand, node=source), 1 / number if divides else number
        return operand, 1.0


def scores_of(program: Program, node: fx.Node) -> Scores | Decline:
    """The scores that a softmax is taken of.

    Args:
        program: the program of the node.
        node: input of the softmax.
    """
    return _Walk(program).back(node, _Way())


def _is_whole(source: fx.Node, node: fx.Node) -> bool:
    """Whether an operand is as large as the result and of its dtype: it is not broadcast."""
    before, after = source.meta["val"], node.meta["val"]
    same = [str(s) for s in before.shape] == [str(s) for s in after.shape]
    return same and before.dtype == after.dtype


def _no_scores(found: Product) -> Decline | None:
    """Why a product is none of queries and keys."""
    if found.order is not None:
        return Decline("scores are transposed between their product and softmax", found.node)
    left, right = (_is_weight(operand.node) for operand in (found.left, found.right))
    if left or right:
        other = found.right.node if left else found.left.node
        if _reaches_product(other):
            return _mixed(found.node)
    if right:
        return Decline("scores are a product with a weight, not of queries and keys", found.node)
    return None


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
        passes = is_noop(node) or is_cast(node) or node.target in _VIEWS or node.target in _MIXING
        if not inputs or not (passes or node.target in (aten.mul.Tensor, aten.div.Tensor)):
            return False
        node = inputs[0]
    return False
