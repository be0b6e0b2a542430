"""`hoist-products`: what a loop over time multiplies by a weight at every step, multiplied at once.

    h, y = step(W x[t] + U h)                     T products W x[t]
      ->  v = linear(x, W);  step(v[t] + U h)     one

    y = stack([V h1, ..., V hT])                  T products V h[t]
      ->  linear(stack([h1, ..., hT]), V)         one

A product of what a step is given does not depend on the state and is done in front of the loop; one
that is only collected is done behind it. What reads the state and is handed on stays: it is one
product a step. The products that leave are linear maps like any other, to the passes that follow.

Exactness: REASSOCIATES. Source: as cuDNN does (Appleyard et al. 2016, arXiv 1604.01946).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxpress.ops.recurrence import Cell, Collected
from fxpress.program import Program, module_path
from fxpress.rewrite import Applied, Decline, Pass, PassContext, PassRecord, provide
from fxpress.testing import REASSOCIATES, Exactness

__all__ = ["HoistProducts"]

aten = torch.ops.aten

_LINEAR = aten.linear.default
_PRODUCTS = {
    _LINEAR,
    aten.matmul.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.lstm_cell.default,
    aten.gru_cell.default,
    aten.rnn_tanh_cell.default,
    aten.rnn_relu_cell.default,
}


class HoistProducts(Pass):
    """Takes products out of loops over time."""

    name: ClassVar[str] = "hoist-products"
    phase: ClassVar[str] = "canonicalize"
    after: ClassVar[dict[str, str]] = {"roll-recurrence": "a loop is one node by then"}
    exactness: ClassVar[Exactness] = REASSOCIATES

    def run(self, program: Program, ctx: PassContext) -> PassRecord:
        """Take out of every loop what can leave it; say of each other product why it stays."""
        record = PassRecord(self.name, self.exactness)
        for node in program.calls(torch.ops.fxpress.recurrence.default):
            loop, path = _Loop.of(node), module_path(node)
            if (loop.before or loop.behind) and ctx.enabled(path) and ctx.fuel.burn():
                counts = {"before": len(loop.before), "behind": len(loop.behind)}
                record.rewrites.append(Applied(self.name, node.name, path, detail=counts))
                node = provide(program, node, self.name, loop.emptied)  # noqa: PLW2901
                loop = _Loop.of(node)
            record.declined += [Decline(reason, node) for reason in loop.reasons()]
        program.finish()
        return record


@dataclass
class _Loop:
    """A loop over time, and the products of its step that can leave it.

    Attributes:
        node: the loop.
        cell: its step; only read.
        kinds: what the placeholders of the step stand for: by kind, as in the call.
        before: products of what a step is given.
        behind: products that are only collected, or returned by the last step.
    """

    node: fx.Node
    cell: Cell
    kinds: dict[str, list[fx.Node]]
    before: list[fx.Node] = field(default_factory=list)
    behind: list[fx.Node] = field(default_factory=list)

    @classmethod
    def of(cls, node: fx.Node) -> _Loop:
        """Look into a loop."""
        arguments: Any = node.args
        *given, _, text = arguments
        cell = Cell.read(text)
        places = iter(cell.graph.find_nodes(op="placeholder"))
        kinds = {kind: [next(places) for _ in n] for kind, n in zip("xhws", given, strict=True)}
        loop = cls(node, cell, kinds)
        linears = [n for n in cell.graph.nodes if n.target is _LINEAR and loop._by_weight(n)]
        loop.before = [n for n in linears if loop._is_given(n.args[0])]
        loop.behind = [n for n in linears if n not in loop.before and loop._is_collected(n)]
        return loop

    def _by_weight(self, product: fx.Node) -> bool:
        return all(n in self.kinds["w"] for n in product.args[1:] if n is not None)

    def _is_given(self, operand: Any) -> bool:
        """Whether a value is what a step is given, with a dimension of one or without."""
        if operand in self.kinds["x"]:
            return True
        if operand.target is not aten.unsqueeze.default or operand.args[0] not in self.kinds["x"]:
            return False
        rank = self._given(operand.args[0]).meta["val"].ndim  # time stands for the new dimension
        return bool(operand.args[1] % rank != rank - 1)

    def _given(self, place: fx.Node) -> fx.Node:
        """What a placeholder of the step stands for in the call."""
        for at, nodes in enumerate(self.kinds.values()):
            if place in nodes:
                found: fx.Node = self.node.args[at][nodes.index(place)]  # type: ignore[index, assignment]
                return found
        raise AssertionError(f"{place} is no placeholder")

    def _is_collected(self, product: fx.Node) -> bool:
        """Whether a value is read by nobody in the loop, and joined along leading dimensions."""
        following, outputs, _ = self.cell.results
        if product in following or {*product.users} != {self.cell.graph.output_node()}:
            return False
        joins = [how for how, n in zip(self.cell.collected, outputs, strict=True) if n is product]
        return all(how.dim < self._rank(at) - 1 for at, how in self._joined(product, joins))

    def _joined(self, product: fx.Node, joins: Sequence[Collected]) -> list[tuple[int, Collected]]:
        outputs = self.cell.results[1]
        places = [at for at, n in enumerate(outputs) if n is product]
        return list(zip(places, joins, strict=True))

    def _rank(self, at: int) -> int:
        """Dimensions of a result of the loop."""
        rank: int = self.node.meta["val"][at].ndim
        return rank

    # The loop without them

    def emptied(self) -> fx.Node:
        """The products in front of the loop, the loop without them, and those behind it."""
        graph = self.node.graph
        live = self._live()
        kept = {kind: [n for n in nodes if n in live] for kind, nodes in self.kinds.items()}
        kept["h"] = self.kinds["h"]
        made = [self._in_front(product) for product in self.before if product in live]
        given = {kind: [self._given(n) for n in nodes] for kind, nodes in kept.items()}
        cell = self._cell(kept, live)
        inputs = [*given["x"], *made]
        args = (inputs, given["h"], given["w"], given["s"], self.node.args[4], cell.text())
        loop = graph.create_node("call_function", self.node.target, args, name=self.node.name)
        self._put_behind(loop)
        return loop

    def _operand(self, product: fx.Node) -> Any:
        """What a product multiplies, in the step that is left: that of itself where it stays."""
        return product.args[0] if product in self.behind else product

    @property
    def _results(self) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
        """What the step that is left hands on, collects and returns."""
        following, outputs, last = self.cell.results
        return (
            list(following),
            [self._operand(n) for n in outputs],
            [self._operand(n) for n in last],
        )

    def _live(self) -> set[fx.Node]:
        """What the step that is left is computed from; products in front are its inputs."""
        stack = [n for part in self._results for n in part]
        seen = set(stack)
        while stack:
            node = stack.pop()
            if node not in self.before:
                fresh = [n for n in node.all_input_nodes if n not in seen]
                seen.update(fresh)
                stack += fresh
        return seen

    def _in_front(self, product: fx.Node) -> fx.Node:
        """The product of all steps."""
        operand, *weights = product.args
        source: Any = operand if operand in self.kinds["x"] else operand.args[0]  # type: ignore[union-attr]
        return self._product(self._given(source), weights)

    def _product(self, of: fx.Node, weights: Sequence[Any]) -> fx.Node:
        """A product outside of the loop, as a call of the module that has the weight."""
        given = [self._given(n) if isinstance(n, fx.Node) else n for n in weights]
        made = self.node.graph.call_function(_LINEAR, (of, *given))
        if path := str(given[0].target).rpartition(".")[0] if given[0].op == "get_attr" else "":
            made.meta["nn_module_stack"] = {path: (path, "")}
        return made

    def _cell(self, kept: dict[str, list[fx.Node]], live: set[fx.Node]) -> Cell:
        graph, values = fx.Graph(), {}
        products = [n for n in self.before if n in live]
        for kind, nodes in kept.items():
            read = nodes + (products if kind == "x" else [])
            for index, node in enumerate(read):
                values[node] = graph.placeholder(f"{kind}{index}")
        for node in products:
            operand: Any = node.args[0]
            if operand not in self.kinds["x"]:
                args = (values[node], operand.args[1])
                values[node] = graph.call_function(aten.unsqueeze.default, args)
        for node in self.cell.graph.nodes:
            if node.op == "call_function" and node in live and node not in values:
                values[node] = graph.node_copy(node, values.__getitem__)
        graph.output(tuple(tuple(values[n] for n in part) for part in self._results))
        backwards = dict(zip(self.kinds["x"], self.cell.reverse, strict=True))
        sources = [n.args[0] if n.args[0] in backwards else n.args[0].args[0] for n in products]  # type: ignore[union-attr]
        reverse = tuple(backwards[n] for n in (*kept["x"], *sources))  # type: ignore[index]
        return Cell(graph, reverse, self.cell.states, len(kept["s"]), self.cell.collected)

    def _put_behind(self, loop: fx.Node) -> None:
        """Multiply what is collected, in the places of the products that were."""
        _, outputs, last = self.cell.results
        moved = {at: n for at, n in enumerate((*outputs, *last)) if n in self.behind}
        for user in list(self.node.users):
            product = moved.get(user.args[1])  # type: ignore[arg-type]
            if product is not None:
                graph = self.node.graph
                joined = graph.call_function(operator.getitem, (loop, user.args[1]))
                user.replace_all_uses_with(self._product(joined, product.args[1:]))
                graph.erase_node(user)

    # What stays

    def reasons(self) -> list[str]:
        """Why each product that is left stays."""
        by_state = set(self.kinds["h"])
        found = []
        for node in self.cell.graph.nodes:
            if not by_state.isdisjoint(node.all_input_nodes):
                by_state.add(node)
            weights = {*node.all_input_nodes} & {*self.kinds["w"]}
            if node.target in _PRODUCTS and weights:
                why = "reads its state: one product a step"
                if node not in by_state:
                    why = f"reads %{node.args[0]}, which every step computes for itself"
                found.append(f"%{node.name} in the step of a loop {why}")
        return found
