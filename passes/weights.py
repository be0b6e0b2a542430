"""Weights as products read them: tensors of the model, or parts, behind transposes and reshapes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxpress.program import Program, alias_parameter, attribute, captured

__all__ = ["VIEWS", "Weight", "place", "readers", "same_layout", "weight_behind"]

aten = torch.ops.aten

VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_LAYOUTS = VIEWS | {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    operator.getitem,
}
_COPIES = {aten.contiguous.default, aten.clone.default}


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as a product reads it.

    Attributes:
        source: the `get_attr` node.
        tensor: the view (m, n) of that tensor's storage.
    """

    source: fx.Node
    tensor: Tensor

    def transposed(self) -> Weight:
        """The same matrix with inputs and outputs exchanged."""
        return Weight(self.source, self.tensor.t())

    def single(self) -> Weight | None:
        """The matrix that a batch of matrices repeats; None where they differ."""
        tensor = self.tensor
        while tensor.ndim > 2:
            if tensor.shape[0] != 1 and tensor.stride(0) != 0:
                return None
            tensor = tensor[0]
        return Weight(self.source, tensor)

    def flat(self) -> Weight:
        """The kernel of a convolution of width one as a matrix."""
        return Weight(self.source, self.tensor.flatten(1))


def weight_behind(node: Any, program: Program) -> Weight | None:
    """What lies behind changes of layout and parts, if that is a tensor of the model."""
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _LAYOUTS:
        steps.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    tensor = attribute(program.graph_module, str(node.target))
    if not isinstance(tensor, Tensor):
        return None
    made: Any = tensor.detach()
    for step in reversed(steps):
        if step.target not in _COPIES:
            args, kwargs = fx.map_arg(
                (step.args[1:], step.kwargs), lambda size: captured(size.meta["val"])
            )
            made = step.target(made, *args, **kwargs)  # type: ignore[operator]
    if not isinstance(made, Tensor):
        return None
    alike = made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return Weight(node, made) if alike else None


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in the same order."""
    where = (a.data_ptr(), a.shape, a.stride())
    return bool(where == (b.data_ptr(), b.shape, b.stride()))


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory, or lie between each other."""
    (first, end), (other, other_end) = (_span(t) for t in (a, b))
    return first < other_end and other < end


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def readers(program: Program, weight: Weight) -> Iterator[fx.Node]:
    """The nodes that read a weight's memory, behind changes of layout; not other parts of it."""
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        value = attribute(program.graph_module, str(node.target))
        if not isinstance(value, Tensor) or not _overlap(value, weight.tensor):
            continue
        stack = [node]
        while stack:
            behind = stack.pop()
            found = weight_behind(behind, program)
            if found is not None and not _overlap(found.tensor, weight.tensor):
                continue
            stack += [user for user in behind.users if user.target in _LAYOUTS]
            yield from (user for user in behind.users if user.target not in _LAYOUTS)


def place(weight: Weight, program: Program) -> fx.Node:
    """The weight as (m, n): the tensor itself, one made for it before, or a new one."""
    graph = program.graph
    value = attribute(program.graph_module, str(weight.source.target))
    if same_layout(value, weight.tensor):
        return graph.get_attr(str(weight.source.target))
    root = program.graph_module
    for name, held in [*root._parameters.items(), *root._buffers.items()]:
        if held is not None and same_layout(held, weight.tensor):
            return graph.get_attr(name)
    tensor = weight.tensor
    if isinstance(value, nn.Parameter):
        tensor = alias_parameter(tensor, value.requires_grad)
    return graph.get_attr(program.register(f"{weight.source.target}_matrix", tensor))
