"""The kernels of `vvma_linear` on a CUDA device: values, gradients, CUDA graphs, compilers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpress import kernels, lowering
from fxpress.kernels.vvma_linear import (
    VvmaKernel,
    emit,
    kernel_of,
    launch,
    sums_of,
    whole_of,
)
from fxpress.ops.linear_samples import vvma_samples
from fxpress.ops.vvma_linear import VvmaSite, lay_out_cores, vvma_linear, vvma_reference
from fxpress.testing import assert_equivalent

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = [s.name for s in vvma_samples(torch.float32, "cpu")]
# More rows than the kernels are for.
DECLINED = {"many rows"}


def gradients(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def run(x: Tensor, core: Tensor, vectors: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, core, vectors)]
            return torch.autograd.grad(function(*leaves, *rest).square().sum(), leaves)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    (s,) = (s for s in vvma_samples(dtype, "cuda") if s.name == name)
    rows = s.args[0].reshape(-1, s.args[0].shape[-1])
    site = VvmaSite.of(rows, *s.args[1:])
    assert kernels.__all__
    served = lowering.choose("fxpress::vvma_linear", "cuda", site) is not None
    assert served == (name not in DECLINED)
    assert_equivalent(vvma_linear, vvma_reference, s.args)
    if dtype == torch.float32:
        assert_equivalent(gradients(vvma_linear), gradients(vvma_reference), s.args)


def weights(terms: int, size: int = 1024, block: int = 64) -> tuple[Tensor, Tensor]:
    pieces = size // block
    core = torch.randn(terms, block, block) * block**-0.5
    vectors = torch.randn(terms, pieces, pieces, block) * (terms * pieces) ** -0.5
    return core.cuda().half(), vectors.cuda().half()


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 17, 32])
@pytest.mark.parametrize("terms", [1, 4, 16])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_blocks_and_batches(block: int, terms: int, batch: int) -> None:
    x = torch.randn(batch, 1024, device="cuda").half()
    assert_equivalent(vvma_linear, vvma_reference, (x, *weights(terms, block=block)))


@pytest.mark.parametrize("terms", [1, 4, 16])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_chain_of_layers(overlap: bool, terms: int) -> None:
    """Launches that overlap see the results of the layers before, not what was there."""
    layers = [weights(terms) for _ in range(24)]
    x = torch.randn(1, 1024, device="cuda").half()
    site = VvmaSite.of(x, *layers[0], None, None, 1024)
    kernel, plain = kernel_of(site, overlap=overlap), kernel_of(site)
    function = emit(kernel).load().kernel

    def chain(x: Tensor) -> Tensor:
        for core, vectors in layers:
            x = launch(function, kernel, x, core, vectors, None)
        return x

    eager = chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, eager)
    for core, vectors in layers:
        x = launch(emit(plain).load().kernel, plain, x, core, vectors, None)
        torch.cuda.synchronize()
    assert torch.equal(x, eager)


@pytest.mark.parametrize("terms", [1, 16])
def test_weights_written_just_before_are_seen(terms: int) -> None:
    """Overlapping kernels read no weight before the kernel that wrote it is done."""
    core, vectors = weights(terms, size=4096)
    x = torch.randn(1, 4096, device="cuda").half()
    vvma_linear(x, core, vectors)
    for factor in (2.0, 0.5, -1.0):
        want = vvma_linear(x, core, vectors * factor)
        torch.cuda.synchronize()
        vectors.mul_(factor)
        assert torch.equal(vvma_linear(x, core, vectors), want)
        core.mul_(2)
        assert torch.equal(vvma_linear(x, core, vectors), 2 * want)
        core.mul_(0.5)


@pytest.mark.parametrize("terms", [1, 4])
def test_compiles_whole_with_gradients(terms: int) -> None:
    core, vectors = weights(terms)
    x = torch.randn(3, 1024, device="cuda").half()

    def layer(x: Tensor, core: Tensor, vectors: Tensor) -> Tensor:
        y: Tensor = torch.ops.fxpress.vvma_linear(x, core, vectors, None, "gelu", 1024)
        return y * 2

    compiled = torch.compile(layer, fullgraph=True)
    leaves = [t.detach().requires_grad_() for t in (x, core, vectors)]
    assert_equivalent(compiled, layer, leaves)
    got = torch.autograd.grad(compiled(*leaves).float().square().sum(), leaves)
    want = torch.autograd.grad(layer(*leaves).float().square().sum(), leaves)
    assert_equivalent(lambda: got, lambda: want, ())


def test_x_may_be_strided() -> None:
    core, vectors = weights(1)
    x = torch.randn(1024, 6, device="cuda").half().t()
    assert_equivalent(vvma_linear, vvma_reference, (x, core, vectors))
    wide = torch.randn(6, 1040, device="cuda").half()[:, 8:1032]
    assert_equivalent(vvma_linear, vvma_reference, (wide, core, vectors))


@pytest.mark.parametrize("terms", [4, 16])
def test_options_change_no_result(terms: int) -> None:
    core, vectors = weights(terms)
    x = torch.randn(5, 1024, device="cuda").half()
    site = VvmaSite.of(x, core, vectors, None, None, 1024)
    ways = [whole_of(site, overlap=True), sums_of(site, overlap=True)]
    for group, rows, width in ((1, 1, 16), (2, 1, 8), (4, 2, 8), (1, 4, 8)):
        ways.append(replace(ways[0], group=group, rows=rows, width=width))
        ways.append(replace(ways[1], rows=rows, width=width))
    for kernel in ways:
        function = emit(kernel).load().kernel

        def call(
            x: Tensor,
            core: Tensor,
            vectors: Tensor,
            run: Any = function,
            kernel: VvmaKernel = kernel,
        ) -> Tensor:
            return launch(run, kernel, x, core, vectors, None)

        assert_equivalent(call, vvma_reference, (x, core, vectors))
        assert_equivalent(call, vvma_reference, (x, lay_out_cores(core), vectors))
