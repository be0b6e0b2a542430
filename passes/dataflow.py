"""What passes ask about the flow of data: constants, no-ops, the factors of a mask.

A mask that depends on no input is recognized by its value, not by how it was spelled. Where sizes
are dynamic the value is taken at two sizes, the captured one and one above it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxpress.program import Program, attribute, captured, same_sizes

__all__ = [
    "CASTS",
    "RESHAPES",
    "Constants",
    "MaskFactors",
    "argument",
    "constant_value",
    "is_closed",
    "is_noop",
    "mask_factors",
    "peel",
    "sizes",
]

aten = torch.ops.aten

_LIMIT = 1 << 26  # elements of the largest constant that is worth computing
_FARTHEST = 4096  # a larger number in a mask of dynamic size is not looked beyond
_CLOSED = -1e9  # an additive mask at or below it leaves nothing of a float32 probability

# These read only the shape of their first argument.
_SHAPE_ONLY = {
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
}
_SAME_VALUE = {aten.alias.default, aten.contiguous.default, aten.clone.default}
CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.to.device,
    aten.type_as.default,
}
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.mT.default,
    aten.numpy_T.default,
)
_AND = {
    aten.__and__.Tensor,
    aten.bitwise_and.Tensor,
    aten.logical_and.default,
    aten.mul.Tensor,  # of two booleans
}


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or by keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def sizes(node: fx.Node) -> tuple[int, ...]:
    """Sizes of a node's tensor; dynamic ones as captured."""
    return tuple(captured(size) for size in node.meta["val"].shape)


# No-ops ------------------------------------------------------------------------------------------


def is_noop(node: fx.Node) -> bool:
    """Whether a node returns its first argument, value by value, in the same shape and dtype."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return False
    value, origin = node.meta.get("val"), source.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(origin, Tensor):
        return False
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target in _SAME_VALUE:
        return True
    if node.target in CASTS:
        return bool(value.dtype == origin.dtype)
    return node.target in (aten.expand.default, aten.slice.Tensor) and same_sizes(value, origin)


def peel(node: fx.Node, also: Iterable[Any] = ()) -> fx.Node:
    """The node behind no-ops, and behind calls of the operators `also`."""
    more = set(also)
    while is_noop(node) or (node.op == "call_function" and node.target in more):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


# Constants ---------------------------------------------------------------------------------------


@dataclass
class Constants:
    """Values of the nodes of a program that depend on no input, each computed once.

    Attributes:
        program: the program; its parameters are not constants, for they train.
        growth: how much larger than captured dynamic sizes are taken.
    """

    program: Program
    growth: int = 0
    _known: dict[fx.Node, Any] = field(default_factory=dict, repr=False)

    def value(self, node: fx.Node) -> Any:
        """Value of a node, or None where it depends on an input or is too large."""
        for step in self._pending(node):
            self._known[step] = self._compute(step)
        return self._known[node]

    def scalar(self, value: Any) -> float | None:
        """A number, written as such or as a constant tensor of one element."""
        if isinstance(value, fx.Node):
            value = self.value(value) if _elements(value) == 1 else None
        if isinstance(value, Tensor):
            value = value.item()
        return float(value) if isinstance(value, (int, float)) else None

    def _pending(self, node: fx.Node) -> list[fx.Node]:
        """Nodes to compute, inputs first."""
        order: dict[fx.Node, None] = {}
        stack = [node]
        seen: set[fx.Node] = set()
        while stack:
            top = stack[-1]
            if top in self._known or top in order:
                stack.pop()
                continue
            waiting = [n for n in _value_inputs(top) if n not in self._known and n not in seen]
            seen.add(top)
            if waiting:
                stack += waiting
            else:
                order[stack.pop()] = None
        return list(order)

    def _compute(self, node: fx.Node) -> Any:
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt):
            return self._grown(meta)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op != "call_function" or not _is_pure(node) or _elements(node) > _LIMIT:
            return None
        inputs = _value_inputs(node)
        if any(self._known.get(n) is None for n in inputs):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._input)
        try:
            with torch.no_grad():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError):
            return None  # a size that the graph was not made for

    def _input(self, node: fx.Node) -> Any:
        if node in self._known and self._known[node] is not None:
            return self._known[node]
        like = node.meta["val"]
        shape = [self._grown(size) for size in like.shape]
        return torch.empty(1, dtype=like.dtype, device=like.device).expand(shape)

    def _attribute(self, node: fx.Node) -> Any:
        value = attribute(self.program.graph_module, str(node.target))
        written = any(user.meta.get("epilogue") for user in node.users)
        return None if isinstance(value, nn.Parameter) or written else value

    def _grown(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        environment = size.node.shape_env
        # Renamed in torch 2.12.
        hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
        known = {symbol: hints.get(symbol, 2) + self.growth for symbol in expression.free_symbols}
        return int(expression.xreplace(known))


def _value_inputs(node: fx.Node) -> list[fx.Node]:
    if isinstance(node.meta.get("val"), torch.SymInt):
        return []
    inputs = list(node.all_input_nodes)
    if node.target in _SHAPE_ONLY and node.args[0] in inputs:
        inputs.remove(node.args[0])  # type: ignore[arg-type]
    return inputs


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in target.tags
        return not random and not target._schema.is_mutable
    return getattr(target, "__module__", "") == "_operator"


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(sizes(node)) if isinstance(value, Tensor) else 1


def constant_value(program: Program, node: fx.Node) -> Any:
    """Value of a node that depends on no input, else None."""
    return Constants(program).value(node)


# Masks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskFactors:
    """A mask of attention, taken apart.

    Attributes:
        is_causal: its constant factors keep no key after its row, aligned at the first row.
        rest: what remains beside causality: nodes that broadcast to (B, H, Nq, Nk), boolean (True =
            kept) or additive; the whole mask where the constants do more than causality.
    """

    is_causal: bool
    rest: tuple[fx.Node, ...]


def is_closed(value: float, dtype: torch.dtype) -> bool:
    """Whether an additive mask value drops the key."""
    return value <= max(torch.finfo(dtype).min / 2, _CLOSED)


def mask_factors(program: Program, mask: fx.Node, shape: tuple[int, int]) -> MaskFactors:
    """Take a mask apart into causality and the rest.

    Args:
        program: the program of the mask.
        mask: boolean or additive, broadcasts to (B, H, Nq, Nk).
        shape: (Nq, Nk), as captured.
    """
    parts = _conjuncts(program, mask) if _is_bool(mask) else _addends(program, mask)
    now = Constants(program)
    fixed = [part for part in parts if now.value(part) is not None]
    kept = [_kept_by_all(fixed, now, shape)]
    if _is_dynamic(mask):
        # A window wider than the captured size looks causal at that size: look beyond it.
        reach = _largest_literal(mask)
        growths = (1, reach + 1) if reach <= _FARTHEST else ()
        kept += [_kept_by_all(fixed, Constants(program, growth=g), None) for g in growths] or [None]
    if not all(cells is not None and _looks_back(cells.open) for cells in kept):
        return MaskFactors(False, (mask,))
    if all(cells is not None and cells.is_plain_causality for cells in kept):
        return MaskFactors(True, tuple(part for part in parts if part not in fixed))
    return MaskFactors(True, (mask,))


def _largest_literal(mask: fx.Node) -> int:
    """The largest whole number written in what a mask is computed from; ends of slices aside."""
    stack, seen, largest = [mask], {mask}, 0
    while stack:
        node = stack.pop()
        for leaf in pytree.tree_leaves((list(node.args), dict(node.kwargs))):
            if type(leaf) is int and leaf < 1 << 62:
                largest = max(largest, abs(leaf))
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
    return largest


def _is_dynamic(node: fx.Node) -> bool:
    return any(not isinstance(size, int) for size in node.meta["val"].shape)


def _is_bool(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool)


def _broadcasts_alike(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is its first argument but for what broadcasting would do anyway."""
    if is_noop(node) or node.target is aten.expand.default:
        return True
    return node.target is aten.unsqueeze.default and sizes(node) == (1, *sizes(source))


def _conjuncts(program: Program, mask: fx.Node) -> list[fx.Node]:
    """Boolean factors of a boolean mask."""
    if mask.op != "call_function":
        return [mask]
    inputs = [n for n in mask.args if isinstance(n, fx.Node)]
    if mask.target in _AND and len(inputs) == 2 and all(_is_bool(n) for n in inputs):
        return [part for n in inputs for part in _conjuncts(program, n)]
    if inputs and _is_bool(inputs[0]) and _broadcasts_alike(mask, inputs[0]):
        return _conjuncts(program, inputs[0])
    return [mask]


def _addends(program: Program, mask: fx.Node) -> list[fx.Node]:
    """Addends of an additive mask; what only opens and closes is given as a boolean factor."""
    if mask.op != "call_function":
        return [mask]
    inputs = [n for n in mask.args if isinstance(n, fx.Node)]
    if mask.target is aten.add.Tensor and len(inputs) == 2 and not mask.kwargs:
        return [part for n in inputs for part in _addends(program, n)]
    if inputs and not _is_bool(inputs[0]) and _broadcasts_alike(mask, inputs[0]):
        return _addends(program, inputs[0])
    if mask.target in (aten.where.self, aten.where.ScalarOther, aten.where.Scalar):
        return _where_parts(program, mask)
    return [mask]


def _where_parts(program: Program, mask: fx.Node) -> list[fx.Node]:
    """Factors and addends of `where(condition, addends, minus infinity)`."""
    condition, kept, dropped = mask.args
    constants = Constants(program)
    low = constants.scalar(dropped)
    if low is None or not is_closed(low, mask.meta["val"].dtype):
        return [mask]
    assert isinstance(condition, fx.Node)
    if constants.scalar(kept) == 0.0:
        return _conjuncts(program, condition)
    if isinstance(kept, fx.Node):
        return _conjuncts(program, condition) + _addends(program, kept)
    return [mask]


@dataclass(frozen=True)
class _Cells:
    """What constant factors together do to the cells (..., Nq, Nk).

    Attributes:
        open: cells that they keep.
        is_plain: whether they do no more than keep and drop.
    """

    open: Tensor
    is_plain: bool

    @property
    def is_plain_causality(self) -> bool:
        """Whether every key at or before its row is kept as it is, and no other."""
        return self.is_plain and bool((self.open == _lower_triangle(self.open)).all())


def _kept_by_all(
    fixed: Iterable[fx.Node], constants: Constants, shape: tuple[int, int] | None
) -> _Cells | None:
    """Cells that all factors keep; None where they are no mask of this shape."""
    together, is_plain = None, True
    for part in fixed:
        value = constants.value(part)
        if not isinstance(value, Tensor):
            return None
        kept = value if value.dtype == torch.bool else ~_closed(value)
        is_plain &= value.dtype == torch.bool or bool(((value == 0) | ~kept).all())
        together = kept if together is None else together & kept
    if together is None or together.ndim < 2:
        return None
    if shape is not None and tuple(together.shape[-2:]) != shape:
        return None
    return _Cells(together, is_plain)


def _closed(value: Tensor) -> Tensor:
    return value <= max(torch.finfo(value.dtype).min / 2, _CLOSED)


def _lower_triangle(cells: Tensor) -> Tensor:
    return torch.ones(cells.shape[-2:], dtype=torch.bool, device=cells.device).tril()


def _looks_back(kept: Tensor) -> bool:
    """Whether no key after its row is kept."""
    return not bool((kept & ~_lower_triangle(kept)).any())
