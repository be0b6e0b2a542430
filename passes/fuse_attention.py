"""`fuse-attention`: any spelling of attention becomes one operator.

    softmax(scale * q @ k^T + mask) @ v
      ->  scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)

    q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), mask broadcasts to (B, H, Nq, Nk)

The anchor is the product with v. From there the data flow is followed back over the softmax to the
product of q and k, whatever stands in between: scales, masks, casts, views. A mask that is causal
by value becomes the flag `is_causal`.

Exactness: REASSOCIATES. Where the probabilities are used elsewhere too (returned weights), they
are still computed for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxpress.passes.dataflow import argument, is_noop, mask_factors, sizes
from fxpress.passes.products import Product, Strided, emit, product
from fxpress.passes.scores import Scores, is_cast, is_view, scores_of
from fxpress.program import Program
from fxpress.rewrite import Decline, Rewrite, RewritePass

__all__ = ["FuseAttention"]

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_POINTWISE = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.pow.Tensor_Scalar,
    aten.masked_fill.Scalar,
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.nan_to_num.default,
    aten.clamp.default,
    aten.relu.default,
}
_MIXING = {aten.linear.default, aten.matmul.default, aten.einsum.default, aten.conv2d.default}
_REORDERING = {aten.permute.default, aten.transpose.int, aten.clone.default}
_NEAR = 6  # operations between softmax and product within which a near miss is reported


class FuseAttention(RewritePass):
    """Brings attention to its canonical form."""

    name: ClassVar[str] = "fuse-attention"
    phase: ClassVar[str] = "canonicalize"

    def rules(self) -> Iterable[Rewrite]:
        """The call as it is, then the spelled-out forms."""
        return (FlagCausal(), FuseSoftmax())


class FlagCausal(Rewrite):
    """sdpa(q, k, v, mask)  ->  sdpa(q, k, v, None, 0.0, True)   mask causal, whatever the input."""

    name: ClassVar[str] = "flag-causal"

    def match(self, node: fx.Node, program: Program) -> bool | Decline | None:
        """An attention call with a wholly causal mask."""
        if node.target is not _SDPA:
            return None
        q, k = (n for n in node.args[:2] if isinstance(n, fx.Node))
        if q.meta["val"].ndim != 4:
            return Decline("attention on tensors that are not (B, H, N, D): give heads apart", node)
        if argument(node, 4, "dropout_p", 0.0) != 0.0:
            return Decline("attention with dropout at inference", node)
        mask = argument(node, 3, "attn_mask")
        if mask is None or argument(node, 5, "is_causal", False):
            return None
        factors = mask_factors(program, mask, (sizes(q)[2], sizes(k)[2]))
        return True if factors.is_causal and not factors.rest else None

    def replace(self, node: fx.Node, _match: Any, program: Program) -> fx.Node:
        """The same call with the flag."""
        args = (*node.args[:3], None, 0.0, True)
        kept: dict[str, Any] = {
            key: node.kwargs[key] for key in ("scale", "enable_gqa") if key in node.kwargs
        }
        return program.graph.call_function(_SDPA, args, kept)


@dataclass(frozen=True)
class _Attention:
    """What was matched: the scores, the product with v, and the number of heads."""

    scores: Scores
    values: Product
    heads: int


class FuseSoftmax(Rewrite):
    """softmax(scale * q @ k^T + mask) @ v  ->  sdpa(q, k, v, mask, 0.0, is_causal, scale=scale).

    q (B, H, Nq, D) or with B and H merged; masks additive, by `masked_fill` or by `where`.
    A finite fill becomes an addend, so that a row that keeps nothing still averages all values; its
    gradient then reaches the scores, where the fill had cut it off.
    """

    name: ClassVar[str] = "fuse-softmax"

    def match(self, node: fx.Node, program: Program) -> _Attention | Decline | None:
        """A product whose left operand comes from a softmax over its last dimension."""
        values = product(node)
        if values is None or values.addend is not None:
            return None
        found = _softmax_behind(values.left)
        if found is None and node.target is aten.einsum.default:
            values = values.swapped()
            found = _softmax_behind(values.left)
        if found is None or isinstance(found, Decline):
            return found
        source = found.args[0]
        assert isinstance(source, fx.Node)
        scores = scores_of(program, source)
        if isinstance(scores, Decline):
            return scores
        return _attention(scores, values)

    def replace(self, _node: fx.Node, match: _Attention, program: Program) -> fx.Node:
        """Attention on four-dimensional operands, brought back to the product's own form."""
        graph, scores, values = program.graph, match.scores, match.values
        dtype = torch.promote_types(_dtype(scores.q), _dtype(values.right))
        operands = (scores.q, scores.k, values.right)
        q, k, v = (_four(graph, operand, match.heads, dtype) for operand in operands)
        program.refresh()
        q, k, v = _same_batch(graph, q, k, v)
        mask = scores.mask(program, match.heads, dtype)
        program.refresh()
        is_causal = False
        if mask is not None:
            factors = mask_factors(program, mask, (sizes(q)[2], sizes(k)[2]))
            is_causal = factors.is_causal and not factors.rest
        args = (q, k, v, None if is_causal else mask, 0.0, is_causal)
        fused = graph.call_function(_SDPA, args, {"scale": scores.scale})
        return _restored(graph, fused, values, dtype)


# From the product with v back to the softmax -----------------------------------------------------


def _softmax_behind(operand: Strided) -> fx.Node | Decline | None:
    """The softmax whose probabilities an operand is; Decline for near misses."""
    if operand.order is not None and operand.order[-1] != len(operand.order) - 1:
        return None
    node = operand.node
    while is_noop(node) or is_cast(node) or is_view(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    if _is_softmax(node):
        if operand.order is not None:
            return Decline("probabilities are transposed before the product with v", node)
        return node
    return _near_softmax(node)


def _is_softmax(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _SOFTMAX:
        return False
    dim = node.args[1]
    return isinstance(dim, int) and dim % node.meta["val"].ndim == node.meta["val"].ndim - 1


def _near_softmax(start: fx.Node) -> Decline | None:
    """Why what stands in front of the product with v is nearly, but not, a softmax."""
    waiting, seen = [(start, _NEAR, False)], {start}
    while waiting:
        node, left, mixed = waiting.pop(0)
        if _is_handwritten(node):
            return Decline("hand-written softmax: use torch.softmax, which is recognized", node)
        if _is_softmax(node):
            return _changed(start, mixed)
        passes = is_noop(node) or is_cast(node) or is_view(node)
        mixes = node.target in _MIXING
        if left and (passes or mixes or node.target in _POINTWISE | _REORDERING):
            inputs = [n for n in node.all_input_nodes if n.op == "call_function" and n not in seen]
            waiting += [(n, left - 1, mixed or mixes) for n in inputs]
            seen |= set(inputs)
    return None


def _changed(start: fx.Node, mixed: bool) -> Decline:
    if mixed:
        return Decline("heads are mixed between softmax and the product with v", start)
    return Decline("probabilities are changed between softmax and the product with v", start)


def _is_handwritten(node: fx.Node) -> bool:
    """exp(x) / sum(exp(x))."""
    if node.target is not aten.div.Tensor:
        return False
    above, below = (_behind_noops(n) for n in node.args)
    return above is aten.exp.default and below in (aten.sum.dim_IntList, aten.sum.default)


def _behind_noops(node: Any) -> Any:
    while isinstance(node, fx.Node) and (is_noop(node) or is_cast(node) or _adds_scalar(node)):
        node = node.args[0]
    return node.target if isinstance(node, fx.Node) else None


def _adds_scalar(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not isinstance(node.args[1], fx.Node)


# The parts put together --------------------------------------------------------------------------


def _attention(scores: Scores, values: Product) -> _Attention | Decline:
    """Check that the operands fit one attention call, and count the heads."""
    ranks = {len(operand.shape) for operand in (scores.q, scores.k, values.right)}
    if len(ranks) > 1:
        return Decline("queries, keys and values differ in their number of dimensions", values.node)
    rank = ranks.pop()
    if rank > 4:
        return Decline("attention over more than four dimensions", values.node)
    if rank == 4:
        heads = max(sizes(scores.product.node)[_heads_dim(scores.product)], 1)
    else:
        heads = _merged_heads(scores.q) if rank == 3 else 1
        if rank == 3 and scores.heads is not None:
            heads = scores.heads
    batches = [operand.shape[: rank - 2] for operand in (scores.q, scores.k, values.right)]
    if not _batches_fit(batches):
        return Decline("batch sizes of queries, keys and values differ", values.node)
    return _Attention(scores, values, heads)


def _heads_dim(scores: Product) -> int:
    return scores.order.index(1) if scores.order is not None else 1


def _batches_fit(batches: list[tuple[Any, ...]]) -> bool:
    """Equal, but for sizes of one that broadcast against a fixed size."""
    for column in zip(*batches, strict=True):
        distinct = {str(size) for size in column}
        if len(distinct) > 1 and (
            not all(isinstance(s, int) for s in column) or len(distinct - {"1"}) > 1
        ):
            return False
    return True


def _merged_heads(q: Strided) -> int:
    """H where the batch is B*H: from the view that split the features into heads of D."""
    width, node = int(q.shape[-1]), q.node
    for _ in range(16):
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, fx.Node):
            return 1
        if node.target in (aten.linear.default, aten.addmm.default):
            return 1
        before, after = sizes(source), sizes(node)
        if len(before) == 4 and len(after) == 3 and math.prod(before[:2]) == after[0]:
            return before[1]
        if after[-1] == width < before[-1] and before[-1] % width == 0:
            heads = before[-1] // width
            return heads if sizes(q.node)[0] % heads == 0 or q.order is not None else 1
        node = source
    return 1


def _dtype(operand: Strided) -> torch.dtype:
    dtype: torch.dtype = operand.node.meta["val"].dtype
    return dtype


def _four(graph: fx.Graph, operand: Strided, heads: int, dtype: torch.dtype) -> fx.Node:
    """An operand as (B, H, N, D)."""
    rank, node = len(operand.shape), emit(graph, operand)
    if _dtype(operand) != dtype:
        node = graph.call_function(aten.to.dtype, (node, dtype))
    if rank == 2:
        node = graph.call_function(aten.unsqueeze.default, (node, 0))
    if rank < 4:
        node = graph.call_function(aten.unflatten.int, (node, 0, [-1, heads]))
    return node


def _same_batch(graph: fx.Graph, *nodes: fx.Node) -> list[fx.Node]:
    """Operands expanded to the same batch and heads."""
    shapes = [node.meta["val"].shape for node in nodes]
    wanted = [
        max((s[d] for s in shapes), key=lambda s: s if isinstance(s, int) else 0) for d in (0, 1)
    ]
    result = []
    for given, shape in zip(nodes, shapes, strict=True):
        node = given
        size = [
            want if isinstance(want, int) and isinstance(have, int) and want != have else -1
            for want, have in zip(wanted, shape[:2], strict=True)
        ]
        if size != [-1, -1]:
            node = graph.call_function(aten.expand.default, (node, [*size, -1, -1]))
        result.append(node)
    return result


def _restored(graph: fx.Graph, fused: fx.Node, values: Product, dtype: torch.dtype) -> fx.Node:
    """The result in rank, order and dtype of the product that it replaces."""
    rank = values.node.meta["val"].ndim
    if rank < 4:
        fused = graph.call_function(aten.flatten.using_ints, (fused, 0, 1))
    if rank == 2:
        fused = graph.call_function(aten.squeeze.dim, (fused, 0))
    if values.order is not None:
        fused = graph.call_function(aten.permute.default, (fused, list(values.order)))
    wanted: torch.dtype = values.node.meta["val"].dtype
    if dtype != wanted:
        fused = graph.call_function(aten.to.dtype, (fused, wanted))
    return fused
