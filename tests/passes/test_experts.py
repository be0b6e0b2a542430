"""Products by letters: one map for several inputs and outputs, a bank where experts differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import DrawFn
from torch import Tensor, nn

import fxpress
from fxpress.capture import capture
from fxpress.cost import hardware_of
from fxpress.passes.factor_forms import Form, Place, dense_cost, fit, predicted_errors
from fxpress.passes.factor_settings import FactorVvmaConfig
from fxpress.passes.factor_vvma import FactorVvma
from fxpress.passes.normalize_linear import NormalizeLinear
from fxpress.passes.sites import LinearSite, linear_sites
from fxpress.program import Program
from fxpress.rewrite import PassContext
from fxpress.testing import BITWISE, assert_equivalent
from fxpress.verify import verify
from tests.passes.test_laws import Gradients, gradients_of
from tests.passes.test_normalize_linear import Apply, Case

aten = torch.ops.aten

EXPERTS, TOKENS, N, M = 3, 5, 6, 4

EXACT = (Form(rank=4), Form(2, 2), Form(4, 4, share="row"), Form(2, 2, share="layer"))


def normalized(model: nn.Module, *args: Any, **dynamic: Any) -> Program:
    program = capture(model, args, **dynamic)
    before = program.copy()
    record = NormalizeLinear().run(program, PassContext())
    verify(program, "normalize-linear", before)
    assert not record.declined
    assert not NormalizeLinear().run(program, PassContext()).rewrites
    return program


def factored(program: Program, form: Form) -> Program:
    """Every site in a form that loses nothing at its sizes."""
    decisions = {s.name: fit(s.matrix(program).detach(), form, None) for s in linear_sites(program)}
    before = program.copy()
    record = FactorVvma().run(program, PassContext(FactorVvmaConfig(), decisions))
    verify(program, "factor-vvma", before)
    assert not record.declined
    assert {rewrite.site for rewrite in record.rewrites} == set(decisions)
    return program


# By letters --------------------------------------------------------------------------------------

SIZES = dict(zip("abcdefgh", (2, 3, 4, 2, 3, 2, 4, 3), strict=True))


@dataclass(frozen=True)
class Drawn:
    """An einsum of an input and a weight, its letters by their kind, and the order of each."""

    experts: str
    inner: str
    outer: str
    axes: str
    rows: str
    out: str
    is_left: bool
    seed: int

    @property
    def equation(self) -> str:
        given = (self.rows, self.axes) if self.is_left else (self.axes, self.rows)
        return f"{','.join(given)}->{self.out}"

    def build(self) -> tuple[nn.Module, tuple[Tensor]]:
        torch.manual_seed(self.seed)

        def call(x: Tensor, w: Tensor) -> Tensor:
            return torch.einsum(self.equation, *((w, x) if self.is_left else (x, w)))

        axes, rows = (tuple(SIZES[letter] for letter in part) for part in (self.axes, self.rows))
        return Apply(call, rows), (torch.randn(axes),)


@st.composite
def contractions(draw: DrawFn) -> Drawn:
    """What may be one map or a bank of maps: each kind of letters in a row, and shuffled."""
    counts = (draw(st.integers(0, 1)), *(draw(st.integers(1, 2)) for _ in range(3)))
    letters = iter(SIZES)
    experts, tokens, inner, outer = ("".join(next(letters) for _ in range(n)) for n in counts)
    together = draw(st.booleans()) or bool(experts)
    parts = draw(st.permutations([experts, inner, outer]))
    rows = "".join(parts if together else draw(st.permutations(inner + outer)))
    axes, out = (
        draw(st.permutations(p)) for p in (experts + tokens + inner, experts + tokens + outer)
    )
    is_left, seed = draw(st.booleans()), draw(st.integers(0, 3))
    return Drawn(experts, inner, outer, "".join(axes), rows, "".join(out), is_left, seed)


@given(drawn=contractions())
@settings(
    max_examples=30,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
def test_every_contraction_is_recognized_and_equal(drawn: Drawn) -> None:
    model, call = drawn.build()
    program = capture(model, call)
    before = program.copy()
    record = NormalizeLinear().run(program, PassContext())
    verify(program, "normalize-linear", before)
    assert_equivalent(program, model, call)
    assert_equivalent(gradients_of(program, model), Gradients(model), call)
    sites = linear_sites(program)
    if not sites:  # inputs, or outputs, do not lie together in memory
        assert [d.reason for d in record.declined] == [_refusal(drawn)]
        return
    (site,) = sites
    by_expert = bool(drawn.experts) or not record.rewrites
    assert site.kind == ("experts" if by_expert else "linear")
    wanted = math.prod(SIZES[letter] for letter in drawn.inner)
    assert (site.experts or 1) * site.shape[0] * wanted == next(model.parameters()).numel()
    assert site.shape[1] == wanted
    if by_expert:
        vectors = site.vectors(call[0])
        assert vectors.shape == (site.experts, site.tokens, site.shape[1])
    rank = Form(rank=min(site.shape))
    assert_equivalent(factored(program, rank), model, call)


def _refusal(drawn: Drawn) -> str:
    return f"the einsum {drawn.axes},{drawn.rows}->{drawn.out} is no product with a matrix"


LETTERS: dict[str, Case] = {
    "heads of a projection": (
        lambda x, w: torch.einsum("btn,nhd->bthd", x, w),
        ((N, 2, M),),
        (2, TOKENS, N),
    ),
    "heads first": (
        lambda x, w: torch.einsum("btn,hnd->bhtd", x, w.transpose(0, 1)),
        ((N, 2, M),),
        (2, TOKENS, N),
    ),
    "what heads are projected to": (
        lambda x, w: torch.einsum("bthd,hdm->btm", x, w),
        ((2, 3, M),),
        (2, TOKENS, 2, 3),
    ),
    "implicit output": (lambda x, w: torch.einsum("ba,ac", x, w), ((N, M),), (TOKENS, N)),
    "any dimensions": (
        lambda x, w: torch.einsum("...n,nhd->...hd", x, w),
        ((N, 2, M),),
        (2, TOKENS, N),
    ),
    "tensordot over two": (
        lambda x, w: torch.tensordot(x, w, dims=2),
        ((2, 3, M),),
        (TOKENS, 2, 3),
    ),
}


@pytest.mark.parametrize("name", LETTERS)
def test_several_letters_are_one_map(name: str) -> None:
    function, shapes, size = LETTERS[name]
    model, x = Apply(function, *shapes), torch.randn(size)
    program = normalized(model, x)
    assert [site.kind for site in linear_sites(program)] == ["linear"]
    assert not {n for n in program.graph.nodes if "einsum" in str(n.target)}
    assert_equivalent(program, model, (x,))
    assert_equivalent(gradients_of(program, model), Gradients(model), (x,))


# Banks -------------------------------------------------------------------------------------------


def routed(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Experts in a batch, as transformers has them: what each is given, weighted."""
    batch = x.repeat(EXPERTS, 1).view(EXPERTS, -1, N) * x.softmax(-1)[:, :EXPERTS].t()[..., None]
    return torch.bmm(torch.relu(torch.bmm(batch, up)), down).sum(0)


def biased(x: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x.expand(EXPERTS, TOKENS, N), up)


BANKS: dict[str, Case] = {
    "bmm": (torch.bmm, ((EXPERTS, N, M),), (EXPERTS, TOKENS, N)),
    "matmul": (torch.matmul, ((EXPERTS, N, M),), (2, EXPERTS, TOKENS, N)),
    "matmul, turned": (
        lambda x, w: x @ w.transpose(1, 2),
        ((EXPERTS, M, N),),
        (EXPERTS, TOKENS, N),
    ),
    "from the left": (lambda x, w: w @ x, ((EXPERTS, M, N),), (EXPERTS, N, TOKENS)),
    "baddbmm": (biased, ((EXPERTS, N, M), (EXPERTS, M)), (TOKENS, N)),
    "einsum": (
        lambda x, w: torch.einsum("ten,enm->tem", x, w),
        ((EXPERTS, N, M),),
        (TOKENS, EXPERTS, N),
    ),
    "einsum, to all": (
        lambda x, w: torch.einsum("btn,enm->btem", x, w),
        ((EXPERTS, N, M),),
        (2, TOKENS, N),
    ),
    "einsum, capacity": (
        lambda x, w: torch.einsum("gecn,enm->gecm", x, w),
        ((EXPERTS, N, M),),
        (2, EXPERTS, TOKENS, N),
    ),
    "one behind the other": (
        lambda x, up, down: torch.bmm(torch.bmm(x, up), down),
        ((EXPERTS, N, M), (EXPERTS, M, N)),
        (EXPERTS, TOKENS, N),
    ),
    "experts in a batch": (routed, ((EXPERTS, N, M), (EXPERTS, M, N)), (TOKENS, N)),
}


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_of_experts_is_a_site_that_can_be_factored(name: str) -> None:
    function, shapes, size = BANKS[name]
    model, x = Apply(function, *shapes), torch.randn(size)
    program = normalized(model, x)
    sites = linear_sites(program)
    assert {(site.kind, site.experts) for site in sites} == {("experts", EXPERTS)}
    assert [site.name for site in sites] == ["root", "root#2"][: len(sites)]
    assert str(program) == str(capture(model, (x,)))
    for form in EXACT:
        other = factored(program.copy(), form)
        assert not linear_sites(other)
        assert_equivalent(other, model, (x,))


def test_names_stay_when_one_bank_is_factored() -> None:
    function, shapes, size = BANKS["experts in a batch"]
    program = normalized(Apply(function, *shapes), torch.randn(size))
    first, second = linear_sites(program)
    decision = fit(first.matrix(program).detach(), EXACT[0], None)
    FactorVvma().run(program, PassContext(FactorVvmaConfig(), {first.name: decision}))
    assert [site.name for site in linear_sites(program)] == [second.name]


def test_a_dynamic_number_of_tokens() -> None:
    model, x = Apply(routed, (EXPERTS, N, M), (EXPERTS, M, N)), torch.randn(TOKENS, N)
    sizes = {"x": {0: torch.export.Dim("t", min=2, max=99)}}
    program = normalized(model, x, dynamic_shapes=sizes)
    factored(program, Form(2, 2))
    assert_equivalent(program, model, (torch.randn(17, N),))


@pytest.mark.parametrize(
    ("reason", "function", "shapes", "size"),
    [
        (
            "one input is broadcast to a batch of matrices",
            torch.matmul,
            ((EXPERTS, N, M),),
            (1, TOKENS, N),
        ),
        (
            "baddbmm scales its terms by beta and alpha",
            lambda x, w: torch.baddbmm(x[:, :, :M], x, w, alpha=0.5),
            ((EXPERTS, N, M),),
            (EXPERTS, TOKENS, N),
        ),
        (
            "the weight has a matrix for each pair of several dimensions",
            torch.matmul,
            ((2, EXPERTS, N, M),),
            (2, EXPERTS, TOKENS, N),
        ),
        (
            "the weight is computed by aten.exp",
            lambda x, w: torch.bmm(x, w.exp()),
            ((EXPERTS, N, M),),
            (EXPERTS, TOKENS, N),
        ),
        ("the weight is a batch of matrices", torch.matmul, ((EXPERTS, N, M),), (TOKENS, N)),
    ],
)
def test_refusals(reason: str, function: Any, shapes: Any, size: Any) -> None:
    model, x = Apply(function, *shapes), torch.randn(size)
    program = capture(model, (x,))
    record = NormalizeLinear().run(program, PassContext())
    assert [decline.reason for decline in record.declined] == [reason]
    assert not linear_sites(program)


def test_a_grouped_product_is_declined() -> None:
    def grouped(x: Tensor, w: Tensor) -> Tensor:
        ends = (x[:EXPERTS, 0] > -9).cumsum(0).int()
        return torch._grouped_mm(x, w, offs=ends)

    model, x = Apply(grouped, (EXPERTS, 8, 8)).bfloat16(), torch.randn(TOKENS, 8).bfloat16()
    record = NormalizeLinear().run(capture(model, (x,)), PassContext())
    reason = "each expert maps as many tokens as a call sends it (grouped product)"
    assert [decline.reason for decline in record.declined] == [reason]


# What a bank costs, loses and learns -------------------------------------------------------------


def site_of(name: str) -> tuple[LinearSite, Program]:
    function, shapes, size = BANKS[name]
    program = normalized(Apply(function, *shapes), torch.randn(size))
    return linear_sites(program)[0], program


def test_a_bank_costs_what_its_experts_do_but_for_the_calls() -> None:
    hardware, form = hardware_of(torch.device("cpu")), Form(rank=2)
    site, _ = site_of("bmm")
    bank = Place.of(site, torch.float32, hardware)
    one = Place(site.shape, site.tokens, torch.float32, hardware)
    for cost in (form.cost, dense_cost):
        of: Callable[[Place, str], float] = cost
        assert of(bank, "memory") == EXPERTS * of(one, "memory")
        assert of(one, "latency") < of(bank, "latency") < EXPERTS * of(one, "latency")


@pytest.mark.parametrize("form", [Form(2, 1), Form(rank=2), Form(2, 1, share="row")], ids=str)
@pytest.mark.parametrize("moments", [None, (EXPERTS, N), (EXPERTS, N, N)], ids=str)
def test_what_a_bank_loses_is_predicted(form: Form, moments: Any) -> None:
    torch.manual_seed(0)
    weight, moment = torch.randn(EXPERTS, M, N), None
    if moments is not None:
        x = torch.randn(EXPERTS, 50, N) * torch.arange(1.0, 1 + N)
        moment = x.mT @ x / 50 if len(moments) == 3 else x.square().mean(1)
    found = fit(weight, form, moment)["error"]
    if moment is not None and moment.dim() == 3:
        diagonal = torch.stack([m.diag() for m in moment.diagonal(dim1=1, dim2=2)])
        found = fit(weight, form, diagonal)["error"]
    predicted = predicted_errors(weight, moment, [form])[form] ** 0.5
    assert found == pytest.approx(predicted, abs=1e-5)


def test_a_run_factors_a_bank_learns_its_inputs_and_is_applied_again(tmp_path: Any) -> None:
    torch.manual_seed(0)
    function, shapes = routed, ((EXPERTS, N, M), (EXPERTS, M, N))
    model = Apply(function, *shapes)
    batches = [torch.randn(TOKENS, N) for _ in range(4)]
    found = fxpress.explain(model, (batches[0],)).matmuls
    assert [(s.kind, s.recognised, s.shape) for s in found] == [
        ("experts", True, (EXPERTS, M, N)),
        ("experts", True, (EXPERTS, N, M)),
    ]
    wish = {"factor-vvma": {"rank": 2, "moment": "full"}, "recover": False}
    o = fxpress.optimize(model, batches, config=wish, judge="off")
    assert [r.site for r in o.passes["factor-vvma"].rewrites] == ["root", "root#2"]
    entry = o.passes["factor-vvma"].ledger["root"]
    assert entry["parameters"] == {"before": 72, "after": 60}
    again = fxpress.optimize(model, None, plan=fxpress.Plan.from_json(o.plan.to_json()))
    loaded = fxpress.load(o.save(tmp_path / "m"))
    for other in (again, loaded):
        assert_equivalent(other, o, (batches[0],), exactness=BITWISE)
    (program,) = o.captured.programs.values()
    trained = FactorVvma().trainable(program)
    assert set(trained) == {(s, k) for s in ("root", "root#2") for k in ("down", "up")}
    assert_equivalent(o, by_hand(o), (batches[0],))


def by_hand(o: fxpress.OptimizedModule) -> nn.Module:
    """The model with the weights that the plan's factors stand for."""
    decisions = o.plan.decisions["factor-vvma"]
    model = Apply(routed, (EXPERTS, N, M), (EXPERTS, M, N))
    for site, weight in zip(("root", "root#2"), model.parameters(), strict=True):
        dense = decisions[site]["up"] @ decisions[site]["down"]
        weight.data = dense.mT.contiguous()
    return model
