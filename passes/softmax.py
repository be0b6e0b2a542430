"""The softmax that a node computes, by operator or written out.

    exp(x - m) / sum(exp(x - m)),  exp(x) * (1 / sum(exp(x))),  exp(log_softmax(x)),
    exp(x - logsumexp(x)),  c exp(x) / sum(c exp(x))    m of size one along the axis
    with exp(a x) also as (e^a)^x

What is the same along the axis changes nothing, whatever it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxpress.passes.dataflow import CASTS, argument, is_noop, peel
from fxpress.passes.products import product
from fxpress.program import captured, same_sizes
from fxpress.rewrite import Decline

__all__ = ["LOG_SOFTMAX", "SOFTMAX", "Softmax", "divided_late", "is_cast", "softmax_of"]

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)
_MAXIMUM = (aten.amax.default, aten.max.dim)
_CUTS = (
    aten.mul.Tensor,
    aten.masked_fill.Scalar,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)
_TINY = 1e-7  # added to a sum of at least one, it is lost in float32


@dataclass(frozen=True)
class Softmax:
    """A softmax.

    Attributes:
        node: its result.
        scores: what it is taken of.
        dim: the axis, counted from the front.
        cut: what sets some exponentials to zero before they are summed, or None.
        factor: number that the scores are multiplied by, where the base is not e.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    cut: fx.Node | None = None
    factor: float = 1.0


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes the dtype between two floating-point ones."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or node.target not in CASTS or not isinstance(source, fx.Node):
        return False
    return bool(node.meta["val"].is_floating_point() and source.meta["val"].is_floating_point())


def softmax_of(node: fx.Node) -> Softmax | Decline | None:
    """The softmax that a node computes; Decline where its sum has something added."""
    if node.op != "call_function":
        return None
    if node.target in SOFTMAX:
        return _along(node, node.args[0], node.args[1])
    if node.target is aten.exp.default:
        return _exponential(node)
    if node.target is aten.div.Tensor:
        return _normalized(node, node.args[0], node.args[1])
    if node.target is aten.mul.Tensor:
        for one, other in (node.args, node.args[::-1]):
            if isinstance(other, fx.Node) and _is_reciprocal(peel(other)):
                return _normalized(node, one, peel(other).args[0])
    return None


def _is_reciprocal(node: fx.Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return bool(node.args[1] == -1)
    return node.target is aten.reciprocal.default


def _power(node: fx.Node) -> tuple[Any, float] | None:
    """What a number is raised to, and the logarithm of that number."""
    if node.target is aten.exp.default:
        return node.args[0], 1.0
    if node.target is aten.exp2.default:
        return node.args[0], math.log(2.0)
    if node.target is aten.pow.Scalar and isinstance(base := node.args[0], (int, float)):
        return (node.args[1], math.log(base)) if base > 1 else None
    return None


def _along(node: fx.Node, scores: Any, dim: Any) -> Softmax | None:
    if not isinstance(scores, fx.Node) or not isinstance(dim, int):
        return None
    return Softmax(node, scores, dim % node.meta["val"].ndim)


def _exponential(node: fx.Node) -> Softmax | None:
    """exp(log_softmax(x)), exp(x - logsumexp(x))."""
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    if inner.target in LOG_SOFTMAX:
        return _along(node, inner.args[0], inner.args[1])
    if inner.target is not aten.sub.Tensor or inner.kwargs:
        return None
    scores, total = inner.args
    if not isinstance(total, fx.Node) or not isinstance(scores, fx.Node):
        return None
    found = _reduced(total, aten.logsumexp.default)
    return Softmax(node, scores, found[1]) if found and found[0] is scores else None


def _normalized(node: fx.Node, above: Any, below: Any) -> Softmax | Decline | None:
    """exp(x) over its own sum along an axis."""
    if not isinstance(above, fx.Node) or not isinstance(below, fx.Node):
        return None
    power, total = peel(above, CASTS), peel(below, CASTS)
    added = 0.0
    if total.target in (aten.add.Tensor, aten.clamp_min.default, aten.clamp.default):
        number, inner = total.args[1], total.args[0]
        if not isinstance(number, (int, float)) or not isinstance(inner, fx.Node):
            return None
        added, total = float(number), peel(inner, CASTS)
    dim, cut = _summed(total, power), None
    if power.target in _CUTS:
        nodes = (n for n in power.args if isinstance(n, fx.Node))
        cut, power = power, next((n for n in nodes if _power(n)), power)
    raised = _power(power)
    if raised is None or dim is None:
        return None
    scores, by_maximum = _shifted(raised[0], dim)
    if added and (added > _TINY or not by_maximum or cut is not None):
        return Decline("something is added to the sum of a hand-written softmax", node)
    return Softmax(node, scores, dim, cut, raised[1])


def divided_late(node: fx.Node) -> tuple[fx.Node, Softmax] | Decline | None:
    """(exp(x) @ v) / sum(exp(x)): the product, and the softmax that its left operand becomes."""
    if node.op != "call_function" or node.target is not aten.div.Tensor:
        return None
    above, below = node.args
    if not isinstance(above, fx.Node) or not isinstance(below, fx.Node) or len(above.users) > 1:
        return None
    values = product(above)
    if values is None or values.left.order is not None or values.order is not None:
        return None
    power = values.left.node
    found = _normalized(node, power, below)
    if not isinstance(found, Softmax):
        return found
    is_last = found.dim == power.meta["val"].ndim - 1
    return (above, replace(found, node=power)) if is_last else None


def _summed(total: fx.Node, power: fx.Node) -> int | None:
    """The axis along which a node is the sum of another, and has size one."""
    found = _reduced(total, aten.sum.dim_IntList)
    return found[1] if found and peel(found[0], CASTS) is power else None


def _reduced(node: fx.Node, operator: Any) -> tuple[fx.Node, int] | None:
    """What a node reduces along one axis, which it keeps or brings back as of size one."""
    restored = node.args[1] if node.target is aten.unsqueeze.default else None
    if isinstance(restored, int):
        assert isinstance(node.args[0], fx.Node)
        node = peel(node.args[0], CASTS)
    if node.target is not operator:
        return None
    source: Any
    dims: Any
    source, dims = node.args[:2]
    if not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    rank = source.meta["val"].ndim
    dim = int(dims[0]) % rank
    kept = bool(argument(node, 2, "keepdim", False))
    is_back = kept if restored is None else not kept and restored % rank == dim
    return (source, dim) if is_back else None


def _shifted(node: Any, dim: int) -> tuple[fx.Node, bool]:
    """What an exponential is of, but for a shift along the axis; whether by its maximum."""
    assert isinstance(node, fx.Node)
    if node.target is not aten.sub.Tensor or node.kwargs or not isinstance(node.args[1], fx.Node):
        return node, False
    scores, shift = node.args
    assert isinstance(scores, fx.Node)
    assert isinstance(shift, fx.Node)
    ndim, place = shift.meta["val"].ndim, dim - scores.meta["val"].ndim
    is_alike = same_sizes(scores.meta["val"], node.meta["val"])
    if not is_alike or (ndim >= -place and captured(shift.meta["val"].shape[place]) != 1):
        return node, False
    return scores, _is_maximum(shift, scores, place)


def _is_maximum(shift: fx.Node, scores: fx.Node, place: int) -> bool:
    """Whether a shift is the maximum of the scores along an axis counted from the end."""
    while is_noop(shift) or shift.target in (aten.detach.default, aten.detach_.default):
        source = shift.args[0]
        assert isinstance(source, fx.Node)
        shift = source
    if getattr(shift.target, "__name__", "") == "getitem":
        source = shift.args[0]
        assert isinstance(source, fx.Node)
        shift = source
    if shift.target not in _MAXIMUM or shift.args[0] is not scores:
        return False
    dims = shift.args[1]
    return (dims if isinstance(dims, list) else [dims]) in (
        [place],
        [place + scores.meta["val"].ndim],
    )
