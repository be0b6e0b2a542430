"""`prune-attention`: attention under a static mask learned from calibration data.

    scaled_dot_product_attention(q, k, v, mask)
      ->  sparse_attention(q, k, v, layout(S), mask')        S (H, Nq, Nk) static, per head

The static mask S holds causality; `mask'` is what remains of the run-time mask (padding). S is
applied before the softmax, so that what is kept renormalizes. Where S comes from:

- `pruned` given: a percentile of the mean attention map (Rugina et al. 2020, arXiv 2012.02030),
  or a window or random blocks of the same share as baselines;
- `pruned` not given: columns per tile of rows, chosen by their effect (`column_choice`), as a
  ladder of proposals that the judge climbs.

Exactness: APPROXIMATES(budget), held by the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxpress.capture import Call
from fxpress.errors import PassError, PlanError
from fxpress.judge import Proposal
from fxpress.ops.mask_layout import MaskLayout, compile_mask
from fxpress.passes.attention_maps import MeanAttention
from fxpress.passes.column_choice import ColumnErrors, ColumnRanks, choose_columns
from fxpress.passes.masks import (
    Block,
    live_cells,
    random_mask,
    threshold_masks,
    window_mask,
)
from fxpress.passes.sensitivity import row_weights
from fxpress.passes.sites import AttentionSite, attention_sites
from fxpress.profile import Observer, profile
from fxpress.program import Program
from fxpress.progress import Progress
from fxpress.regions import CapturedModel
from fxpress.rewrite import Applied, Decline, Pass, PassContext, PassRecord, provide
from fxpress.testing import APPROXIMATES, Exactness

__all__ = ["PruneAttention", "PruneAttentionConfig"]

aten = torch.ops.aten

_LADDER = (
    0.05,
    0.08,
    0.1,
    0.12,
    0.15,
    0.18,
    0.22,
    0.28,
    0.35,
    0.5,
)  # shares of the dense attention cost
_MAP_BYTES = 256 << 20  # element maps of all sites together; above it they are pooled
_SCORED_CALLS = 8
_CHOICES = {
    "scope": ("layer", "head", "global"),
    "universe": ("live", "all"),
    "granularity": ("block", "element", "column"),
    "survive": ("mean", "any"),
    "mask": ("learned", "window", "random"),
}


@dataclass(frozen=True)
class PruneAttentionConfig:
    """Settings.

    Attributes:
        pruned: share of the universe to prune, in [0, 1); None: as far as the budget allows.
        mask: `"learned"` from mean attention, or the baselines `"window"` and `"random"`.
        scope: what shares a threshold: `"layer"`, `"head"` or `"global"`.
        universe: percentile over `"live"` cells or over `"all"` (the paper's own counting).
        granularity: `"block"` (block x block), `"element"`, or `"column"` (one column of `rows`).
        block: side of a block.
        rows: query rows of a tile for columns.
        survive: a block survives by its `"mean"` or if `"any"` cell survives.
        min_keep_per_row: keys that every row keeps.
        sinks: first keys that the window keeps.
        unit: neighboring columns chosen together when `pruned` is None; None: 1 on CPU, 16 on CUDA.
        seed: of random masks.
    """

    pruned: float | None = None
    mask: str = "learned"
    scope: str = "layer"
    universe: str = "live"
    granularity: str = "block"
    block: int = 16
    rows: int = 128
    survive: str = "mean"
    min_keep_per_row: int = 1
    sinks: int = 4
    unit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"prune-attention: {name} is {getattr(self, name)!r}: give one of {allowed}"
                )
        pruned = self.pruned
        if pruned is not None and not 0 <= pruned < 1:
            raise PlanError(f"prune-attention: pruned is {pruned!r}: give a share in [0, 1)")
        for name in ("block", "rows", "min_keep_per_row"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PlanError(f"prune-attention: {name} is {value!r}: give a whole number >= 1")

    @property
    def cells(self) -> Block:
        """Rows and columns that are kept or pruned together."""
        if self.granularity == "element":
            return (1, 1)
        return (self.block, self.block) if self.granularity == "block" else (self.rows, 1)


class PruneAttention(Pass):
    """Replaces attention by attention under a static mask, as decided."""

    name: ClassVar[str] = "prune-attention"
    phase: ClassVar[str] = "rewrite"
    after: ClassVar[Mapping[str, str]] = {
        "fuse-attention": "masks go onto whole attention operators"
    }
    exactness: ClassVar[Exactness] = APPROXIMATES(0.0)
    config_type: ClassVar[type | None] = PruneAttentionConfig

    def run(self, program: Program, ctx: PassContext) -> PassRecord:
        """Apply `ctx.decisions`: site -> `{"mask": bool (H, Nq, Nk)}`."""
        record = PassRecord(self.name, self.exactness)
        for site in attention_sites(program):
            decision = ctx.decisions.get(site.name)
            if decision is None or not ctx.enabled(site.path):
                continue
            if (reason := _unfit(site, decision["mask"])) is not None:
                record.declined.append(Decline(reason, site.node, site.name))
                continue
            if not ctx.fuel.burn():
                break
            device = _device(program, ctx.device)
            layout = compile_mask(
                decision["mask"], device=device, universe=_universe(site, decision)
            )
            self._rewrite(program, site, layout)
            record.masks[site.name] = layout
            record.ledger[site.name] = _ledger(site, layout)
            detail = {k: v for k, v in record.ledger[site.name].items() if k.endswith("density")}
            applied = Applied(self.name, site.node.name, site.path, site.name, detail)
            record.rewrites.append(applied)
        program.finish()
        return record

    def _rewrite(self, program: Program, site: AttentionSite, layout: MaskLayout) -> None:
        graph = program.graph

        def build() -> fx.Node:
            names = [
                program.register(f"{site.name}_layout_{i}", tensor)
                for i, tensor in enumerate(layout.tensors)
            ]
            tensors = [graph.get_attr(name) for name in names]
            q, k, v = site.node.args[:3]
            return graph.call_function(
                torch.ops.fxpress.sparse_attention.default,
                (q, k, v, tensors, layout.spec, _run_time_mask(graph, site), False, site.scale, 0),
            )

        provide(program, site.node, self.name, build, site.name)

    def propose(
        self,
        captured: CapturedModel,
        calls: Sequence[Call],
        settings: Callable[[str], PruneAttentionConfig],
        enabled: Callable[[str], bool],
        device: str,
        progress: Progress,
        record: PassRecord,
    ) -> list[Proposal]:
        """What could be pruned, strongest first.

        Args:
            captured: the canonical programs.
            calls: calibration calls to learn from.
            settings: module path -> settings.
            enabled: whether a module path may be pruned.
            device: type of the device that the model will run on.
            progress: told of the profiling.
            record: receives refusals and mean attention maps.
        """
        sites: list[AttentionSite] = []
        paths: dict[str, str] = {}
        for region, program in captured.programs.items():
            for site in attention_sites(program):
                path = f"{region}.{site.path}".strip(".")
                if enabled(path):
                    sites.append(site)
                    paths[site.name] = path
                else:
                    reason = "left out by the configuration"
                    record.declined.append(Decline(reason, site.node, site.name))
        if not sites:
            return []
        configs = {site.name: settings(paths[site.name]) for site in sites}
        if all(config.pruned is None for config in configs.values()):
            return _chosen(captured, calls, sites, configs, device, progress)
        if any(config.pruned is None for config in configs.values()):
            raise PassError("prune-attention: give `pruned` for all modules, or for none")
        means = _mean_attention(captured, calls, sites, configs, progress)
        record.mean_attention = {name: observer.mean() for name, observer in means.items()}
        shapes = {name: observer.shape for name, observer in means.items()}
        return [_stated(sites, configs, record.mean_attention, shapes)]


def _device(program: Program, wanted: str) -> torch.device:
    for tensor in program.tensors().values():
        return tensor.device
    return torch.device(wanted)


def _unfit(site: AttentionSite, mask: Tensor) -> str | None:
    heads, queries, keys = mask.shape
    if heads != site.heads:
        return f"the mask does not fit: it has {heads} heads, the attention {site.heads}"
    if queries < site.shape[3] or keys < site.shape[4]:
        return f"the mask does not fit: {queries} x {keys} cells for {site.shape[3:5]}"
    return None


def _universe(site: AttentionSite, decision: Mapping[str, Any]) -> Tensor:
    _, queries, keys = decision["mask"].shape
    return live_cells(queries, keys, site.is_causal)


def _run_time_mask(graph: fx.Graph, site: AttentionSite) -> fx.Node | None:
    """What is left of the run-time mask once causality is in the static one, four-dimensional."""
    mask = site.padding if site.is_causal else site.mask
    if mask is None:
        return None
    for _ in range(4 - mask.meta["val"].ndim):
        mask = graph.call_function(aten.unsqueeze.default, (mask, 0))
        mask.meta["val"] = mask.args[0].meta["val"].unsqueeze(0)  # type: ignore[union-attr]
    return mask


def _ledger(site: AttentionSite, layout: MaskLayout) -> dict[str, Any]:
    batch, heads, _, queries, keys, width, value_width = site.shape
    dense = batch * heads * queries * keys * (width + value_width)
    return {
        "kind": site.kind,
        "pruned": 1 - layout.live_density,
        "live_density": layout.live_density,
        "tile_density": layout.tile_density,
        "multiply_adds": {"before": dense, "after": round(dense * layout.tile_density)},
        "mask_bytes": sum(t.nbytes for t in layout.tensors),
    }


# A stated sparsity -------------------------------------------------------------------------------


def _mean_attention(
    captured: CapturedModel,
    calls: Sequence[Call],
    sites: Sequence[AttentionSite],
    configs: Mapping[str, PruneAttentionConfig],
    progress: Progress,
) -> dict[str, MeanAttention]:
    """Mean maps of all sites from one run; by element where they fit into memory."""
    elements = sum(s.heads * s.shape[3] * s.shape[4] for s in sites)
    pooled = elements * 8 > _MAP_BYTES
    means = {
        site.name: MeanAttention(site, configs[site.name].cells if pooled else (1, 1))
        for site in sites
    }
    profile(captured, calls, _by_region(captured, means), progress)
    return means


def _by_region(captured: CapturedModel, observers: Mapping[str, Any]) -> dict[str, list[Observer]]:
    found: dict[str, list[Observer]] = {}
    for path, program in captured.programs.items():
        nodes = set(program.graph.nodes)
        found[path] = [o for o in observers.values() if o.node in nodes]
    return found


def _stated(
    sites: Sequence[AttentionSite],
    configs: Mapping[str, PruneAttentionConfig],
    means: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
) -> Proposal:
    live = {s.name: live_cells(*shapes[s.name], s.is_causal) for s in sites}

    def decide() -> dict[str, dict[str, Any]]:
        decisions: dict[str, dict[str, Any]] = {}
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


def _groups(
    sites: Sequence[AttentionSite], configs: Mapping[str, PruneAttentionConfig]
) -> list[list[AttentionSite]]:
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


# As far as the budget allows ---------------------------------------------------------------------


def _chosen(
    captured: CapturedModel,
    calls: Sequence[Call],
    sites: Sequence[AttentionSite],
    configs: Mapping[str, PruneAttentionConfig],
    device: str,
    progress: Progress,
) -> list[Proposal]:
    """A ladder of masks by effect, from few columns to many."""
    sizes = _longest(captured, calls, sites)
    few = calls[:: max(1, len(calls) // _SCORED_CALLS)][:_SCORED_CALLS]
    weights = row_weights(captured, sites, few, progress)
    ranks = {}
    for site in sites:
        config = configs[site.name]
        unit = config.unit or (16 if device == "cuda" else 1)
        size = sizes[site.name]
        ranks[site.name] = ColumnRanks(site, *size, config.rows, unit, weights.get(site.name))
    profile(captured, calls, _by_region(captured, ranks), progress)
    scored = {name: ColumnErrors(rank) for name, rank in ranks.items()}
    profile(captured, few, _by_region(captured, scored), progress)
    return [_rung(list(scored.values()), share, device) for share in _LADDER]


@dataclass
class _Size(Observer):
    """The longest query and key lengths that a site sees."""

    site: AttentionSite
    longest: tuple[int, int] = (0, 0)
    node: fx.Node = field(init=False)

    def __post_init__(self) -> None:
        self.node = self.site.node

    def observe(self, inputs: Mapping[str, Any], _output: Any) -> None:
        q, k = inputs[self.site.q.name], inputs[self.site.k.name]
        self.longest = (max(self.longest[0], q.shape[2]), max(self.longest[1], k.shape[2]))


def _longest(
    captured: CapturedModel, calls: Sequence[Call], sites: Sequence[AttentionSite]
) -> dict[str, tuple[int, int]]:
    if all(isinstance(s.node.meta["val"].shape[2], int) for s in sites):
        return {s.name: (s.shape[3], s.shape[4]) for s in sites}
    observers = {s.name: _Size(s) for s in sites}
    profile(captured, calls, _by_region(captured, observers), Progress())
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
    def decide() -> dict[str, dict[str, Any]]:
        choices = choose_columns(scored, _tile_cost(device), share)
        decisions: dict[str, dict[str, Any]] = {}
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
