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

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxpress.cost import attention_work, hardware_of, sparse_attention_work
from fxpress.errors import PassError
from fxpress.ops.mask_layout import MaskLayout, compile_mask
from fxpress.passes.column_ladder import propose_columns
from fxpress.passes.masks import live_cells
from fxpress.passes.pruning_settings import PruneAttentionConfig
from fxpress.passes.sites import AttentionSite, attention_sites
from fxpress.passes.stated_masks import propose_stated
from fxpress.planning import PlanContext, PlannedPass, Proposal
from fxpress.program import Program
from fxpress.rewrite import Applied, Decline, PassContext, PassRecord, provide
from fxpress.testing import APPROXIMATES, Exactness

__all__ = ["PruneAttention", "PruneAttentionConfig"]

aten = torch.ops.aten


class PruneAttention(PlannedPass):
    """Replaces attention by attention under a static mask, as decided."""

    name: ClassVar[str] = "prune-attention"
    phase: ClassVar[str] = "rewrite"
    after: ClassVar[Mapping[str, str]] = {
        "fuse-attention": "masks go onto whole attention operators"
    }
    exactness: ClassVar[Exactness] = APPROXIMATES(0.0)
    config_type: ClassVar[type | None] = PruneAttentionConfig
    objectives: ClassVar[tuple[str, ...]] = ("latency",)  # masks are stored beside all weights

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
                decision["mask"],
                device=device,
                universe=_universe(site, decision),
                head_dim=site.shape[5],
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

    def propose(self, ctx: PlanContext) -> list[Proposal]:
        """What could be pruned, strongest first.

        Raises:
            PassError: `pruned` is stated for some modules and left open for others.
        """
        configs: dict[str, PruneAttentionConfig] = {}
        sites: list[AttentionSite] = []
        for region, program in ctx.captured.programs.items():
            for site in attention_sites(program):
                path = f"{region}.{site.path}".strip(".")
                if ctx.enabled(path):
                    sites.append(site)
                    configs[site.name] = ctx.settings(path)
                else:
                    reason = "left out by the configuration"
                    ctx.record.declined.append(Decline(reason, site.node, site.name))
        if not sites:
            return []
        stated = [config.pruned is not None for config in configs.values()]
        if all(stated):
            return [propose_stated(ctx, sites, configs)]
        if any(stated):
            raise PassError("prune-attention: give `pruned` for all modules, or for none")
        if ctx.forced:
            reason = "judge='off' applies what the configuration states: it states no pruned="
            ctx.record.declined += [Decline(reason, site.node, site.name) for site in sites]
            return []
        return propose_columns(ctx, sites, configs)

    def sites(self, program: Program) -> dict[str, dict[str, Any]]:
        """Every attention."""
        return {
            s.name: {"kind": s.kind, "path": s.path, "shape": list(s.shape)}
            for s in attention_sites(program)
        }


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
    return mask


def _ledger(site: AttentionSite, layout: MaskLayout) -> dict[str, Any]:
    batch, heads, _, queries, keys, width, value_width = site.shape
    dense = batch * heads * queries * keys * (width + value_width)
    return {
        "kind": site.kind,
        "pruned": 1 - layout.live_density,
        "live_density": layout.live_density,
        "tile_density": layout.tile_density,
        "modelled_ms": _modelled_ms(site, layout),
        "multiply_adds": {"before": dense, "after": round(dense * layout.tile_density)},
        "mask_bytes": sum(t.nbytes for t in layout.tensors),
    }


def _modelled_ms(site: AttentionSite, layout: MaskLayout) -> dict[str, float]:
    hardware, dtype = hardware_of(layout.device), site.q.meta["val"].dtype
    dense = attention_work(site.shape, site.is_causal, dtype.itemsize, hardware)
    sparse = sparse_attention_work(site.shape, layout.tile_density, dtype.itemsize, hardware)
    return {"before": hardware.ms(dense, dtype), "after": hardware.ms(sparse, dtype)}
