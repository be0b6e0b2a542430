"""The closed-form fits: exact where they must be, best where they can be, never worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxpress.errors import PlanError
from fxpress.ops.vvma_linear import vvma_linear
from fxpress.passes.low_rank_fit import fit_low_rank
from fxpress.passes.vvma_fit import VvmaFit, fit_vvma
from fxpress.testing import BITWISE, assert_equivalent, relative_rms

SHARES = ["matrix", "layer", "row"]
ROUNDING = torch.finfo(torch.float32).eps


def moments(inputs: Tensor) -> Tensor:
    return inputs.mT @ inputs / len(inputs)


def correlated(rows: int, features: int) -> Tensor:
    """Inputs that lie near a space of few dimensions, as activations do."""
    few = max(1, features // 4)
    spread = torch.randn(rows, few).double() @ torch.randn(few, features).double()
    return spread + 0.1 * torch.randn(rows, features).double()


def output_error(weight: Tensor, fitted: Tensor, inputs: Tensor) -> float:
    return relative_rms(inputs @ fitted.double().mT, inputs @ weight.double().mT)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.integers(1, 12),
    share=st.sampled_from(SHARES),
    full=st.booleans(),
)
@settings(max_examples=40)
def test_exact_with_all_terms(shape: tuple[int, int], block: int, share: str, full: bool) -> None:
    weight = torch.randn(shape)
    moment = moments(correlated(60, shape[1])) if full else None
    fit = fit_vvma(weight, block, block, share, moment, sweeps=1)
    assert fit.to_dense().shape == weight.shape
    assert_equivalent(fit.to_dense, lambda: weight, ())
    x = torch.randn(3, shape[1])
    assert_equivalent(
        lambda x, w: vvma_linear(x, fit.core, fit.vectors, out_features=shape[0]),
        lambda x, w: x @ w.mT,
        (x, weight),
    )


@given(
    pieces=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    block=st.integers(2, 10),
    terms=st.integers(1, 3),
)
@settings(max_examples=40)
def test_finds_a_weight_of_that_form(pieces: tuple[int, int], block: int, terms: int) -> None:
    terms = min(terms, block)
    core = torch.randn(terms, block, block)
    vectors = torch.randn(terms, *pieces, block)
    weight = VvmaFit(core, vectors, pieces[0] * block, pieces[1] * block, 0.0).to_dense()
    fit = fit_vvma(weight, block, terms)
    assert fit.relative_error <= 4 * ROUNDING * block


@given(terms=st.integers(1, 8), share=st.sampled_from(["matrix", "row"]))
@settings(max_examples=20)
def test_is_the_best_of_each_lane(terms: int, share: str) -> None:
    """Against the truncated singular value decomposition of each lane's matrix."""
    weight = torch.randn(24, 32).double()
    lanes = weight.view(3, 8, 4, 8).permute(3, 0, 2, 1)
    matrices = lanes if share == "row" else lanes.reshape(8, 12, 8)
    lost = torch.linalg.svdvals(matrices)[..., terms:].square().sum()
    fit = fit_vvma(weight, 8, terms, share)
    assert fit.relative_error == pytest.approx(float((lost / weight.square().sum()).sqrt()))
    assert fit.relative_error == pytest.approx(relative_rms(fit.to_dense(), weight))


def test_no_small_change_of_the_factors_is_better() -> None:
    weight, moment = torch.randn(32, 24).double(), torch.rand(24).double() + 0.1
    fit = fit_vvma(weight, 8, 2, second_moment=moment)
    leaves = [fit.core.requires_grad_(), fit.vectors.requires_grad_()]
    error = ((weight - fit.to_dense()).square() * moment).sum()
    for gradient in torch.autograd.grad(error, leaves):
        assert gradient.abs().max() < 1e-9 * error.detach()


@pytest.mark.parametrize("share", ["matrix", "row"])
def test_each_moment_known_lowers_the_error_of_the_outputs(share: str) -> None:
    weight, inputs = torch.randn(40, 61), correlated(300, 61)
    moment = moments(inputs)
    known: list[Any] = [None, moment.diagonal(), moment]
    fits = [fit_vvma(weight, 8, 2, share, m) for m in known]
    plain, diagonal, full = (output_error(weight, fit.to_dense(), inputs) for fit in fits)
    assert full < diagonal < plain
    assert full < 0.5 * plain
    assert fits[2].relative_error == pytest.approx(full, rel=1e-3)


def test_a_diagonal_matrix_is_a_diagonal() -> None:
    weight, moment = torch.randn(20, 24).double(), torch.rand(24) + 0.1
    diagonal = fit_vvma(weight, 8, 2, second_moment=moment)
    full = fit_vvma(weight, 8, 2, second_moment=moment.diag(), sweeps=2)
    assert full.relative_error == pytest.approx(diagonal.relative_error, rel=1e-4)


def test_sweeps_never_raise_the_error() -> None:
    weight, moment = torch.randn(24, 40), moments(correlated(200, 40))
    errors = [
        fit_vvma(weight, 8, 2, second_moment=moment, sweeps=s).relative_error for s in range(1, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_inputs_that_never_move_cost_nothing() -> None:
    weight, moment = torch.randn(16, 24), torch.ones(24)
    moment[5:] = 0
    assert fit_vvma(weight, 8, 5, second_moment=moment).relative_error < ROUNDING * 8
    assert fit_vvma(weight, 8, 1, second_moment=torch.zeros(24)).relative_error == 0
    assert fit_vvma(torch.zeros(16, 24), 8, second_moment=moment.diag()).relative_error == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 24).to(dtype)
    fit = fit_vvma(weight, 8, 8)
    assert fit.core.dtype == fit.vectors.dtype == fit.to_dense().dtype == dtype
    assert_equivalent(fit.to_dense, lambda: weight, ())


def test_a_layer_shares_its_core() -> None:
    weights = [torch.randn(m, 24) for m in (16, 20, 9)]
    fit = fit_vvma(weights, 8, 3, "layer")
    assert fit.core.shape == (3, 8, 8)
    assert fit.vectors.shape == (3, 6, 3, 8)
    stacked = fit_vvma(torch.cat(weights), 8, 3)
    assert_equivalent(fit.to_dense, stacked.to_dense, (), exactness=BITWISE)


def test_a_row_has_cores_of_its_own() -> None:
    weight = torch.randn(30, 64)
    fit = fit_vvma(weight, 8, 2, "row")
    assert fit.core.shape == (4, 2, 8, 8)
    assert fit.relative_error < fit_vvma(weight, 8, 2).relative_error


def test_signs_and_results_are_fixed() -> None:
    weight = torch.randn(40, 48)
    first, again = fit_vvma(weight, 8, 3), fit_vvma(weight.clone(), 8, 3)
    assert torch.equal(first.core, again.core)
    assert torch.equal(first.vectors, again.vectors)
    flipped = fit_vvma(-weight, 8, 3)
    assert torch.equal(first.core, flipped.core)
    assert torch.equal(first.vectors, -flipped.vectors)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("share is", {"share": "column"}),
        ("terms is between 1 and block = 8, not 9", {"terms": 9}),
        ("terms is between 1 and block = 8, not 0", {"terms": 0}),
        ("sweeps is at least 1", {"sweeps": 0}),
        ('several weights need share="layer"', {"weight": [torch.ones(8, 8)]}),
        ("a weight is (m, n), not empty", {"weight": torch.ones(8)}),
        ("a weight is (m, n), not empty", {"weight": [], "share": "layer"}),
        ("take one input", {"weight": [torch.ones(8, 8), torch.ones(8, 9)], "share": "layer"}),
        ("floating and finite", {"weight": torch.full((8, 8), torch.nan)}),
        ("floating and finite", {"weight": torch.ones(8, 8).long()}),
        ("second_moment is (8,) or (8, 8), not (9,)", {"second_moment": torch.ones(9)}),
        ("no negative entry", {"second_moment": -torch.ones(8)}),
        ("no negative entry", {"second_moment": torch.full((8, 8), torch.inf)}),
    ],
)
def test_refusals(message: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"weight": torch.ones(8, 8), "block": 8}
    with pytest.raises(PlanError) as raised:
        fit_vvma(**arguments | changes)
    assert message in str(raised.value)


@given(shape=st.tuples(st.integers(1, 30), st.integers(1, 30)), data=st.data())
@settings(max_examples=40)
def test_low_rank_is_the_best_of_its_rank(shape: tuple[int, int], data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(shape)))
    weight = torch.randn(shape).double()
    fit = fit_low_rank(weight, rank)
    values = torch.linalg.svdvals(weight)
    best = float(values[rank:].norm() / values.norm())
    assert fit.relative_error == pytest.approx(best, abs=1e-7)
    assert relative_rms(fit.to_dense(), weight) == pytest.approx(best, abs=1e-7)
    assert (fit.down.shape, fit.up.shape) == ((rank, shape[1]), (shape[0], rank))


@pytest.mark.parametrize("shape", [(600, 300), (300, 600)])
def test_low_rank_of_what_is_worked_on_in_parts(shape: tuple[int, int]) -> None:
    weight, scales = torch.randn(shape), torch.rand(shape[1])
    fit = fit_low_rank(weight, 270, scales.square())
    values = torch.linalg.svdvals(weight.double() * scales)
    best = float(values[270:].norm() / values.norm())
    assert fit.relative_error == pytest.approx(best, rel=1e-6)
    assert relative_rms(fit.to_dense() * scales, weight * scales) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("shape", [(40, 61), (61, 40)])
def test_low_rank_weighs_what_the_inputs_are(shape: tuple[int, int]) -> None:
    weight, inputs = torch.randn(shape), correlated(300, shape[1])
    moment = moments(inputs)
    fits = [fit_low_rank(weight, 10, m) for m in (None, moment.diagonal(), moment)]
    plain, diagonal, full = (output_error(weight, fit.to_dense(), inputs) for fit in fits)
    assert full < diagonal < plain
    assert fits[2].relative_error == pytest.approx(full, rel=1e-3)
    singular = inputs[:5]  # fewer samples than features
    exact = fit_low_rank(weight, 5, moments(singular))
    assert output_error(weight, exact.to_dense(), singular) < 100 * ROUNDING


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("(m, n), not empty, floating and finite", (torch.ones(8), 1)),
        ("(m, n), not empty, floating and finite", (torch.ones(8, 0), 1)),
        ("(m, n), not empty, floating and finite", (torch.full((8, 8), torch.inf), 1)),
        ("rank is between 1 and 8, not 9", (torch.ones(8, 10), 9)),
        ("second_moment is (10,) or (10, 10)", (torch.ones(8, 10), 2, torch.ones(8))),
    ],
)
def test_low_rank_refusals(message: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(PlanError) as raised:
        fit_low_rank(*args)
    assert message in str(raised.value)
