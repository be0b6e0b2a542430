"""Near misses of attention that have no softmax: cosine attention, linear attention.

    f(q @ k^T) @ v          f of single scores: none, relu, sigmoid, decay
    f(q) @ (g(k)^T @ v)     the same products, keys and values first

Both are products of three projections. They are named, so that nobody looks for them among what was
recognized; nothing is rewritten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from fxpress.passes.dataflow import RESHAPES, peel
from fxpress.passes.products import Product, product
from fxpress.passes.softmax import LOG_SOFTMAX, SOFTMAX
from fxpress.passes.views import VIEWS
from fxpress.rewrite import Decline

__all__ = ["keys_first", "without_softmax"]

aten = torch.ops.aten

_FAR = 24  # operations that are looked at behind an operand
_WEIGHTED = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default}
_SOFTMAX = (*SOFTMAX, *LOG_SOFTMAX)
_MOVES = {
    *RESHAPES,
    *VIEWS,
    operator.getitem,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.cat.default,
    aten.stack.default,
    aten.linalg_vector_norm.default,
    *_SOFTMAX,
    aten.cumsum.default,
    aten.tril.default,
    aten.triu.default,
    aten.rms_norm.default,
    aten.layer_norm.default,
}


def without_softmax(outer: Product) -> Decline | None:
    """Why a product of queries, keys and values is no attention; None: it is no such product."""
    scores = _product_of_projections(outer.left.node)
    if scores is not None and _is_projected(outer.right.node):
        reason = "no softmax stands between the product of queries and keys and that with v"
        return Decline(reason, scores)
    return keys_first(outer)


def keys_first(outer: Product) -> Decline | None:
    """Linear attention, whether or not queries and keys have a softmax each; None: it is not."""
    inner = _product_of_projections(outer.right.node)
    if inner is None or not _is_projected(outer.left.node):
        return None
    reason = "keys and values are multiplied first, without a softmax (linear attention)"
    return Decline(reason, inner)


def _product_of_projections(node: fx.Node) -> fx.Node | None:
    """The matrix product of two projections that a node is computed from, score by score."""
    for behind in _behind(node, lambda n: _weights(n) or _is_matrix(n) or n.target in _SOFTMAX):
        found = product(behind)
        if found is not None and not _weights(behind):
            both = (found.left.node, found.right.node)
            return behind if _is_matrix(behind) and all(map(_is_projected, both)) else None
    return None


def _is_projected(node: fx.Node) -> bool:
    """Whether a node comes from a product with a weight, or from an input as it is."""
    if peel(node, RESHAPES).op == "placeholder":
        return True
    return any(_weights(behind) for behind in _behind(node, _weights))


def _behind(node: fx.Node, ends: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """A node and what it is computed from, nearest first, number by number or moved about."""
    waiting, seen = [node], {node}
    while waiting and len(seen) <= _FAR:
        top = waiting.pop(0)
        if top.op != "call_function":
            continue
        yield top
        if not ends(top) and (top.target in _MOVES or torch.Tag.pointwise in _tags(top)):
            inputs = [n for n in top.all_input_nodes if n not in seen]
            waiting += inputs
            seen |= set(inputs)


def _tags(node: fx.Node) -> list[torch.Tag]:
    return getattr(node.target, "tags", [])


def _weights(node: fx.Node) -> bool:
    """Whether a node is a product with a weight of the model."""
    return node.target in _WEIGHTED and any(
        isinstance(n, fx.Node) and peel(n, RESHAPES).op == "get_attr" for n in node.args[:3]
    )


def _is_matrix(node: fx.Node) -> bool:
    """Whether a product has several rows and columns."""
    return product(node) is not None and "1" not in map(str, node.meta["val"].shape[-2:])
