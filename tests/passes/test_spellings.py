"""Generated spellings of attention and of products with a weight are recognized, and stay equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from fxpress.capture import capture, capture_calls
from fxpress.passes.fuse_attention import FuseAttention
from fxpress.passes.normalize_linear import NormalizeLinear
from fxpress.passes.sites import attention_sites, linear_sites
from fxpress.rewrite import PassContext
from fxpress.testing import assert_equivalent
from fxpress.verify import verify
from tests.passes.handwritten import HANDWRITTEN, B, E, Model, N
from tests.passes.spellings import FEATURES, WIDTH, Attention, Linear, attentions, linears
from tests.passes.test_laws import Gradients, gradients_of

# No phase that explains: it traces every line, which takes minutes where a capture takes a second.
some = settings(
    max_examples=60,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@given(drawn=attentions())
@some
def test_every_attention_is_recognized_and_equal(
    assert_same_gradients: Callable[..., None], drawn: Attention
) -> None:
    model, call = drawn.build()
    program = capture(model, call)
    before = program.copy()
    record = FuseAttention().run(program, PassContext())
    verify(program, "fuse-attention", before)
    assert len(attention_sites(program)) == 1, record.declined
    assert not record.declined
    assert not FuseAttention().run(program, PassContext()).rewrites
    assert_equivalent(program, model, call)
    assert_same_gradients(program.graph_module, model, call, None)


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_what_is_written_by_hand(name: str, assert_same_gradients: Callable[..., None]) -> None:
    body, count, reasons = HANDWRITTEN[name]
    model, call = Model(body).eval(), (torch.randn(B, N, E),)
    program = capture(model, call)
    before = program.copy()
    record = FuseAttention().run(program, PassContext())
    verify(program, "fuse-attention", before)
    assert len(attention_sites(program)) == count
    assert [decline.reason for decline in record.declined] == reasons
    assert not FuseAttention().run(program, PassContext()).rewrites
    assert_equivalent(program, model, call)
    assert_same_gradients(program.graph_module, model, call, None)


# What is shared by the batch or met where windows, queries or keys are split: sizes are read off.
DYNAMIC = (
    "swin_shifted",
    "bigcode_merged",
    "memory_matmul",
    "vitdet_rel",
    "in_place",
    "attention_pool_weight",
)


@pytest.mark.parametrize("name", DYNAMIC)
def test_what_is_written_by_hand_for_any_batch(
    name: str, assert_same_gradients: Callable[..., None]
) -> None:
    body, count, reasons = HANDWRITTEN[name]
    model = Model(body).eval()
    program = capture_calls(model, [((torch.randn(b, N, E),), {}) for b in (B, B + 2)])
    before = program.copy()
    record = FuseAttention().run(program, PassContext())
    verify(program, "fuse-attention", before)
    assert len(attention_sites(program)) == count
    assert [decline.reason for decline in record.declined] == reasons
    for batch in (2, 5):
        call = (torch.randn(batch, N, E),)
        assert_equivalent(program, model, call)
        assert_same_gradients(program.graph_module, model, call, None)


@given(drawn=linears())
@some
def test_every_linear_is_recognized_and_equal(drawn: Linear) -> None:
    model, call = drawn.build()
    program = capture(model, call)
    before = program.copy()
    record = NormalizeLinear().run(program, PassContext())
    verify(program, "normalize-linear", before)
    assert [site.shape for site in linear_sites(program)] == [(WIDTH, FEATURES)], record.declined
    assert not record.declined
    assert not NormalizeLinear().run(program, PassContext()).rewrites
    assert_equivalent(program, model, call)
    assert_equivalent(gradients_of(program, model), Gradients(model), call)
