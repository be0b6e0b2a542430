"""Milliseconds of every node of a graph by the cost model, for shares and estimates.

Linear maps and attention as `cost` has them; other products by their multiply-adds; recurrences as
one product per step; what is left by the bytes that it reads and writes. Views are free.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxpress.cost import Hardware, Work, attention_work, dense_work
from fxpress.ops.recurrence import Cell
from fxpress.ops.recurrent_layers import LAYERS, PACKED
from fxpress.program import Program, captured

__all__ = ["RECURRENCES", "modelled_ms", "sizes"]

aten = torch.ops.aten

ROLLED = torch.ops.fxpress.recurrence.default

RECURRENCES = {
    LAYERS["lstm"]: "lstm",
    LAYERS["gru"]: "gru",
    LAYERS["rnn_tanh"]: "rnn",
    LAYERS["rnn_relu"]: "rnn",
    PACKED["lstm"]: "packed lstm",
    PACKED["gru"]: "packed gru",
    PACKED["rnn_tanh"]: "packed rnn",
    PACKED["rnn_relu"]: "packed rnn",
    ROLLED: "loop",
}
"""Operators that run a whole recurrence, and the names of their cells."""


def modelled_ms(program: Program, hardware: Hardware) -> dict[fx.Node, float]:
    """Milliseconds of each operator call in one call of the captured shapes."""
    nodes = [n for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return {n: hardware.ms(_work(n, hardware), _dtype(n)) for n in nodes}


def _dtype(node: fx.Node) -> torch.dtype:
    tensors = _tensors(node.meta.get("val"))
    return tensors[0].dtype if tensors else torch.float32


def _work(node: fx.Node, hardware: Hardware) -> list[Work]:
    if _is_view(node):
        return []
    operands = [n.meta["val"] for n in node.all_input_nodes]
    if node.target is aten.linear.default:
        x, (m, n) = operands[0], sizes(operands[1])
        return dense_work((m, n), math.prod(sizes(x)[:-1]), x.dtype.itemsize)
    if node.target is aten.scaled_dot_product_attention.default and operands[0].ndim == 4:
        return _attention(node, hardware)
    moved = _bytes(operands) + _bytes(node.meta.get("val"))
    if node.target is ROLLED:
        return _rolled(node, hardware)
    if node.target in RECURRENCES:
        return _recurrence(node, moved)
    return [Work(_multiply_adds(node), moved)]


def _attention(node: fx.Node, hardware: Hardware) -> list[Work]:
    q, k, v = (sizes(n.meta["val"]) for n in node.args[:3])  # type: ignore[union-attr]
    shape = (q[0], q[1], k[1], q[2], k[2], q[3], v[3])
    is_causal = bool(node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else False))
    return attention_work(shape, is_causal, _dtype(node).itemsize, hardware)


def _recurrence(node: fx.Node, moved: int) -> list[Work]:
    """One product by all weights per step; batch and steps lie first, in either order."""
    is_packed = node.target in PACKED.values()
    (steps, batch) = sizes(node.args[0].meta["val"])[:2]  # type: ignore[union-attr]
    if is_packed:  # (rows, I): about as many steps as the largest batch leaves
        steps = max(1, sizes(node.args[1].meta["val"])[0])  # type: ignore[union-attr]
        batch = sizes(node.args[0].meta["val"])[0] // steps  # type: ignore[union-attr]
    elif node.args[-1] is True:  # batch_first
        steps, batch = batch, steps
    flat = node.args[3 if is_packed else 2]
    weights = [n.meta["val"] for n in pytree.tree_leaves(flat) if isinstance(n, fx.Node)]
    products = sum(math.prod(sizes(w)) for w in weights if w.ndim == 2)
    return [Work(batch * products, moved / max(steps, 1))] * steps


def _rolled(node: fx.Node, hardware: Hardware) -> list[Work]:
    """What the operators of one step cost, for every step."""
    values: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
    inputs, state, weights, sizes_read, steps, text = values
    calls = Cell.read(text).on_step(inputs, state, weights, sizes_read)
    return [work for call in calls for work in _work(call, hardware)] * captured(steps)


def _multiply_adds(node: fx.Node) -> float:
    """By torch's formulas for products and convolutions; 0 for operators that have none."""
    from torch.utils.flop_counter import flop_registry  # imports Triton

    formula = flop_registry.get(node.target.overloadpacket)  # type: ignore[union-attr]
    if formula is None:
        return 0.0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return float(formula(*args, **kwargs, out_val=node.meta["val"])) / 2


def _is_view(node: fx.Node) -> bool:
    """Whether the result is, or may be, the memory of an operand."""
    returns = node.target._schema.returns  # type: ignore[union-attr]
    aliases = [r.alias_info for r in returns if r.alias_info is not None]
    return any(not alias.is_write for alias in aliases)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(value: Any) -> int:
    return sum(math.prod(sizes(t)) * t.dtype.itemsize for t in _tensors(value))


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """Sizes of a tensor: dynamic ones as captured, two where only the data decides."""
    return tuple(captured(size) for size in tensor.shape)
