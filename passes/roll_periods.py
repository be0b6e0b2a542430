"""Where a sequence repeats itself: the lag scan of `roll-recurrence`.

Every operator call of a graph gets a number: equal ones for the same operator on the same kinds of
operands. A loop that was unrolled is then a stretch of numbers with a period.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "LEAST_STEPS",
    "SLICERS",
    "Call",
    "Run",
    "calls_of",
    "countable",
    "makes_constant",
    "nested",
    "periodic_runs",
]

aten = torch.ops.aten

LEAST_STEPS = 2
"""Two equal stretches may be chance: they are a loop only where they read a whole tensor."""

SLICERS: dict[Any, tuple[int, ...]] = {
    aten.select.int: (2,),
    aten.slice.Tensor: (2, 3),
    operator.getitem: (1,),
}
"""What reads one step of a tensor, and which of its arguments count the steps."""


_SHAPED = {
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
}


@dataclass(frozen=True)
class Call:
    """An operator call with its arguments laid out flat.

    Attributes:
        node: the call.
        leaves: its arguments, nodes and plain values.
        structure: how they are nested.
        number: equal for calls that may be the same place in two steps.
    """

    node: fx.Node
    leaves: list[Any]
    structure: Hashable
    number: int


@dataclass(frozen=True)
class Run:
    """A stretch in which `numbers[i] == numbers[i + period]`.

    Attributes:
        start: its first position.
        stop: the position behind its last.
        period: the shortest there is.
    """

    start: int
    stop: int
    period: int

    @property
    def steps(self) -> int:
        """How many whole periods fit."""
        return (self.stop - self.start) // self.period


def calls_of(graph: fx.Graph) -> list[Call]:
    """The operator calls of a graph, numbered, in graph order.

    Calls that make a constant of nothing are left out: they may stand anywhere, as where the first
    step makes the state that it was not given. So are, where there are few of them, calls that make
    one in the shape of a slice.
    """
    numbers: dict[Hashable, int] = {}
    calls = []
    for node in graph.nodes:
        if node.op == "call_function" and not makes_constant(node):
            leaves, structure = arguments_of(node)
            number = numbers.setdefault(_key(node, leaves, structure), len(numbers))
            calls.append(Call(node, leaves, structure, number))
    counts = Counter(call.number for call in calls)
    return [c for c in calls if counts[c.number] >= LEAST_STEPS or not _shapes_slice(c.node)]


def makes_constant(node: fx.Node) -> bool:
    """Whether a call makes the same tensor wherever it stands: it reads no other node."""
    target = node.target
    if node.all_input_nodes or not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _shapes_slice(node: fx.Node) -> bool:
    """Whether a call makes a constant in the shape of a slice, whatever is in that."""
    source = node.args[0] if node.args else None
    return node.target in _SHAPED and isinstance(source, fx.Node) and source.target in SLICERS


def arguments_of(node: fx.Node) -> tuple[list[Any], Hashable]:
    """The arguments of a call in a row, and how they were nested."""
    leaves: list[Any] = []
    structure = _laid_out((node.args, node.kwargs), leaves)
    return leaves, structure


def _laid_out(value: Any, leaves: list[Any]) -> Hashable:
    """Put the plain values and nodes of an argument in a row; how they were nested."""
    if isinstance(value, (list, tuple)):
        return None, tuple([_laid_out(item, leaves) for item in value])
    if isinstance(value, dict):
        return tuple(value), tuple([_laid_out(item, leaves) for item in value.values()])
    leaves.append(value)
    return None


def nested(leaves: Iterator[Any], structure: Any) -> Any:
    """The argument that a row of values stands for."""
    if structure is None:
        return next(leaves)
    keys, inner = structure
    items = [nested(leaves, part) for part in inner]
    return items if keys is None else dict(zip(keys, items, strict=True))


def _key(node: fx.Node, leaves: Sequence[Any], structure: Hashable) -> Hashable:
    """What must be the same of a call at every step: all but counters and what is handed on."""
    counters = {*SLICERS.get(node.target, ()), *countable(node)}
    described = tuple(
        None if at in counters else _described(leaf) for at, leaf in enumerate(leaves)
    )
    return node.target, structure, described, _kind(node.meta["val"])


def countable(node: fx.Node) -> list[int]:
    """Places of whole numbers, in a row of arguments, where a tensor could stand instead."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return []
    found = []
    for at, (given, argument) in enumerate(zip(node.args, target._schema.arguments, strict=False)):
        if isinstance(given, (list, tuple)):
            break  # from here on places are other ones
        if type(given) is int and str(argument.type) == "Tensor":
            found.append(at)
    return found


def _described(leaf: Any) -> Hashable:
    """An operand by its kind; a plain value by type and text."""
    if isinstance(leaf, fx.Node):
        return _kind(leaf.meta["val"])
    return type(leaf), repr(leaf)


def _kind(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.dtype, str(tuple(value.shape))
    if isinstance(value, (tuple, list)):
        return len(value), _kind(value[0]) if value else None
    return type(value).__name__


def periodic_runs(numbers: Sequence[int]) -> list[Run]:
    """Every longest stretch with a period that holds at least three of its periods; most of two.

    Windows are doubled: two windows of width w that begin p <= w apart and are equal have the
    period p. One level of doubling numbers all windows in one walk, so that n positions take
    O(n log n), however many steps there are. Of a stretch of two periods no window of a whole one
    is left to compare: a window of at least half of one tells of it, where nothing nearer looks
    like that window.

    Returns:
        The runs, those of most steps first, then those that cover most.
    """
    found: set[Run] = set()
    ranks, width = list(numbers), 1
    while width < 2 * (len(numbers) // LEAST_STEPS):
        covered: dict[int, int] = {}  # period -> where its last run ended
        latest: dict[int, int] = {}  # rank -> where it was last
        for at, rank in enumerate(ranks):
            period = at - latest.get(rank, at)  # 0 of what is new
            latest[rank] = at
            if width // 2 < period < 2 * width and at >= covered.get(period, 0):
                run = _extended(numbers, at - period, period)
                covered[period] = run.stop
                if run.steps >= LEAST_STEPS:
                    found.add(run)
        ranks, width = _doubled(ranks, width), 2 * width
    return sorted(found, key=lambda r: (-r.steps, r.start - r.stop, r.start, r.period))


def _doubled(ranks: Sequence[int], width: int) -> list[int]:
    pairs: dict[tuple[int, int], int] = {}
    return [pairs.setdefault(pair, len(pairs)) for pair in zip(ranks, ranks[width:], strict=False)]


def _extended(numbers: Sequence[int], start: int, period: int) -> Run:
    stop = start + period
    while stop < len(numbers) and numbers[stop] == numbers[stop - period]:
        stop += 1
    while start and numbers[start - 1] == numbers[start - 1 + period]:
        start -= 1
    return Run(start, stop, period)
