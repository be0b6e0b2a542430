"""From the product with v back to the softmax, over views, casts, and what changes probabilities.

(p * a) @ v = a * (p @ v)        a of size one along the keys
(p * b) @ v = p @ (b^T * v)      b of size one along the queries
p where kept, else 0             the same p, where the mask of the scores dropped these keys
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.dataflow import Constants, argument, is_noop
from fxpress.passes.indicators import conditions, is_indicator
from fxpress.passes.products import Strided
from fxpress.passes.score_walk import FILLS, Way, filled, is_whole
from fxpress.passes.scores import Keep, Scores, Stretch
from fxpress.passes.softmax import Softmax, is_cast, softmax_of
from fxpress.passes.views import VIEWS, is_view, turned
from fxpress.program import Program, captured
from fxpress.rewrite import Decline

__all__ = ["UNCHANGED", "Moved", "Probabilities", "moved", "probabilities_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Probabilities:
    """The left operand of a product with v.

    Attributes:
        softmax: the softmax behind it.
        way: how it was changed on the way: by factors, stretches, and where it was set to zero.
    """

    softmax: Softmax
    way: Way


def probabilities_of(operand: Strided, program: Program) -> Probabilities | Decline | None:
    """The softmax whose probabilities an operand is, and how they were changed."""
    return _Walk(program).back(operand.node, Way(operand.order))


@dataclass
class _Walk:
    """A walk back through one program."""

    program: Program
    constants: Constants = field(init=False)

    def __post_init__(self) -> None:
        self.constants = Constants(self.program)

    def back(self, node: fx.Node, way: Way) -> Probabilities | Decline | None:
        """Follow the probabilities back to their softmax."""
        while (found := softmax_of(node)) is None:
            if node.op != "call_function":
                return None
            if node.target in (aten.mul.Tensor, aten.div.Tensor):
                return self._scaled(node, way)
            further = self._moved(node, way) or self._zeroed(node, way)
            if further is None:
                return None
            node, way = further
        return found if isinstance(found, Decline) else Probabilities(found, way)

    def _moved(self, node: fx.Node, way: Way) -> tuple[fx.Node, Way] | None:
        """Behind one view or cast."""
        if way.whole is None and (earlier := turned(node, way.order)) is not None:
            return earlier[0], replace(way, order=earlier[1])
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        if is_noop(node) or is_cast(node) or (is_view(node) and way.is_plain):
            return source, way
        further = way.viewed(node) if node.target in VIEWS and _keeps_last(node) else None
        return None if further is None else (source, further)

    def _zeroed(self, node: fx.Node, way: Way) -> tuple[fx.Node, Way] | None:
        """Behind what sets probabilities to zero."""
        if node.target is aten.nan_to_num.default and not argument(node, 1, "nan"):
            return node.args[0], replace(way, settled=True)  # type: ignore[return-value]
        if node.target not in FILLS:
            return None
        chain, keep = filled(node, way, self.constants, 0.0)
        return None if chain is None or keep is None else (chain, way.kept(keep))

    def _scaled(self, node: fx.Node, way: Way) -> Probabilities | Decline | None:
        """A number, or a tensor that the probabilities do not decide."""
        left, right = node.args
        divides = node.target is aten.div.Tensor
        nearest: Decline | None = None
        for chain, other in ((left, right), (right, left))[: 1 if divides else 2]:
            if not isinstance(chain, fx.Node) or not is_whole(chain, node):
                continue
            if (number := self.constants.scalar(other)) is not None:
                return self.back(chain, way.scaled(1 / number if divides else number))
            if self.back(chain, way) is None:
                continue
            assert isinstance(other, fx.Node)
            tensor = way.placed(other, node)
            shape = [captured(size) for size in tensor.shape]
            if not divides and is_indicator(other, self.constants):
                further = way.kept(Keep(tensor, False, 0.0))
            elif 1 in shape[-2:] and way.whole is None:
                further = way.stretched(Stretch(tensor, divides, shape[-1] != 1))
            else:
                continue
            found = self.back(chain, further)
            if isinstance(found, Probabilities) and not _depends(other, found.softmax.node):
                return found
            nearest = nearest or (found if isinstance(found, Decline) else None)
        return nearest


def _keeps_last(node: fx.Node) -> bool:
    """Whether a view leaves the last dimension alone."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return str(source.meta["val"].shape[-1:]) == str(node.meta["val"].shape[-1:])


def _depends(node: fx.Node, on: fx.Node) -> bool:
    stack, seen = [node], {node}
    while stack:
        top = stack.pop()
        if top is on:
            return True
        fresh = [n for n in top.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
    return False


# What was met there, done elsewhere --------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """Changes of probabilities, as changes of what stands around their product.

    Attributes:
        factor: a number that multiplies the result.
        results: what stretches the rows of the result, or sets them to zero.
        values: what stretches the rows of v, or sets them to zero.
        settled: whether rows that keep no key are zero.
    """

    factor: float = 1.0
    results: tuple[Stretch | Keep, ...] = ()
    values: tuple[Stretch | Keep, ...] = ()
    settled: bool = False

    @property
    def tensors(self) -> list[Any]:
        """All tensors met."""
        return [part.tensor for part in (*self.results, *self.values)]


UNCHANGED = Moved()


def moved(found: Probabilities, scores: Scores, program: Program) -> Moved | Decline:
    """The changes of probabilities, done to result and values instead."""
    way, constants = found.way, Constants(program)
    refusal = Decline(
        "probabilities are changed between softmax and the product with v", found.softmax.node
    )
    together = Moved(way.factor)
    for stretch in way.stretches:
        together = _with(together, stretch, stretch.by_key)
    alive = _never_dead(scores, constants)
    for keep in way.keeps:
        covered = _covered(keep, scores, constants)
        shape = [captured(size) for size in keep.tensor.shape]
        if covered and (alive or covered == "all"):
            together = replace(together, settled=together.settled or not alive)
        elif 1 in shape[-2:] and keep.tensor.split is None:
            together = _with(together, keep, shape[-1] != 1)
        else:
            return refusal
    if way.settled and not alive:
        if scores.biases or {keep.fill for keep in scores.keeps} != {-torch.inf}:
            return refusal
        together = replace(together, settled=True)
    return together


def _with(moved: Moved, part: Stretch | Keep, by_key: bool) -> Moved:
    if by_key:
        return replace(moved, values=(*moved.values, part))
    return replace(moved, results=(*moved.results, part))


def _never_dead(scores: Scores, constants: Constants) -> bool:
    """Whether every row keeps a key, whatever the input."""
    if not scores.keeps:
        return True
    together: Tensor | None = None
    for keep in scores.keeps:
        value = constants.value(keep.tensor.node)
        if not isinstance(value, Tensor) or keep.tensor.order or keep.tensor.split:
            return False
        kept = (value != 0) ^ keep.negated
        together = kept if together is None else together & kept
    return together is not None and bool(together.any(-1).all())


def _covered(after: Keep, scores: Scores, constants: Constants) -> str:
    """Whether scores dropped what is set to zero: "all" of what they drop, "some" of it, ""."""
    before = [conditions(keep.tensor, keep.negated, constants) for keep in scores.keeps]
    dropped: frozenset[Any] = frozenset().union(*before)
    cleared = conditions(after.tensor, after.negated, constants)
    if cleared <= dropped:
        return "all" if cleared == dropped else "some"
    values = [constants.value(keep.tensor.node) for keep in (after, *scores.keeps)]
    if any(not isinstance(v, Tensor) for v in values) or len(values) < 2:
        return ""
    if any(k.tensor.order or k.tensor.split for k in (after, *scores.keeps)):
        return ""
    mine, *theirs = (
        (v != 0) ^ k.negated for v, k in zip(values, (after, *scores.keeps), strict=True)
    )
    together = theirs[0]
    for kept in theirs[1:]:
        together = together & kept
    return "some" if not bool((~mine & together).any()) else ""
