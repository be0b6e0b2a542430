"""`normalize-linear`: any spelling of a product with a weight becomes one operator.

    x @ W + b, addmm(b, x, W), einsum("btn,nm->btm", x, W), a convolution of width one
      ->  linear(x, W', b)                       W' (m, n), x (..., n)

W' is the model's own tensor where it lies that way already. Otherwise it is a parameter of its own
that is a view of the same storage: nothing is copied. That is done only where the weight is read
in no other layout: two parameters on one storage would part when they are trained.

Exactness: REASSOCIATES.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxpress.passes.dataflow import argument
from fxpress.passes.linear_rules import LINEAR, PRODUCTS
from fxpress.passes.weights import VIEWS
from fxpress.program import Program, attribute
from fxpress.rewrite import Rewrite, RewritePass

__all__ = ["NormalizeLinear"]

aten = torch.ops.aten


class NormalizeLinear(RewritePass):
    """Brings products with a weight to their canonical form."""

    name: ClassVar[str] = "normalize-linear"
    phase: ClassVar[str] = "canonicalize"

    def rules(self) -> Iterable[Rewrite]:
        """Products first; then what stands around them."""
        return (*PRODUCTS, UnwrapLinear(), FoldBias())


class UnwrapLinear(Rewrite):
    """view(linear(view(x, (-1, n)), W, b), (..., m))  ->  linear(x, W, b)   x (..., n)."""

    name: ClassVar[str] = "unwrap-linear"

    def match(self, node: fx.Node, program: Program) -> tuple[fx.Node, fx.Node] | None:
        """A view that gives back the leading sizes which another took before the product."""
        del program
        linear = _single_use(node.args[:1])
        if node.target not in VIEWS or linear is None:
            return None
        inner = linear.args[0]
        if not isinstance(inner, fx.Node) or inner.target not in VIEWS:
            return None
        source = inner.args[0]
        assert isinstance(source, fx.Node)
        given, rows, wanted = (n.meta["val"].shape for n in (source, inner, node))
        return (linear, source) if _alike(given, (*wanted[:-1], rows[-1])) else None

    def replace(self, node: fx.Node, match: Any, program: Program) -> fx.Node:
        """The product on x as it came."""
        del node
        linear, source = match
        return program.graph.call_function(LINEAR, (source, *linear.args[1:]), linear.kwargs)


class FoldBias(Rewrite):
    """linear(x, W) + b  ->  linear(x, W, b)   b (m,), of the model."""

    name: ClassVar[str] = "fold-bias"

    def match(self, node: fx.Node, program: Program) -> tuple[fx.Node, fx.Node] | None:
        """A sum of a product that has no bias with a vector of the model."""
        if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
            return None
        linear = _single_use(node.args)
        if linear is None or argument(linear, 2, "bias") is not None:
            return None
        bias = node.args[1] if node.args[0] is linear else node.args[0]
        weight = linear.args[1]
        if not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in (bias, weight)):
            return None
        b, w = (attribute(program.graph_module, str(n.target)) for n in (bias, weight))  # type: ignore[union-attr]
        fits = b.shape == w.shape[:1] and b.dtype == w.dtype
        return (linear, bias) if fits else None  # type: ignore[return-value]

    def replace(self, node: fx.Node, match: Any, program: Program) -> fx.Node:
        """The product with its bias."""
        del node
        linear, bias = match
        return program.graph.call_function(LINEAR, (*linear.args[:2], bias))


def _single_use(operands: Iterable[Any]) -> fx.Node | None:
    """The linear among some operands that is read once."""
    for operand in operands:
        if isinstance(operand, fx.Node) and operand.target is LINEAR and len(operand.users) == 1:
            return operand
    return None


def _alike(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(
        statically_known_true(x == y) for x, y in zip(a, b, strict=True)
    )
