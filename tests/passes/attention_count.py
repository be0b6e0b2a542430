"""A count of attention in an eager run, which knows nothing of graphs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["AttentionCount"]


class AttentionCount(TorchDispatchMode):
    """Counts attention in an eager run: fused calls, and softmaxes that reach a product.

    A tensor carries the softmaxes that it was computed from, each with the number of what it
    weighs, until a product consumes it. A product that sums over another number consumes none: it
    does not sum over what was weighed (experts, classes, channels).
    """

    FUSED = "_scaled_dot_product"
    SOFTMAX = ("aten::_softmax", "aten::_safe_softmax")
    RESIZED = ("aten::slice", "aten::constant_pad_nd", "aten::_unsafe_view")
    PRODUCTS = ("aten::bmm", "aten::mm", "aten::baddbmm", "aten::addmm")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fused = 0
        self.reached: set[int] = set()
        self.seen = 0
        self.carried: dict[int, set[tuple[int, int]]] = {}
        self.alive: list[Any] = []  # an id is unique only as long as its tensor lives

    @property
    def total(self) -> int:
        return self.fused + len(self.reached)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        carried = set().union(*(self.carried.get(id(t), set()) for t in tensors))
        self.fused += self.FUSED in name
        if name in self.SOFTMAX:
            self.seen += 1
            carried = {(self.seen, out.shape[args[1]])}
        elif name in self.RESIZED:
            carried = {(softmax, out.shape[-1]) for softmax, _ in carried}
        elif name in self.PRODUCTS:
            left = args[1] if name in ("aten::baddbmm", "aten::addmm") else args[0]
            found = self.carried.get(id(left), set())
            self.reached |= {softmax for softmax, count in found if count == left.shape[-1]}
            carried = set()
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.alive.append(leaf)
                self.carried[id(leaf)] = carried
        return out
