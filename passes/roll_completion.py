"""Give the last step of a loop back what it computed for nobody.

Capture drops what nobody reads: the cell state behind the last step, the next input that a decoder
would have embedded. Then the last step is shorter than the others, and no step of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxpress.passes.roll_bodies import Body, Carried, Counted, Local, Shared, Sliced
from fxpress.passes.roll_periods import Call, nested

__all__ = ["complete"]


def complete(body: Body, calls: Sequence[Call]) -> bool:
    """Put the missing calls of one more step behind a loop, if at least half of it is there.

    Args:
        body: the loop.
        calls: all calls of the graph.

    Returns:
        Whether there is one more step now; its new calls are unread.
    """
    step = _Step(body, calls)
    return step.is_partial and step.fill()


class _Step:
    """The step behind the last whole one: which of its calls are there."""

    def __init__(self, body: Body, calls: Sequence[Call]) -> None:
        self.body = body
        self.nodes: dict[int, fx.Node] = {}
        last = body.columns[-1][-1].node
        at = next(i for i, call in enumerate(calls) if call.node is last) + 1
        for place, column in enumerate(body.columns):
            if at < len(calls) and self._is_at(place, column[-1], calls[at]):
                self.nodes[place] = calls[at].node
                at += 1
        self.before = last

    @property
    def is_partial(self) -> bool:
        """Whether most of the step is there, but not all."""
        places = len(self.body.columns)
        return places / 2 <= len(self.nodes) < places

    def _is_at(self, place: int, pattern: Call, call: Call) -> bool:
        if call.number != pattern.number:
            return False
        roles = self.body.operands.get(place)
        return roles is None or all(
            isinstance(role, Sliced | Counted)
            or self._value(role) is leaf
            or self._value(role) == leaf
            for role, leaf in zip(roles, call.leaves, strict=True)
        )

    def _value(self, role: Any) -> Any:
        """What a role stands for in this step; None: nothing that is there."""
        if isinstance(role, Local):
            return self.nodes.get(role.place)
        if isinstance(role, Carried):
            return self.body.columns[role.place][-role.steps].node
        return role.node if isinstance(role, Shared) else role

    def fill(self) -> bool:
        """Make the missing calls, in their places."""
        made: list[fx.Node] = []
        before = self.before
        for place, column in enumerate(self.body.columns):
            if place not in self.nodes:
                node = self._made(place, column[-1], before)
                if node is None:
                    for extra in reversed(made):
                        extra.graph.erase_node(extra)
                    return False
                self.nodes[place] = node
                made.append(node)
            before = self.nodes[place]
        return True

    def _made(self, place: int, pattern: Call, before: fx.Node) -> fx.Node | None:
        """One missing call; None: it would read a slice that is not there."""
        roles = self.body.operands.get(place)
        if roles is None:
            roles = pattern.leaves if isinstance(self.body.given[place], Shared) else []
        if not roles or any(isinstance(role, Sliced | Counted) for role in roles):
            return None
        args, kwargs = nested((self._value(role) for role in roles), pattern.structure)
        with before.graph.inserting_after(before):
            node = before.graph.create_node(
                "call_function", pattern.node.target, tuple(args), kwargs
            )
        for key in ("nn_module_stack", "stack_trace"):
            if key in pattern.node.meta:
                node.meta[key] = pattern.node.meta[key]
        return node
