"""`roll-recurrence`: an unrolled loop over time becomes one node.

    h1, y1 = cell(x[0], h0);  h2, y2 = cell(x[1], h1);  ...;  y = stack([y1, y2, ...])
      ->  y, hT = recurrence([x], [h0], weights, T, cell)            x (T, ...), y (T, ...)

Capture unrolls every loop of Python. A lag scan finds stretches of the graph that repeat
(`roll_periods.py`); a stretch is a loop where all its steps are alike, operand by operand
(`roll_bodies.py`), something is handed from step to step, and something is read or collected step
by step. Layers within a step are one body, layers after each other one loop each, and a loop back
in time reads from the end. A loop that hands nothing on is rolled over the outputs of another one
only, where it is the rest of a time step.

Exactness: BITWISE. The operators are those of the loop, in their order. Gradients are summed in
another layout, so that they may round differently.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import fxpress.ops.recurrence  # noqa: F401  (defines the operator)
from fxpress.artifact_targets import target_name
from fxpress.errors import ArtifactError
from fxpress.ops.recurrence import Cell, Collected
from fxpress.ops.recurrent_layers import LAYERS, PACKED
from fxpress.passes.roll_bodies import (
    Body,
    Carried,
    Counted,
    Local,
    Made,
    Shared,
    Sliced,
    body_of,
)
from fxpress.passes.roll_completion import complete
from fxpress.passes.roll_lengths import join_lengths
from fxpress.passes.roll_misses import near_misses
from fxpress.passes.roll_periods import LEAST_STEPS, Call, Run, calls_of, nested, periodic_runs
from fxpress.program import Program, Provenance, has_effect, module_path
from fxpress.rewrite import Applied, Decline, Fuel, Pass, PassContext, PassRecord
from fxpress.testing import BITWISE, Exactness

__all__ = ["RECURRENCE", "RollRecurrence"]

aten = torch.ops.aten

RECURRENCE = torch.ops.fxpress.recurrence.default

RECURRENT = {RECURRENCE, *LAYERS.values(), *PACKED.values()}
"""Operators that run a whole recurrence."""

_JOINS: dict[Any, str] = {aten.stack.default: "stack", aten.cat.default: "cat"}
_MULTIPLES = 16  # a step may hold that many stretches that look alike, such as layers
_FEW = 5  # steps that are looked at first
_STARTS = 24  # positions at which a step may be taken to begin


class RollRecurrence(Pass):
    """Rolls loops over time."""

    name: ClassVar[str] = "roll-recurrence"
    phase: ClassVar[str] = "canonicalize"
    after: ClassVar[dict[str, str]] = {
        "fuse-attention": "attention in a loop is looked at before the loop is",
        "normalize-linear": "cells are rolled in their canonical form",
    }
    exactness: ClassVar[Exactness] = BITWISE

    def run(self, program: Program, ctx: PassContext) -> PassRecord:
        """Roll until nothing repeats any more: a loop may run over the outputs of another."""
        record = PassRecord(self.name, self.exactness)
        calls = calls_of(program.graph)
        declined = near_misses(calls)
        while _roll_once(calls, program, ctx, record):
            calls = calls_of(program.graph)
        left = set(program.graph.nodes)
        record.declined += [decline for decline in declined if decline.at in left]
        if record.rewrites:
            _select_rest(program)
        program.finish()
        self._join_lengths(program, ctx, record)
        return record

    def _join_lengths(self, program: Program, ctx: PassContext, record: PassRecord) -> None:
        """Make the length dynamic, where it was captured at several and a loop fixed it."""
        shorter, program.shorter = program.shorter, ()
        if not shorter or not any(n.target in RECURRENT for n in program.graph.nodes):
            return
        for other in shorter:
            self.run(other, replace(ctx, fuel=Fuel(ctx.fuel.left)))
        found = join_lengths(program, shorter)
        if isinstance(found, Decline):
            record.declined.append(found)
            return
        length = f"dynamic: {found[0]} to {found[1]}, as captured"
        record.rewrites = [
            replace(r, detail={**r.detail, "length": length}) for r in record.rewrites
        ]


def _roll_once(
    calls: Sequence[Call], program: Program, ctx: PassContext, record: PassRecord
) -> bool:
    """Roll every loop that is there now; whether there was one."""
    found = _loops(calls)
    # What the last step computes for nobody has been dropped: it gets that back, and is a step too.
    completed = [complete(body, calls) for body in found.values()]
    if any(completed):
        program.refresh()
        found = _loops(calls_of(program.graph))
    rolled = []
    # From the back: what a loop reads is then still what was looked at.
    for _, body in sorted(found.items(), reverse=True):
        loop = _Loop(body)
        if (reason := _unlisted(body)) is not None:
            if all(decline.at is not loop.first for decline in record.declined):
                record.declined.append(Decline(reason, loop.first))
        elif ctx.enabled(module_path(loop.first)) and ctx.fuel.burn():
            rolled.append(loop.roll(program))
            program.refresh()
    record.rewrites += reversed(rolled)
    return bool(rolled)


def _unlisted(body: Body) -> str | None:
    """What of a step no cell may call: a cell is text, and calls operators on a list only."""
    for column in body.columns:
        try:
            target_name(column[0].node.target)
        except ArtifactError as error:
            return f"a step holds what a recurrence cannot: {error}"
    return None


def _select_rest(program: Program) -> None:
    """Read the few slices by themselves that are left of a tensor which was taken apart."""
    program.graph.eliminate_dead_code(has_effect)
    for unbind in program.calls(aten.unbind.int):
        users = list(unbind.users)
        dim = unbind.args[1] if len(unbind.args) > 1 else unbind.kwargs.get("dim", 0)
        if len(users) == len(unbind.meta["val"]) or any(
            user.target is not operator.getitem for user in users
        ):
            continue
        for user in users:
            args = (unbind.args[0], dim, user.args[1])
            with program.graph.inserting_before(user):
                select = program.graph.call_function(aten.select.int, args)
            select.meta = dict(user.meta)
            select.meta["provenance"] = Provenance("roll-recurrence", (user.name,))
            user.replace_all_uses_with(select)
            program.graph.erase_node(user)


# Finding -----------------------------------------------------------------------------------------


def _loops(calls: Sequence[Call]) -> dict[int, Body]:
    """Loops that do not overlap, by where their stretches begin; those of most steps first."""
    positions = {call.node: at for at, call in enumerate(calls)}
    found: dict[Run, Body] = {}
    for run in periodic_runs([call.number for call in calls]):
        if not any(run.start < other.stop and other.start < run.stop for other in found):
            body = _loop(calls, positions, run)
            if body is not None:
                found[run] = body
    return {run.start: body for run, body in found.items()}


def _loop(calls: Sequence[Call], positions: dict[fx.Node, int], run: Run) -> Body | None:
    """The body of the loop of a stretch, or of the first of several after each other."""
    for start, period in _cuts(run):

        def body(steps: int, start: int = start, period: int = period) -> Body | None:
            part = calls[start : start + steps * period]
            found = body_of(part, positions, start, period)
            return found if isinstance(found, Body) else None

        steps = (run.stop - start) // period
        for few in sorted({min(steps, _FEW), LEAST_STEPS}, reverse=True):
            first = body(few)  # most cuts fail here already
            if first is not None and _Loop(first).is_over_time:
                return body(steps) or body(_most(few, steps, body))
    return None


def _most(low: int, high: int, holds: Callable[[int], Any]) -> int:
    """The largest number below `high` for which something holds that holds for `low`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _cuts(run: Run) -> Iterator[tuple[int, int]]:
    """Where the first step may begin, and how long it may be."""
    for multiple in range(1, _MULTIPLES + 1):
        period = run.period * multiple
        if (run.stop - run.start) // period < LEAST_STEPS:
            return
        spare = (run.stop - run.start) % period
        for offset in dict.fromkeys((0, spare, *range(min(period, _STARTS)))):
            if (run.stop - run.start - offset) // period >= LEAST_STEPS:
                yield run.start + offset, period


# Rolling -----------------------------------------------------------------------------------------


@dataclass
class _Loop:
    """A loop that can be rolled.

    Attributes:
        body: one step.
        joined: nodes that join one value of every step, with how, and the place of the value.
        single: steps whose value is read by itself, by place.
    """

    body: Body
    joined: list[_Joined] = field(default_factory=list)
    single: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inside = {call.node for column in self.body.columns for call in column}
        for place in self.body.operands:
            self._read_outside(place, inside)

    def _read_outside(self, place: int, inside: set[fx.Node]) -> None:
        """Note who reads the values of a place from outside of the loop."""
        nodes = [call.node for call in self.body.columns[place]]
        readers = [[user for user in node.users if user not in inside] for node in nodes]
        joins = [_joined(user, place, nodes) for user in readers[0] if user.target in _JOINS]
        found = {join.node for join in joins if join is not None}
        self.joined += [join for join in joins if join is not None]
        steps = [k for k, users in enumerate(readers) if set(users) - found]
        if steps:
            self.single[place] = steps

    @property
    def first(self) -> fx.Node:
        """The first node of the loop."""
        return self.body.columns[0][0].node

    @property
    def slices(self) -> list[Sliced]:
        """What is read step by step."""
        read = self.body.roles(Sliced)
        handed_on = [self.body.given.get(role.place) for role in self.body.roles(Carried)]
        return list(dict.fromkeys([*read, *(s for s in handed_on if isinstance(s, Sliced))]))

    @property
    def is_over_time(self) -> bool:
        """Whether this is a loop over time, not equal layers after each other."""
        if not (self.slices or self.joined) or self._holds_attention:
            return False
        if self.body.steps == 2 and not any(role.is_whole for role in self.slices):
            return False  # two alike may be chance, or a part of a loop whose steps differ
        values = [self.body.columns[r.place][0].node.meta["val"] for r in self.body.roles(Carried)]
        if any(not isinstance(value, Tensor) for value in values):
            return False
        return bool(values) or any(_is_of_recurrence(s.source) for s in self.slices)

    @property
    def _holds_attention(self) -> bool:
        """Whether a step holds attention of many queries: a layer, on which other passes work."""
        sdpa = aten.scaled_dot_product_attention.default
        nodes = [column[0].node for column in self.body.columns]
        return any(n.target is sdpa and n.meta["val"].shape[-2] != 1 for n in nodes)

    def roll(self, program: Program) -> Applied:
        """Put one node in the place of the loop."""
        rolled = _Rolled(self, program)
        return rolled.replace()


@dataclass(frozen=True)
class _Joined:
    """A node that joins the values of all steps, among others or alone.

    Attributes:
        node: a stack or a concatenation.
        place: place of the value in the body.
        how: what it does with the values of the steps.
        at: where they begin among all that it joins.
    """

    node: fx.Node
    place: int
    how: Collected
    at: int


def _joined(node: fx.Node, place: int, values: Sequence[fx.Node]) -> _Joined | None:
    """How a node joins the values of all steps, in order or in reverse; None: not all of them."""
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(parts, (list, tuple))
    assert isinstance(dim, int)
    dim %= node.meta["val"].ndim
    for reverse in (False, True):
        wanted = list(reversed(values)) if reverse else list(values)
        if wanted[0] in parts:
            at = parts.index(wanted[0])
            if list(parts[at : at + len(wanted)]) == wanted:
                rest = (*parts[:at], *parts[at + len(wanted) :])
                if not set(rest) & set(values):
                    return _Joined(node, place, Collected(_JOINS[node.target], dim, reverse), at)
    return None


def _is_of_recurrence(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target is RECURRENCE


class _Rolled:
    """The replacement of one loop: first the graph of the cell, then the nodes around it."""

    def __init__(self, loop: _Loop, program: Program) -> None:
        self.loop, self.body, self.program = loop, loop.body, program
        self.cell = fx.Graph()
        self.slices: list[Sliced | Counted] = [*loop.slices, *self.body.roles(Counted)]
        carried: list[Carried] = self.body.roles(Carried)
        # A value of d steps before goes through d states: what one step reads as that of d steps
        # before, the next reads as that of d + 1.
        self.states = list(
            dict.fromkeys((c.place, d, c.initial[-d:]) for c in carried for d in _upto(c.steps))
        )
        shared = [role.node for role in self.body.roles(Shared)]
        handed_on = [self.body.given.get(c.place) for c in carried]
        shared += [given.node for given in handed_on if isinstance(given, Shared)]
        shared = list(dict.fromkeys(shared))
        self.weights = [n for n in shared if isinstance(n.meta["val"], Tensor)]
        self.sizes = [n for n in shared if not isinstance(n.meta["val"], Tensor)]
        self.values: dict[Any, fx.Node] = {}
        given: Any = (
            ("x", self.slices),
            ("h", self.states),
            ("w", self.weights),
            ("s", self.sizes),
        )
        for kind, keys in given:
            for index, key in enumerate(keys):
                self.values[key] = self.cell.placeholder(f"{kind}{index}")

    # The cell

    def build(self) -> Cell:
        """The graph of one step."""
        for role in self.slices:
            if isinstance(role, Sliced) and role.keeps and role.width == 1:
                args = (self.values[role], role.dim)
                self.values[role] = self.cell.call_function(aten.unsqueeze.default, args)
        computed: dict[int, fx.Node] = {}
        for place, given in self.body.given.items():
            key = given.node if isinstance(given, Shared) else given
            if key in self.values:
                computed[place] = self.values[key]
        for place, operands in self.body.operands.items():
            call = self.body.columns[place][-1]
            leaves = (self._value(role, computed) for role in operands)
            args, kwargs = nested(leaves, call.structure)
            computed[place] = self.cell.create_node(
                "call_function", call.node.target, tuple(args), kwargs, _plain(call.node)
            )
        following = [
            computed[place] if d == 1 else self.values[place, d - 1, initial[1:]]
            for place, d, initial in self.states
        ]
        stacked = [computed[join.place] for join in self.loop.joined]
        stacked += [computed[place] for place in self.apart]
        last = [computed[place] for place in self.ending]
        self.cell.output((tuple(following), tuple(stacked), tuple(last)))
        how = [join.how for join in self.loop.joined] + [Collected("stack", 0)] * len(self.apart)
        reverse = tuple(isinstance(r, Sliced) and r.stride < 0 for r in self.slices)
        return Cell(self.cell, reverse, len(self.states), len(self.sizes), tuple(how))

    def _value(self, role: Any, computed: dict[int, fx.Node]) -> Any:
        if isinstance(role, Local):
            return computed[role.place]
        if isinstance(role, Carried):
            return self.values[role.place, role.steps, role.initial]
        if isinstance(role, Shared):
            return self.values[role.node]
        if isinstance(role, Made):
            if role not in self.values:
                args = (role.node.target, role.node.args, role.node.kwargs, _plain(role.node))
                self.values[role] = self.cell.create_node("call_function", *args)
            return self.values[role]
        return self.values[role] if isinstance(role, Sliced | Counted) else role

    @property
    def apart(self) -> list[int]:
        """Places whose values before the last are read one by one."""
        final = self.body.steps - 1
        return [place for place, steps in self.loop.single.items() if steps != [final]]

    @property
    def ending(self) -> list[int]:
        """Places of whose values only the last is read by itself."""
        final = self.body.steps - 1
        return [place for place, steps in self.loop.single.items() if steps == [final]]

    # The nodes around it

    def replace(self) -> Applied:
        """Put the node behind the loop, and its results in the places of those of the steps."""
        graph, columns = self.program.graph, self.body.columns
        inside = [call.node for row in zip(*columns, strict=True) for call in row]
        known = set(graph.nodes)
        cell = self.build()
        with graph.inserting_after(inside[-1]):
            anchor = graph.call_function(operator.getitem, ((), 0))  # what follows is put before it
        with graph.inserting_before(anchor):
            inputs = [self._over_time(role) for role in self.slices]
            initial = [before[0] for _, _, before in self.states]
            args = (inputs, initial, self.weights, self.sizes, self.body.steps, cell.text())
            node = graph.create_node("call_function", RECURRENCE, args, name="recurrence")
            for index, join in enumerate(self.loop.joined):
                self._rejoin(join, graph.call_function(operator.getitem, (node, index)))
            at = len(self.loop.joined)
            for index, place in enumerate(self.apart, at):
                self._take_apart(place, graph.call_function(operator.getitem, (node, index)))
            at += len(self.apart)
            for index, place in enumerate(self.ending, at):
                value = graph.call_function(operator.getitem, (node, index))
                self._replace_outside(columns[place][-1].node, value)
        graph.erase_node(anchor)
        for old in reversed(inside):
            if not old.users:
                graph.erase_node(old)
        return self._described(node, known)

    def _over_time(self, role: Sliced | Counted) -> fx.Node:
        """What is read step by step, with time first, and no more of it than is read."""
        graph = self.program.graph
        if isinstance(role, Counted):
            ends = (role.start, role.start + role.stride * self.body.steps, role.stride)
            kind: dict[str, Any] = {"dtype": role.dtype, "device": torch.device(role.device)}
            return graph.call_function(aten.arange.start_step, ends, kind)
        node, shape = role.source, role.source.meta["val"].shape
        last = role.start + role.stride * (self.body.steps - 1)
        low, high, step = min(role.start, last), max(role.start, last), abs(role.stride)
        if role.width > 1:
            return self._windows(role, low, high + role.width)
        if (low, high + 1, step) != (0, shape[role.dim], 1):
            args = (node, role.dim, low, high + 1, *((step,) if step > 1 else ()))
            node = graph.call_function(aten.slice.Tensor, args)
        if role.dim:
            order = [role.dim, *(d for d in range(len(shape)) if d != role.dim)]
            node = graph.call_function(aten.permute.default, (node, order))
        return node

    def _windows(self, role: Sliced, low: int, high: int) -> fx.Node:
        """Windows of a tensor, which may overlap, with time first."""
        graph, node, rank = self.program.graph, role.source, role.source.meta["val"].ndim
        if (low, high) != (0, role.source.meta["val"].shape[role.dim]):
            node = graph.call_function(aten.slice.Tensor, (node, role.dim, low, high))
        args = (node, role.dim, role.width, abs(role.stride))
        node = graph.call_function(aten.unfold.default, args)
        order = [role.dim, *(rank if dim == role.dim else dim for dim in range(rank))]
        return graph.call_function(aten.permute.default, (node, order))

    def _rejoin(self, join: _Joined, value: fx.Node) -> None:
        """Join the values of the steps, which are one tensor now, with what stands around them."""
        graph, parts, how = self.program.graph, list(join.node.args[0]), join.how  # type: ignore[arg-type]
        around = (parts[: join.at], parts[join.at + self.body.steps :])
        if any(around):
            before, after = around
            with graph.inserting_before(join.node):
                if how.how == "stack":
                    before, after = (
                        [graph.call_function(aten.stack.default, (p, how.dim))] if p else []
                        for p in around
                    )
                pieces = [*before, value, *after]
                value = graph.call_function(aten.cat.default, (pieces, how.dim))
        join.node.replace_all_uses_with(value)
        graph.erase_node(join.node)

    def _take_apart(self, place: int, value: fx.Node) -> None:
        """Give those who read single steps a slice of all."""
        graph = self.program.graph
        parts = graph.call_function(aten.unbind.int, (value, 0))
        for step in self.loop.single[place]:
            part = graph.call_function(operator.getitem, (parts, step))
            self._replace_outside(self.body.columns[place][step].node, part)

    def _replace_outside(self, old: fx.Node, new: fx.Node) -> None:
        inside = {call.node for column in self.body.columns for call in column}
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)

    def _described(self, node: fx.Node, known: set[fx.Node]) -> Applied:
        """Say of the new nodes where they come from."""
        columns = self.body.columns
        first = [column[0].node for column in columns]
        path = _common([module_path(n) for n in first])
        traced = next((n for n in first if "stack_trace" in n.meta), first[0])
        origin = Provenance("roll-recurrence", tuple(n.name for n in first), path)
        for fresh in self.program.graph.nodes:
            if fresh not in known:
                if path:
                    fresh.meta["nn_module_stack"] = {path: (path, "")}
                if "stack_trace" in traced.meta:
                    fresh.meta["stack_trace"] = traced.meta["stack_trace"]
                fresh.meta["provenance"] = origin
        detail = {"steps": self.body.steps, "length": "fixed: captured at one length"}
        return Applied("roll-loop", node.name, path, path, detail)


def _plain(node: fx.Node) -> str:
    """The name of an operator without its overload."""
    target: Any = node.target
    return str(getattr(getattr(target, "overloadpacket", target), "__name__", "call"))


def _upto(steps: int) -> range:
    return range(1, steps + 1)


def _common(paths: Sequence[str]) -> str:
    """The innermost module that holds all paths."""
    parts = [path.split(".") for path in paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
