"""Weights as products read them: a tensor of the model behind transposes and reshapes."""

from __future__ import annotations

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
            given = fx.map_arg(step.args[1:], lambda size: captured(size.meta["val"]))
            tensor = step.target(tensor, *given)  # type: ignore[operator]
    return Weight(node, tensor) if tensor.untyped_storage().data_ptr() == storage else None


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in the same order."""
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


def readers(program: Program, weight: Weight) -> Iterator[fx.Node]:
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
