"""One graph for every length: captures at several lengths, rolled, become one of dynamic length.

Export fixes the length of a loop of Python. Captures at the shortest length, at the one above it
and at the longest are compared node by node. They must be the same graph with the same cells, but
for whole numbers that are a + b T at all three; these are computed from the length from then on.
What a loop does at some later step only would show in the longest capture, so that the length may
be anything from the shortest to the longest, and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.roll_bodies import same_value
from fxpress.passes.roll_periods import arguments_of, nested
from fxpress.program import Program, Provenance, attribute
from fxpress.rewrite import Decline

__all__ = ["join_lengths"]

aten = torch.ops.aten


class _DiffersError(Exception):
    """The graphs differ in more than their length; holds the `Decline`."""


def join_lengths(program: Program, shorter: Sequence[Program]) -> tuple[int, int] | Decline:
    """Give a program a dynamic length, from what was captured at shorter ones.

    Args:
        program: captured at the longest length.
        shorter: the same at shorter lengths, after the same passes.

    Returns:
        The shortest and the longest length, or why the length stays fixed.
    """
    programs = (*shorter, program)
    graphs = [list(p.graph.nodes) for p in programs]
    if len({len(nodes) for nodes in graphs}) > 1:
        counts = ", ".join(str(len(nodes)) for nodes in graphs)
        return Decline(f"the length is fixed: captures of other lengths have {counts} nodes")
    try:
        lengths, read = _length(programs)
        trial = program.copy()
        _Joined(trial, graphs, programs, lengths, read).join()
    except _DiffersError as error:
        decline: Decline = error.args[0]
        return decline
    program.graph_module = trial.graph_module
    return lengths[0], lengths[-1]


def _length(programs: Sequence[Program]) -> tuple[list[int], tuple[int, int]]:
    """The length of every capture, and the input and dimension that have it."""
    for at, nodes in enumerate(zip(*(p.placeholders for p in programs), strict=True)):
        values = [node.meta["val"] for node in nodes]
        if not all(isinstance(value, Tensor) for value in values):
            continue
        for dim, sizes in enumerate(zip(*(value.shape for value in values), strict=True)):
            if all(isinstance(s, int) for s in sizes) and len(set(sizes)) == len(sizes):
                return list(sizes), (at, dim)
    raise AssertionError("shorter captures are of shorter inputs")


class _Joined:
    """The comparison of the graphs, and the changes of the one that is kept."""

    def __init__(
        self,
        trial: Program,
        graphs: Sequence[Sequence[fx.Node]],
        programs: Sequence[Program],
        lengths: Sequence[int],
        read: tuple[int, int],
    ) -> None:
        self.trial, self.graphs, self.programs, self.lengths = trial, graphs, programs, lengths
        self.indices = [{node: i for i, node in enumerate(nodes)} for nodes in graphs]
        self.input, self.dim = trial.placeholders[read[0]], read[1]
        self.sizes: dict[tuple[int, int], fx.Node] = {}
        self.copies = dict(zip(graphs[-1], trial.graph.nodes, strict=True))

    def join(self) -> None:
        """Make the length dynamic, or raise."""
        mode = self.trial._fake_mode()
        self.symbol = _symbol(mode.shape_env, self.lengths)
        nodes = list(self.trial.graph.nodes)
        last = self.trial.placeholders[-1]
        with self.trial.graph.inserting_after(last):
            self.length = self.trial.graph.call_function(aten.sym_size.int, (self.input, self.dim))
        self.tail = self.length
        for row, node in zip(zip(*self.graphs, strict=True), nodes, strict=True):
            self._compare(row, node, mode)
        origin = Provenance("roll-recurrence", (self.input.name,))
        for node in self.trial.graph.nodes:
            if node.op == "call_function":
                node.meta.pop("val", None)
                node.meta.setdefault("provenance", origin)
        try:
            with torch.no_grad():
                self.trial.refresh()
        except Exception as error:  # an operator raises what it likes about its arguments
            reason = " ".join(str(error).split())[:160]
            raise _DiffersError(Decline(f"the length is fixed: {reason}")) from error
        bounds = mode.shape_env.bound_sympy(self.symbol.node.expr)
        if (bounds.lower, bounds.upper) != (self.lengths[0], self.lengths[-1]):
            why = "the shapes of an operator take no other"
            raise _DiffersError(Decline(f"the length is fixed: {why}", self.length))
        self.trial.graph_module.recompile()

    def _compare(self, row: Sequence[fx.Node], node: fx.Node, mode: Any) -> None:
        if len({(n.op, n.target) for n in row if n.op != "placeholder"}) > 1:
            raise self._differs(row, f"{row[0].name} there is {row[-1].name}")
        if node.op == "get_attr":
            held = [attribute(p.graph_module, str(node.target)) for p in self.programs]
            if any(h.shape != held[0].shape or not _equal(h, held[0]) for h in held):
                raise self._differs(row, f"{node.target} holds something else")
        elif node.op == "placeholder":
            self._resize(row, node, mode)
        else:
            laid_out = [arguments_of(n) for n in row]
            if len({structure for _, structure in laid_out}) > 1:
                raise self._differs(row, f"{node.name} has other arguments")
            leaves = [
                self._leaf(row, values)
                for values in zip(*(leaves for leaves, _ in laid_out), strict=True)
            ]
            if any(new is not old for new, old in zip(leaves, laid_out[-1][0], strict=True)):
                mapped = (self.copies.get(v, v) if isinstance(v, fx.Node) else v for v in leaves)
                args, kwargs = nested(mapped, laid_out[-1][1])
                node.args, node.kwargs = tuple(args), kwargs

    def _leaf(self, row: Sequence[fx.Node], values: Sequence[Any]) -> Any:
        """An argument for every length."""
        if isinstance(values[0], fx.Node):
            places = {index.get(v) for index, v in zip(self.indices, values, strict=True)}
            if len(places) > 1:
                raise self._differs(row, f"{row[-1].name} reads another node")
            return values[-1]
        if all(same_value(v, values[0]) for v in values):
            return values[-1]
        if all(type(v) is int for v in values):
            return self._size(*self._line(row, values))
        what = "another cell" if isinstance(values[0], str) else f"{values[0]!r}, {values[-1]!r}"
        raise self._differs(row, f"{row[-1].name} computes with {what}")

    def _line(self, row: Sequence[fx.Node], values: Sequence[Any]) -> tuple[int, int]:
        """Slope and offset of numbers over the lengths."""
        (a, b), (u, v) = (self.lengths[0], self.lengths[-1]), (values[0], values[-1])
        slope, rest = divmod(v - u, b - a)
        offset = u - slope * a
        on_line = all(slope * t + offset == w for t, w in zip(self.lengths, values, strict=True))
        if rest or not on_line:
            raise self._differs(row, f"{row[-1].name} has sizes {list(values)}")
        return slope, offset

    def _size(self, slope: int, offset: int) -> fx.Node:
        """The node of slope * T + offset."""
        if (slope, offset) == (1, 0):
            return self.length
        if (slope, offset) not in self.sizes:
            node, graph = self.length, self.trial.graph
            for function, number, idle in ((operator.mul, slope, 1), (operator.add, offset, 0)):
                if number != idle:
                    with graph.inserting_after(self.tail):
                        node = self.tail = graph.call_function(function, (node, number))
            self.sizes[slope, offset] = node
        return self.sizes[slope, offset]

    def _resize(self, row: Sequence[fx.Node], node: fx.Node, mode: Any) -> None:
        """Give an input its dynamic sizes."""
        values = [n.meta["val"] for n in row]
        if not all(isinstance(value, Tensor) for value in values):
            if any(value != values[0] for value in values):
                raise self._differs(row, f"the input {node.name} is another")
            return
        both = [
            [self._dynamic(row, column) for column in zip(*parts, strict=True)]
            for parts in ([v.shape for v in values], [v.stride() for v in values])
        ]
        if any(not isinstance(n, int) for n in (*both[0], *both[1])):
            with mode:
                blank = torch.empty_strided(*both, dtype=values[-1].dtype, device=values[-1].device)
            node.meta["val"] = blank

    def _dynamic(self, row: Sequence[fx.Node], column: Sequence[Any]) -> Any:
        if not all(isinstance(s, int) for s in column) or len(set(column)) == 1:
            return column[-1]
        slope, offset = self._line(row, column)
        return slope * self.symbol + offset

    def _differs(self, row: Sequence[fx.Node], what: str) -> _DiffersError:
        reason = (
            f"the length is fixed: captured at {self.lengths[0]} and {self.lengths[-1]}, {what}"
        )
        return _DiffersError(Decline(reason, row[-1]))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or a.data_ptr() == b.data_ptr() or bool(torch.equal(a, b))


def _symbol(environment: Any, lengths: Sequence[int]) -> Any:
    """A size that may be anything from the shortest length to the longest."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StrictMinMaxConstraint
    from torch.utils._sympy.value_ranges import ValueRanges

    bounds = ValueRanges(lengths[0], lengths[-1])
    symbol = environment.create_symbol(
        lengths[-1],
        ConstantSource("length"),
        DimDynamic.DYNAMIC,
        StrictMinMaxConstraint(warn_only=False, vr=bounds),
    )
    return environment.create_symintnode(symbol, hint=lengths[-1])
