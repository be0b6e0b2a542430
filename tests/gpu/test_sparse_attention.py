"""The attention kernel on a CUDA device: values, gradients, CUDA graphs, compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress import lowering
from fxpress.kernels import MaskLayout, compile_mask, sparse_attention
from fxpress.ops import AttentionSite, reference
from fxpress.ops.attention_samples import attention_samples
from fxpress.testing import assert_equivalent

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = [s.name for s in attention_samples(torch.float32, "cpu")]
DECLINED = {"negative scale", "cache"}


def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return sparse_attention(q, k, v, compile_mask(mask), **options)


def gradients(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(function(*leaves, mask, **options).square().sum(), leaves)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    (s,) = (s for s in attention_samples(dtype, "cuda") if s.name == name)
    args = (s.q, s.k, s.v, s.mask)
    facts = compile_mask(s.mask).facts
    site = AttentionSite.of(s.q, s.k, s.v, facts, **s.options)
    served = lowering.choose("fxpress::sparse_attention", "cuda", site) is not None
    assert served == (name not in DECLINED)
    assert_equivalent(call, reference, args, s.options)
    if dtype == torch.float32:
        assert_equivalent(gradients(call), gradients(reference), args, s.options)


@pytest.mark.parametrize("width", [16, 40, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_widths(width: int, dtype: torch.dtype) -> None:
    mask = (torch.rand(2, 300, 300) < 0.1).cuda()
    q, k, v = (torch.randn(1, 2, 300, width, device="cuda", dtype=dtype) for _ in range(3))
    assert_equivalent(call, reference, (q, k, v, mask))


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, MaskLayout]:
    mask = (torch.rand(4, 512, 512) < 0.05) & torch.ones(512, 512, dtype=torch.bool).tril()
    q, k, v = (torch.randn(2, 4, 512, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    return q, k, v, compile_mask(mask)


def test_cuda_graph(inputs: tuple[Tensor, Tensor, Tensor, MaskLayout]) -> None:
    q, k, v, layout = inputs
    sparse_attention(q, k, v, layout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_attention(q, k, v, layout)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, sparse_attention(q, k, v, layout))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_compiles_whole_with_gradients(inputs: tuple[Tensor, Tensor, Tensor, MaskLayout]) -> None:
    q, k, v, layout = inputs
    tensors = list(layout.tensors)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.fxpress.sparse_attention(
            q, k, v, tensors, layout.spec, None, False, 0.125, 0
        )
        return out * 2

    compiled = torch.compile(attention, fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    assert torch.equal(compiled(*leaves), attention(*leaves))
    got = torch.autograd.grad(compiled(*leaves).float().square().sum(), leaves)
    want = torch.autograd.grad(attention(*leaves).float().square().sum(), leaves)
    assert_equivalent(lambda: got, lambda: want, ())


def test_exports(inputs: tuple[Tensor, Tensor, Tensor, MaskLayout]) -> None:
    q, k, v, layout = inputs

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sparse_attention(q, k, v, layout)

    exported = torch.export.export(Attention(), (q, k, v))
    assert torch.equal(exported.module()(q, k, v), sparse_attention(q, k, v, layout))
