"""Conditions as graphs compute them: tensors of zeros and ones, complements and factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.dataflow import CASTS, Constants, is_noop
from fxpress.passes.layouts import Placed
from fxpress.passes.views import VIEWS

__all__ = ["Condition", "affine", "conditions", "is_indicator", "value_key"]

aten = torch.ops.aten

_AND = {
    aten.__and__.Tensor,
    aten.bitwise_and.Tensor,
    aten.logical_and.default,
    aten.mul.Tensor,
}
_OR = {aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default}
_EQUAL = {aten.eq.Scalar, aten.eq.Tensor}
_UNEQUAL = {aten.ne.Scalar, aten.ne.Tensor}
_NOT = {aten.bitwise_not.default, aten.logical_not.default}
_MOVES = VIEWS | {aten.expand.default, aten.transpose.int, aten.permute.default}
_DEPTH = 12  # operations within which two nodes are found to compute the same


def is_indicator(node: Any, constants: Constants) -> bool:
    """Whether a node is zero or one everywhere, whatever the input."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    if node.meta["val"].dtype == torch.bool:
        return True
    value = constants.value(node)
    if isinstance(value, Tensor):
        return bool(((value == 0) | (value == 1)).all())
    sources: list[Any] = []
    if node.op == "call_function" and node.target is aten.mul.Tensor:
        sources = list(node.args)
    elif is_noop(node) or node.target in CASTS | _MOVES or _is_complement(node):
        sources = [n for n in node.args if isinstance(n, fx.Node)][:1]
    return bool(sources) and all(is_indicator(n, constants) for n in sources)


def _is_complement(node: fx.Node) -> bool:
    """Whether a node is one minus another."""
    if node.target is aten.rsub.Scalar:
        return bool(node.args[1] == 1) and len(node.args) == 2
    return node.target is aten.sub.Tensor and bool(node.args[0] == 1) and not node.kwargs


def value_key(node: Any, depth: int = _DEPTH) -> Any:
    """What two nodes have in common that compute the same of the same."""
    if not isinstance(node, fx.Node):
        return str(node)
    source = node.args[0] if node.args else None
    if is_noop(node):
        return value_key(source, depth)
    pure = isinstance(node.target, torch._ops.OpOverload) and not (
        node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
    )
    if node.op != "call_function" or not pure or not depth:
        return node
    parts = [[value_key(n, depth - 1) for n in _parts(given)] for given in node.args]
    return (node.target, str(parts), str(node.kwargs))


def _parts(given: Any) -> Any:
    return given if isinstance(given, (list, tuple)) else [given]


def affine(node: Any, constants: Constants) -> tuple[Any, float, float]:
    """(of, a, b): a node is a * of + b, by what `value_key` says of `of`."""
    slope, offset = 1.0, 0.0
    while isinstance(node, fx.Node) and (step := _linear_step(node, constants)) is not None:
        node, factor, shift = step
        slope, offset = slope * factor, offset + slope * shift
    return value_key(node), slope, offset


def _linear_step(node: fx.Node, constants: Constants) -> tuple[Any, float, float] | None:
    """(of, a, b) of one operation."""
    if is_noop(node) or node.target is aten.neg.default:
        return node.args[0], 1.0 if is_noop(node) else -1.0, 0.0
    if node.op != "call_function" or node.kwargs or len(node.args) != 2:
        return None
    left, right = (constants.scalar(n) for n in node.args)
    if node.target is aten.sub.Tensor and left is not None:
        return node.args[1], -1.0, left
    if right is None or (node.target is aten.div.Tensor and not right):
        return None
    by_number = {
        aten.mul.Tensor: lambda: (right, 0.0),
        aten.div.Tensor: lambda: (1 / right, 0.0),
        aten.add.Tensor: lambda: (1.0, right),
        aten.sub.Tensor: lambda: (1.0, -right),
        aten.rsub.Scalar: lambda: (-1.0, right),
    }
    found = by_number.get(node.target)  # type: ignore[call-overload]
    return None if found is None else (node.args[0], *found())


@dataclass(frozen=True)
class Condition:
    """One factor of what is kept: a value, whether it is negated, and where it broadcasts."""

    value: Any
    negated: bool
    where: Any


def conditions(kept: Placed, negated: bool, constants: Constants) -> frozenset[Condition]:
    """The factors of a mask that keeps where it is true (false, where negated)."""
    flat = kept.order is None and kept.split is None and kept.node.meta["val"].ndim <= 2
    where = None if flat else (str(kept.lead), kept.order, str(kept.split))
    return frozenset(
        Condition(value, flipped, where)
        for value, flipped in _factors(kept.node, negated, constants)
    )


def _factors(node: fx.Node, negated: bool, constants: Constants) -> list[tuple[Any, bool]]:
    if node.op != "call_function":
        return [(node, negated)]
    inputs = [n for n in node.args if isinstance(n, fx.Node)]
    joins = _OR if negated else _AND
    both = node.target in joins and len(inputs) == 2
    if both and all(is_indicator(n, constants) for n in inputs):
        return [part for n in inputs for part in _factors(n, negated, constants)]
    if (source := _truth_of(node, constants)) is not None:
        return _factors(source[0], negated ^ source[1], constants)
    if node.target in _MOVES:
        rest = str(node.args[1:])
        moved = _factors(inputs[0], negated, constants)
        return [((node.target, value, rest), flipped) for value, flipped in moved]
    return [(value_key(node), negated)]


def _truth_of(node: fx.Node, constants: Constants) -> tuple[fx.Node, bool] | None:
    """What a node is the truth of, or the opposite of."""
    source = next((n for n in node.args if isinstance(n, fx.Node)), None)
    if source is None:
        return None
    if is_noop(node) or node.target in CASTS:
        return source, False
    if node.target in _NOT or _is_complement(node):
        return source, True
    if node.target in _EQUAL | _UNEQUAL and source is node.args[0]:
        number, equal = constants.scalar(node.args[1]), node.target in _EQUAL
        if number in (0, 1) and is_indicator(source, constants):
            return source, equal == (number == 0)
        if number == 0:  # a number counts as true unless it is zero
            return source, equal
    return None
