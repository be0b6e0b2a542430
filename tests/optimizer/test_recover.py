"""Recovery: training what a rewrite brought in, and nothing else."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.capture import Call
from fxpress.errors import PlanError
from fxpress.recover import RecoverConfig, Recovery, distill
from fxpress.testing import BITWISE, assert_equivalent


def first(model: nn.Sequential) -> nn.Linear:
    """Its first map."""
    found = model[0]
    assert isinstance(found, nn.Linear)
    return found


def wide(seed: int = 0) -> nn.Sequential:
    """A model whose first map has rank 60 and a little noise."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 64)).eval()
    with torch.no_grad():
        low = torch.randn(1024, 60) @ torch.randn(60, 256) / 60
        first(model).weight.copy_(low + 0.002 * torch.randn(1024, 256))
    return model


def calls(count: int = 20) -> list[Call]:
    """Inputs of 24 dimensions."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(24, 256, generator=generator) / 5
    return [((torch.randn(32, 24, generator=generator) @ base,), {}) for _ in range(count)]


def damaged(model: nn.Sequential) -> nn.Sequential:
    """A copy whose first weight was shrunk."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        first(other).weight.mul_(0.5)
    return other


def train(model: nn.Sequential, candidate: nn.Sequential, **settings: float) -> Recovery:
    """Train the first weight of the candidate."""
    wish = RecoverConfig(**{"seconds": 1e9, "steps": 60, **settings})  # type: ignore[arg-type]
    return distill(model, candidate, [first(candidate).weight], calls(), wish, seed=3)


def test_it_brings_the_loss_down_and_touches_nothing_else() -> None:
    model = wide()
    candidate, kept = damaged(model), copy.deepcopy(model)
    bias = first(candidate).bias.clone()
    recovery = train(model, candidate)
    best = min(loss for _, loss in recovery.checks)
    assert best < recovery.checks[0][1] / 5
    assert torch.equal(first(candidate).bias, bias)
    assert all(p.grad is None for m in (model, candidate) for p in m.parameters())
    assert_equivalent(model, kept, calls(1)[0][0], exactness=BITWISE)


def test_the_same_seed_gives_the_same_tensors() -> None:
    model = wide()
    one, two = damaged(model), damaged(model)
    assert train(model, one).losses == train(model, two).losses
    assert torch.equal(first(one).weight, first(two).weight)


@pytest.mark.parametrize("room", [1 << 30, 0])
def test_the_original_answers_each_batch_once_where_its_answers_fit(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide()
    losses = train(model, damaged(model), steps=12, check_every=6).losses
    answered: list[int] = []
    model.register_forward_hook(lambda _, args, output: answered.append(args[0].data_ptr()))
    monkeypatch.setattr("fxpress.quality._CACHE_BYTES", room)
    candidate = damaged(wide())
    assert train(model, candidate, steps=12, check_every=6).losses == losses
    looks = 4  # before, twice in 12 steps, and after: at 4 of the 20 batches each
    assert len(answered) == (len(set(answered)) if room else 12 + 4 * looks + 1)


def test_half_precision_trains_on_float32_copies() -> None:
    model = wide().bfloat16()
    data = [((call[0][0].bfloat16(),), call[1]) for call in calls()]
    candidate = damaged(model)
    settings = RecoverConfig(seconds=1e9, steps=100)
    recovery = distill(model, candidate, [first(candidate).weight], data, settings)
    assert min(loss for _, loss in recovery.checks) < recovery.checks[0][1] / 5


def test_it_stops_when_nothing_improves() -> None:
    model = wide()
    recovery = train(model, copy.deepcopy(model), steps=1000, check_every=2, patience=2)
    assert recovery.stopped == "no more improvement"
    assert (recovery.best, len(recovery.losses)) == (0, 4)


@pytest.mark.parametrize(
    ("tick", "reason"), [(8.0, "given up: a step takes about"), (0.4, "30 s are over")]
)
def test_time_is_capped(tick: float, reason: str) -> None:
    model = wide()
    candidate, ticks = damaged(model), itertools.count(0.0, tick)
    weight = first(candidate).weight
    recovery = distill(
        model, candidate, [weight], calls(), RecoverConfig(), clock=lambda: next(ticks)
    )
    assert recovery.stopped.startswith(reason)


def factored(**config: object) -> fxpress.OptimizedModule:
    """One stated form, which misses the budget until it is recovered."""
    wish = {"factor-vvma": {"rank": 24}, "*2": {"enable": False}, **config}
    return fxpress.optimize(
        wide(), [c[0] for c in calls(40)], config=wish, judge="modelled", max_divergence=0.35
    )


def test_a_run_recovers_what_missed_the_budget_and_its_plan_holds_the_result() -> None:
    settings = {"seconds": 1e9, "steps": 150, "reach": 100}
    o = factored(recover=settings)
    record = o.passes["factor-vvma"]
    assert [r.site for r in record.rewrites] == ["0"]
    tried = o.report.as_dict()["attempts"]["factor-vvma"]
    assert {a["strength"]: a["holds"] for a in tried} == {
        "the stated forms": False,
        "the stated forms, recovered": True,
    }
    assert record.recovery
    assert record.recovery["checks"][0][1] > 3 * record.recovery["checks"][-1][1]
    assert "recovery of the stated forms: loss" in str(o.report)
    again = fxpress.optimize(wide(), None, plan=fxpress.Plan.from_json(o.plan.to_json()))
    assert_equivalent(again, o, calls(1)[0][0], exactness=BITWISE)
    assert o.original
    assert_equivalent(o.original, wide(), calls(1)[0][0], exactness=BITWISE)


def test_recovery_can_be_left_out() -> None:
    o = factored(recover=False)
    assert o.passes["factor-vvma"].recovery is None
    assert not o.report.as_dict()["changed"]


@pytest.mark.parametrize("wish", [{"steps": -1}, {"stpes": 3}, "often"])
def test_bad_settings_are_refused(wish: object) -> None:
    with pytest.raises(PlanError, match="recover"):
        factored(recover=wish)


def test_a_recovery_that_cannot_be_done_in_time_is_not_begun(tmp_path: Path) -> None:
    o = factored(recover={"seconds": 1e-9, "reach": 100})
    recovery = o.passes["factor-vvma"].recovery
    assert recovery
    assert not recovery["losses"]
    assert "recovery of the stated forms: given up: a step takes about" in str(o.report)
    assert "given up" in o.report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
