"""The run and its judge, on a pass that only scales products: ladder, roll-backs, cap, fuel."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from models import batches, stack
from scaling import ScaleLinear, offer, scaled
from torch import Tensor, nn

import fxpress
from fxpress.capture import Call
from fxpress.errors import PassError
from fxpress.judge import Judge
from fxpress.pipeline import Pipeline, resolve_order
from fxpress.regions import capture_model
from fxpress.rewrite import Pass
from fxpress.site_timing import time_sites
from fxpress.testing import BITWISE, assert_equivalent
from fxpress.timing import Timings, interleave

ONLY = {"prune-attention": False}
CALLS: list[Call] = [((x,), {}) for x in batches()]


def stub_timing(patch: pytest.MonkeyPatch, results: Iterable[Mapping[str, float]]) -> list[Any]:
    """Every timing gives the next of some milliseconds by name; 10 where a name is missing."""
    asked: list[Any] = []
    following = iter(results)

    def interleave(callables: Mapping[str, Callable[[], Any]], **_options: Any) -> Timings:
        asked.append(list(callables))
        figures = next(following)
        return Timings({name: (figures.get(name, 10.0),) * 4 for name in callables})

    patch.setattr("fxpress.judge.interleave", interleave)
    patch.setattr("fxpress.site_timing.interleave", interleave)
    return asked


def by_hand(model: nn.Module, **factors: float) -> nn.Module:
    """The model with some products scaled, without a graph."""

    def hook(factor: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _module, _args, output: output * factor

    for name, factor in factors.items():
        model.get_submodule(f"{name[-1]}.{name[:-1]}").register_forward_hook(hook(factor))
    return model


def row(o: fxpress.OptimizedModule, site: str) -> dict[str, Any]:
    """The report's row of a site of the scaling pass."""
    rows = o.report.as_dict()["sites"]
    return next(r for r in rows if (r["site"], r["pass"]) == (site, "scale-linear"))


def test_the_strongest_proposal_that_holds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = [scaled(out0=factor) for factor in (9.0, 5.0, 1.02, 1.01)]
    offer(monkeypatch, *ladder)
    stub_timing(monkeypatch, itertools.repeat({"after": 1.0, "optimized": 1.0}))
    o = fxpress.optimize(stack(), batches(), config=ONLY, max_divergence=0.1)
    assert o.plan.decisions["scale-linear"] == ladder[2]
    assert_equivalent(o, by_hand(stack(), out0=1.02).eval(), (batches(1)[0],))
    tried = o.report.as_dict()["attempts"]["scale-linear"]
    assert {a["strength"]: a["holds"] for a in tried}["rung 2"]
    assert "over budget" in str(o.report)


@pytest.mark.parametrize(
    ("ladder", "reason"),
    [
        ([9.0, 1.0], "no proposal keeps the quality budget"),
        ([1.0], "every proposal leaves all sites as they are"),
    ],
)
def test_a_proposal_that_decides_on_no_site_is_no_success(
    monkeypatch: pytest.MonkeyPatch, ladder: list[float], reason: str
) -> None:
    offer(monkeypatch, *(scaled(out0=f) if f != 1.0 else scaled() for f in ladder))
    o = fxpress.optimize(stack(), batches(), config=ONLY, max_divergence=0.1)
    (rolled,) = o.passes["scale-linear"].rolled_back
    assert rolled.reason == reason
    tried = o.report.as_dict()["attempts"]["scale-linear"]
    assert [a["outcome"] for a in tried] == ["changes nothing", "over budget"][: len(ladder)]
    assert "drop 0, changes nothing" in str(o.report)


def test_a_single_proposal_is_cut_down_to_its_harmless_sites(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, scaled(out0=1.001, out1=1.002, qkv1=90.0))
    stub_timing(monkeypatch, itertools.repeat({"after": 1.0, "optimized": 1.0}))
    o = fxpress.optimize(stack(), batches(), config=ONLY, max_divergence=0.05)
    assert set(o.plan.decisions["scale-linear"]) == {"0.out", "1.out"}


def test_a_site_that_is_not_faster_is_taken_back_with_both_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, scaled(out0=1.01, out1=1.02))
    sites = [{"before": 2.0, "after": 3.0}, {"before": 4.0, "after": 1.0}]
    asked = stub_timing(monkeypatch, [*sites, {"optimized": 5.0}])
    o = fxpress.optimize(stack(), batches(), config=ONLY, max_divergence=0.5)
    assert asked == [["before", "after"]] * 2 + [["original", "dense", "optimized"]]
    (rolled,) = o.passes["scale-linear"].rolled_back
    assert (rolled.site, rolled.reason) == ("0.out", "not faster in isolation")
    assert rolled.figures == {"ms_before": 2.0, "ms_after": 3.0}
    assert row(o, "0.out")["status"] == "rolled back"
    assert row(o, "1.out") | {"status": "rewritten", "ms_after": 1.0} == row(o, "1.out")
    assert "rolled back 0.out: not faster in isolation (ms_before 2, ms_after 3)" in str(o.report)
    assert_equivalent(o, by_hand(stack(), out1=1.02).eval(), (batches(1)[0],))
    assert o.report.as_dict()["latency_ms"]["speedup"] == 2.0


def test_a_pass_that_does_not_pay_is_taken_back_with_both_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, scaled(out0=1.01))
    whole = {"original": 20.0, "dense": 10.0, "optimized": 15.0}
    stub_timing(monkeypatch, [{"after": 1.0}, whole])
    model = stack().eval()
    o = fxpress.optimize(model, batches(), config=ONLY, max_divergence=0.5)
    (rolled,) = o.passes["scale-linear"].rolled_back
    assert rolled.reason == "the whole model is not measurably faster than in dense form"
    assert rolled.figures == {"ms_before": 10.0, "ms_after": 15.0}
    assert row(o, "0.out")["reason"] == rolled.reason
    assert "nothing was changed" in str(o.report)
    assert o.report.as_dict()["baseline"]["name"].startswith("its best dense form")
    assert_equivalent(o, model, (batches(1)[0],))


def test_the_cost_model_takes_back_what_is_not_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, scaled(out0=0.99, out1=1.01))
    o = fxpress.optimize(stack(), batches(), config=ONLY, judge="modelled", max_divergence=0.5)
    (rolled,) = o.passes["scale-linear"].rolled_back
    assert (rolled.site, rolled.figures) == ("1.out", {"ms_before": 1.0, "ms_after": 1.01})


def test_a_later_pass_has_to_beat_what_earlier_ones_made(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, scaled(out0=1.01))
    whole = [{"optimized": 4.0}, {"so far": 4.0, "optimized": 5.0}]
    site = {"after": 1.0}
    asked = stub_timing(monkeypatch, [site, site, whole[0], site, whole[1]])
    config = {"prune-attention": {"pruned": 0.5}}
    o = fxpress.optimize(stack(), batches(), config=config, max_divergence=10.0)
    assert asked[-1] == ["original", "dense", "so far", "optimized"]
    assert o.passes["prune-attention"].rewrites
    (rolled,) = o.passes["scale-linear"].rolled_back
    assert rolled.figures == {"ms_before": 4.0, "ms_after": 5.0}
    assert o.report.as_dict()["latency_ms"]["after"] == 4.0


def test_a_plan_of_two_passes_is_applied_again_and_taken_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, scaled(out0=1.5))
    model, x = stack().eval(), batches(1)[0]
    config = {"prune-attention": {"pruned": 0.5}}
    o = fxpress.optimize(model, batches(), config=config, judge="off")
    assert set(o.plan.decisions) == {"prune-attention", "scale-linear"}
    again = fxpress.optimize(model, None, plan=fxpress.Plan.from_json(o.plan.to_json()))
    assert_equivalent(again, o, (x,), exactness=BITWISE)
    scaling = o.without("prune-attention")
    assert_equivalent(scaling, by_hand(stack(), out0=1.5).eval(), (x,))


def test_a_pass_that_gains_nothing_for_the_objective_is_left_out_and_named() -> None:
    config = {"factor-vvma": False}
    o = fxpress.optimize(stack(), batches(), objective="memory", judge="modelled", config=config)
    assert not o.report.as_dict()["changed"]
    assert "prune-attention saves no memory" in str(o.report)


def test_times_of_a_busy_machine_are_said_to_be_such(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, scaled(out0=1.01, out1=1.02))
    busy = Timings({"before": (2.0,) * 4, "after": (3.0,) * 4}, had_core=0.42)
    monkeypatch.setattr("fxpress.site_timing.interleave", lambda *_, **__: busy)
    o = fxpress.optimize(stack(), batches(), config=ONLY, max_divergence=0.5)
    (note,) = [n for n in o.report.as_dict()["notes"] if "busy" in n]
    assert "had a core for 42% of it" in note


def test_a_thread_that_has_no_core_is_noticed() -> None:
    assert interleave({"asleep": lambda: time.sleep(0.01)}, rounds=3).had_core < 0.5


def test_with_no_time_left_nothing_is_tried_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, scaled(out0=1.01))
    config = ONLY | {"judge_seconds": 1e-9}
    o = fxpress.optimize(stack(), batches(), config=config, max_divergence=0.5)
    (rolled,) = o.passes["scale-linear"].rolled_back
    assert rolled.reason == "there was no time to try a proposal"
    notes = o.report.as_dict()["notes"]
    assert "judge_seconds=1e-09 ran out: scale-linear" in " ".join(notes)


def test_sites_that_there_is_no_time_for_are_named() -> None:
    before = capture_model(stack().eval(), CALLS[:1])
    after = before.copy()
    decisions = scaled(out0=1.1, qkv0=1.2, out1=1.3, qkv1=1.4)
    Pipeline().run(ScaleLinear, after, decisions)
    judge = Judge("measured", None, CALLS, seconds=0.0)
    assert judge.slow_sites(before, after, list(decisions)) == []
    (note,) = judge.notes
    assert note == "judge_seconds=0 ran out: not timed in isolation: 0.out, 0.qkv, 1.out and 1 more"


def fueled(patch: pytest.MonkeyPatch, fuel: int | None = None) -> fxpress.OptimizedModule:
    """A run with the first rewrites only."""
    if fuel is not None:
        patch.setenv("FXPRESS_FUEL", str(fuel))
    return fxpress.optimize(stack().eval(), batches(), config=ONLY, judge="off")


def test_fuel_finds_the_rewrite_that_breaks_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = 1.0
    offer(monkeypatch, scaled(qkv0=sound, out0=sound, qkv1=0.0, out1=sound))
    rewrites = [r for record in fueled(monkeypatch).passes.values() for r in record.rewrites]
    x = batches(1)[0]
    expected = stack().eval()(x)

    def breaks(fuel: int) -> bool:
        return not torch.equal(fueled(monkeypatch, fuel)(x), expected)

    first = bisect.bisect_left(range(len(rewrites) + 1), True, key=breaks)
    assert rewrites[first - 1].site == "1.qkv"
    assert len(rewrites) == 4


def test_what_the_judge_tries_burns_no_fuel(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, scaled(out0=0.98), scaled(out0=0.99))
    monkeypatch.setenv("FXPRESS_FUEL", "1")
    o = fxpress.optimize(stack(), batches(), config=ONLY, judge="modelled", max_divergence=0.5)
    assert [r.site for r in o.passes["scale-linear"].rewrites] == ["0.out"]


def test_a_pass_of_the_wrong_phase_is_refused() -> None:
    class Wrong(Pass):
        name, phase = "do-wrong", "rewrite"

        def run(self, program: Any, ctx: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(PassError, match="do-wrong: a PlannedPass, and no other"):
        resolve_order([Wrong])


def test_progress_is_told_of_every_stage() -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}

    def progress(title: str, done: int, total: int | None) -> None:
        seen.setdefault(title, []).append((done, total))

    config = {"prune-attention": {"pruned": 0.5}}
    fxpress.optimize(
        stack(), batches(), config=config, judge="modelled", max_divergence=10.0, progress=progress
    )
    assert seen["profile"] == [(done, 4) for done in range(5)]
    assert seen["judge quality: 50 % pruned"] == [(0, 1), (1, 1)]


def test_sites_that_read_each_other_are_timed() -> None:
    """The second map's input is what the first map, its activation folded in, gave."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    config = {"factor-vvma": {"block": 32, "terms": 1}}
    before, after = (
        fxpress.optimize(model, [torch.randn(2, 64)] * 2, judge="off", config=settings).captured
        for settings in ({}, config)
    )
    call: Call = ((torch.randn(2, 64),), {})
    timed = time_sites(before, after, ["0", "2"], call)
    assert {site: set(found.samples) for site, found in timed.items()} == {
        "0": {"before", "after"},
        "2": {"before", "after"},
    }
