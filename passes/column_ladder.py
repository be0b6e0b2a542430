"""The ladder of masks by effect, from few columns to many.

It is what a run tries whose configuration states no sparsity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxpress.passes.column_choice import ColumnErrors, ColumnRanks, choose_columns
from fxpress.passes.masks import live_cells
from fxpress.passes.pruning_settings import PruneAttentionConfig
from fxpress.passes.sensitivity import row_weights
from fxpress.passes.sites import AttentionSite
from fxpress.planning import Decisions, PlanContext, Proposal
from fxpress.profile import profile
from fxpress.progress import Progress

__all__ = ["propose_columns"]

# Shares of the dense attention cost.
_LADDER = (0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.2, 0.22, 0.25, 0.28, 0.35, 0.5)
_SCORED_CALLS = 8


def propose_columns(
    ctx: PlanContext, sites: Sequence[AttentionSite], configs: Mapping[str, PruneAttentionConfig]
) -> list[Proposal]:
    """One proposal per rung, strongest first; columns are chosen only when it is tried.

    Args:
        ctx: the captured model and its calibration calls.
        sites: the attention that may be pruned.
        configs: settings by site: `rows` of a tile and `unit` of columns.
    """
    captured, calls = ctx.captured, ctx.calls
    few = calls[:: max(1, len(calls) // _SCORED_CALLS)][:_SCORED_CALLS]
    sizes = _longest(ctx, sites)
    weights = row_weights(captured, sites, few, ctx.progress)
    ranks = []
    for site in sites:
        config = configs[site.name]
        unit = config.unit or (16 if ctx.device == "cuda" else 1)
        weight = weights.get(site.name)
        ranks.append(ColumnRanks(site, *sizes[site.name], config.rows, unit, weight))
    profile(captured, calls, ranks, ctx.progress)
    scored = [ColumnErrors(rank) for rank in ranks]
    profile(captured, few, scored, ctx.progress)
    return [_rung(scored, share, ctx.device) for share in _LADDER]


@dataclass
class _Size:
    """The longest query and key lengths that a site sees."""

    site: AttentionSite
    longest: tuple[int, int] = (0, 0)
    node: fx.Node = field(init=False)

    def __post_init__(self) -> None:
        self.node = self.site.node

    def observe(self, inputs: Mapping[str, Any], _output: Any) -> None:
        q, k = inputs[self.site.q.name], inputs[self.site.k.name]
        self.longest = (max(self.longest[0], q.shape[2]), max(self.longest[1], k.shape[2]))


def _longest(ctx: PlanContext, sites: Sequence[AttentionSite]) -> dict[str, tuple[int, int]]:
    if all(isinstance(s.node.meta["val"].shape[2], int) for s in sites):
        return {s.name: (s.shape[3], s.shape[4]) for s in sites}
    observers = {s.name: _Size(s) for s in sites}
    profile(ctx.captured, ctx.calls, observers.values(), Progress())
    return {name: o.longest for name, o in observers.items()}


def _tile_cost(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Cost of a tile of gathered columns, in dense columns: measured ratios on two x86 cores.

    A gathered column costs about 1.3 dense ones (smaller products, the gather), a tile as much as
    16 on top; on CUDA the kernel's tiles are as fast as dense ones, and a tile costs about 64.
    """
    per_column, per_tile = (1.0, 64.0) if device == "cuda" else (1.3, 16.0)

    def cost(kept: Tensor, live: Tensor) -> Tensor:
        # A single column is a copy of its value: no product at all.
        gathered = per_tile + per_column * kept
        return torch.minimum(torch.where(kept <= 1, torch.ones_like(kept), gathered), live * 1.3)

    return cost


def _rung(scored: Sequence[ColumnErrors], share: float, device: str) -> Proposal:
    def decide() -> Decisions:
        choices = choose_columns(scored, _tile_cost(device), share)
        decisions: Decisions = {}
        for errors, (family, cut) in zip(scored, choices, strict=True):
            site = errors.ranks.site
            mask = errors.mask(family, cut)
            live = live_cells(mask.shape[1], mask.shape[2], site.is_causal)
            if bool((mask == live).all()):
                continue  # nothing to gain here: the attention stays as it is
            lost = errors.errors.gather(
                0, family[None, ..., None].expand(1, *errors.errors.shape[1:])
            )
            error = float(lost[0].gather(-1, cut[..., None]).sum())
            decisions[site.name] = {"mask": mask, "source": "effect", "error": error}
        return decisions

    return Proposal(f"{100 * share:g} % of the dense attention cost", decide)
