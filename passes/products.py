"""Batched matrix products in one form, whatever operator they were written with.

matmul, bmm, baddbmm, addmm, einsum, linear, inner, tensordot, (a[..., None] * b).sum
  ->  left (..., N, K) x right (..., K, M) -> (..., N, M)
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.dataflow import argument, is_noop, sizes

__all__ = ["Product", "Strided", "emit", "labels", "product", "unless_sorted"]

aten = torch.ops.aten

_ROW, _COLUMN = "1", "2"  # labels of one row or column that an operand has beside its own
_ONES = {_ROW, _COLUMN}


@dataclass(frozen=True)
class Strided:
    """A node with its dimensions in another order; `order` None: as they are.

    A dimension of -1 in the order is one of size one that the node does not have.
    """

    node: fx.Node
    order: tuple[int, ...] | None = None

    def transposed(self) -> Strided:
        """The last two dimensions exchanged."""
        if self.order is None and (source := _transpose_source(self.node)) is not None:
            return Strided(source)
        rank = len(self.shape)
        return self.reordered((*range(rank - 2), rank - 1, rank - 2))

    def reordered(self, dims: Sequence[int]) -> Strided:
        """Dimension `dims[i]` of this one at place i; -1: a new one of size one."""
        have = self.order or tuple(range(self.node.meta["val"].ndim))
        return Strided(self.node, unless_sorted(have[d] if d >= 0 else -1 for d in dims))

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes in that order."""
        shape = tuple(self.node.meta["val"].shape)
        return shape if self.order is None else tuple(shape[d] if d >= 0 else 1 for d in self.order)


def unless_sorted(order: Iterable[int]) -> tuple[int, ...] | None:
    """An order of dimensions, or None where it leaves all as they are."""
    found = tuple(order)
    return None if found == tuple(range(len(found))) else found


def _unless_whole(order: Sequence[int], rank: int) -> tuple[int, ...] | None:
    """An order of dimensions, or None where it is all of them as they are."""
    return tuple(order) if len(order) < rank else unless_sorted(order)


def _transpose_source(node: fx.Node) -> fx.Node | None:
    """What a node is with its last two dimensions exchanged."""
    source, rank = node.args[0] if node.args else None, node.meta["val"].ndim
    if not isinstance(source, fx.Node):
        return None
    flat = rank == 2 and node.target in (aten.t.default, aten.numpy_T.default)
    if flat or node.target is aten.mT.default:
        return source
    if node.target is aten.transpose.int:
        dims = {dim % rank for dim in node.args[1:] if isinstance(dim, int)}
        return source if dims == {rank - 2, rank - 1} else None
    return None


def emit(graph: fx.Graph, operand: Strided) -> fx.Node:
    """The node of an operand, with the permutation and the dimensions of one that it needs."""
    node, order = operand.node, operand.order
    if order is None:
        return node
    held = [dim for dim in order if dim >= 0]
    if held != sorted(held):
        node = graph.call_function(aten.permute.default, (node, held))
    for place, dim in enumerate(order):
        if dim < 0:
            node = graph.call_function(aten.unsqueeze.default, (node, place))
    return node


@dataclass(frozen=True)
class Product:
    """A batched product alpha (left x right) + beta addend.

    Attributes:
        node: the call.
        left: (..., N, K).
        right: (..., K, M).
        order: the dimension of (..., N, M) at each place of the result, which has not the one of
            a single row or column that no letter names; None: as they are.
        alpha: factor of the product.
        addend: what is added, or None.
        beta: factor of the addend.
    """

    node: fx.Node
    left: Strided
    right: Strided
    order: tuple[int, ...] | None = None
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 1.0

    @property
    def rank(self) -> int:
        """Number of dimensions of (..., N, M)."""
        return len(self.left.shape)

    @property
    def hides(self) -> bool:
        """Whether the result does not show a single row or column."""
        return self.order is not None and len(self.order) < self.rank

    def swapped(self) -> Product:
        """The same product of the transposed operands: (..., M, N)."""
        position = [*range(self.rank - 2), self.rank - 1, self.rank - 2]
        order = _unless_whole([position[d] for d in self.order or range(self.rank)], self.rank)
        left, right = self.right.transposed(), self.left.transposed()
        return replace(self, left=left, right=right, order=order)


def product(node: fx.Node) -> Product | None:
    """The product that a node computes, or None."""
    if node.op != "call_function":
        return None
    made = next((make for targets, make in _PRODUCTS if node.target in targets), None)
    return None if made is None else made(node)


def _matmul(node: fx.Node) -> Product | None:
    operands = [n for n in node.args[:2] if isinstance(n, fx.Node)]
    ranks = [n.meta["val"].ndim for n in operands]
    if min(ranks) < 2:
        return None
    # The operand of fewer dimensions is broadcast.
    left, right = (
        Strided(n, unless_sorted([-1] * (max(ranks) - rank) + list(range(rank))))
        for n, rank in zip(operands, ranks, strict=True)
    )
    return Product(node, left, right)


def _added(node: fx.Node) -> Product:
    addend, left, right = (n for n in node.args[:3] if isinstance(n, fx.Node))
    beta, alpha = (float(argument(node, i, name, 1)) for i, name in ((3, "beta"), (4, "alpha")))
    operands = Strided(left), Strided(right)
    return Product(node, *operands, None, alpha, addend if beta else None, beta)


def _by_rows(node: fx.Node) -> Product | None:
    """linear(x, W, b), inner(x, W): x (N, K), W (M, K), both computed."""
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if (left.meta["val"].ndim, right.meta["val"].ndim) != (2, 2) or right.op == "get_attr":
        return None
    addend = argument(node, 2, "bias")
    return Product(node, Strided(left), Strided(right).transposed(), addend=addend)


def _tensordot(node: fx.Node) -> Product | None:
    """tensordot(a, b) of two matrices over one dimension of each."""
    left, right, over, by = node.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    dims = [[int(dim) % 2 for dim in part] for part in (over, by)]  # type: ignore[union-attr, arg-type]
    if (left.meta["val"].ndim, right.meta["val"].ndim) != (2, 2) or any(len(d) != 1 for d in dims):
        return None
    (summed,), (shared,) = dims
    return Product(
        node,
        Strided(left, unless_sorted((1 - summed, summed))),
        Strided(right, unless_sorted((shared, 1 - shared))),
    )


def _einsum(node: fx.Node) -> Product | None:
    """An einsum of two operands that share one summed label."""
    operands = node.args[1]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    left, right = operands
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _labelled(node, left, right, *labels(str(node.args[0]), left, right))


def _labelled(
    node: fx.Node, left: fx.Node, right: fx.Node, first: str, second: str, output: str
) -> Product | None:
    """The product of two operands whose dimensions have labels, of which one is summed.

    Labels that one operand alone has are rows or columns; of several, the one that counts most is
    it, and the others are batch (heads that share their keys). Where one operand has none, it has
    one row that the result does not show, or shows as `_ROW` or `_COLUMN`.
    """
    own = [x for x in first + second if x not in _ONES]
    repeated = any(len(set(part)) != len(part) for part in (first, second, output))
    summed = {x for x in first if x in second and x not in output}
    if repeated or len(summed) != 1 or {*own} != {*output, *summed} - _ONES:
        return None
    size = dict(zip(output, sizes(node), strict=True))
    row, column = (
        max((x for x in output if x in a and x not in b), key=lambda x: size[x], default=one)
        for a, b, one in ((first, second, _ROW), (second, first, _COLUMN))
    )
    if {row, column} == _ONES or {*first, *second, *output} & _ONES - {row, column}:
        return None
    batch = [x for x in output if x not in (row, column)]
    return Product(
        node,
        Strided(left, _order(first, [*batch, row, *summed])),
        Strided(right, _order(second, [*batch, *summed, column])),
        _unless_whole([[*batch, row, column].index(x) for x in output], len(batch) + 2),
    )


def _summed(node: fx.Node) -> Product | None:
    """sum(a * b) or mean(a * b) over one dimension, of factors that broadcast."""
    of, dims = node.args[:2]
    assert isinstance(of, fx.Node)
    of, alpha = _without_numbers(of)
    factors = [n for n in of.args if isinstance(n, fx.Node) and isinstance(n.meta["val"], Tensor)]
    if of.target is not aten.mul.Tensor or len(factors) != 2 or node.kwargs:
        return None
    one_type = len({n.meta["val"].dtype for n in (node, *factors)}) == 1
    if not one_type or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    shape = [str(size) for size in of.meta["val"].shape]
    names, place = string.ascii_lowercase[: len(shape)], int(dims[0]) % len(shape)  # type: ignore[arg-type]
    (left, first), (right, second) = (_spread(factor, names) for factor in factors)
    has, other = _named(left, first), _named(right, second)
    summed = names[place]
    whole = all(size in (has.get(x), other.get(x)) for x, size in zip(names, shape, strict=True))
    if not whole or has.get(summed) != other.get(summed):
        return None
    first = _with_one(first, second, has, _ROW)
    second = _with_one(second, first, other, _COLUMN)
    shown = ""
    if argument(node, 2, "keepdim", False):
        shown = _COLUMN if {*first} - {*second, _ROW} else _ROW
    found = _labelled(node, left, right, first, second, names.replace(summed, shown))
    if node.target is aten.sum.dim_IntList or found is None:
        return None if found is None else replace(found, alpha=alpha)
    count = of.meta["val"].shape[place]
    return replace(found, alpha=alpha / count) if isinstance(count, int) else None


def _without_numbers(node: fx.Node) -> tuple[fx.Node, float]:
    """A product of tensors behind the numbers that it is multiplied by, and these."""
    alpha = 1.0
    while node.target in (aten.mul.Tensor, aten.div.Tensor) and len(node.args) == 2:
        source, number = node.args
        if not isinstance(number, (int, float)) or not number or not isinstance(source, fx.Node):
            break
        node, alpha = source, alpha * (number if node.target is aten.mul.Tensor else 1 / number)
    return node, alpha


def _spread(node: fx.Node, names: str) -> tuple[fx.Node, str]:
    """A factor without the dimensions that it has only to broadcast, and the names of the rest."""
    kept = names[len(names) - node.meta["val"].ndim :]
    while is_noop(node) or node.target in (aten.unsqueeze.default, aten.expand.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target is aten.unsqueeze.default:
            place = int(node.args[1]) % len(kept)  # type: ignore[arg-type]
            kept = kept[:place] + kept[place + 1 :]
        kept = kept[len(kept) - source.meta["val"].ndim :]
        node = source
    return node, kept


def _named(node: fx.Node, names: str) -> dict[str, str]:
    return dict(zip(names, map(str, node.meta["val"].shape), strict=True))


def _with_one(mine: str, other: str, size: dict[str, str], one: str) -> str:
    """Names of a factor without rows of its own: a dimension of one stands for them."""
    spare = next((x for x in mine if size[x] == "1"), "")
    return mine if {*mine} - {*other} or not spare else mine.replace(spare, one)


def labels(equation: str, left: fx.Node, right: fx.Node) -> tuple[str, str, str]:
    """Labels of both operands and of the result, one letter a dimension."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow:
        once = sorted(x for x in {*inputs} - {*".,"} if inputs.count(x) == 1)
        output = "..." * ("..." in inputs) + "".join(once)
    spare = [x for x in string.ascii_uppercase if x not in equation]
    spans = [
        n.meta["val"].ndim - len(part.replace("...", ""))
        for n, part in zip((left, right), parts, strict=True)
    ]
    whole = spare[: max(spans)]
    first, second = (
        part.replace("...", "".join(whole[len(whole) - span :]))
        for part, span in zip(parts, spans, strict=True)
    )
    return first, second, output.replace("...", "".join(whole))


def _order(have: str, want: list[str]) -> tuple[int, ...] | None:
    return unless_sorted(have.find(label) if label else -1 for label in want)


_PRODUCTS: tuple[tuple[set[Any], Callable[[fx.Node], Product | None]], ...] = (
    ({aten.matmul.default, aten.bmm.default, aten.mm.default}, _matmul),
    ({aten.baddbmm.default, aten.addmm.default}, _added),
    ({aten.linear.default, aten.inner.default}, _by_rows),
    ({aten.tensordot.default}, _tensordot),
    ({aten.einsum.default}, _einsum),
    ({aten.sum.dim_IntList, aten.mean.dim}, _summed),
)
