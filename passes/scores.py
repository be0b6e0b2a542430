"""The scores that a softmax is taken of, as matched, and the mask that is built of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxpress.passes.dataflow import Constants, is_closed
from fxpress.passes.layouts import Layout, Placed, placed
from fxpress.passes.products import Strided
from fxpress.program import Program

__all__ = ["Bias", "Keep", "Scores", "Stretch", "changed", "settled"]

aten = torch.ops.aten

_LOWEST = torch.finfo(torch.float32).min


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
        met: tuple[Bias | Keep | Stretch, ...] = (
            *self.biases,
            *self.keeps,
            *self.stretches,
            *by_bias,
        )
        return [part.tensor for part in met]

    def mask(
        self, anchor: fx.Node, program: Program, layout: Layout, dtype: torch.dtype
    ) -> fx.Node | None:
        """Build one mask, boolean or of `dtype`, that broadcasts to (B, H, Nq, Nk)."""
        graph = program.graph
        bias = _sum_of([_bias(graph, bias, layout, dtype) for bias in self.biases], graph)
        kept = [_keep(graph, keep, layout) for keep in self.keeps]
        program.refresh(anchor)
        if bias is None and self._is_boolean(program, kept):
            return _all_of(graph, kept)
        for node, keep in zip(kept, self.keeps, strict=True):
            bias = _where(graph, node, bias, _fill(keep.fill, dtype), dtype)
        return bias

    def stretched(
        self, anchor: fx.Node, program: Program, layout: Layout, q: fx.Node, k: fx.Node
    ) -> tuple[fx.Node, fx.Node]:
        """Queries and keys (B, H, N, D) times what scales their scores."""
        graph, dtype = program.graph, q.meta["val"].dtype
        for stretch in self.stretches:
            if stretch.by_key:
                k = stretched(graph, k, stretch, layout, dtype, of_rows=False)
            else:
                q = stretched(graph, q, stretch, layout, dtype)
        program.refresh(anchor)
        return q, k

    def finite(self) -> Scores:
        """The same scores, but rows that keep nothing average all values."""
        lowest = tuple(replace(keep, fill=max(keep.fill, _LOWEST)) for keep in self.keeps)
        return replace(self, keeps=lowest)

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


def changed(
    graph: fx.Graph,
    node: fx.Node,
    parts: Sequence[Stretch | Keep],
    layout: Layout,
    dtype: torch.dtype,
    of_rows: bool = True,
) -> fx.Node:
    """A node (B, H, N, D) whose rows are stretched, or zero where they are not kept."""
    for part in parts:
        if isinstance(part, Stretch):
            node = stretched(graph, node, part, layout, dtype, of_rows)
            continue
        kept = _keep(graph, part, layout)
        if not of_rows:
            kept = graph.call_function(aten.transpose.int, (kept, -1, -2))
        node = graph.call_function(aten.where.ScalarOther, (kept, node, 0.0))
    return node


def settled(graph: fx.Graph, node: fx.Node, keeps: Sequence[Keep], layout: Layout) -> fx.Node:
    """A result (B, H, Nq, Dv) that is zero where a row keeps no key."""
    kept = _all_of(graph, [_keep(graph, keep, layout) for keep in keeps])
    alive = graph.call_function(aten.any.dim, (kept, -1, True))
    return graph.call_function(aten.where.ScalarOther, (alive, node, 0.0))


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
