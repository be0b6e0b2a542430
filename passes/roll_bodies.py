"""Whether the periods of a stretch are the steps of one loop: the check of `roll-recurrence`.

Numbers say that operators repeat; here every operand of every step is looked at. At each place of
the body it must be, for all steps alike,

    a plain value           the same one
    local                   computed in the same step, at the same place
    carried                 computed d steps before, at the same place; what the first d steps read
                            lies in front of the loop
    shared                  one node in front of the loop: a weight, a constant
    made                    a constant of its own, made alike
    a slice                 of one tensor, or a window of some, at a + b t
    counted                 the whole number a + b t, where a tensor may stand instead
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpress.passes.roll_periods import SLICERS, Call, countable, makes_constant
from fxpress.program import attribute, source_line
from fxpress.rewrite import Decline
from fxpress.verify import mutates

__all__ = [
    "Body",
    "Carried",
    "Counted",
    "Local",
    "Made",
    "Shared",
    "Sliced",
    "body_of",
    "same_value",
    "slice_of",
]

aten = torch.ops.aten

_WHOLE = (torch.int64, torch.int32)
_SPLITS = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


@dataclass(frozen=True)
class Local:
    """Computed in the same step at this place of the body."""

    place: int


@dataclass(frozen=True)
class Carried:
    """Computed some steps before.

    Attributes:
        place: place in the body.
        steps: how many steps before.
        initial: what the first steps read instead, the first one first.
    """

    place: int
    steps: int
    initial: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Shared:
    """The same node for every step."""

    node: fx.Node


@dataclass(frozen=True)
class Sliced:
    """One slice of a tensor per step.

    Attributes:
        source: the tensor.
        dim: along which dimension.
        start: where the first step reads.
        stride: how far the next step reads from there; below 0: backwards.
        keeps: whether the slice keeps the dimension.
        width: size that it keeps.
    """

    source: fx.Node
    dim: int
    start: int
    stride: int
    keeps: bool
    width: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether two steps read all that there is, one the neighbor of the other."""
        size = self.source.meta["val"].shape[self.dim]
        return abs(self.stride) == self.width and str(size) == str(2 * self.width)


@dataclass(frozen=True)
class Counted:
    """A number that counts the steps.

    Attributes:
        start: at the first step.
        stride: how much more it is at the next.
        dtype, device: of the tensor that holds it.
    """

    start: int
    stride: int
    dtype: torch.dtype = torch.int64
    device: str = "cpu"


@dataclass(frozen=True)
class Made:
    """A constant that every step makes for itself, alike.

    Attributes:
        key: what is called, with which arguments.
        node: one such call.
    """

    key: str
    node: fx.Node = field(compare=False)


Slice = tuple[fx.Node, int, int, bool, int]
"""Tensor, dimension, index, whether the dimension is kept, and its size."""

Role = Local | Carried | Shared | Sliced | Made | Counted


class _MismatchError(Exception):
    """A step is not like those before it; holds the `Decline`."""


@dataclass
class Body:
    """One step of a loop.

    Attributes:
        columns: for each place, its call at every step.
        operands: for each place that stays in the body, its arguments: roles and plain values.
        given: what the other places are to the steps: a slice or a shared node.
    """

    columns: list[list[Call]]
    operands: dict[int, list[Any]] = field(default_factory=dict)
    given: dict[int, Sliced | Shared] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.columns[0])

    def roles(self, kind: type[Any]) -> list[Any]:
        """The different roles of a kind that operands have, in order."""
        every = [role for roles in self.operands.values() for role in roles]
        return list(dict.fromkeys(role for role in every if isinstance(role, kind)))


def body_of(
    calls: Sequence[Call], positions: dict[fx.Node, int], start: int, period: int
) -> Body | Decline:
    """The body whose steps are the periods of some calls, or where these differ.

    Args:
        calls: the calls of the whole steps, and no more.
        positions: of all calls of the graph.
        start: position of the first of `calls`.
        period: calls of one step.
    """
    body = Body([list(calls[place::period]) for place in range(period)])
    place_of = _Places(positions, start, period, len(calls))
    try:
        for place in range(period):
            _Column(body, place, place_of).settle()
    except _MismatchError as mismatch:
        decline: Decline = mismatch.args[0]
        return decline
    return body


@dataclass(frozen=True)
class _Places:
    """Step and place of a node in the loop."""

    positions: dict[fx.Node, int]
    start: int
    period: int
    length: int

    def __call__(self, node: fx.Node) -> tuple[int, int] | None:
        at = self.positions.get(node, -1) - self.start
        return divmod(at, self.period) if 0 <= at < self.length else None


@dataclass(frozen=True)
class _Column:
    """One place of the body at all steps."""

    body: Body
    place: int
    place_of: Callable[[fx.Node], tuple[int, int] | None]

    @property
    def calls(self) -> list[Call]:
        """The calls of all steps."""
        return self.body.columns[self.place]

    def settle(self) -> None:
        """Find the role of every argument, and so whether the call stays in the body."""
        roles: list[Any] = []
        counters: dict[int, tuple[int, int]] = {}
        for at, values in enumerate(zip(*(call.leaves for call in self.calls), strict=True)):
            if isinstance(values[0], fx.Node):
                roles.append(self._operand(values))
            elif all(same_value(value, values[0]) for value in values):
                roles.append(values[0])
            elif at in self._countable:
                roles.append(Counted(*self._even(values)))
            else:
                counters[at] = self._counter(at, values)
                roles.append(None)
        first = self.calls[0]
        if mutates(first.node):
            raise self._mismatch(0, "writes into its input")
        source = roles[0] if roles else None
        if counters:
            if not isinstance(source, Shared):
                raise self._mismatch(1, "counts the steps, but does not slice what all steps share")
            self.body.given[self.place] = self._slice(source.node, counters)
        elif _is_view(first.node) and all(
            isinstance(r, Shared) or not isinstance(r, Role) for r in roles
        ):
            self.body.given[self.place] = Shared(first.node)
        else:
            self.body.operands[self.place] = roles

    def _operand(self, nodes: Sequence[Any]) -> Role:
        """The role of a node."""
        at = self.place_of(nodes[-1])
        if at is None:
            return self._outside(nodes)
        steps, place = len(nodes) - 1 - at[0], at[1]
        if steps > max(1, (len(nodes) - 1) // 2):
            raise self._mismatch(len(nodes) - 1, f"reads %{nodes[-1]} of {steps} steps before")
        for step, node in enumerate(nodes):
            expected = None if step < steps else (step - steps, place)
            if self.place_of(node) != expected:
                raise self._mismatch(step, f"reads %{getattr(node, 'name', node)}, not as the last")
        if place in self.body.given and (not steps or _is_shared(self.body, place, nodes, steps)):
            return self.body.given[place]
        return Carried(place, steps, tuple(nodes[:steps])) if steps else Local(place)

    def _outside(self, nodes: Sequence[Any]) -> Role:
        """A node in front of the loop: one for all steps, or a slice for each."""
        named = {node.target for node in nodes if node.op == "get_attr"}
        if all(node is nodes[0] for node in nodes) or (
            len(named) == 1 and all(node.op == "get_attr" for node in nodes)
        ):
            return Shared(nodes[0])
        keys = {f"{node.target} {node.args} {node.kwargs}" for node in nodes}
        if len(keys) == 1 and makes_constant(nodes[0]):
            return Made(keys.pop(), nodes[0])
        if (counted := _counted(nodes)) is not None:
            return counted
        slices = [slice_of(node) for node in nodes]
        if None not in slices:
            sources = {(source, dim, *kept) for source, dim, _, *kept in slices}  # type: ignore[misc]
            line = _line([index for _, _, index, *_ in slices])  # type: ignore[misc]
            if len(sources) == 1 and isinstance(line, tuple):
                (source, dim, keeps, width) = sources.pop()
                return Sliced(source, dim, *line, keeps, width)
        step = next(step for step, node in enumerate(nodes) if node is not nodes[0])
        raise self._mismatch(step, f"reads %{nodes[step]}, where the step before reads %{nodes[0]}")

    def _counter(self, at: int, values: Sequence[Any]) -> tuple[int, int]:
        """Start and stride of a plain value that differs from step to step."""
        call, line = self.calls[0], self._even(values)
        if at not in SLICERS.get(call.node.target, ()):
            raise self._mismatch(1, f"computes with {values[1]!r}, which counts the steps")
        return line

    def _even(self, values: Sequence[Any]) -> tuple[int, int]:
        """Start and stride of numbers that count the steps."""
        line = _line(values) if all(type(value) is int for value in values) else 1
        if isinstance(line, int):
            raise self._mismatch(line, f"has {values[line]!r}, which does not follow the steps")
        return line

    @property
    def _countable(self) -> Sequence[int]:
        """Where a tensor that counts may stand for a number: beside one of some dimensions.

        Beside a number alone it would decide the dtype of the result.
        """
        node = self.calls[0].node
        beside = [n.meta["val"] for n in node.all_input_nodes]
        return countable(node) if all(isinstance(v, Tensor) and v.ndim for v in beside) else ()

    def _slice(self, source: fx.Node, counters: dict[int, tuple[int, int]]) -> Sliced:
        """What a call reads that counts the steps."""
        first, *rest = (slice_of(call.node, source) for call in self.calls)
        if first is None or None in rest or set(counters) - set(SLICERS[self.calls[0].node.target]):
            raise self._mismatch(1, "reads its tensor by windows that differ")
        line = _line([index for _, _, index, *_ in (first, *rest)])  # type: ignore[misc]
        if isinstance(line, int):
            raise self._mismatch(line, "reads another step than follows")
        return Sliced(first[0], first[1], *line, *first[3:])

    def _mismatch(self, step: int, what: str) -> _MismatchError:
        node = self.calls[step].node
        line = source_line(node)
        where = f" ({line})" if line else ""
        reason = f"bodies differ at step {step}: %{node.name} {what}{where}"
        return _MismatchError(Decline(reason, node))


def _counted(nodes: Sequence[fx.Node]) -> Counted | None:
    """The role of constants of one whole number each, that count the steps."""
    if any(node.op != "get_attr" for node in nodes):
        return None
    root = nodes[0].graph.owning_module
    assert root is not None
    held = [attribute(root, str(node.target)) for node in nodes]
    if any(isinstance(v, nn.Parameter) or v.dtype not in _WHOLE or v.ndim for v in held):
        return None
    line = _line([int(value) for value in held])
    return None if isinstance(line, int) else Counted(*line, held[0].dtype, str(held[0].device))


def _is_shared(body: Body, place: int, nodes: Sequence[fx.Node], steps: int) -> bool:
    """Whether a value carried from earlier steps is what all steps share."""
    given = body.given[place]
    return isinstance(given, Shared) and all(node is given.node for node in nodes[:steps])


def same_value(a: Any, b: Any) -> bool:
    """Whether two plain values are the same, not a number included."""
    return type(a) is type(b) and (a == b or (a != a and b != b))  # noqa: PLR0124  (nan)


def _line(values: Sequence[int]) -> tuple[int, int] | int:
    """Start and stride of evenly spaced numbers, or where they are not."""
    start, stride = values[0], values[1] - values[0]
    for step, value in enumerate(values):
        if value != start + stride * step:
            return step
    return (start, stride) if stride else 1


def slice_of(node: fx.Node, shared: fx.Node | None = None) -> Slice | None:
    """Tensor, dimension, index and whether it is kept, where a node reads one slice of a tensor.

    Args:
        node: any node.
        shared: stands for its first argument, which is the same at every step.
    """
    source = shared if shared is not None else (node.args[0] if node.args else None)
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.select.int:
        return _indexed(source, node.args[1], node.args[2], False)
    if node.target is aten.slice.Tensor and len(node.args) >= 4:
        (_, dim, start, stop), step = node.args[:4], [*node.args[4:], 1][0]
        width = node.meta["val"].shape[dim]
        is_fixed = all(isinstance(size, int) for size in (start, stop, width)) and step == 1
        return _indexed(source, dim, start, True, width) if is_fixed else None
    if node.target is operator.getitem and source.target in _SPLITS:
        return _part(source, node.args[1])
    return None


def _part(split: fx.Node, index: Any) -> Slice | None:
    """A part of a tensor that was split into slices of size one."""
    source, parts = split.args[0], split.meta["val"]
    assert isinstance(source, fx.Node)
    at = 1 if split.target is aten.unbind.int else 2
    dim = split.args[at] if len(split.args) > at else split.kwargs.get("dim", 0)
    if split.target is aten.unbind.int:
        return _indexed(source, dim, index, False)
    if not all(part.shape[dim] == 1 for part in parts):
        return None
    return _indexed(source, dim, index, True)


def _indexed(source: fx.Node, dim: Any, index: Any, keeps: bool, width: int = 1) -> Slice | None:
    value = source.meta["val"]
    if not isinstance(value, Tensor) or not isinstance(dim, int) or not isinstance(index, int):
        return None
    dim = dim % value.ndim
    if index < 0:
        if not isinstance(value.shape[dim], int):
            return None
        index += value.shape[dim]
    return source, dim, index, keeps, width


def _is_view(node: fx.Node) -> bool:
    """Whether a call returns the memory of an operand, or a part of what such a call returned."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliases = [r.alias_info for r in node.target._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)
