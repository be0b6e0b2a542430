"""What the semantic operators of a program become on its device."""

from __future__ import annotations

from typing import Any

from fxpress import lowering
from fxpress.ops.mask_layout import LayoutSpec
from fxpress.ops.sparse_attention import AttentionSite
from fxpress.program import Program, attribute
from fxpress.regions import CapturedModel

__all__ = ["kernel_sources"]


def kernel_sources(captured: CapturedModel) -> dict[str, str]:
    """Generated source by site, for every site that a generated kernel serves."""
    found: dict[str, str] = {}
    for program in captured.programs.values():
        for node in program.graph.nodes:
            if str(node.target) == "fxpress.sparse_attention.default":
                found |= _attention_source(program, node)
    return found


def _attention_source(program: Program, node: Any) -> dict[str, str]:
    q, k, v, layout, spec, mask, is_causal, scale, offset = node.args
    site = AttentionSite.of(
        q.meta["val"],
        k.meta["val"],
        v.meta["val"],
        LayoutSpec.parse(spec),
        mask.meta["val"] if mask is not None else None,
        is_causal,
        scale,
        offset,
    )
    device = attribute(program.graph_module, str(layout[0].target)).device
    chosen = lowering.choose("fxpress::sparse_attention", device.type, site)
    return {node.meta["provenance"].site: chosen.source(site)} if chosen else {}
