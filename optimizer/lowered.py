"""What the semantic operators of a program become on a device: generated kernels, or nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxpress import environment, lowering
from fxpress.ops.mask_layout import LayoutSpec, MaskLayout, compile_mask
from fxpress.ops.sparse_attention import AttentionSite
from fxpress.ops.vvma_linear import VvmaSite
from fxpress.program import Program, attribute
from fxpress.regions import CapturedModel
from fxpress.report import Report

__all__ = ["LoweredSite", "kernel_sources", "lower", "trace"]

log = logging.getLogger("fxpress")


@dataclass(frozen=True)
class LoweredSite:
    """How one call of a semantic operator runs on a device.

    Attributes:
        site: name of the site.
        operator: full name of the operator.
        device: type of the device.
        lowering: name of the lowering, or `""`: the operator's portable implementation.
        source: the generated program text; empty for the portable implementation.
        declined: lowering -> why it does not serve the call.
    """

    site: str
    operator: str
    device: str
    lowering: str = ""
    source: str = ""
    declined: dict[str, str] = field(default_factory=dict)


def kernel_sources(
    captured: CapturedModel, device: str | None = None, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Generated source by site, for every site that a generated kernel serves.

    Args:
        captured: the programs.
        device: type of a device, which need not be here; None: where the program is.
        dtype: as if the tensors were of another dtype.
    """
    return {low.site: low.source for low in lower(captured, device, dtype) if low.lowering}


def lower(
    captured: CapturedModel, device: str | None = None, dtype: torch.dtype | None = None
) -> list[LoweredSite]:
    """Choose a lowering for every site that passes made; arguments as `kernel_sources`."""
    found = []
    for program in captured.programs.values():
        for node in program.graph.nodes:
            operator = str(node.target).removesuffix(".default").replace(".", "::", 1)
            if (describe := _SITES.get(operator)) is not None:
                where = device or _device(program, node)
                site = describe(program, node, where)
                site = site if dtype is None else _retyped(site, dtype)
                found.append(_choose(node.meta["provenance"].site, operator, where, site))
    return found


def _choose(name: str, operator: str, device: str, site: Any) -> LoweredSite:
    declines = lowering.declines(operator, device, site)
    low = LoweredSite(name, operator, device, declined={k: d.reason for k, d in declines.items()})
    chosen = lowering.choose(operator, device, site)
    if chosen is None:
        return low
    return replace(low, lowering=chosen.name, source=chosen.source(site))


def _device(program: Program, node: fx.Node) -> str:
    """Where the tensors are that the operator holds: a layout, or factors."""
    held = next(n for n in node.all_input_nodes if n.op == "get_attr")
    device: torch.device = attribute(program.graph_module, str(held.target)).device
    return device.type


def _attention(program: Program, node: fx.Node, device: str) -> AttentionSite:
    q, k, v, _layout, spec, mask, *rest = (_value(argument) for argument in node.args)
    facts = LayoutSpec.parse(spec)
    if device == "cuda" and facts.form != "tiles":
        # A layout is compiled for one kind of device: from the mask, it can be for the other too.
        stored = [attribute(program.graph_module, str(n.target)) for n in node.args[3]]  # type: ignore[union-attr]
        dense = MaskLayout(spec, tuple(stored)).to_dense().cpu()
        facts = compile_mask(dense, device="cpu", form="tiles", head_dim=int(q.shape[-1])).facts
    return AttentionSite.of(q, k, v, facts, mask, *rest)


def _vvma(_program: Program, node: fx.Node, _device: str) -> VvmaSite:
    x, *rest = (_value(argument) for argument in node.args)
    return VvmaSite.of(x.reshape(-1, x.shape[-1]), *rest)


_SITES: dict[str, Callable[[Program, fx.Node, str], Any]] = {
    "fxpress::sparse_attention": _attention,
    "fxpress::vvma_linear": _vvma,
}


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _retyped(site: Any, dtype: torch.dtype) -> Any:
    """The site as it would be in another dtype; a mask of the old dtype follows."""
    names = {"mask": str(dtype).removeprefix("torch.")}
    follows = getattr(site, "mask", "") == str(site.dtype).removeprefix("torch.")
    return replace(site, dtype=dtype, **(names if follows else {}))


def trace(report: Report, captured: CapturedModel) -> None:
    """Log or write what `FXPRESS_DEBUG` and `FXPRESS_DUMP` ask for once a run is done."""
    level, folder = environment.debug_level(), environment.dump_folder()
    if level >= 1:
        log.warning("%s", report)
    if level < 4 and folder is None:
        return
    for site, source in kernel_sources(captured).items():
        if level >= 4:
            log.warning("kernel of %s:\n%s", site, source)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"[^\w.-]", "_", site)
            (folder / f"kernel.{name}.py").write_text(source, encoding="utf-8")
