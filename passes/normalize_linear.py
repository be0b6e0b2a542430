"""`normalize-linear`: any spelling of a product with a weight becomes one operator.

    x @ W + b, addmm(b, x, W), einsum("btn,nm->btm", x, W), a convolution of width one
      ->  linear(x, W', b)                       W' (m, n), x (..., n)

W' is the model's own tensor where it lies that way already. Otherwise it is a parameter of its own
that is a view of the same storage: nothing is copied. That is done only where the weight is read
in no other layout: two parameters on one storage would part when they are trained.

Exactness: REASSOCIATES.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxpress.capture import _alias
from fxpress.passes.dataflow import argument
from fxpress.program import Program, attribute
from fxpress.rewrite import Decline, Rewrite, RewritePass

__all__ = ["NormalizeLinear"]

aten = torch.ops.aten

_LINEAR = aten.linear.default
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_LAYOUTS = _VIEWS | {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
}
_COPIES = {aten.contiguous.default, aten.clone.default}
_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
}


class NormalizeLinear(RewritePass):
    """Brings products with a weight to their canonical form."""

    name: ClassVar[str] = "normalize-linear"
    phase: ClassVar[str] = "canonicalize"

    def rules(self) -> Iterable[Rewrite]:
        """Products first; then what stands around them."""
        return (*_PRODUCTS, UnwrapLinear(), FoldBias())


# Weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A tensor of the model as a product reads it.

    Attributes:
        source: the `get_attr` node.
        tensor: the view (m, n) of that tensor's storage.
    """

    source: fx.Node
    tensor: Tensor

    def transposed(self) -> _Weight:
        """The same matrix with inputs and outputs exchanged."""
        return _Weight(self.source, self.tensor.t())

    def flat(self) -> _Weight:
        """The kernel of a convolution of width one as a matrix."""
        return _Weight(self.source, self.tensor.flatten(1))


def _weight(node: Any, program: Program) -> _Weight | None:
    """What lies behind transposes and reshapes, if that is a tensor of the model."""
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _LAYOUTS:
        steps.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    tensor = attribute(program.graph_module, str(node.target)).detach()
    storage = tensor.untyped_storage().data_ptr()
    for step in reversed(steps):
        if step.target not in _COPIES:
            tensor = step.target(tensor, *step.args[1:])  # type: ignore[operator]
    return _Weight(node, tensor) if tensor.untyped_storage().data_ptr() == storage else None


def _same_layout(a: Tensor, b: Tensor) -> bool:
    where = (a.data_ptr(), a.shape, a.stride())
    return bool(where == (b.data_ptr(), b.shape, b.stride()))


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory."""
    (first, end), (other, other_end) = (_span(t) for t in (a, b))
    return first < other_end and other < end


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _readers(program: Program, weight: _Weight) -> Iterator[fx.Node]:
    """The nodes that read a weight's memory, behind any change of layout."""
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        value = attribute(program.graph_module, str(node.target))
        if not isinstance(value, Tensor) or not _overlap(value, weight.tensor):
            continue
        stack = list(node.users)
        while stack:
            user = stack.pop()
            if user.target in _LAYOUTS:
                stack += user.users
            else:
                yield user


def _read_alike(program: Program, weight: _Weight) -> bool:
    """Whether all that reads a weight's memory reads this very matrix."""
    for reader in _readers(program, weight):
        match = _read_plain(reader, program) or _read_any(reader, program)
        if not isinstance(match, _Product) or not _same_layout(match.weight.tensor, weight.tensor):
            return False
    return True


def _place(weight: _Weight, program: Program) -> fx.Node:
    """The weight as (m, n): the tensor itself, one made for it before, or a new one."""
    graph = program.graph
    value = attribute(program.graph_module, str(weight.source.target))
    if _same_layout(value, weight.tensor):
        return graph.get_attr(str(weight.source.target))
    root = program.graph_module
    for name, held in [*root._parameters.items(), *root._buffers.items()]:
        if held is not None and _same_layout(held, weight.tensor):
            return graph.get_attr(name)
    tensor = weight.tensor
    if isinstance(value, nn.Parameter):
        tensor = _alias(nn.Parameter(tensor, requires_grad=value.requires_grad))
    return graph.get_attr(program.register(f"{weight.source.target}_matrix", tensor))


# Products ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """out = permute(linear(permute(x, before), W, bias), after)."""

    x: fx.Node
    weight: _Weight
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
        if _same_layout(value, found.weight.tensor) or _read_alike(program, found.weight):
            return found
        return Decline("the weight is read in another layout too: a copy would untie it", node)

    def replace(self, node: fx.Node, match: Any, program: Program) -> fx.Node:
        """Linear, between the permutations that it needs."""
        graph, x = program.graph, match.x
        weight = _place(match.weight, program)
        if match.before:
            x = graph.call_function(aten.permute.default, (x, list(match.before)))
        bias = () if match.bias is None else (match.bias,)
        out = graph.call_function(_LINEAR, (x, weight, *bias))
        if match.after:
            out = graph.call_function(aten.permute.default, (out, list(match.after)))
            if node.meta["val"].is_contiguous():  # a later view may count on it
                out = graph.call_function(aten.contiguous.default, (out,))
        return out


class LinearFromMatmul(_ToLinear):
    """x @ W, mm(x, W), addmm(b, x, W), linear(x, W.t(), b)  ->  linear(x, W', b).

    x (..., n), W (n, m), W' (m, n), b (m,)
    """

    name: ClassVar[str] = "linear-from-matmul"

    def read(self, node: fx.Node, program: Program) -> _Product | Decline | None:
        """A product from the right with a matrix of the model."""
        if node.target is _LINEAR:
            return _read_turned(node, program)
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
    found = _weight(weight, program)
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
    if weight.meta["val"].ndim > 2:
        return Decline("the weight is a batch of matrices", node)
    found = _weight(weight, program)
    if found is None:
        return Decline(f"the weight is computed by {_operator(weight)}", node)
    return _Product(x, found.transposed(), bias)


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
    """einsum("btn,nm->btm", x, W)  ->  linear(x, W')   any letters, operands in any order."""

    name: ClassVar[str] = "linear-from-einsum"

    def read(self, node: fx.Node, program: Program) -> _Product | Decline | None:
        """A sum over one letter that a matrix of the model shares with x."""
        if node.target is not aten.einsum.default or len(node.args[1]) != 2:  # type: ignore[arg-type]
            return None
        equation: str = node.args[0].replace(" ", "")  # type: ignore[union-attr]
        (x, weight), turned = _input_first(node.args[1])
        if weight is None:
            return None
        terms, _, out = equation.partition("->")
        axes, rows = reversed(terms.split(",")) if turned else terms.split(",")
        found = _weight(weight, program)
        if found is None or found.tensor.ndim != 2:
            return Decline(f"the einsum {equation} has no matrix of the model", node)
        return _contracted(node, x, axes, found, rows, out)


def _input_first(operands: Any) -> tuple[tuple[fx.Node, fx.Node | None], bool]:
    """The operand that a call decides, the one of the model, and whether they were turned."""
    left, right = operands
    from_input = _from_input(left), _from_input(right)
    if from_input[0] == from_input[1]:
        return (left, None), False
    return ((left, right), False) if from_input[0] else ((right, left), True)


def _contracted(
    node: fx.Node, x: fx.Node, axes: str, weight: _Weight, rows: str, out: str
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
    """

    name: ClassVar[str] = "linear-from-convolution"

    def read(self, node: fx.Node, program: Program) -> _Product | Decline | None:
        """A convolution that looks at one position."""
        if node.target not in _CONVOLUTIONS:
            return None
        x, kernel = node.args[:2]
        assert isinstance(x, fx.Node)
        found = _weight(kernel, program)
        if found is None or any(width != 1 for width in found.tensor.shape[2:]):
            return None
        if reason := _spread(node):
            return Decline(f"a convolution of width one {reason}", node)
        ndim, spatial = x.meta["val"].ndim, found.tensor.ndim - 2
        channel = ndim - spatial - 1
        before = [*range(channel), *range(channel + 1, ndim), channel]
        after = [*range(channel), ndim - 1, *range(channel, ndim - 1)]
        bias = argument(node, 2, "bias")
        return _Product(x, found.flat(), bias, tuple(before), tuple(after))


def _spread(node: fx.Node) -> str:
    """Why a convolution of width one is no map of each position, or ""."""
    decomposed = node.target is aten.convolution.default
    groups = argument(node, 8 if decomposed else 6, "groups", 1)
    if any(step != 1 for step in argument(node, 3, "stride", [1])):
        return "that strides"
    padding = argument(node, 4, "padding", [0])
    if not isinstance(padding, str) and any(width != 0 for width in padding):
        return "that pads"
    if decomposed and argument(node, 6, "transposed", False):
        return "that is transposed"
    return "in groups" if groups != 1 else ""


_PRODUCTS = (LinearFromMatmul(), LinearFromEinsum(), LinearFromConvolution())


def _read_any(node: fx.Node, program: Program) -> _Product | Decline | None:
    found = (rule.read(node, program) for rule in _PRODUCTS)
    return next((match for match in found if match is not None), None)


def _read_plain(node: fx.Node, program: Program) -> _Product | None:
    """A linear that is in canonical form already."""
    if node.target is not _LINEAR or node.args[1].op != "get_attr":  # type: ignore[union-attr]
        return None
    weight = _weight(node.args[1], program)
    return _Product(node.args[0], weight) if weight is not None else None  # type: ignore[arg-type]


# Around the product ------------------------------------------------------------------------------


class UnwrapLinear(Rewrite):
    """view(linear(view(x, (-1, n)), W, b), (..., m))  ->  linear(x, W, b)   x (..., n)."""

    name: ClassVar[str] = "unwrap-linear"

    def match(self, node: fx.Node, program: Program) -> tuple[fx.Node, fx.Node] | None:
        """A view that gives back the leading sizes which another took before the product."""
        del program
        linear = _single_use(node.args[:1])
        if node.target not in _VIEWS or linear is None:
            return None
        inner = linear.args[0]
        if not isinstance(inner, fx.Node) or inner.target not in _VIEWS:
            return None
        source = inner.args[0]
        assert isinstance(source, fx.Node)
        given, rows, wanted = (n.meta["val"].shape for n in (source, inner, node))
        return (linear, source) if _alike(given, (*wanted[:-1], rows[-1])) else None

    def replace(self, node: fx.Node, match: Any, program: Program) -> fx.Node:
        """The product on x as it came."""
        del node
        linear, source = match
        return program.graph.call_function(_LINEAR, (source, *linear.args[1:]), linear.kwargs)


class FoldBias(Rewrite):
    """linear(x, W) + b  ->  linear(x, W, b)   b (m,), of the model."""

    name: ClassVar[str] = "fold-bias"

    def match(self, node: fx.Node, program: Program) -> tuple[fx.Node, fx.Node] | None:
        """A sum of a product that has no bias with a vector of the model."""
        if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
            return None
        linear = _single_use(node.args)
        if linear is None or argument(linear, 2, "bias") is not None:
            return None
        bias = node.args[1] if node.args[0] is linear else node.args[0]
        weight = linear.args[1]
        if not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in (bias, weight)):
            return None
        b, w = (attribute(program.graph_module, str(n.target)) for n in (bias, weight))  # type: ignore[union-attr]
        fits = b.shape == w.shape[:1] and b.dtype == w.dtype
        return (linear, bias) if fits else None  # type: ignore[return-value]

    def replace(self, node: fx.Node, match: Any, program: Program) -> fx.Node:
        """The product with its bias."""
        del node
        linear, bias = match
        return program.graph.call_function(_LINEAR, (*linear.args[:2], bias))


def _single_use(operands: Iterable[Any]) -> fx.Node | None:
    """The linear among some operands that is read once."""
    for operand in operands:
        if isinstance(operand, fx.Node) and operand.target is _LINEAR and len(operand.users) == 1:
            return operand
    return None


def _alike(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(
        statically_known_true(x == y) for x, y in zip(a, b, strict=True)
    )
