"""Rules of `normalize-linear`: each spelling of a product with a weight, as a linear."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxpress.passes.contractions import Arrangement, Bank, Contraction, bank_of, contraction_of
from fxpress.passes.dataflow import argument
from fxpress.passes.patches import Patches, patches_of
from fxpress.passes.weights import Weight, place, readers, same_layout, weight_behind
from fxpress.program import Program, attribute, is_contiguous
from fxpress.rewrite import Decline, Rewrite

__all__ = ["LINEAR", "PRODUCTS", "LinearFromConvolution", "LinearFromEinsum", "LinearFromMatmul"]

aten = torch.ops.aten

LINEAR = aten.linear.default


@dataclass(frozen=True)
class _Product:
    """out = linear(x, W, bias), or that between changes of layout."""

    x: fx.Node
    weight: Weight
    bias: Any = None
    arrangement: Arrangement | None = None


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
        """Linear, between the changes of layout that it needs."""
        graph, x, around = program.graph, match.x, match.arrangement
        weight = place(match.weight, program)
        if around is not None:
            x = around.emit(x)
        bias = () if match.bias is None else (match.bias,)
        out = graph.call_function(LINEAR, (x, weight, *bias))
        if around is None:
            return out
        return around.restore(out, node, _only_moved(node, around.before))  # type: ignore[no-any-return]


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
        bank = bank_of(node, program)
        return bank if isinstance(bank, Decline) else None


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
    if found is None:
        return Decline(f"the weight is computed by {_operator(weight)}", node)
    single = found.single()
    if single is None or x.meta["val"].ndim != node.meta["val"].ndim:
        bank = bank_of(node, program)
        if isinstance(bank, Bank):
            return None
        return bank or Decline("the weight is a batch of matrices", node)
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

    Several letters may stand for the inputs, and several for the outputs, where they lie together
    in memory: einsum("btn,nhd->bthd", x, W) -> unflatten(linear(x, W')). tensordot is such an
    einsum. One with a matrix for each of several experts stays what it is (`contractions.py`).
    """

    name: ClassVar[str] = "linear-from-einsum"

    def read(self, node: fx.Node, program: Program) -> _Product | Decline | None:
        """A sum over letters that a weight of the model shares with x."""
        if node.target not in (aten.einsum.default, aten.tensordot.default):
            return None
        found = contraction_of(node, program)
        if not isinstance(found, Contraction):
            return _without_weight(node)
        if isinstance(bank := bank_of(node, program), (Bank, Decline)):
            return bank if isinstance(bank, Decline) else None
        matrix = found.matrix() if found.is_map else None
        if matrix is None:
            letters = f"{found.axes},{found.rows}->{found.out}"
            return Decline(f"the einsum {letters} is no product with a matrix", node)
        weight = Weight(found.weight.source, matrix)
        return _Product(found.x, weight, None, found.arrangement())


def _without_weight(node: fx.Node) -> Decline | None:
    """Why an einsum of an input and of something that no call decides is no linear."""
    given: Any = node.args
    operands = given[1] if node.target is aten.einsum.default else given[:2]
    if len(operands) != 2 or len({_from_input(operand) for operand in operands}) == 1:
        return None
    (weight,) = (operand for operand in operands if not _from_input(operand))
    return Decline(f"the weight is computed by {_operator(weight)}", node)


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
        around = Arrangement(before, 1, (found.tensor.shape[0],), after)
        return _Product(x, found.flat(), argument(node, 2, "bias"), around)


def _lies_as(node: fx.Node, order: Sequence[int]) -> bool:
    """Whether a tensor lies in memory in this order of its dimensions."""
    return is_contiguous(node.meta["val"].permute(order))


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
