"""Masks of a stated sparsity: percentiles of mean attention, and the baselines beside them.

The method of Rugina et al. 2020 (arXiv 2012.02030): one run over the calibration set gives the
mean attention map of every head, and a percentile of it the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fxpress.passes.attention_maps import MeanAttention
from fxpress.passes.masks import live_cells, random_mask, threshold_masks, window_mask
from fxpress.passes.pruning_settings import PruneAttentionConfig
from fxpress.passes.sites import AttentionSite
from fxpress.planning import Decisions, PlanContext, Proposal
from fxpress.profile import profile

__all__ = ["propose_stated"]

_MAP_BYTES = 256 << 20  # element maps of all sites together; above it they are pooled

Configs = Mapping[str, PruneAttentionConfig]


def propose_stated(ctx: PlanContext, sites: Sequence[AttentionSite], configs: Configs) -> Proposal:
    """The one proposal that prunes what the settings of each site state.

    Args:
        ctx: its record receives the mean attention maps.
        sites: the attention that may be pruned.
        configs: settings by site.
    """
    observers = _mean_attention(ctx, sites, configs)
    means = {name: observer.mean() for name, observer in observers.items()}
    ctx.record.mean_attention = means
    live = {s.name: live_cells(*observers[s.name].shape, s.is_causal) for s in sites}

    def decide() -> Decisions:
        decisions: Decisions = {}
        for group in _groups(sites, configs):
            config = configs[group[0].name]
            names = [site.name for site in group]
            masks = _masks(config, {n: means[n] for n in names}, {n: live[n] for n in names})
            for name in names:
                lost = 1 - float((means[name] * masks[name]).sum() / means[name].sum())
                decisions[name] = {"mask": masks[name], "source": config.mask, "error": lost}
        return decisions

    shares = sorted({float(c.pruned or 0) for c in configs.values()})
    return Proposal(f"{', '.join(f'{100 * s:g} %' for s in shares)} pruned", decide)


def _mean_attention(
    ctx: PlanContext, sites: Sequence[AttentionSite], configs: Configs
) -> dict[str, MeanAttention]:
    """Mean maps of all sites from one run; by element where they fit into memory."""
    elements = sum(s.heads * s.shape[3] * s.shape[4] for s in sites)
    pooled = elements * 8 > _MAP_BYTES
    means = {
        site.name: MeanAttention(site, configs[site.name].cells if pooled else (1, 1))
        for site in sites
    }
    profile(ctx.captured, ctx.calls, means.values(), ctx.progress)
    return means


def _groups(sites: Sequence[AttentionSite], configs: Configs) -> list[list[AttentionSite]]:
    """Sites that share their settings, self- and cross-attention apart, as in the paper."""
    groups: dict[Any, list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault((configs[site.name], site.kind == "cross"), []).append(site)
    return list(groups.values())


def _masks(
    config: PruneAttentionConfig, means: Mapping[str, Tensor], live: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    pruned = float(config.pruned or 0.0)
    if config.mask == "learned":
        return threshold_masks(
            means,
            live,
            pruned,
            block=config.cells,
            scope=config.scope,
            universe=config.universe,
            survive=config.survive,
            min_keep_per_row=config.min_keep_per_row,
        )
    masks = {}
    for index, (name, mean) in enumerate(means.items()):
        if config.mask == "window":
            one = window_mask(live[name], 1 - pruned, sinks=config.sinks, block=config.cells)
            masks[name] = one.expand(mean.shape[0], -1, -1)
        else:
            seed = config.seed + index
            masks[name] = random_mask(
                live[name], mean.shape[0], 1 - pruned, seed=seed, block=config.cells
            )
    return masks
