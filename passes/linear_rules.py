"""Rules of `normalize-linear`: each spelling of a product with a weight, as a linear."""

from __future__ import annotations

import string
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxpress.passes.dataflow import argument
from fxpress.passes.patches import Patches, patches_of
from fxpress.passes.weights import Weight, place, readers, same_layout, weight_behind
from fxpress.program import Program, attribute
from fxpress.rewrite import Decline, Rewrite

__all__ = ["LINEAR", "PRODUCTS", "LinearFromConvolution", "LinearFromEinsum", "LinearFromMatmul"]

aten = torch.ops.aten

LINEAR = aten.linear.default


@dataclass(frozen=True)
class _Product:
    """out = permute(linear(permute(x, before), W, bias), after)."""

    x: fx.Node
    weight: Weight
    bias: Any = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class _ToLinear(Rewrite):
    """A spelling of a product with a weight."""

    @abstractmethod
    def read(self, node: fx.Node, program: Program) -> _Product | Decline | None:
        """The product that a node is."""

    def match(self, node: fx.Node, program: Program) -> _Product | Decline | None:
        """The product, if its weight can be brought to (m, n)."""
        found = self.read(node, program)
        if not isinstance(found, _Product):
            return found
        value = attribute(program.graph_module, str(found.weight.source.target))
        if same_layout(value, found.weight.tensor) or _read_alike(program, found.weight):
            return found
        return Decline("the weight is read in another layout too: a copy would untie it", node)

    def replace(self, node: fx.Node, match: Any, program: Program) -> fx.Node:
        """Linear, between the permutations that it needs."""
        graph, x = program.graph, match.x
        weight = place(match.weight, program)
        if match.before:
            x = graph.call_function(aten.permute.default, (x, list(match.before)))
        bias = () if match.bias is None else (match.bias,)
        out = graph.call_function(LINEAR, (x, weight, *bias))
        if match.after:
            out = graph.call_function(aten.permute.default, (out, list(match.after)))
            if node.meta["val"].is_contiguous() and not _only_moved(node, match.before):
                # A later view may count on it.
                out = graph.call_function(aten.contiguous.default, (out,))
        return out


class LinearFromMatmul(_ToLinear):
    """x @ W, mm(x, W), addmm(b, x, W), inner(x, W), linear(x, W.t(), b)  ->  linear(x, W', b).

    x (..., n), W (n, m) or that one expanded to a batch, W' (m, n), b (m,)
    """

    name: ClassVar[str] = "linear-from-matmul"

    def read(self, node: fx.Node, program: Program) -> _Product | Decline | None:
        """A product from the right with a matrix of the model."""
        if node.target is LINEAR:
            return _read_turned(node, program)
        if node.target is aten.inner.default and node.args[1].meta["val"].ndim == 2:  # type: ignore[union-attr]
            found = weight_behind(node.args[1], program)
            return _Product(node.args[0], found) if found is not None else None  # type: ignore[arg-type]
        if node.target in (aten.mm.default, aten.matmul.default, aten.bmm.default):
            return _multiplied(node, node.args[0], node.args[1], None, program)
        if node.target is aten.addmm.default:
            return _added(node, program)
        return None


def _read_turned(node: fx.Node, program: Program) -> _Product | Decline | None:
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if weight.op == "get_attr" or _from_input(weight):
        return None
    found = weight_behind(weight, program)
    if found is None or found.tensor.ndim != 2:
        return Decline(f"the weight is computed by {_operator(weight)}", node)
    return _Product(x, found, argument(node, 2, "bias"))


def _multiplied(
    node: fx.Node, x: Any, weight: Any, bias: Any, program: Program
) -> _Product | Decline | None:
    if _from_input(weight):
        turned = not _from_input(x) and x.meta["val"].ndim == 2
        return Decline("the weight stands on the left: it maps columns", node) if turned else None
    if not _from_input(x) or weight.meta["val"].ndim < 2:
        return None
    found = weight_behind(weight, program)
    if found is None and weight.meta["val"].ndim == 2:
        return Decline(f"the weight is computed by {_operator(weight)}", node)
    single = found.single() if found is not None else None
    if single is None or x.meta["val"].ndim != node.meta["val"].ndim:
        return Decline("the weight is a batch of matrices", node)
    return _Product(x, single.transposed(), bias)


def _added(node: fx.Node, program: Program) -> _Product | Decline | None:
    bias, x, weight = node.args
    assert isinstance(bias, fx.Node)
    found = _multiplied(node, x, weight, bias, program)
    if not isinstance(found, _Product):
        return found
    if (node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)) != (1, 1):
        return Decline("addmm scales its terms by beta and alpha", node)
    if tuple(bias.meta["val"].shape) != (found.weight.tensor.shape[0],):
        return Decline("what addmm adds is no bias: it differs between rows", node)
    return found


def _from_input(node: Any) -> bool:
    """Whether a value depends on the call."""
    stack, seen = [node], {node}
    while stack:
        top = stack.pop()
        if top.op == "placeholder":
            return True
        fresh = [n for n in top.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
    return False


def _operator(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


class LinearFromEinsum(_ToLinear):
    """einsum("btn,nm->btm", x, W)  ->  linear(x, W')   any letters, operands in any order.

    tensordot(x, W) over one dimension is such an einsum.
    """

    name: ClassVar[str] = "linear-from-einsum"

    def read(self, node: fx.Node, program: Program) -> _Product | Decline | None:
        """A sum over one letter that a matrix of the model shares with x."""
        equation, operands = _contraction(node)
        if len(operands) != 2:
            return None
        (x, weight), turned = _input_first(operands)
        if weight is None:
            return None
        terms, _, out = equation.partition("->")
        axes, rows = reversed(terms.split(",")) if turned else terms.split(",")
        found = weight_behind(weight, program)
        if found is None or found.tensor.ndim != 2:
            return Decline(f"the einsum {equation} has no matrix of the model", node)
        return _contracted(node, x, axes, found, rows, out)


def _contraction(node: fx.Node) -> tuple[str, Any]:
    """The equation of an einsum or tensordot, and its operands; none of other calls."""
    given: Any = node.args
    if node.target is aten.einsum.default:
        return given[0].replace(" ", ""), given[1]
    if node.target is not aten.tensordot.default:
        return "", ()
    ranks = [operand.meta["val"].ndim for operand in given[:2]]
    letters = string.ascii_lowercase
    left, right = list(letters[: ranks[0]]), list(letters[ranks[0] : sum(ranks)])
    for one, other in zip(given[2], given[3], strict=True):
        right[other] = left[one]
    out = [x for x in (*left, *right) if (x in left) != (x in right)]
    return f"{''.join(left)},{''.join(right)}->{''.join(out)}", given[:2]


def _input_first(operands: Any) -> tuple[tuple[fx.Node, fx.Node | None], bool]:
    """The operand that a call decides, the one of the model, and whether they were turned."""
    left, right = operands
    from_input = _from_input(left), _from_input(right)
    if from_input[0] == from_input[1]:
        return (left, None), False
    return ((left, right), False) if from_input[0] else ((right, left), True)


def _contracted(
    node: fx.Node, x: fx.Node, axes: str, weight: Weight, rows: str, out: str
) -> _Product | Decline:
    shared = [letter for letter in rows if letter in axes]
    if len(shared) != 1 or len(set(rows)) != 2 or len(set(axes)) != len(axes) or "." in axes:
        return Decline(f"the einsum {axes},{rows}->{out} is no product with a matrix", node)
    inner = shared[0]
    outer = rows.replace(inner, "")
    rest = out.replace(outer, "")
    if sorted(rest + inner) != sorted(axes) or outer not in out:
        return Decline(f"the einsum {axes},{rows}->{out} is no product with a matrix", node)
    matrix = weight if rows == outer + inner else weight.transposed()
    before = tuple(axes.index(letter) for letter in rest + inner)
    after = tuple((rest + outer).index(letter) for letter in out)
    return _Product(x, matrix, None, _unless_sorted(before), _unless_sorted(after))


def _unless_sorted(order: Sequence[int]) -> tuple[int, ...]:
    return () if list(order) == sorted(order) else tuple(order)


class LinearFromConvolution(_ToLinear):
    """conv(x, W, b) of width one  ->  permute(linear(permute(x), W', b)).

    x (B, n, *S), W (m, n, 1, ...), W' (m, n), out (B, m, *S)

    Only where channels lie last in memory on both sides, so that no permutation copies: measured on
    CPU, a copy makes a linear up to three times slower than the convolution, without one it is as
    fast or up to twice faster. Other convolutions whose windows do not overlap stay as they are,
    and are linear maps of patches to passes that would factor them (`patches.py`).
    """

    name: ClassVar[str] = "linear-from-convolution"

    def read(self, node: fx.Node, program: Program) -> _Product | Decline | None:
        """A convolution that looks at one position."""
        patches = patches_of(node)
        if not isinstance(patches, Patches):
            return patches
        x, kernel = node.args[:2]
        assert isinstance(x, fx.Node)
        assert isinstance(kernel, fx.Node)
        found = weight_behind(kernel, program)
        if found is None:
            return Decline(f"the weight is computed by {_operator(kernel)}", node)
        ndim, spatial = x.meta["val"].ndim, len(patches.widths)
        channel = ndim - spatial - 1
        before = (*range(channel), *range(channel + 1, ndim), channel)
        after = (*range(channel), ndim - 1, *range(channel, ndim - 1))
        lies_last = _lies_as(x, before) and (_lies_as(node, before) or _only_moved(node, before))
        if not patches.is_pointwise or not lies_last:
            return None
        return _Product(x, found.flat(), argument(node, 2, "bias"), before, after)


def _lies_as(node: fx.Node, order: Sequence[int]) -> bool:
    """Whether a tensor lies in memory in this order of its dimensions."""
    return bool(node.meta["val"].permute(order).is_contiguous())


def _only_moved(node: fx.Node, order: Sequence[int]) -> bool:
    """Whether all that reads a node brings its dimensions into this order first."""
    ndim = node.meta["val"].ndim
    return all(_order(user, ndim) == list(order) for user in node.users)


def _order(node: fx.Node, ndim: int) -> list[int] | None:
    """The order that a permutation brings dimensions into."""
    order = list(range(ndim))
    dims: Any = node.args[1:]
    if node.target is aten.permute.default:
        return [order[dim] for dim in dims[0]]
    if node.target is not aten.transpose.int:
        return None
    order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    return order


PRODUCTS = (LinearFromMatmul(), LinearFromEinsum(), LinearFromConvolution())


def _read_any(node: fx.Node, program: Program) -> _Product | Decline | None:
    found = (rule.read(node, program) for rule in PRODUCTS)
    return next((match for match in found if match is not None), None)


def _read_plain(node: fx.Node, program: Program) -> _Product | None:
    """A linear that is in canonical form already."""
    if node.target is not LINEAR or node.args[1].op != "get_attr":  # type: ignore[union-attr]
        return None
    weight = weight_behind(node.args[1], program)
    return _Product(node.args[0], weight) if weight is not None else None  # type: ignore[arg-type]


def _read_alike(program: Program, weight: Weight) -> bool:
    """Whether all that reads a weight's memory reads this very matrix."""
    for reader in readers(program, weight):
        match = _read_plain(reader, program) or _read_any(reader, program)
        if not isinstance(match, _Product) or not same_layout(match.weight.tensor, weight.tensor):
            return False
    return True
