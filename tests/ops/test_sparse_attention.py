"""`fxpress::sparse_attention` against the dense reference: values, gradients, compilers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxpress.errors import LoweringError
from fxpress.ops import compile_mask, flops, reference, sparse_attention
from fxpress.ops.attention_samples import AttentionSample, attention_errors, attention_samples
from fxpress.ops.mask_layout import MaskLayout
from fxpress.testing import assert_equivalent

FORMS = ["buckets", "tiles"]
SAMPLES = {sample.name: sample for sample in attention_samples(torch.float32, "cpu")}


def candidate(form: str) -> Callable[..., Tensor]:
    """The operator, called like `reference`."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
        return sparse_attention(q, k, v, compile_mask(mask, device="cpu", form=form), **options)

    return call


def gradients(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of q, k and v, under one incoming gradient that depends on the output only."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(function(*leaves, mask, **options).square().sum(), leaves)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_values(form: str, dtype: torch.dtype) -> None:
    for s in attention_samples(dtype, "cpu"):
        assert_equivalent(candidate(form), reference, (s.q, s.k, s.v, s.mask), s.options)


@pytest.mark.parametrize("name", list(SAMPLES))
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str, name: str) -> None:
    s = SAMPLES[name]
    args = (s.q, s.k, s.v, s.mask)
    assert_equivalent(gradients(candidate(form)), gradients(reference), args, s.options)


@st.composite
def calls(draw: st.DrawFn) -> AttentionSample:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, columns = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    offset = draw(st.integers(0, rows - 1))
    queries, keys = draw(st.integers(1, rows - offset)), draw(st.integers(1, columns))
    if draw(st.booleans()):
        offset, queries, keys = 0, rows, columns
    heads = key_heads * group
    shape = (heads, rows, columns)
    density = draw(st.sampled_from([0.0, 0.02, 0.2, 1.0]))
    mask = torch.rand(shape, generator=generator) < density
    if draw(st.booleans()):  # columns agree within tiles
        mask = mask[:, :1] & (torch.rand(heads, rows, 1, generator=generator) < 0.9)
    if draw(st.booleans()):  # some rows keep everything
        mask = mask.clone()
        mask[: draw(st.integers(1, heads)), : draw(st.integers(1, rows))] = True
    options: dict[str, Any] = {"is_causal": draw(st.booleans()), "q_offset": offset}
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        full = (2, heads, queries, keys)
        size = [draw(st.sampled_from([1, n])) for n in full]
        noise = torch.randn(size, generator=generator)
        options["attn_mask"] = noise > -0.5 if kind == "bool" else noise
    q = torch.randn(2, heads, queries, 8, generator=generator)
    k, v = (torch.randn(2, key_heads, keys, d, generator=generator) for d in (8, 16))
    return AttentionSample("drawn", mask, q, k, v, options)


@given(calls(), st.sampled_from(FORMS))
@settings(max_examples=60)
def test_drawn_calls(s: AttentionSample, form: str) -> None:
    args = (s.q, s.k, s.v, s.mask)
    assert_equivalent(candidate(form), reference, args, s.options)
    assert_equivalent(gradients(candidate(form)), gradients(reference), args, s.options)


def operator_arguments(s: AttentionSample, form: str = "buckets") -> tuple[Any, ...]:
    layout = compile_mask(s.mask, device="cpu", form=form)
    scale = s.options.get("scale", s.q.shape[-1] ** -0.5)
    options = (s.options.get("is_causal", False), scale, s.options.get("q_offset", 0))
    return s.q, s.k, s.v, list(layout.tensors), layout.spec, s.options.get("attn_mask"), *options


# "padding" has grouped heads too.
@pytest.mark.parametrize("name", ["pruned", "padding", "cache", "nothing"])
def test_opcheck(name: str) -> None:
    q, k, v, *rest = operator_arguments(SAMPLES[name])
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    opcheck(torch.ops.fxpress.sparse_attention.default, (*leaves, *rest))
    grad = torch.ones(*q.shape[:3], v.shape[-1])
    opcheck(torch.ops.fxpress.sparse_attention_backward.default, (grad, q, k, v, *rest))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    mask = torch.rand(2, 9, 7) < 0.4
    layout = compile_mask(mask, device="cpu", form=form)
    q, k, v = (
        torch.randn(1, h, n, 3).double().requires_grad_() for h, n in ((2, 9), (1, 7), (1, 7))
    )
    assert torch.autograd.gradcheck(lambda q, k, v: sparse_attention(q, k, v, layout), (q, k, v))


def test_a_row_without_keys_is_zero_with_zero_gradient() -> None:
    s = SAMPLES["rows without keys"]
    q = s.q.detach().clone().requires_grad_()
    out = sparse_attention(q, s.k, s.v, compile_mask(s.mask, device="cpu"))
    (grad,) = torch.autograd.grad(out.sum(), q)
    empty = ~s.mask.any(-1)
    assert empty.any()
    assert not out[:, empty].any()
    assert not grad[:, empty].any()


def test_incoming_gradients_may_be_expanded() -> None:
    s = SAMPLES["pruned"]
    layout = compile_mask(s.mask, device="cpu")
    q = s.q.detach().clone().requires_grad_()
    out = sparse_attention(q, s.k, s.v, layout)
    one = torch.ones(1)
    (expanded,) = torch.autograd.grad(out, q, one.expand_as(out), retain_graph=True)
    (plain,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert torch.equal(expanded, plain)


def test_dropout_keeps_the_mean_and_the_mask() -> None:
    s = SAMPLES["pruned"]
    layout = compile_mask(s.mask, device="cpu")
    ones = torch.ones_like(s.v)
    out = sparse_attention(s.q, s.k, ones, layout, dropout_p=0.5)
    assert out.std() > 0.05
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    outside = s.v.masked_fill(s.mask.any(1)[None, :, :, None], 0.0)
    assert not sparse_attention(s.q, s.k, outside, layout, dropout_p=0.5).any()


def test_an_additive_mask_may_need_a_gradient() -> None:
    s = SAMPLES["additive per row"]
    layout = compile_mask(s.mask, device="cpu")
    bias = s.options["attn_mask"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(sparse_attention(s.q, s.k, s.v, layout, bias).sum(), bias)
    dropped = ~s.mask.any(0)
    assert grad[0, 0, ~dropped].any()
    assert not grad[0, 0, dropped].any()


class Attention(nn.Module):
    """A module that holds its layout as buffers, as a rewritten graph does."""

    def __init__(self, layout: MaskLayout) -> None:
        super().__init__()
        self.spec, self.count = layout.spec, len(layout.tensors)
        for index, tensor in enumerate(layout.tensors):
            self.register_buffer(f"layout_{index}", tensor)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = [self.get_buffer(f"layout_{index}") for index in range(self.count)]
        scale = q.shape[-1] ** -0.5
        out: Tensor = torch.ops.fxpress.sparse_attention(
            q, k, v, layout, self.spec, None, False, scale, 0
        )
        return out


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_gradients(backend: str) -> None:
    s = SAMPLES["pruned"]
    module = Attention(compile_mask(s.mask, device="cpu"))
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    args = [x.detach().requires_grad_() for x in (s.q, s.k, s.v)]
    got, want = compiled(*args), module(*args)
    assert_equivalent(lambda: got, lambda: want, ())
    got_grads = torch.autograd.grad(got.sum(), args)
    want_grads = torch.autograd.grad(want.sum(), args)
    assert_equivalent(lambda: got_grads, lambda: want_grads, ())


def test_exports_with_a_dynamic_batch() -> None:
    s = SAMPLES["pruned"]
    module = Attention(compile_mask(s.mask, device="cpu"))
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = {name: {0: batch} for name in "qkv"}
    exported = torch.export.export(module, (s.q, s.k, s.v), dynamic_shapes=dynamic)
    targets = [node.target for node in exported.graph.nodes]
    assert torch.ops.fxpress.sparse_attention.default in targets
    wide = tuple(torch.cat([x, x, x]) for x in (s.q, s.k, s.v))
    assert_equivalent(exported.module(), module, wide)


def test_exports_with_a_growing_cache() -> None:
    layout = compile_mask(torch.rand(2, 64, 64) < 0.5, device="cpu")

    class Step(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            tensors, offset = list(layout.tensors), k.shape[2] - q.shape[2]
            out: Tensor = torch.ops.fxpress.sparse_attention(
                q, k, k, tensors, layout.spec, None, True, 0.3, offset
            )
            return out

    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 20, 8)
    keys = torch.export.Dim("keys", min=2, max=64)
    exported = torch.export.export(Step(), (q, k), dynamic_shapes=({}, {2: keys}))
    longer = torch.randn(1, 2, 33, 8)
    assert_equivalent(exported.module(), Step(), (q, longer))


def test_flops_count_the_cells_computed() -> None:
    layout = compile_mask(torch.ones(2, 64, 128, dtype=torch.bool), device="cpu")
    q, k, v = (torch.randn(3, 2, n, d) for n, d in ((64, 8), (128, 8), (128, 4)))
    assert flops.__all__
    with FlopCounterMode(display=False) as counter:
        sparse_attention(q, k, v, layout)
    assert counter.get_total_flops() == 2 * 3 * 2 * 64 * 128 * (8 + 4)


@pytest.mark.parametrize(("message", "tensors", "options"), list(attention_errors()))
def test_refusals(message: str, tensors: Any, options: dict[str, Any]) -> None:
    options = dict(options)
    layout = compile_mask(torch.ones(2, 64, 64, dtype=torch.bool), device="cpu")
    layout = layout.to(options.pop("to", "cpu"))
    q, k, v = tensors()
    with pytest.raises(LoweringError, match=message):
        sparse_attention(q, k, v, layout, **options)


def test_a_call_says_why_no_kernel_takes_it() -> None:
    from fxpress import kernels, lowering
    from fxpress.ops import AttentionSite

    s = SAMPLES["negative scale"]
    facts = compile_mask(s.mask, device="cpu", form="tiles").facts
    site = AttentionSite.of(s.q, s.k, s.v, facts, scale=-1.0)
    assert kernels.__all__
    found = lowering.declines("fxpress::sparse_attention", "cuda", site)
    assert [decline.reason for decline in found.values()] == ["the scale is not above 0"]
    assert lowering.choose("fxpress::sparse_attention", "cuda", site) is None


def test_tiles_that_keep_everything_gather_no_keys() -> None:
    mask = torch.zeros(4, 100, 300, dtype=torch.bool)
    mask[1, :50], mask[2, 50:], mask[3], mask[:, :, 7] = True, True, True, True
    layout = compile_mask(mask, device="cpu")
    whole = [b for b in layout.facts.buckets if b.head is not None]
    assert {b.head for b in whole} == {1, 2, 3}
    assert not any(b.gathered for b in whole)
    assert [b.natural for b in whole if b.head == 3] == [True]
    q = torch.randn(2, 4, 100, 8)
    k, v = torch.randn(2, 2, 300, 8), torch.randn(2, 2, 300, 16)
    assert_equivalent(candidate("buckets"), reference, (q, k, v, mask))
    assert_equivalent(gradients(candidate("buckets")), gradients(reference), (q, k, v, mask))


def some_columns(seed: int) -> Tensor:
    """Masks of one shape of layout: per head the same number of columns, elsewhere."""
    torch.manual_seed(seed)
    kept = torch.stack([torch.randperm(64)[:16] for _ in range(2)])
    return (
        torch.zeros(2, 64, dtype=torch.bool)
        .scatter(1, kept, value=True)[:, None]
        .expand(-1, 48, -1)
    )


def test_a_layout_changed_in_place_is_noticed() -> None:
    """As `load_state_dict` does to the buffers of a module."""
    x = torch.randn(1, 2, 64, 8)
    first, second = (compile_mask(some_columns(seed), device="cpu") for seed in (0, 1))
    assert first.spec == second.spec
    q = x[:, :, :48]
    before = sparse_attention(q, x, x, first)
    for mine, other in zip(first.tensors, second.tensors, strict=True):
        mine.copy_(other)
    assert not torch.equal(sparse_attention(q, x, x, first), before)
    assert_equivalent(
        lambda: sparse_attention(q, x, x, first), lambda: sparse_attention(q, x, x, second), ()
    )


def test_a_layout_first_used_for_inference_trains() -> None:
    mask = some_columns(0)
    layout = compile_mask(mask, device="cpu")
    x = torch.randn(3, 2, 64, 8)
    with torch.inference_mode():
        sparse_attention(x[:, :, :48], x, x, layout)
    leaf = x.clone().requires_grad_()
    sparse_attention(leaf[:, :, :48], leaf, leaf, layout).sum().backward()
    assert leaf.grad is not None


def test_nothing_is_kept_of_a_layout_that_is_gone() -> None:
    from fxpress.ops import packed_attention

    gc.collect()
    count = len(packed_attention._KNOWN)
    layout = compile_mask(some_columns(2), device="cpu")
    x = torch.randn(1, 2, 64, 8)
    sparse_attention(x[:, :, :48], x, x, layout)
    assert len(packed_attention._KNOWN) == count + 1
    del layout
    gc.collect()
    assert len(packed_attention._KNOWN) == count
