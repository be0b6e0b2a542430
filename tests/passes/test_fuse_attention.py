"""`fuse-attention`: every spelling becomes one operator; every near miss says why it does not."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxpress.capture import Call, capture, capture_calls
from fxpress.passes import fuse_attention, layouts, probabilities, score_walk, softmax
from fxpress.passes.fuse_attention import FuseAttention
from fxpress.passes.sites import attention_sites
from fxpress.program import Program
from fxpress.rewrite import PassContext, PassRecord
from fxpress.testing import assert_equivalent
from fxpress.verify import verify
from tests.passes.handwritten import HANDWRITTEN

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

Forward = Callable[["Heads", Tensor], Any]
LOW = torch.finfo(torch.float32).min


class Heads(nn.Module):
    """Projections to two heads of four, and a forward that is given."""

    def __init__(self, body: Forward) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.body = body

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (B, 2, N, 4) each."""
        flat = (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) for t in flat)
        return q, k, v

    def forward(self, x: Tensor) -> Any:
        """Whatever is tested."""
        return self.body(self, x)


def upper(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def divided(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.transpose(-1, -2) / 4**0.5).softmax(-1) @ v


def scaled_queries(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return F.dropout((q * 0.5 @ k.mT).softmax(-1), 0.1, m.training) @ v


def scaled_keys(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return torch.softmax(torch.matmul(q, (k / 2).mT) + 1.0, dim=3).contiguous() @ v


def constant_scale(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT / torch.full((), 4.0).sqrt()).softmax(-1) @ v


def added_mask(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
    return (q @ k.mT * 0.5 + mask).softmax(-1) @ v


def filled_mask(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT).masked_fill(upper(x.shape[1]), -1e9).softmax(-1) @ v


def where_masks(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    keep = ((x[:, :, 0] > -0.5) | (torch.arange(x.shape[1]) == 0))[:, None, None]
    scores = torch.where(keep, q @ k.mT, LOW)
    return torch.where(~upper(x.shape[1]), scores, LOW).softmax(-1) @ v


def reversed_where(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    low = torch.full((1,), -torch.inf)
    return torch.where(upper(x.shape[1]), low, q @ k.mT).softmax(-1) @ v


def bias_and_padding(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    bias = x[:, None, :, :1] * m.temperature
    padding = (x[:, :, 0] > 0.5)[:, None, None]
    return (0.5 * (bias + q @ k.mT)).masked_fill(padding, LOW).softmax(-1) @ v


def subtracted_mask(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT - 1e4 * (x[:, None, None, :, 0] > 0.5).float()).softmax(-1) @ v


def banded_mask(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    band = (~upper(x.shape[1])).triu(-1)
    return (q @ k.mT).masked_fill(~band, LOW).softmax(-1) @ v


def einsum(m: Heads, x: Tensor) -> Tensor:
    q, k, v = (p(x).view(*x.shape[:2], 2, 4) for p in (m.q, m.k, m.v))
    p = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v).flatten(2)


def einsum_values_first(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    p = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return torch.einsum("bhjd, bhij -> bhid", v, p)


def merged_heads(m: Heads, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = (t.reshape(-1, n, 4) for t in m.heads(x))
    mask = (x[:, None, None, :, 0] > 0.5) * -1e9
    p = (torch.bmm(q, k.transpose(1, 2)).view(b, 2, n, n) + mask).view(-1, n, n).softmax(-1)
    return torch.bmm(p, v).view(b, 2, n, 4)


def split_as_in_torch(m: Heads, x: Tensor) -> Tensor:
    n, b, _ = x.shape
    q, k, v = (p(x).view(n, b * 2, 4).transpose(0, 1) for p in (m.q, m.k, m.v))
    mask = torch.zeros(b * 2, n, n, dtype=x.dtype).masked_fill(upper(n), -torch.inf)
    return torch.bmm(torch.baddbmm(mask, q, k.mT, alpha=0.5).softmax(-1), v)


def without_heads(m: Heads, x: Tensor) -> Tensor:
    result: Tensor = torch.softmax(m.q(x) @ m.k(x).mT, 2) @ m.v(x)
    return result


def without_batch(m: Heads, x: Tensor) -> Tensor:
    row = x[0]
    result: Tensor = torch.softmax(m.q(row) @ m.k(row).T, -1) @ m.v(row)
    return result


def repeated_keys(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    k, v = (t[:, :1].repeat_interleave(2, 1) for t in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def broadcast_keys(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]


def casts(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT * 0.5).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def mixed_dtypes(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q.float() @ k.float().mT).softmax(-1).to(q.dtype) @ v


def learned_queries(m: Heads, x: Tensor) -> Tensor:
    q = m.q.weight.view(1, 8, 8).expand(x.shape[0], -1, -1)
    result: Tensor = torch.softmax(q @ m.k(x).mT, -1) @ m.v(x)
    return result


def transposed_probabilities(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return torch.einsum("bhij,hbjd->hbid", (q @ k.mT).softmax(-1), v.transpose(0, 1))


def by_hand(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    e = (q @ k.mT).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def temperature(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT * m.temperature).softmax(-1) @ v


def window_mask(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    b, h, n, _ = q.shape
    scores = (q @ k.mT).view(1, b, h, n, n) + x[None, :, None, :, :1]
    return scores.view(b, h, n, n).softmax(-1) @ v


def five_dimensions(m: Heads, x: Tensor) -> Tensor:
    q, k, v = (t[None] for t in m.heads(x))
    return (q @ k.mT).softmax(-1) @ v


def scores_transposed(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return torch.einsum("bhid,bhjd->bhji", q, k).softmax(-1) @ v


def unequal_ranks(m: Heads, x: Tensor) -> Tensor:
    q, k, _ = m.heads(x)
    result: Tensor = (q @ k.mT).softmax(-1) @ m.v(x)[0]
    return result


def three_dimensions(m: Heads, x: Tensor) -> Tensor:
    q: Tensor = m.q(x)
    return F.scaled_dot_product_attention(q, m.k(x), m.v(x))


def after_maximum(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    scores = (q @ k.mT).masked_fill(upper(x.shape[1]), -1e4)
    e = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return (e / (e.sum(-1, keepdim=True) + 1e-9)) @ v


def by_log(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT).log_softmax(-1).exp() @ v


def by_logsumexp(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    scores = q @ k.mT
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def by_reciprocal(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    scores = q @ k.mT
    e = (scores - scores.max(-1, keepdim=True).values).exp()
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


def cosine(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    scales = m.q.bias[:2].exp().view(2, 1, 1)
    return (q @ k.mT * scales + x[:, None, None, :, 0]).softmax(-1) @ v


def scaled_by_key(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT / (1 + x[:, None, None, :, 0].square())).softmax(-1) @ v


def scores_of_keys(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    scores = (k @ q.mT).transpose(-2, -1).masked_fill(upper(x.shape[1]), LOW)
    return v.mT @ scores.softmax(-1).mT


def middle_axis(m: Heads, x: Tensor) -> Tensor:
    q, k, v = (p(x).view(*x.shape[:2], 2, 4) for p in (m.q, m.k, m.v))
    scores = torch.einsum("bihd,bjhd->bijh", q, k) + x[:, None, :, :1]
    return torch.einsum("bijh,bjhd->bihd", scores.softmax(2), v)


def dots(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    p = torch.einsum("...id,...jd", q, k).softmax(-1)
    return torch.einsum("...ij,...jd->...id", p, v)


def keys_for_all_heads(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    p = torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1)
    return torch.einsum("bhij,bjd->bihd", p, v[:, 0])


def grouped_heads(m: Heads, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = m.heads(x)
    q, k, v = q.reshape(b, 1, 2, n, 4), k[:, :1, None], v[:, :1, None]
    bias = x[:, None, None, :, :1] * m.temperature
    return (q @ k.mT + bias).softmax(-1) @ v


def windows(m: Heads, x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (-1, 2)).transpose(1, 2) for t in m.heads(x[:, :4]))
    mask = torch.arange(4.0).view(2, 1, 1, 2)
    context: Tensor = (q @ k.mT + mask).softmax(-1) @ v
    return context


def split_between(m: Heads, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = m.heads(x)
    p = (q @ k.mT).softmax(-1).view(b * 2, n, n)
    return torch.bmm(p, v.reshape(b * 2, n, 4))


def bounded(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    mask = torch.where(upper(x.shape[1]), LOW, 0.0)
    return torch.max(q @ k.mT + mask, torch.tensor(LOW)).softmax(-1) @ v


def negated(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    distance = -(q @ k.mT)
    return (x[:, None, None, :, 0] - distance).softmax(-1).type_as(x) @ v


def scaled_with_bias(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return ((q @ k.mT + x[:, None, None, :, 0]) * m.temperature).softmax(-1) @ v


def scaled_in_one(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    scores = torch.baddbmm(x[:, None, :, 0], q, k.mT) * m.temperature
    result: Tensor = scores.softmax(-1) @ v
    return result


def three_dimensions_masked(m: Heads, x: Tensor) -> Tensor:
    mask = (x[:, :1] @ x.mT) * torch.ones(x.shape[1], 1)
    return F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), mask)


def five_dimensions_given(m: Heads, x: Tensor) -> Tensor:
    q, k, v = (t[None].expand(2, -1, -1, -1, -1) for t in m.heads(x))
    mask = (x[:, :, 0] > -9)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask)


def two_dimensions_given(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.q(x[0]), m.k(x[0]), m.v(x[0])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# name: (forward, whether it is causal, dtype of the mask)
SPELLINGS: dict[str, tuple[Forward, bool, torch.dtype | None]] = {
    "divided": (divided, False, None),
    "scaled_queries": (scaled_queries, False, None),
    "scaled_keys": (scaled_keys, False, None),
    "constant_scale": (constant_scale, False, None),
    "added_mask": (added_mask, True, None),
    "filled_mask": (filled_mask, True, None),
    "where_masks": (where_masks, False, torch.float32),
    "reversed_where": (reversed_where, True, None),
    "bias_and_padding": (bias_and_padding, False, torch.float32),
    "subtracted_mask": (subtracted_mask, False, torch.float32),
    "banded_mask": (banded_mask, False, torch.bool),
    "einsum": (einsum, False, None),
    "einsum_values_first": (einsum_values_first, False, None),
    "merged_heads": (merged_heads, False, torch.float32),
    "split_as_in_torch": (split_as_in_torch, True, None),
    "without_heads": (without_heads, False, None),
    "without_batch": (without_batch, False, None),
    "repeated_keys": (repeated_keys, False, None),
    "broadcast_keys": (broadcast_keys, False, None),
    "casts": (casts, False, None),
    "mixed_dtypes": (mixed_dtypes, False, None),
    "learned_queries": (learned_queries, False, None),
    "transposed_probabilities": (transposed_probabilities, False, None),
    "by_hand": (by_hand, False, None),
    "temperature": (temperature, False, None),
    "window_mask": (window_mask, False, torch.float32),
    "five_dimensions": (five_dimensions, False, None),
    "scores_transposed": (scores_transposed, False, None),
    "unequal_ranks": (unequal_ranks, False, None),
    "by_log": (by_log, False, None),
    "by_logsumexp": (by_logsumexp, False, None),
    "by_reciprocal": (by_reciprocal, False, None),
    "scores_of_keys": (scores_of_keys, True, None),
    "after_maximum": (after_maximum, True, None),
    "cosine": (cosine, False, torch.float32),
    "scaled_by_key": (scaled_by_key, False, None),
    "middle_axis": (middle_axis, False, torch.float32),
    "dots": (dots, False, None),
    "keys_for_all_heads": (keys_for_all_heads, False, None),
    "grouped_heads": (grouped_heads, False, torch.float32),
    "windows": (windows, False, torch.float32),
    "split_between": (split_between, False, None),
    "bounded": (bounded, True, None),
    "negated": (negated, False, torch.float32),
    "scaled_with_bias": (scaled_with_bias, False, torch.float32),
    "scaled_in_one": (scaled_in_one, False, torch.float32),
}


IN_HALF = ("casts", "mixed_dtypes")


def fused(program: Program) -> PassRecord:
    before = program.copy()
    record = FuseAttention().run(program, PassContext())
    verify(program, "fuse-attention", before)
    return record


def count(program: Program, *targets: Any) -> int:
    return sum(n.op == "call_function" and n.target in targets for n in program.graph.nodes)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_operator(
    name: str, assert_same_gradients: Callable[..., None]
) -> None:
    forward, is_causal, mask = SPELLINGS[name]
    dtype = torch.bfloat16 if name in IN_HALF else torch.float32
    model, x = Heads(forward).to(dtype).eval(), torch.randn(3, 5, 8, dtype=dtype)
    program = capture(model, (x,))
    record = fused(program)
    assert record.counts() == {"fuse-softmax": 1}
    assert not record.declined
    assert count(program, aten.softmax.int, aten._softmax.default) == 0
    (call,) = program.calls(SDPA)
    q, _, _, mask_node, dropout, flag = call.args
    assert isinstance(q, fx.Node)
    assert q.meta["val"].ndim == 4
    assert (dropout, flag) == (0.0, is_causal)
    found = mask_node.meta["val"].dtype if isinstance(mask_node, fx.Node) else None
    assert found == mask
    assert_equivalent(program, model, (x,))
    assert_same_gradients(program.graph_module, model, (x,), None)
    assert not fused(program).rewrites


@pytest.mark.parametrize("name", ["divided", "filled_mask", "where_masks", "einsum"])
def test_dynamic_sizes_stay_dynamic(name: str) -> None:
    forward, is_causal, _ = SPELLINGS[name]
    model = Heads(forward).eval()
    small, large = torch.randn(3, 5, 8), torch.randn(4, 7, 8)
    program = capture_calls(model, [((small,), {}), ((large,), {})])
    assert fused(program).counts() == {"fuse-softmax": 1}
    (call,) = program.calls(SDPA)
    assert call.args[5] is is_causal
    for x in (small, large, torch.randn(2, 11, 8)):
        assert_equivalent(program, model, (x,))


def test_heads_are_recovered_from_a_merged_batch() -> None:
    program = capture(Heads(split_as_in_torch).eval(), (torch.randn(5, 3, 8),))
    fused(program)
    (site,) = attention_sites(program)
    assert site.shape == (3, 2, 2, 5, 5, 4, 4)


def test_scales_are_multiplied() -> None:
    def forward(m: Heads, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        return (q * 0.5 @ (k / 4).mT * 3).softmax(-1) @ v

    program = capture(Heads(forward).eval(), (torch.randn(2, 5, 8),))
    fused(program)
    (site,) = attention_sites(program)
    assert site.scale == 0.5 / 4 * 3
    assert count(program, aten.mul.Tensor, aten.div.Tensor) == 0


def test_a_row_that_keeps_nothing_stays_uniform_where_it_was() -> None:
    def forward(m: Heads, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        return (q @ k.mT).masked_fill(x[:, None, None, :, 0] > -9, LOW).softmax(-1) @ v

    model, x = Heads(forward).eval(), torch.randn(2, 5, 8)
    program = capture(model, (x,))
    fused(program)
    assert_equivalent(program, model, (x,))


def test_returned_probabilities_are_still_computed(
    assert_same_gradients: Callable[..., None],
) -> None:
    def forward(m: Heads, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = m.heads(x)
        p = (q @ k.mT).softmax(-1)
        return p @ v, p.mean(1)

    model, x = Heads(forward).eval(), torch.randn(2, 5, 8)
    program = capture(model, (x,))
    fused(program)
    assert count(program, SDPA) == 1
    assert count(program, aten.softmax.int) == 1
    assert count(program, aten.matmul.default) == 1  # that of the scores
    assert_equivalent(program, model, (x,))
    assert_same_gradients(program.graph_module, model, (x,), None)


def test_a_causal_mask_becomes_the_flag() -> None:
    def forward(m: Heads, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        q, k, v = m.heads(x)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3)

    model, x = Heads(forward).eval(), torch.randn(2, 5, 8)
    program = capture(model, (x,))
    assert fused(program).counts() == {"flag-causal": 1}
    (call,) = program.calls(SDPA)
    assert call.args[3:] == (None, 0.0, True)
    assert call.kwargs == {"scale": 0.3}
    assert_equivalent(program, model, (x,))
    assert not fused(program).rewrites


def test_graph_text(golden: Callable[[str, str], None]) -> None:
    program = capture(Heads(where_masks).eval(), (torch.randn(3, 5, 8),))
    before = str(program)
    fused(program)
    golden(f"{before}\n\nbecomes\n\n{program}", "passes/fuse_attention.txt")


def test_new_nodes_say_where_they_come_from() -> None:
    program = capture(Heads(divided).eval(), (torch.randn(3, 5, 8),))
    fused(program)
    (call,) = program.calls(SDPA)
    assert call.meta["provenance"].rule == "fuse-softmax"
    assert call.meta["provenance"].sources == ("matmul_1",)


def test_fuel_ends_it() -> None:
    program = capture(Heads(divided).eval(), (torch.randn(3, 5, 8),))
    ctx = PassContext()
    ctx.fuel.left = 0
    record = FuseAttention().run(program, ctx)
    assert not record.rewrites
    assert count(program, SDPA) == 0


# Refusals ----------------------------------------------------------------------------------------


def soft_cap(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (torch.tanh(q @ k.mT / 50) * 50).softmax(-1) @ v


def heads_mixed_before(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    mixed = F.linear((q @ k.mT).permute(0, 2, 3, 1), m.q.weight[:2, :2])
    return mixed.permute(0, 3, 1, 2).softmax(-1) @ v


def heads_mixed_by_a_product(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    mixed = (q @ k.mT).permute(0, 2, 3, 1) @ torch.ones(2, 2)
    return mixed.permute(0, 3, 1, 2).softmax(-1) @ v


def heads_mixed_after(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return torch.einsum("hg,bgij->bhij", m.q.weight[:2, :2], (q @ k.mT).softmax(-1)) @ v


def mixture_of_rows(m: Heads, x: Tensor) -> Tensor:
    return F.softmax(m.q(x), -1) @ m.k.weight


def weight_for_keys(m: Heads, x: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(m.v(x), m.k.weight), -1) @ m.q.weight


def finite_fill(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT).masked_fill(x[:, None, None, :, 0] > 0, -5.0).softmax(-1) @ v


def dropout_at_inference(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def over_queries(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT).softmax(-2) @ v


def over_heads(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT).softmax(1) @ v


def renormalized(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    p = (q @ k.mT).softmax(-1) * (x[:, None, None, :, 0] > 0)
    return (p / (p.sum(-1, keepdim=True) + 1e-6)) @ v


def quiet(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    e = (q @ k.mT).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def full_scale(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT * (x @ x.mT)[:, None]).softmax(-1) @ v


def masked_then_scaled(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return ((q @ k.mT).masked_fill(upper(x.shape[1]), -1e9) * m.temperature).softmax(-1) @ v


def regrouped(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    b, h, n, _ = q.shape
    scores = (q @ k.mT).view(h, b, n, n) + m.q.weight[:h, :1, None, None]
    return scores.view(b, h, n, n).softmax(-1) @ v


def unequal_ranks_of_values(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    p = (q @ k.mT).softmax(-1).reshape(3, 1, 2, 5, 5)
    return p @ v[:, None]


def more_heads_than_queries(m: Heads, x: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2).reshape(3, 10, 1, 4) for t in m.heads(x))
    p = (q @ k[:, None, :, 0].mT).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", p, v[:, :, 0])


def grouped_without_batch(m: Heads, x: Tensor) -> Tensor:
    q, k, v = (t[0] for t in m.heads(x))
    return F.scaled_dot_product_attention(q, k[:1], v[:1], enable_gqa=True)


def softmax_of_features(m: Heads, x: Tensor) -> Tensor:
    """Linear attention: softmax of queries and of keys, apart."""
    q, k, v = m.heads(x)
    return q.softmax(-1) @ (k.mT @ v)


REFUSALS: dict[Forward, str] = {
    soft_cap: "a soft cap (tanh) stands between scores and softmax",
    heads_mixed_before: "heads are mixed between scores and softmax",
    heads_mixed_by_a_product: "heads are mixed between scores and softmax",
    heads_mixed_after: "heads are mixed between softmax and the product with v",
    mixture_of_rows: "softmax is not of a product of queries and keys, but of aten.linear",
    weight_for_keys: "keys are a weight of the model",
    finite_fill: "masked scores are filled with more than minus infinity",
    dropout_at_inference: "attention with dropout at inference",
    over_queries: "softmax is taken over the queries, not over the keys",
    over_heads: "softmax is taken over batch or heads, not over the keys",
    renormalized: "probabilities are changed between softmax and the product with v",
    quiet: "something is added to the sum of a hand-written softmax",
    full_scale: "scores are scaled by a tensor that differs by query and key",
    masked_then_scaled: "masked scores are scaled by a tensor",
    regrouped: "a mask is applied in dimensions that are not batch and heads",
    unequal_ranks_of_values: "queries, keys and values differ in their number of dimensions",
    more_heads_than_queries: "rows of the scores are not those of the product with v",
    grouped_without_batch: "attention of grouped heads that is not on (B, H, N, D)",
    softmax_of_features: (
        "keys and values are multiplied first, without a softmax (linear attention)"
    ),
}


@pytest.mark.parametrize("forward", REFUSALS, ids=lambda forward: forward.__name__)
def test_near_misses_say_why(forward: Forward) -> None:
    program = capture(Heads(forward).eval(), (torch.randn(3, 5, 8),))
    before = str(program)
    record = fused(program)
    assert [decline.reason for decline in record.declined] == [REFUSALS[forward]]
    assert record.declined[0].at in program.graph.nodes
    assert not record.rewrites
    assert str(program) == before


@pytest.mark.parametrize("which", ["queries", "keys", "values", "merged"])
def test_what_the_batch_shares_is_expanded_to_a_dynamic_one(which: str) -> None:
    def forward(m: Heads, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        if which == "merged":  # windows: what they share, and what all share
            q, k, v = (t[:, None] * torch.arange(3.0).view(3, 1, 1, 1) for t in (q, k, v))
            window = x[0, :3, :3].sum(1)[:, None, None, None] * torch.arange(5.0)
            return (q[:1] @ k.mT + window).softmax(-1) @ v[:, :1]
        q, k, v = (
            t[:1] if which == n else t for t, n in ((q, "queries"), (k, "keys"), (v, "values"))
        )
        return (q @ k.mT).softmax(-1) @ v

    model = Heads(forward).eval()
    calls: list[Call] = [((torch.randn(b, 5, 8),), {}) for b in (4, 6)]
    program = capture_calls(model, calls)
    record = fused(program)
    assert record.counts() == {"fuse-softmax": 1}, record.declined
    for batch in (2, 4, 10):
        assert_equivalent(program, model, (torch.randn(batch, 5, 8),))


def test_values_shared_by_the_batch_while_heads_are_merged_into_it_are_declined() -> None:
    def forward(m: Heads, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        q, k = (t.reshape(-1, 5, 4) for t in (q, k))
        return torch.bmm(q, k.mT).softmax(-1).view(3, 2, 5, 5) @ v[:1]

    (decline,) = fused(capture(Heads(forward).eval(), (torch.randn(3, 5, 8),))).declined
    assert decline.reason == UNEQUAL


TWO_DYNAMIC = "more than one dynamic size among the batch dimensions of attention"
UNEQUAL = "batch sizes of queries, keys and values differ"


def test_every_reason_is_hit() -> None:
    known = [*REFUSALS.values(), UNEQUAL, TWO_DYNAMIC, NO_SOFTMAX, VALUES_FIRST]
    known += [reason for _, _, reasons in HANDWRITTEN.values() for reason in reasons]
    for module in (fuse_attention, probabilities, score_walk, layouts, softmax):
        assert module.__file__ is not None
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Decline":
                first = node.args[0]
                text = first.values[0] if isinstance(first, ast.JoinedStr) else first
                assert isinstance(text, ast.Constant)
                assert any(reason.startswith(str(text.value)) for reason in known), text.value


@pytest.mark.parametrize("dim", [1, -1])
def test_softmax_without_a_product_behind_it_is_no_anchor(dim: int) -> None:
    def forward(m: Heads, x: Tensor) -> Tensor:
        q, k, _ = m.heads(x)
        return (q @ k.mT).softmax(dim).sum(-1)

    record = fused(capture(Heads(forward).eval(), (torch.randn(3, 5, 8),)))
    assert not record.rewrites
    assert not record.declined


def _cosine_scores(m: Heads, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = m.heads(x)
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT, v


def _of_scores(change: Callable[[Tensor], Tensor]) -> Forward:
    def forward(m: Heads, x: Tensor) -> Tensor:
        scores, v = _cosine_scores(m, x)
        return change(scores) @ v

    return forward


def elu_features(m: Heads, x: Tensor) -> Tensor:
    """Linear attention (Katharopoulos et al. 2020)."""
    q, k, v = m.heads(x)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)


def first_the_values(m: Heads, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v)) / x.shape[1]


NO_SOFTMAX = "no softmax stands between the product of queries and keys and that with v"
VALUES_FIRST = "keys and values are multiplied first, without a softmax (linear attention)"
WITHOUT: dict[str, tuple[Forward, str]] = {
    "cosine": (_of_scores(lambda s: s), NO_SOFTMAX),
    "relu": (_of_scores(F.relu), NO_SOFTMAX),
    "squared relu": (_of_scores(lambda s: F.relu(s) ** 2 / s.shape[-1]), NO_SOFTMAX),
    "sigmoid": (_of_scores(lambda s: torch.sigmoid(s - 1) * (s > -0.5)), NO_SOFTMAX),
    "decay": (_of_scores(lambda s: s * 0.9 ** torch.arange(s.shape[-1])), NO_SOFTMAX),
    "exponentials cut late": (
        _of_scores(lambda s: s.exp().tril() / s.exp().tril().sum(-1, keepdim=True)),
        NO_SOFTMAX,
    ),
    "elu features": (elu_features, VALUES_FIRST),
    "values first": (first_the_values, VALUES_FIRST),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_near_attention_without_a_softmax_is_named(name: str) -> None:
    forward, reason = WITHOUT[name]
    program = capture(Heads(forward).eval(), (torch.randn(3, 5, 8),))
    before = str(program)
    record = fused(program)
    assert [decline.reason for decline in record.declined] == [reason]
    assert not record.rewrites
    assert str(program) == before


def test_products_of_projections_with_other_ends_are_not_named() -> None:
    def forward(m: Heads, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        gram = q.mT @ k  # nothing of a third projection follows
        rotated = (x @ (x.mT @ x).softmax(-1)).sum(1)  # what is rotated is no projection
        return gram.sum() + rotated.sum() + v

    record = fused(capture(Heads(forward).eval(), (torch.randn(3, 5, 8),)))
    assert not record.rewrites
    assert not [d for d in record.declined if d.reason in (NO_SOFTMAX, VALUES_FIRST)]


def test_what_weighs_experts_or_channels_is_left_alone() -> None:
    def forward(m: Heads, x: Tensor) -> Tensor:
        gates = m.q(x).softmax(-1)
        experts = torch.stack([m.k(x), m.v(x)] * 4, -1)
        channels = m.k(x).mean(1, keepdim=True).softmax(-1)
        mixed: Tensor = (experts @ gates[..., None])[..., 0] * channels
        return mixed

    record = fused(capture(Heads(forward).eval(), (torch.randn(3, 5, 8),)))
    assert not record.rewrites


LIFTED: dict[str, Forward] = {
    "three": three_dimensions,
    "three_masked": three_dimensions_masked,
    "five": five_dimensions_given,
    "two": two_dimensions_given,
}


@pytest.mark.parametrize("name", LIFTED)
def test_the_operator_in_other_dimensions_is_lifted(
    name: str, assert_same_gradients: Callable[..., None]
) -> None:
    model, x = Heads(LIFTED[name]).eval(), torch.randn(3, 5, 8)
    program = capture(model, (x,))
    assert fused(program).counts() == {"lift-attention": 1}
    assert len(attention_sites(program)) == 1
    assert_equivalent(program, model, (x,))
    assert_same_gradients(program.graph_module, model, (x,), None)
    assert not fused(program).rewrites


def test_positions_of_a_plane_are_added_in_its_dimensions() -> None:
    def forward(m: Heads, x: Tensor) -> Tensor:
        q, k, v = m.heads(x[:, :4])
        rows, columns = q[..., :2, None], q[..., None, 2:]
        scores = (q @ k.mT).view(3, 2, 4, 2, 2) + rows + columns
        return scores.view(3, 2, 4, 4).softmax(-1) @ v

    model, x = Heads(forward).eval(), torch.randn(3, 5, 8)
    program = capture(model, (x,))
    assert fused(program).counts() == {"fuse-softmax": 1}
    assert_equivalent(program, model, (x,))


def test_two_dynamic_batch_sizes_in_one_are_declined() -> None:
    class Bare(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return (q @ q.mT).softmax(-1) @ q

    calls: list[Call] = [((torch.randn(a, b, 2, 5, 4),), {}) for a, b in ((3, 5), (4, 6))]
    (decline,) = fused(capture_calls(Bare(), calls)).declined
    assert decline.reason == TWO_DYNAMIC
