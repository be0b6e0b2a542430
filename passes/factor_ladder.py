"""Which form each linear map takes: one stated form, or a ladder of ever cheaper choices.

A rung of the ladder is a share of the dense cost of all maps. Within it the forms are chosen
together: at one price per unit of cost every map takes the form of least squared relative error
plus price times cost, so that cost is saved where it loses least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxpress.cost import Hardware
from fxpress.passes.factor_forms import (
    Form,
    Place,
    candidates,
    dense_cost,
    fit,
    fit_layer,
    frontier,
    predicted_errors,
)
from fxpress.passes.factor_settings import FactorVvmaConfig
from fxpress.passes.input_moments import InputMoment
from fxpress.passes.sites import LinearSite
from fxpress.planning import Decisions, PlanContext, Proposal
from fxpress.profile import profile
from fxpress.program import Program
from fxpress.rewrite import Decline

__all__ = ["propose_forms"]

_LADDER = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # shares of the dense cost


@dataclass
class _Map:
    """A linear map with the forms that are cheaper than it is.

    Attributes:
        site: where it is.
        config: settings there.
        place: what its cost depends on.
        weight: (m, n).
        forms: the forms in question.
        moment: of its inputs, once profiled.
    """

    site: LinearSite
    config: FactorVvmaConfig
    place: Place
    weight: Tensor
    forms: list[Form]
    moment: Tensor | None = None


@dataclass(frozen=True)
class _Option:
    """A form of one map (None: as it is), its cost and its squared relative error."""

    form: Form | None
    cost: float
    error: float


def propose_forms(
    ctx: PlanContext,
    sites: Sequence[tuple[Program, LinearSite]],
    configs: Mapping[str, FactorVvmaConfig],
    hardware: Hardware,
) -> list[Proposal]:
    """One proposal of the stated forms, or one per rung of the ladder, strongest first.

    Sites that no form in question makes cheaper are declined, with the arithmetic.

    Args:
        ctx: its record receives the refusals; `ctx.forced` applies stated forms at any cost.
        sites: programs and their linear maps.
        configs: settings by site.
        hardware: what the model will run on.
    """
    maps = []
    for program, site in sites:
        one = _map(program, site, configs[site.name], hardware)
        if (ctx.forced and one.config.is_stated) or _keep_cheaper(one, ctx):
            maps.append(one)
    if not maps:
        return []
    _profile(ctx, maps)
    if all(one.config.is_stated for one in maps):
        return [_proposal(ctx, "the stated forms", maps, [one.forms[0] for one in maps])]
    options = {}
    with ctx.progress.step("what each form loses", len(maps)) as advance:
        for index, one in enumerate(maps):
            if len(found := _options(one, ctx)) > 1:
                options[index] = found
            advance()
    return _rungs(ctx, [maps[i] for i in options], list(options.values()))


def _map(program: Program, site: LinearSite, config: FactorVvmaConfig, hardware: Hardware) -> _Map:
    weight = site.matrix(program)
    reads = [n for n in program.graph.nodes if n.op == "get_attr" and n.target == site.weight]
    freed = sum(len(node.users) for node in reads) == 1
    place = replace(Place.of(site, weight.dtype, hardware), freed=freed)
    return _Map(site, config, place, weight, list(candidates(site.shape, config)))


def _keep_cheaper(one: _Map, ctx: PlanContext) -> bool:
    """Keep the forms that cost less than the map as it is; decline it where there are none."""
    dense = dense_cost(one.place, ctx.objective)
    costs = {form: form.cost(one.place, ctx.objective) for form in one.forms}
    one.forms = [form for form in one.forms if costs[form] < dense]
    if one.forms:
        return True
    ctx.record.declined.append(
        Decline(_refusal(one, costs, dense, ctx), one.site.node, one.site.name)
    )
    return False


def _refusal(one: _Map, costs: Mapping[Form, float], dense: float, ctx: PlanContext) -> str:
    if not costs:
        return f"a weight of {one.site.shape} is too small for any form"
    if ctx.objective == "memory" and not one.place.freed:
        return "something else reads the weight: a factored copy would add bytes, not save any"
    cheapest = min(costs, key=costs.__getitem__)
    arithmetic = cheapest.arithmetic(one.site.shape)
    unit, scale = ("bytes", 1.0) if ctx.objective == "memory" else ("us", 1e3)
    figures = f"{scale * costs[cheapest]:.4g} {unit} against {scale * dense:.4g}"
    return f"not cheaper: {cheapest}, {arithmetic}; modelled {figures} on {one.place.hardware.name}"


def _profile(ctx: PlanContext, maps: Sequence[_Map]) -> None:
    """Second moments of the inputs and the number of vectors, from one run over the calls."""
    observers = [(one, InputMoment(one.site, one.config.moment == "full")) for one in maps]
    profile(ctx.captured, ctx.calls, [observer for _, observer in observers], ctx.progress)
    for one, observer in observers:
        one.moment = None if one.config.moment == "none" else observer.mean()
        one.place = replace(one.place, tokens=observer.tokens)


def _options(one: _Map, ctx: PlanContext) -> list[_Option]:
    """The map as it is, and the forms that no other beats in both cost and error.

    Where every form loses too much, the map is declined with the least that any loses.
    """
    errors = predicted_errors(one.weight, one.moment, one.forms)
    best = min(one.forms, key=errors.__getitem__)
    forms = [form for form in one.forms if errors[form] <= one.config.max_error**2]
    if not forms:
        lost, allowed = max(errors[best], 0.0) ** 0.5, one.config.max_error
        reason = f"loses too much: {best} has relative error {lost:.2f}, above {allowed:g}"
        ctx.record.declined.append(Decline(reason, one.site.node, one.site.name))
    costs = [form.cost(one.place, ctx.objective) for form in forms]
    kept = frontier(forms, costs, [errors[form] for form in forms])
    found = [_Option(forms[i], costs[i], errors[forms[i]]) for i in kept]
    return [_Option(None, dense_cost(one.place, ctx.objective), 0.0), *found]


def _at_price(options: Sequence[Sequence[_Option]], price: float) -> list[_Option]:
    return [min(site, key=lambda o: o.error + price * o.cost) for site in options]


def _rungs(
    ctx: PlanContext, maps: Sequence[_Map], options: Sequence[Sequence[_Option]]
) -> list[Proposal]:
    dense = sum(site[0].cost for site in options)
    proposals: dict[tuple[Form | None, ...], Proposal] = {}
    for share in _LADDER:
        chosen = _within(options, share * dense)
        forms = tuple(option.form for option in chosen)
        if any(forms) and forms not in proposals:
            reached = sum(option.cost for option in chosen) / dense
            unit = "bytes" if ctx.objective == "memory" else "cost"
            strength = f"{100 * reached:.0f} % of the dense matmul {unit}"
            proposals[forms] = _proposal(ctx, strength, maps, forms)
    return list(proposals.values())


def _within(options: Sequence[Sequence[_Option]], budget: float) -> list[_Option]:
    """The choice at the lowest price that costs no more than the budget, or the cheapest of all."""
    low, high = -40.0, 40.0  # logarithms of prices; at the ends nothing and everything is saved
    for _ in range(50):
        middle = (low + high) / 2
        cost = sum(o.cost for o in _at_price(options, math.exp(middle)))
        low, high = (middle, high) if cost > budget else (low, middle)
    return _at_price(options, math.exp(high))


def _proposal(
    ctx: PlanContext, strength: str, maps: Sequence[_Map], forms: Sequence[Form | None]
) -> Proposal:
    def decide() -> Decisions:
        chosen = [(one, form) for one, form in zip(maps, forms, strict=True) if form is not None]
        decisions: Decisions = {}
        with ctx.progress.step(f"fit: {strength}", len(chosen)) as advance, torch.no_grad():
            for group in _layers(chosen):
                fits = _fit(group)
                decisions |= {
                    one.site.name: done for (one, _), done in zip(group, fits, strict=True)
                }
                for _ in group:
                    advance()
        return {one.site.name: decisions[one.site.name] for one, _ in chosen}

    return Proposal(strength, decide)


def _fit(group: Sequence[tuple[_Map, Form]]) -> list[dict[str, Any]]:
    (first, form), *others = group
    if others:
        return fit_layer([one.weight for one, _ in group], form, first.moment)
    return [fit(first.weight, form, first.moment)]


def _layers(chosen: Sequence[tuple[_Map, Form]]) -> list[list[tuple[_Map, Form]]]:
    """Maps that share cores, share="layer": those of one input and one form, of whole tiles."""
    groups: dict[Any, list[tuple[_Map, Form]]] = {}
    for one, form in chosen:
        whole = one.site.shape[0] % form.block == 0 if form.share == "layer" else False
        together = whole and one.site.experts is None
        key = (one.site.source, one.site.cut, form) if together else one.site.name
        groups.setdefault(key, []).append((one, form))
    return list(groups.values())
