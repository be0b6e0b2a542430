"""`fuse-attention`: any spelling of attention becomes one operator.

    softmax(scale * q @ k^T + mask) @ v
      ->  scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)

    q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), mask broadcasts to (B, H, Nq, Nk)

The anchor is the product with v, or the division behind it by the sum of exponentials. From there
the data flow is followed back to the softmax (`probabilities.py`) and on to the product of q and k
(`score_walk.py`), whatever stands in between: scales, masks, casts, views. A mask that is causal by
value becomes the flag `is_causal`.

Exactness: REASSOCIATES. Where the probabilities are used elsewhere too (returned weights), they
are still computed for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxpress.passes.dataflow import RESHAPES, argument, is_noop, mask_factors, peel, sizes
from fxpress.passes.layouts import Layout, Placed, four, layout_of, restored, same_batch
from fxpress.passes.probabilities import UNCHANGED, Moved, Probabilities, moved, probabilities_of
from fxpress.passes.products import Product, Strided, product
from fxpress.passes.score_walk import Way, scores_of
from fxpress.passes.scores import Bias, Keep, Scores, changed, settled
from fxpress.passes.softmax import Softmax, divided_late, is_cast, softmax_of
from fxpress.passes.views import VIEWS
from fxpress.passes.without_softmax import keys_first, without_softmax
from fxpress.program import Program, module_path
from fxpress.rewrite import Decline, PassContext, PassRecord, Rewrite, RewritePass

__all__ = ["FuseAttention"]

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_POINTWISE = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.masked_fill.Scalar,
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.nan_to_num.default,
    aten.clamp.default,
    aten.relu.default,
}
_MIXING = {aten.linear.default, aten.matmul.default, aten.einsum.default, aten.conv2d.default}
_REORDERING = {
    aten.permute.default,
    aten.mT.default,
    aten.cumsum.default,
    aten.transpose.int,
    aten.clone.default,
    aten.slice.Tensor,
    aten.pad.default,
    aten.constant_pad_nd.default,
}
_PARTS = (*RESHAPES, aten.slice.Tensor, aten.select.int)  # of a weight
_NEAR = 6  # operations between softmax and product, views aside, that a near miss may have


class FuseAttention(RewritePass):
    """Brings attention to its canonical form."""

    name: ClassVar[str] = "fuse-attention"
    phase: ClassVar[str] = "canonicalize"

    def rules(self) -> Iterable[Rewrite]:
        """The call as it is, then the spelled-out forms."""
        return (FlagCausal(), LiftAttention(), FuseSoftmax())

    def run(self, program: Program, ctx: PassContext) -> PassRecord:
        """Apply the rules, and name what is left that looks like attention without a softmax."""
        record = super().run(program, ctx)
        for node in program.graph.nodes:
            values = product(node) if ctx.enabled(module_path(node)) else None
            near = values and without_softmax(values)
            if near and not any(rule.match(node, program) for rule in self.rules()):
                record.declined.append(near)
        return record


class FlagCausal(Rewrite):
    """sdpa(q, k, v, mask)  ->  sdpa(q, k, v, None, 0.0, True)   mask causal, whatever the input."""

    name: ClassVar[str] = "flag-causal"

    def match(self, node: fx.Node, program: Program) -> bool | Decline | None:
        """An attention call with a wholly causal mask."""
        if node.target is not _SDPA:
            return None
        q, k = (n for n in node.args[:2] if isinstance(n, fx.Node))
        if argument(node, 4, "dropout_p", 0.0) != 0.0:
            return Decline("attention with dropout at inference", node)
        mask = argument(node, 3, "attn_mask")
        if q.meta["val"].ndim != 4 or mask is None or argument(node, 5, "is_causal", False):
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
    """What was matched.

    Attributes:
        scores: what the softmax is taken of.
        values: the product with v.
        layout: how batch sizes are brought to (B, H).
        changes: what is done to values and result in place of the probabilities.
        is_causal: by a flag.
    """

    scores: Scores
    values: Product
    layout: Layout
    changes: Moved = UNCHANGED
    is_causal: bool = False

    def build(self, anchor: fx.Node, program: Program) -> fx.Node:
        """Attention on four-dimensional operands in front of `anchor`, in the product's form."""
        graph, scores, values, layout = program.graph, self.scores, self.values, self.layout
        dtype = torch.promote_types(_dtype(scores.q), _dtype(values.right))
        operands = (scores.q, scores.k, values.right)
        q, k, v = (four(graph, operand, layout, dtype) for operand in operands)
        program.refresh(anchor)
        q, k, v = same_batch(graph, q, k, v)
        program.refresh(anchor)
        layout = replace(layout, built=q)
        q, k = scores.stretched(anchor, program, layout, q, k)
        v = changed(graph, v, self.changes.values, layout, dtype, of_rows=False)
        if self.changes.settled:
            scores = scores.finite()
        mask = scores.mask(anchor, program, layout, dtype)
        program.refresh(anchor)
        is_causal = self.is_causal
        if mask is not None:
            factors = mask_factors(program, mask, (sizes(q)[2], sizes(k)[2]))
            is_causal = factors.is_causal and not factors.rest
        args = (q, k, v, None if is_causal else mask, 0.0, is_causal)
        scale: dict[str, Any] = {} if scores.scale is None else {"scale": scores.scale}
        fused = graph.call_function(_SDPA, args, scale)
        if self.changes.settled:
            fused = settled(graph, fused, scores.keeps, layout)
        fused = changed(graph, fused, self.changes.results, layout, dtype)
        if (factor := self.changes.factor * values.alpha) != 1.0:
            fused = graph.call_function(aten.mul.Tensor, (fused, factor))
        fused = restored(graph, fused, values, layout, dtype)
        return _plus(graph, fused, values)


def _plus(graph: fx.Graph, node: fx.Node, values: Product) -> fx.Node:
    """What the product with v adds to it."""
    if values.addend is None:
        return node
    alpha: dict[str, Any] = {} if values.beta == 1.0 else {"alpha": values.beta}
    return graph.call_function(aten.add.Tensor, (node, values.addend), alpha)


class LiftAttention(Rewrite):
    """sdpa(q, k, v, mask)  ->  flatten(sdpa(unflatten(q), ...))   q (N, D), (B, N, D), ...

    Attention on tensors that are not (B, H, N, D) becomes such that is.
    """

    name: ClassVar[str] = "lift-attention"

    def match(self, node: fx.Node, program: Program) -> _Attention | Decline | None:
        """An attention call in another number of dimensions."""
        del program
        if node.target is not _SDPA or argument(node, 4, "dropout_p", 0.0) != 0.0:
            return None
        q, k, v = (Strided(n) for n in node.args[:3] if isinstance(n, fx.Node))
        if len(q.shape) == 4:
            return None
        if node.kwargs.get("enable_gqa"):
            return Decline("attention of grouped heads that is not on (B, H, N, D)", node)
        scores = _given(node, q, k)
        flag = bool(argument(node, 5, "is_causal", False))
        return _attention(scores, Product(node, q, v), is_causal=flag)

    def replace(self, node: fx.Node, match: _Attention, program: Program) -> fx.Node:
        """The same attention on four dimensions."""
        return match.build(node, program)


def _given(node: fx.Node, q: Strided, k: Strided) -> Scores:
    """The scores that an attention call computes."""
    mask: Any = argument(node, 3, "attn_mask")
    scale: Any = node.kwargs.get("scale")
    biases: tuple[Bias, ...] = ()
    keeps: tuple[Keep, ...] = ()
    if mask is not None:
        tensor = Placed(mask, q.shape[:-2])
        if mask.meta["val"].dtype == torch.bool:
            keeps = (Keep(tensor, False, -torch.inf),)
        else:
            biases = (Bias(tensor, 1.0),)
    return Scores(node, q, k, scale, biases, keeps)


class FuseSoftmax(Rewrite):
    """softmax(scale * q @ k^T + mask) @ v  ->  sdpa(q, k, v, mask, 0.0, is_causal, scale=scale).

    q (B, H, Nq, D) or in any other layout; masks additive, by `masked_fill` or by `where`; a scale
    that is a tensor multiplies q or k. A finite fill becomes an addend, so that a row that keeps
    nothing still averages all values; its gradient then reaches the scores, where the fill had cut
    it off.
    """

    name: ClassVar[str] = "fuse-softmax"

    def match(self, node: fx.Node, program: Program) -> _Attention | Decline | None:
        """A product whose left operand comes from a softmax over the dimension it sums."""
        if (late := divided_late(node)) is not None:
            return late if isinstance(late, Decline) else _divided(*late, node, program)
        values = product(node)
        if values is None:
            return None
        nearest: Decline | None = None
        for side in (values, values.swapped()):
            # Weights on the right are rarely probabilities, unless the order is that of letters;
            # those of a single row are as often those of experts.
            tells = (side is values or node.target is aten.einsum.default) and not values.hides
            is_layer = peel(side.right.node, _PARTS).op == "get_attr"
            found = self._ends_in(side, program, tells and not is_layer)
            if isinstance(found, _Attention):
                return found
            nearest = nearest or (found if tells else None)
        return nearest and (keys_first(values) or nearest)

    def _ends_in(
        self, values: Product, program: Program, near: bool
    ) -> _Attention | Decline | None:
        """The attention that ends in a product with v from the right; near misses, where asked."""
        behind = probabilities_of(values.left, program)
        if isinstance(behind, Probabilities):
            return _attended(behind, values, program)
        return behind or (_near_softmax(values.left.node) if near else None)

    def replace(self, node: fx.Node, match: _Attention, program: Program) -> fx.Node:
        """Attention on four-dimensional operands, brought back to the product's own form."""
        return match.build(node, program)


def _divided(
    inner: fx.Node, softmax: Softmax, node: fx.Node, program: Program
) -> _Attention | Decline | None:
    """The attention that ends in a division by the sum of exponentials."""
    values = product(inner)
    if values is None or values.left.order is not None:
        return None
    found = Probabilities(softmax, Way(None))
    return _attended(found, replace(values, node=node), program)


def _attended(
    found: Probabilities, values: Product, program: Program
) -> _Attention | Decline | None:
    """The attention that ends in a product with v, whose left operand is a softmax."""
    softmax, way = found.softmax, found.way
    places = way.order or tuple(range(softmax.node.meta["val"].ndim))
    scores = scores_of(program, softmax, way)
    if softmax.dim != places[-1]:
        if isinstance(scores, Decline):
            return None
        if softmax.dim == places[-2]:
            return Decline("softmax is taken over the queries, not over the keys", softmax.node)
        return Decline("softmax is taken over batch or heads, not over the keys", softmax.node)
    if isinstance(scores, Decline):
        return scores
    changes = moved(found, scores, program)
    return changes if isinstance(changes, Decline) else _attention(scores, values, changes)


# Near misses -------------------------------------------------------------------------------------


def _near_softmax(start: fx.Node) -> Decline | None:
    """Why what stands in front of the product with v is nearly, but not, a softmax."""
    changed = Decline("probabilities are changed between softmax and the product with v", start)
    mixed = Decline("heads are mixed between softmax and the product with v", start)
    cut = Decline("the softmax has columns that no value belongs to (sinks)", start)
    waiting, seen = [(start, _NEAR, changed)], {start}
    while waiting:
        node, left, why = waiting.pop(0)
        if _is_softmax(node):
            return why
        passes = is_noop(node) or is_cast(node) or node.target in VIEWS
        if node.target in _MIXING:
            why = mixed
        elif node.target in _POINTWISE | _REORDERING:
            cuts = node.target is aten.slice.Tensor and _cuts_last(node)
            why = cut if cuts else changed if why is cut else why
        elif not passes:
            continue
        inputs = [n for n in node.all_input_nodes if n.op == "call_function" and n not in seen]
        waiting += [(n, left - (not passes), why) for n in inputs if left]
        seen |= set(inputs)
    return None


def _cuts_last(node: fx.Node) -> bool:
    """Whether a slice is of the last dimension."""
    return argument(node, 1, "dim", 0) in (-1, node.meta["val"].ndim - 1)


def _is_softmax(node: fx.Node) -> bool:
    """Whether a node is a softmax over its last dimension."""
    found = softmax_of(node)
    return isinstance(found, Softmax) and found.dim == node.meta["val"].ndim - 1


# The parts put together --------------------------------------------------------------------------


def _attention(
    scores: Scores, values: Product, changes: Moved = UNCHANGED, is_causal: bool = False
) -> _Attention | Decline:
    """Check that the operands fit one attention call, and count the heads."""
    heads = scores.heads or _merged_heads(scores.q)
    layout = layout_of(scores.q, scores.k, values.right, heads, values.node)
    if isinstance(layout, Decline):
        return layout
    if not all(layout.takes(tensor) for tensor in (*scores.tensors, *changes.tensors)):
        return Decline("a mask is applied in dimensions that are not batch and heads", values.node)
    return _Attention(scores, values, layout, changes, is_causal)


def _merged_heads(q: Strided) -> int:
    """H where the batch is B*H: from the view that split the features into heads of D."""
    width, node = int(q.shape[-1]), q.node
    for _ in range(16):
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, fx.Node):
            return 1
        if node.target in (aten.linear.default, aten.addmm.default):
            return 1
        if not all(isinstance(n.meta["val"], torch.Tensor) for n in (source, node)):
            node = source  # one of several parts
            continue
        before, after = sizes(source), sizes(node)
        if heads := _merged_last(before, after):
            return heads
        if after[-1] == width < before[-1] and before[-1] % width == 0:
            heads = before[-1] // width
            return heads if sizes(q.node)[0] % heads == 0 or q.order is not None else 1
        node = source
    return 1


def _merged_last(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """The second of two neighboring dimensions that a view merged, before the last two; else 0."""
    for at in range(len(after) - 2):
        merged = (*before[:at], math.prod(before[at : at + 2]), *before[at + 2 :])
        if merged == after and len(before) == len(after) + 1:
            return before[at + 1]
    return 0


def _dtype(operand: Strided) -> torch.dtype:
    dtype: torch.dtype = operand.node.meta["val"].dtype
    return dtype
