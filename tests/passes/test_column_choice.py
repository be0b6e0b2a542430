"""Columns by effect: nested sets, measured errors, one budget, no empty row."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress.capture import Call, capture_calls
from fxpress.passes.column_choice import SINKS, ColumnErrors, ColumnRanks, choose_columns
from fxpress.passes.column_ladder import propose_columns
from fxpress.passes.pruning_settings import PruneAttentionConfig
from fxpress.passes.sites import AttentionSite, attention_sites
from fxpress.planning import PlanContext
from fxpress.profile import profile
from fxpress.progress import Progress
from fxpress.regions import CapturedModel
from fxpress.rewrite import PassRecord
from fxpress.testing import assert_equivalent

HEADS, WIDTH = 2, 4
SHARES = (0.1, 0.3, 0.6, 1.0)


class Bare(nn.Module):
    """Attention over operands as they are, (B, H, N, D)."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


def calls_of(queries: int, keys: int, seed: int = 0) -> list[Call]:
    """Two calls with scores that differ much between keys."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (tuple(2 * torch.randn(1, HEADS, n, WIDTH, generator=draw) for n in sizes), {})
        for sizes in [(queries, keys, keys)] * 2
    ]


@functools.cache
def scored(
    queries: int, keys: int, causal: bool, rows: int = 8, unit: int = 1
) -> tuple[AttentionSite, list[Call], ColumnErrors]:
    """A site with the measured errors of all its column sets."""
    calls = calls_of(queries, keys)
    program = capture_calls(Bare(causal), calls)
    captured = CapturedModel(Bare(causal), {"": program})
    (site,) = attention_sites(program)
    ranks = ColumnRanks(site, queries, keys, rows, unit)
    profile(captured, calls, [ranks], Progress())
    errors = ColumnErrors(ranks)
    profile(captured, calls, [errors], Progress())
    return site, calls, errors


CASES = pytest.mark.parametrize(
    ("queries", "keys", "causal", "unit"),
    [(24, 40, False, 1), (40, 40, True, 1), (21, 21, True, 4), (8, 30, False, 16)],
)


def tile_cost(kept: Tensor, live: Tensor) -> Tensor:
    """A gathered column costs a quarter more than a dense one, a tile two."""
    return torch.minimum(2 + 1.25 * kept, live)


@CASES
def test_sets_are_nested_and_their_masks_too(
    queries: int, keys: int, causal: bool, unit: int
) -> None:
    *_, errors = scored(queries, keys, causal, unit=unit)
    families, heads, tiles = errors.order.shape[:3]
    every_column = torch.arange(keys).expand_as(errors.order)
    assert torch.equal(errors.order.sort().values, every_column)
    for family in range(families):
        chosen = torch.full((heads, tiles), family)
        masks = [errors.mask(chosen, torch.full_like(chosen, c)) for c in range(len(errors.sizes))]
        for smaller, larger in itertools.pairwise(masks):
            own = smaller & ~larger
            assert not own.any() or (own.sum(-1) <= 1).all()  # the key of a row without another
        assert all(mask.any(-1).all() for mask in masks)
        assert not causal or all(torch.equal(mask, mask.tril()) for mask in masks)


@pytest.mark.parametrize("unit", [1, 4, 16])
def test_units_are_kept_and_dropped_together(unit: int) -> None:
    *_, errors = scored(24, 48, False, unit=unit)
    for size in errors.sizes:
        first = errors.order[..., :size]
        kept = torch.zeros_like(errors.order, dtype=torch.bool).scatter_(-1, first, value=True)
        units = kept.unflatten(-1, (-1, unit))
        assert torch.equal(units.any(-1), units.all(-1))


def test_the_window_takes_the_first_keys_and_then_the_nearest() -> None:
    *_, errors = scored(40, 40, True)
    window = errors.order[-1, 0]
    for tile, order in enumerate(window):
        first = tile * 8
        nearest = {*range(SINKS), *range(first, first + 8)}
        assert set(order[: len(nearest)].tolist()) == nearest


def test_errors_are_those_of_the_output() -> None:
    """Every fourth row of a tile of eight stands for four."""
    site, calls, errors = scored(24, 40, False)

    def by_masks() -> Tensor:
        total = torch.zeros_like(errors.errors)
        for (q, k, v), _ in calls:
            full = F.scaled_dot_product_attention(q, k, v)
            for family, cut in itertools.product(range(3), range(len(errors.sizes))):
                chosen = torch.full((HEADS, 3), family)
                mask = errors.mask(chosen, torch.full_like(chosen, cut))
                part = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
                rows = (part - full).square().sum(-1)[0, :, ::4].unflatten(1, (3, 2))
                total[family, ..., cut] += 4 * rows.sum(-1)
        return total

    assert site.heads == HEADS
    assert_equivalent(lambda: errors.errors, by_masks, ())


@CASES
@pytest.mark.parametrize("share", SHARES)
def test_the_budget_is_respected(
    queries: int, keys: int, causal: bool, unit: int, share: float
) -> None:
    *_, errors = scored(queries, keys, causal, unit=unit)
    costs = errors.costs(tile_cost)
    ((_, cut),) = choose_columns([errors], tile_cost, share)
    least = float(costs.min(-1).values.sum()) * HEADS
    used = float(costs.expand(HEADS, -1, -1).gather(-1, cut[..., None]).sum())
    assert used <= max(share * float(costs[..., -1].sum()) * HEADS, least) * (1 + 1e-9)


def test_a_larger_budget_never_costs_quality() -> None:
    *_, errors = scored(24, 40, False)

    def lost(share: float) -> float:
        ((family, cut),) = choose_columns([errors], tile_cost, share)
        picked = errors.errors.gather(
            0, family[None, ..., None].expand(1, *errors.errors.shape[1:])
        )
        return float(picked[0].gather(-1, cut[..., None]).sum())

    assert all(lost(small) >= lost(large) for small, large in itertools.pairwise(SHARES))


@given(share=st.floats(0.05, 0.9), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_no_other_choice_of_that_cost_loses_less(share: float, seed: int) -> None:
    """By Lagrange; and where the budget is below the cheapest, the best of the cheapest."""
    errors = scored(8, 12, False, rows=4)[-1]
    draw = torch.Generator().manual_seed(seed)
    costs = errors.costs(tile_cost).expand(HEADS, -1, -1)

    def outcome(family: Tensor, cut: Tensor) -> tuple[float, float]:
        lost = errors.errors.movedim(0, 2).flatten(2).gather(2, (family * cuts + cut)[..., None])
        return float(lost.sum()), float(costs.gather(-1, cut[..., None]).sum())

    cuts = len(errors.sizes)
    ((family, cut),) = choose_columns([errors], tile_cost, share)
    best, used = outcome(family, cut)
    for _ in range(50):
        other = torch.randint(3, family.shape, generator=draw)
        sizes = torch.randint(cuts, cut.shape, generator=draw)
        lost, cost = outcome(other, sizes)
        assert cost > used * (1 + 1e-9) or lost >= best * (1 - 1e-6)


def test_sites_share_one_budget() -> None:
    """A site whose rows count a thousand times keeps more of its columns."""
    *_, errors = scored(24, 40, False)
    heavy = ColumnErrors(errors.ranks)
    heavy.errors = errors.errors * 1000
    (_, light), (_, weighted) = choose_columns([errors, heavy], tile_cost, 0.5)
    assert weighted.sum() > light.sum()


def test_the_ladder_falls_in_strength() -> None:
    calls = calls_of(40, 40)
    program = capture_calls(Bare(True), calls)
    captured = CapturedModel(Bare(True), {"": program})
    ctx = PlanContext(captured, calls, lambda _: None, lambda _: True, PassRecord("test"))
    (site,) = attention_sites(program)
    config = PruneAttentionConfig(rows=8)
    kept: list[int] = []
    for proposal in propose_columns(ctx, [site], {site.name: config}):
        decisions: dict[str, Any] = proposal.decide()
        mask = decisions[site.name]["mask"] if decisions else torch.ones(2, 40, 40).tril()
        assert mask.any(-1).all()
        kept.append(int(mask.sum()))
    assert kept == sorted(kept)
