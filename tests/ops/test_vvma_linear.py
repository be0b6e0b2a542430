"""The factored linears against plain PyTorch: values, gradients, compilers, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxpress.errors import LoweringError
from fxpress.ops import flops
from fxpress.ops.activations import ACTIVATIONS, activate, activation_gradient
from fxpress.ops.linear_samples import low_rank_samples, vvma_errors, vvma_samples
from fxpress.ops.low_rank_linear import low_rank_linear, low_rank_reference
from fxpress.ops.vvma_linear import vvma_linear, vvma_reference
from fxpress.testing import assert_equivalent

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
VVMA = {sample.name: sample for sample in vvma_samples(torch.float32, "cpu")}
LOW_RANK = {sample.name: sample for sample in low_rank_samples(torch.float32, "cpu")}
OPERATORS: list[tuple[Callable[..., Tensor], Callable[..., Tensor], Any]] = [
    (vvma_linear, vvma_reference, vvma_samples),
    (low_rank_linear, low_rank_reference, low_rank_samples),
]


def gradients(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of every tensor, under one incoming gradient that depends on the output."""

    def call(*args: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            return torch.autograd.grad(function(*leaves).square().sum(), tensors)

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "reference", "samples"), OPERATORS)
def test_values(operator: Any, reference: Any, samples: Any, dtype: torch.dtype) -> None:
    for sample in samples(dtype, "cpu"):
        assert_equivalent(operator, reference, sample.args)


@pytest.mark.parametrize(("operator", "reference", "samples"), OPERATORS)
def test_gradients(operator: Any, reference: Any, samples: Any) -> None:
    for sample in samples(torch.float32, "cpu"):
        assert_equivalent(gradients(operator), gradients(reference), sample.args)


@given(
    rows=st.integers(0, 6),
    pieces=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    block=st.integers(1, 9),
    terms=st.integers(1, 4),
    own=st.booleans(),
    cut=st.tuples(st.integers(0, 8), st.integers(0, 8)),
)
def test_any_shape(
    rows: int,
    pieces: tuple[int, int],
    block: int,
    terms: int,
    own: bool,
    cut: tuple[int, int],
) -> None:
    (p, q), (m_cut, n_cut) = pieces, (min(c, block - 1) for c in cut)
    x = torch.randn(rows, q * block - n_cut)
    core = torch.randn(*[p] * own, terms, block, block)
    vectors = torch.randn(terms, p, q, block)
    args = (x, core, vectors, None, None, p * block - m_cut)
    assert_equivalent(vvma_linear, vvma_reference, args)


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("terms", [1, 4])
def test_wide_weights_in_any_memory_order(terms: int, rows: int) -> None:
    """Above what a cache holds z is a convolution; lanes may be outermost in memory."""
    core, vectors = torch.randn(terms, 32, 32), torch.randn(terms, 96, 96, 32) / 10
    x = torch.randn(rows, 96 * 32)
    assert_equivalent(vvma_linear, vvma_reference, (x, core, vectors))
    lanes = vectors.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert_equivalent(vvma_linear, vvma_reference, (x, core, lanes))


@pytest.mark.parametrize("name", ["vector", "ragged, terms", "own cores", "many rows"])
def test_opcheck(name: str) -> None:
    sample = VVMA[name]
    x, core, vectors, bias, *rest = sample.args
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, core, vectors, bias)]
    opcheck(torch.ops.fxpress.vvma_linear.default, (*leaves, *rest))
    grad = torch.ones(*x.shape[:-1], rest[-1])
    opcheck(torch.ops.fxpress.vvma_linear_backward.default, (grad, *sample.args))


@pytest.mark.parametrize("name", ["vector", "epilogue"])
def test_opcheck_of_low_rank(name: str) -> None:
    sample = LOW_RANK[name]
    *tensors, activation = sample.args
    leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
    opcheck(torch.ops.fxpress.low_rank_linear.default, (*leaves, activation))
    grad = torch.ones(*tensors[0].shape[:-1], tensors[2].shape[0])
    opcheck(torch.ops.fxpress.low_rank_linear_backward.default, (grad, *sample.args))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradcheck(activation: str | None) -> None:
    shapes = [(2, 7), (2, 3, 3), (2, 2, 3, 3), (5,)]
    leaves = [torch.randn(*shape).double().requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda x, m, v, b: vvma_linear(x, m, v, b, activation), leaves)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_have_their_gradient(name: str) -> None:
    x = torch.randn(50).double().requires_grad_()
    grad = torch.randn(50).double()
    (want,) = torch.autograd.grad(activate(x, name), x, grad)
    got = activation_gradient(grad, x.detach(), name)
    assert_equivalent(lambda: got, lambda: want, ())


def test_incoming_gradients_may_be_expanded() -> None:
    x, core, vectors, *_ = VVMA["one row"].args
    x = x.clone().requires_grad_()
    out = vvma_linear(x, core, vectors)
    (expanded,) = torch.autograd.grad(out, x, torch.ones(1).expand_as(out), retain_graph=True)
    (plain,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(expanded, plain)


class Layers(nn.Module):
    """Both operators, as a rewritten graph has them."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.randn(2, 16, 16) / 4)
        self.vectors = nn.Parameter(torch.randn(2, 3, 2, 16) / 2)
        self.bias = nn.Parameter(torch.randn(45))
        self.down = nn.Parameter(torch.randn(4, 45) / 6)
        self.up = nn.Parameter(torch.randn(20, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.fxpress.vvma_linear(x, self.core, self.vectors, self.bias, "gelu", 45)
        out: Tensor = torch.ops.fxpress.low_rank_linear(y, self.down, self.up, None, None)
        return out


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_gradients(backend: str) -> None:
    module, x = Layers(), torch.randn(3, 30)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert_equivalent(compiled, module, (x,))
    weights = list(module.parameters())
    got = torch.autograd.grad(compiled(x).square().sum(), weights)
    want = torch.autograd.grad(module(x).square().sum(), weights)
    assert_equivalent(lambda: got, lambda: want, ())


def test_exports_with_a_dynamic_batch() -> None:
    module = Layers()
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=512)}}
    exported = torch.export.export(module, (torch.randn(3, 30),), dynamic_shapes=shapes)
    targets = [node.target for node in exported.graph.nodes]
    assert torch.ops.fxpress.vvma_linear.default in targets
    assert torch.ops.fxpress.low_rank_linear.default in targets
    for rows in (1, 100):
        assert_equivalent(exported.module(), module, (torch.randn(rows, 30),))


def test_flops() -> None:
    assert flops.__all__
    x = torch.randn(2, 3, 64, requires_grad=True)
    core, vectors = torch.randn(2, 16, 16), torch.randn(2, 3, 4, 16)
    with FlopCounterMode(display=False) as counter:
        y = vvma_linear(x, core, vectors, None, "relu")
    assert counter.get_total_flops() == 2 * 6 * 2 * (3 * 4 * 16 + 3 * 16 * 16)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 2 * (3 * 3 * 4 * 16 + 3 * 3 * 16 * 16)
    with FlopCounterMode(display=False) as counter:
        y = low_rank_linear(x, torch.randn(5, 64), torch.randn(20, 5))
    assert counter.get_total_flops() == 2 * 6 * 5 * (64 + 20)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 5 * (3 * 64 + 2 * 20)


@pytest.mark.parametrize(("message", "changes"), list(vvma_errors()))
def test_refusals(message: str, changes: dict[str, Any]) -> None:
    args: dict[str, Any] = {
        "x": torch.zeros(3, 30),
        "core": torch.zeros(2, 16, 16),
        "vectors": torch.zeros(2, 3, 2, 16),
    }
    with pytest.raises(LoweringError) as raised:
        vvma_linear(**args | changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("x is (..., n), down (rank, n)", {"up": torch.zeros(4)}),
        ("one floating dtype", {"down": torch.zeros(4, 30).double()}),
        ("on one device", {"up": torch.zeros(20, 4, device="meta")}),
        ("down takes the features of x", {"x": torch.zeros(3, 31)}),
        ("down takes the features of x", {"up": torch.zeros(20, 5)}),
        ("bias is (20,)", {"bias": torch.zeros(21)}),
        ("activation is None or one of", {"activation": "softmax"}),
    ],
)
def test_refusals_of_low_rank(message: str, changes: dict[str, Any]) -> None:
    args: dict[str, Any] = {
        "x": torch.zeros(3, 30),
        "down": torch.zeros(4, 30),
        "up": torch.zeros(20, 4),
    }
    with pytest.raises(LoweringError) as raised:
        low_rank_linear(**args | changes)
    assert message in str(raised.value)
