"""Batched matrix products in one form, whatever operator they were written with.

matmul, bmm, baddbmm, einsum  ->  left (..., N, K) x right (..., K, M) -> (..., N, M)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxpress.passes.dataflow import argument

__all__ = ["Product", "Strided", "emit", "product"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Strided:
    """A node with its dimensions in another order; `order` None: as they are."""

    node: fx.Node
    order: tuple[int, ...] | None = None

    def transposed(self) -> Strided:
        """The last two dimensions exchanged."""
        rank = self.node.meta["val"].ndim
        order = list(self.order or range(rank))
        order[-1], order[-2] = order[-2], order[-1]
        if order == list(range(rank)):
            return Strided(self.node)
        if self.order is None and (source := _transpose_source(self.node)) is not None:
            return Strided(source)
        return Strided(self.node, tuple(order))

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes in that order."""
        shape = tuple(self.node.meta["val"].shape)
        return shape if self.order is None else tuple(shape[d] for d in self.order)


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
    """The node of an operand, with a permutation where it needs one."""
    if operand.order is None:
        return operand.node
    return graph.call_function(aten.permute.default, (operand.node, list(operand.order)))


@dataclass(frozen=True)
class Product:
    """A batched product alpha (left x right) + beta addend.

    Attributes:
        node: the call.
        left: (..., N, K).
        right: (..., K, M).
        order: the dimension of (..., N, M) at each place of the result; None: as they are.
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

    def swapped(self) -> Product:
        """The same product of the transposed operands: (..., M, N)."""
        rank = self.node.meta["val"].ndim
        order = list(self.order or range(rank))
        position = [*range(rank - 2), rank - 1, rank - 2]
        order = [position[d] for d in order]
        left, right = self.right.transposed(), self.left.transposed()
        kept = None if order == list(range(rank)) else tuple(order)
        return replace(self, left=left, right=right, order=kept)


def product(node: fx.Node) -> Product | None:
    """The product that a node computes, or None."""
    if node.op != "call_function":
        return None
    if node.target in (aten.matmul.default, aten.bmm.default):
        left, right = (Strided(n) for n in node.args[:2] if isinstance(n, fx.Node))
        ranks = {o.node.meta["val"].ndim for o in (left, right)}
        return Product(node, left, right) if min(ranks) >= 2 else None
    if node.target is aten.baddbmm.default:
        return _baddbmm(node)
    return _einsum(node) if node.target is aten.einsum.default else None


def _baddbmm(node: fx.Node) -> Product:
    addend, left, right = (n for n in node.args[:3] if isinstance(n, fx.Node))
    beta, alpha = (float(argument(node, i, name, 1)) for i, name in ((3, "beta"), (4, "alpha")))
    operands = Strided(left), Strided(right)
    return Product(node, *operands, None, alpha, addend if beta else None, beta)


def _einsum(node: fx.Node) -> Product | None:
    """An einsum of two operands with batch labels, one free label each and one summed one."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2 or "." in equation:
        return None
    inputs, _, output = equation.partition("->")
    first, _, second = inputs.partition(",")
    batch = [x for x in output if x in first and x in second]
    rows, columns = (
        [x for x in output if x in a and x not in b] for a, b in ((first, second), (second, first))
    )
    summed = [x for x in first if x in second and x not in output]
    labels = {*batch, *rows, *columns, *summed}
    plain = len(set(first)) == len(first) and len(set(second)) == len(second)
    counts = (len(rows), len(columns), len(summed))
    if not plain or counts != (1, 1, 1) or labels != set(first) | set(second):
        return None
    left, right = operands
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    canonical = [*batch, *rows, *columns]
    return Product(
        node,
        Strided(left, _order(first, [*batch, *rows, *summed])),
        Strided(right, _order(second, [*batch, *summed, *columns])),
        _order("".join(canonical), list(output)),
    )


def _order(have: str, want: list[str]) -> tuple[int, ...] | None:
    order = tuple(have.index(label) for label in want)
    return None if order == tuple(range(len(have))) else order
