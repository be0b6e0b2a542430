"""Convolutions over windows that do not overlap: linear maps of patches.

    conv(x, W, b)  =  permute(linear(patches(x), W', b))

    x (..., n, *S), W (m, n, *w), W' (m, n prod w), patches(x) (..., *S', n prod w)

Windows of size w that lie w or more apart read no element twice. As long as nothing factors the
map, the convolution is left as it is: measured on CPU it is as fast as the product of patches that
are copied together, or faster. What factors it makes the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.dataflow import argument
from fxpress.program import is_contiguous
from fxpress.rewrite import Decline

__all__ = ["CONVOLUTIONS", "Patches", "patches_of"]

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
}


@dataclass(frozen=True)
class Patches:
    """How a convolution cuts its input.

    Attributes:
        widths: of a window, by dimension.
        strides: from one window to the next.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_pointwise(self) -> bool:
        """Whether every position is a window."""
        return {*self.widths, *self.strides} == {1}

    def cut(self, x: Tensor) -> Tensor:
        """The patches (..., *S', n prod w) of an input (..., n, *S)."""
        made: Tensor = self._cut(x, x.ndim, lambda target, *args: target(*args))
        return made

    def emit(self, x: fx.Node) -> fx.Node:
        """The same, in the graph of a node."""
        rank = x.meta["val"].ndim
        made: fx.Node = self._cut(x, rank, lambda target, *a: x.graph.call_function(target, a))
        return made

    def restore(self, y: fx.Node, out: fx.Node) -> fx.Node:
        """The output (..., m, *S') of a convolution, from what it is with its channels last."""
        graph, rank = y.graph, out.meta["val"].ndim
        channel = rank - len(self.widths) - 1
        order = [*range(channel), rank - 1, *range(channel, rank - 1)]
        y = graph.call_function(aten.permute.default, (y, order))
        if is_contiguous(out.meta["val"], undecided=True):  # a later view may count on it
            y = graph.call_function(aten.contiguous.default, (y,))
        return y

    def _cut(self, x: Any, rank: int, call: Callable[..., Any]) -> Any:
        dims = len(self.widths)
        channel = rank - dims - 1
        for dim, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            x = call(aten.unfold.default, x, channel + 1 + dim, width, stride)
        last = [channel, *range(rank, rank + dims)]  # an unfolded dimension goes to the end
        order = [*range(channel), *range(channel + 1, rank), *last]
        x = call(aten.permute.default, x, order)
        return call(aten.flatten.using_ints, x, rank - 1, -1)


def patches_of(node: fx.Node) -> Patches | Decline | None:
    """How a convolution is a linear map of patches; None: it is none, or its windows overlap."""
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return None
    kernel = node.args[1]
    assert isinstance(kernel, fx.Node)
    widths = tuple(int(width) for width in kernel.meta["val"].shape[2:])
    strides = _spread(argument(node, 3, "stride", [1]), len(widths))
    if any(stride < width for stride, width in zip(strides, widths, strict=True)):
        return None
    what = "of width one" if set(widths) == {1} else "of patches"
    if reason := _more_than_patches(node, widths):
        return Decline(f"a convolution {what} {reason}", node)
    return Patches(widths, strides)


def _more_than_patches(node: fx.Node, widths: tuple[int, ...]) -> str:
    """What else a convolution does that is no linear map of patches, or ""."""
    decomposed = node.target is aten.convolution.default
    padding = argument(node, 4, "padding", [0])
    pads = padding == "same" if isinstance(padding, str) else set(padding) != {0}
    if pads and not (isinstance(padding, str) and set(widths) == {1}):
        return "that pads"
    dilations = _spread(argument(node, 5, "dilation", [1]), len(widths))
    if any(dilation != 1 < width for dilation, width in zip(dilations, widths, strict=True)):
        return "that is dilated"
    if decomposed and argument(node, 6, "transposed", False):
        return "that is transposed"
    return "in groups" if argument(node, 8 if decomposed else 6, "groups", 1) != 1 else ""


def _spread(sizes: Any, dims: int) -> tuple[int, ...]:
    """A size for each dimension, where one may stand for all."""
    return tuple(sizes) * dims if len(sizes) == 1 else tuple(sizes)
