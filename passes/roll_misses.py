"""What is nearly a loop over time, and where its steps differ.

A tensor that is read slice by slice, each slice where the one before has been worked on, tells of a
loop. Its steps are the stretches from one read to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import fx

from fxpress.passes.roll_bodies import body_of, slice_of
from fxpress.passes.roll_periods import LEAST_STEPS, Call
from fxpress.program import source_line
from fxpress.rewrite import Decline

__all__ = ["near_misses"]


def near_misses(calls: Sequence[Call]) -> list[Decline]:
    """Where the steps of what looks like a loop over time differ."""
    positions = {call.node: at for at, call in enumerate(calls)}
    found = {}
    for reads in _series(calls, positions):
        steps = [calls[a:b] for a, b in pairwise(reads)]
        steps.append(calls[reads[-1] : reads[-1] + len(steps[-1])])
        if not all(_depends(later, earlier) for earlier, later in pairwise(steps)):
            continue
        alike = [_targets(earlier) == _targets(later) for earlier, later in pairwise(steps)]
        if not any(alike):
            continue
        decline = _difference(steps, alike, positions, reads[0])
        if decline is not None:
            found[decline.reason] = decline
    return list(found.values())


def _series(calls: Sequence[Call], positions: dict[fx.Node, int]) -> Iterator[list[int]]:
    """Positions at which the slices of a tensor are read, one slice after the other."""
    slices: dict[tuple[fx.Node, int, bool], list[tuple[int, fx.Node]]] = {}
    for call in calls:
        if (read := slice_of(call.node)) is not None and read[-1] == 1:
            source, dim, index, keeps, _ = read
            slices.setdefault((source, dim, keeps), []).append((index, call.node))
    for nodes in (run for reads in slices.values() for run in _even(reads)):
        if len(nodes) >= LEAST_STEPS:
            users = [[positions[u] for u in n.users if u in positions] for n in nodes]
            reads = [min(found) for found in users if found]
            here = [positions[node] for node in nodes]
            if all(read < own for read, own in zip(reads, here[1:], strict=False)):
                reads = here  # each is taken when it is needed, not all at once
            if len(reads) == len(nodes) and all(a < b for a, b in pairwise(reads)):
                yield reads


def _even(reads: Sequence[tuple[int, fx.Node]]) -> Iterator[list[fx.Node]]:
    """Parts of a series in which the index goes on alike: there and back are two loops."""
    part: list[tuple[int, fx.Node]] = []
    for read in reads:
        if len(part) > 1 and read[0] - part[-1][0] != part[1][0] - part[0][0]:
            yield [node for _, node in part]
            part = []
        part.append(read)
    yield [node for _, node in part]


def _depends(later: Sequence[Call], earlier: Sequence[Call]) -> bool:
    nodes = {call.node for call in earlier}
    return any(leaf in nodes for call in later for leaf in call.leaves if isinstance(leaf, fx.Node))


def _targets(calls: Sequence[Call]) -> list[object]:
    return [call.node.target for call in calls]


def _difference(
    steps: Sequence[Sequence[Call]],
    alike: Sequence[bool],
    positions: dict[fx.Node, int],
    start: int,
) -> Decline | None:
    """Why steps are not those of one loop."""
    if all(alike):
        whole = [call for step in steps for call in step]
        body = body_of(whole, positions, start, len(steps[0]))
        if isinstance(body, Decline):
            return body
        return _holds_attention(steps[0])
    at = alike.index(False) + 1
    if at == len(alike):
        return None  # where the last step ends is not known
    before, step = steps[at - 1], steps[at]
    for old, new in zip(before, step, strict=False):
        if old.node.target is not new.node.target:
            return _differs(at, new.node, f"calls {new.node.target}, not {old.node.target}")
    extra = max(before, step, key=len)[min(len(before), len(step))].node
    return _differs(at, extra, "has no counterpart in the step beside it")


def _differs(step: int, node: fx.Node, what: str) -> Decline:
    line = source_line(node)
    where = f" ({line})" if line else ""
    return Decline(f"bodies differ at step {step}: %{node.name} {what}{where}", node)


def _holds_attention(step: Sequence[Call]) -> Decline | None:
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    for call in step:
        if call.node.target is sdpa:
            return Decline("a step holds attention, which is left to other passes", call.node)
    return None
