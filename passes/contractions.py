"""Products with a weight by letters: einsum, tensordot and batched products in one form.

    out = sum over `inner` of x * W

    experts   letters of x, of the weight and of the result: a matrix for each
    inner     letters of x and of the weight
    outer     letters of the weight and of the result
    tokens    letters of x and of the result

Without experts that is one linear map, m the product of the outer sizes and n that of the inner
ones; with them it is a bank of such maps.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.dataflow import argument
from fxpress.passes.products import labels
from fxpress.passes.weights import Weight, weight_behind
from fxpress.program import Program, is_contiguous
from fxpress.rewrite import Decline

__all__ = ["Arrangement", "Bank", "Contraction", "bank_of", "contraction_of"]

aten = torch.ops.aten

_BATCHED = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default}


@dataclass(frozen=True)
class Arrangement:
    """out = permute(unflatten(map(flatten(permute(x, before))), outer), after).

    Attributes:
        before: order of the dimensions of x that brings those summed over to the end.
        inner: how many these are.
        outer: sizes that the features of the map's output are split into.
        after: order of the dimensions of that, which gives the result.
    """

    before: tuple[int, ...]
    inner: int
    outer: tuple[int, ...]
    after: tuple[int, ...]

    def vectors(self, x: Tensor) -> Tensor:
        """The vectors (..., n) that an input holds."""
        return x.permute(self.before).flatten(-self.inner)

    def emit(self, x: fx.Node) -> fx.Node:
        """The same, in the graph of a node."""
        graph = x.graph
        if list(self.before) != sorted(self.before):
            x = graph.call_function(aten.permute.default, (x, list(self.before)))
        if self.inner > 1:
            x = graph.call_function(aten.flatten.using_ints, (x, -self.inner, -1))
        return x

    def restore(self, y: fx.Node, out: fx.Node, is_only_moved: bool = False) -> fx.Node:
        """The result of a call, from (..., m).

        Args:
            y: what the map makes of the vectors.
            out: the call.
            is_only_moved: whether nothing that reads the result counts on its layout.
        """
        graph = y.graph
        if len(self.outer) > 1:
            y = graph.call_function(aten.unflatten.int, (y, -1, list(self.outer)))
        if list(self.after) != sorted(self.after):
            y = graph.call_function(aten.permute.default, (y, list(self.after)))
            if is_contiguous(out.meta["val"], undecided=True) and not is_only_moved:
                # A later view may count on it.
                y = graph.call_function(aten.contiguous.default, (y,))
        return y


@dataclass(frozen=True)
class Contraction:
    """A call that multiplies by a weight of the model and sums.

    Attributes:
        node: the call.
        side: which of its two operands the weight is not.
        weight: of the model, as the call reads it.
        axes, rows, out: a letter for each dimension of x, of the weight and of the result.
    """

    node: fx.Node
    side: int
    weight: Weight
    axes: str
    rows: str
    out: str

    @property
    def x(self) -> fx.Node:
        """What the call multiplies, as it is read by now."""
        return _operands(self.node)[self.side]

    @property
    def addend(self) -> fx.Node | None:
        """What the call adds, or None."""
        adds = self.node.target is aten.baddbmm.default
        return self.node.args[0] if adds else None  # type: ignore[return-value]

    @property
    def experts(self) -> str:
        """Letters of all three."""
        return "".join(x for x in self.rows if x in self.axes and x in self.out)

    @property
    def inner(self) -> str:
        """Letters that are summed over, as they lie in the weight."""
        return self._in_memory([x for x in self.rows if x not in self.out])

    @property
    def outer(self) -> str:
        """Letters that the weight brings in, as they lie in it."""
        return self._in_memory([x for x in self.rows if x not in self.axes])

    @property
    def tokens(self) -> str:
        """Letters that the weight does not have, as the result has them."""
        return "".join(x for x in self.out if x not in self.rows)

    @property
    def is_map(self) -> bool:
        """Whether every letter is of one of the four kinds, and inner and outer are there."""
        distinct = all(len(set(part)) == len(part) for part in (self.axes, self.rows, self.out))
        both, either = {*self.axes} & {*self.rows}, {*self.axes} | {*self.rows}
        known = either - both <= {*self.out} <= either
        given = dict(zip(self.axes, self.x.meta["val"].shape, strict=True))
        same = all(str(given[letter]) == str(*self.sizes(letter)) for letter in both)
        return distinct and known and same and bool(self.inner) and bool(self.outer)

    def _in_memory(self, letters: Sequence[str]) -> str:
        strides = dict(zip(self.rows, self.weight.tensor.stride(), strict=True))
        return "".join(sorted(letters, key=lambda x: -strides[x]))

    def sizes(self, letters: str) -> tuple[int, ...]:
        """Sizes of dimensions of the weight."""
        shape = self.weight.tensor.shape
        return tuple(int(shape[self.rows.index(letter)]) for letter in letters)

    def matrix(self) -> Tensor | None:
        """The weight as (m, n), a view; None where its letters lie otherwise in memory."""
        turned = self._turned(self.outer + self.inner)
        shape = (math.prod(self.sizes(part)) for part in (self.outer, self.inner))
        try:
            return turned.view(*shape)
        except RuntimeError:
            return None

    def matrices(self, expert: str) -> Tensor:
        """The weight as (experts, m, n), copied where need be."""
        outer = self.outer.replace(expert, "")
        shape = (math.prod(self.sizes(part)) for part in (expert, outer, self.inner))
        return self._turned(expert + outer + self.inner).reshape(*shape)

    def _turned(self, letters: str) -> Tensor:
        return self.weight.tensor.permute([self.rows.index(letter) for letter in letters])

    def arrangement(self, expert: str = "") -> Arrangement:
        """How x becomes vectors, and outputs the result; an expert's letter comes first."""
        outer = "".join(x for x in self.outer if x not in expert)
        lead = "".join(x for x in expert if x in self.axes)
        given, made = lead + self.tokens + self.inner, expert + self.tokens + outer
        before = tuple(self.axes.index(letter) for letter in given)
        after = tuple(made.index(letter) for letter in self.out)
        return Arrangement(before, len(self.inner), self.sizes(outer), after)


@dataclass(frozen=True)
class Bank:
    """One matrix for each of several experts.

    Attributes:
        contraction: the call.
        expert: its letter; where x has not got it, all experts map the same vectors.
    """

    contraction: Contraction
    expert: str

    @property
    def experts(self) -> int:
        """How many."""
        return self.contraction.sizes(self.expert)[0]

    @property
    def is_shared(self) -> bool:
        """Whether all experts map the same vectors."""
        return self.expert not in self.contraction.axes

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of each matrix."""
        _, m, n = self.matrices().shape
        return int(m), int(n)

    def matrices(self) -> Tensor:
        """The weight as (experts, m, n)."""
        return self.contraction.matrices(self.expert)

    def cut(self, x: Tensor) -> Tensor:
        """The vectors (experts, ..., n), or (..., n) where they are shared."""
        return self.contraction.arrangement(self.expert).vectors(x)

    def emit(self, x: fx.Node) -> fx.Node:
        """The same, in the graph of a node."""
        return self.contraction.arrangement(self.expert).emit(x)

    def restore(self, y: fx.Node, out: fx.Node) -> fx.Node:
        """The result of the call, from (experts, ..., m)."""
        y = self.contraction.arrangement(self.expert).restore(y, out)
        if (addend := self.contraction.addend) is not None:
            y = y.graph.call_function(aten.add.Tensor, (y, addend))
        return y


def bank_of(node: fx.Node, program: Program) -> Bank | Decline | None:
    """The bank of maps that a call is; None: it is none."""
    if "grouped_mm" in str(node.target) and weight_behind(node.args[1], program) is not None:
        return Decline("each expert maps as many tokens as a call sends it (grouped product)", node)
    found = contraction_of(node, program)
    if not isinstance(found, Contraction) or not found.is_map:
        return found if isinstance(found, Decline) else None
    if len(found.experts) > 1:
        return Decline("the weight has a matrix for each pair of several dimensions", node)
    if found.experts:
        return Bank(found, found.experts)
    if len(found.outer) == 1 or found.matrix() is not None:
        return None
    return Bank(found, found.outer[0])


def contraction_of(node: fx.Node, program: Program) -> Contraction | Decline | None:
    """A call as the product of an input with a weight; None: it is none."""
    if node.target is aten.einsum.default and len(_operands(node)) == 2:
        return _oriented(node, labels(str(node.args[0]), *_operands(node)), program)
    if node.target is aten.tensordot.default:
        return _oriented(node, _of_tensordot(node), program)
    return _batched(node, program) if node.target in _BATCHED else None


def _operands(node: fx.Node) -> Sequence[fx.Node]:
    """What a call multiplies."""
    given: Any = node.args
    if node.target is aten.einsum.default:
        operands: Sequence[fx.Node] = given[1]
        return operands
    first = 1 if node.target is aten.baddbmm.default else 0
    return given[first : first + 2]  # type: ignore[no-any-return]


def _oriented(node: fx.Node, letters: tuple[str, str, str], program: Program) -> Contraction | None:
    """The operand of the model as the weight; None unless just one is of the model."""
    first, second, out = letters
    left, right = (weight_behind(operand, program) for operand in _operands(node))
    if left is None and right is not None:
        return Contraction(node, 0, right, first, second, out)
    if left is not None and right is None:
        return Contraction(node, 1, left, second, first, out)
    return None


def _of_tensordot(node: fx.Node) -> tuple[str, str, str]:
    given: Any = node.args
    ranks = [operand.meta["val"].ndim for operand in given[:2]]
    letters = string.ascii_lowercase
    left, right = list(letters[: ranks[0]]), list(letters[ranks[0] : sum(ranks)])
    for one, other in zip(given[2], given[3], strict=True):
        right[other] = left[one]
    out = [x for x in (*left, *right) if (x in left) != (x in right)]
    return "".join(left), "".join(right), "".join(out)


def _batched(node: fx.Node, program: Program) -> Contraction | Decline | None:
    """matmul(x, W), bmm(x, W), baddbmm(b, x, W), and the same from the left."""
    ranks = [operand.meta["val"].ndim for operand in _operands(node)]
    if min(ranks) < 2 or max(ranks) < 3:
        return None
    batch = string.ascii_lowercase[: max(ranks) - 2]
    axes, rows = (
        batch[max(ranks) - rank :] + last for rank, last in zip(ranks, ("xy", "yz"), strict=True)
    )
    found = _oriented(node, (axes, rows, batch + "xz"), program)
    found = None if found is None else _without_ones(found)
    if found is None or not found.experts:
        return None
    sizes = dict(zip(found.axes, found.x.meta["val"].shape, strict=True))
    if any(sizes[letter] == 1 for letter in found.experts):
        return Decline("one input is broadcast to a batch of matrices", node)
    scales = ((3, "beta"), (4, "alpha")) if found.addend is not None else ()
    if any(argument(node, at, name, 1) != 1 for at, name in scales):
        return Decline("baddbmm scales its terms by beta and alpha", node)
    return found


def _without_ones(found: Contraction) -> Contraction:
    """The same, without the dimensions that the weight is broadcast along."""
    tensor, rows = found.weight.tensor, found.rows
    for dim in reversed(range(tensor.ndim)):
        letter = rows[dim]
        repeats = tensor.shape[dim] == 1 or tensor.stride(dim) == 0
        if repeats and letter in found.axes and letter in found.out:
            tensor, rows = tensor.select(dim, 0), rows[:dim] + rows[dim + 1 :]
    return replace(found, weight=replace(found.weight, tensor=tensor), rows=rows)
