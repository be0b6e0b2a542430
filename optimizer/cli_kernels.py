"""`fxpress kernels`: which lowerings there are and what they take; generated sources of a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fxpress import lowering
from fxpress.cli_tables import table
from fxpress.config import nearest
from fxpress.errors import PlanError
from fxpress.lowered import LoweredSite
from fxpress.lowering import Lowering
from fxpress.ops.mask_layout import compile_mask
from fxpress.ops.sparse_attention import AttentionSite
from fxpress.ops.vvma_linear import VvmaSite

__all__ = ["DTYPES", "lowerings", "of_site", "render_lowerings", "render_sites"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}


def _examples() -> dict[str, Any]:
    """A small call of every operator, to ask lowerings about."""
    layout = compile_mask(torch.ones(1, 64, 64).bool(), device="cpu", form="tiles")
    attention = AttentionSite(layout.facts, torch.float32, head_dim=64, value_dim=64, group=1)
    linear = VvmaSite(torch.float32, 1, block=32, terms=1, tiles=(32, 32), features=(1024, 1024))
    return {"fxpress::sparse_attention": attention, "fxpress::vvma_linear": linear}


def lowerings(device: str | None = None, dtype: str | None = None) -> list[dict[str, Any]]:
    """Every registered lowering: operator, name, device, what it is, and which dtypes it takes.

    Args:
        device: only lowerings for that type of device.
        dtype: only lowerings that take it.
    """
    found = []
    for operator, site in _examples().items():
        for kind in (device,) if device else ("cpu", "cuda"):
            found += [_facts(low, site) for low in lowering.registered(operator, kind)]
    return [facts for facts in found if dtype is None or dtype in facts["takes"]]


def _facts(low: Lowering, site: Any) -> dict[str, Any]:
    answers = {name: low.accepts(replace(site, dtype=dtype)) for name, dtype in DTYPES.items()}
    about = sys.modules[low.accepts.__module__].__doc__ or ""
    return {
        "operator": low.operator,
        "name": low.name,
        "device": low.device_type,
        "about": about.splitlines()[0] if about else "",
        "takes": [name for name, decline in answers.items() if decline is None],
        "declines": {name: d.reason for name, d in answers.items() if d is not None},
    }


def render_lowerings(found: Sequence[dict[str, Any]]) -> str:
    """The lowerings for a terminal."""
    rows = [["operator", "lowering", "device", "takes", "what it is"]]
    for low in found:
        takes = ", ".join(low["takes"])
        rows.append([low["operator"], low["name"], low["device"], takes, low["about"]])
    note = "elsewhere, and where none takes a call, the operator's portable implementation runs"
    return "\n".join([table(rows), note] if found else [note])


def of_site(found: Sequence[LoweredSite], site: str | None) -> list[LoweredSite]:
    """Those of one site, or all.

    Raises:
        PlanError: nothing was rewritten there.
    """
    names = [low.site for low in found]
    if site is not None and site not in names:
        hint = nearest(site, names) if names else "nothing was rewritten"
        raise PlanError(f"no rewritten site {site!r}: {hint}")
    return [low for low in found if site in (None, low.site)]


def render_sites(found: Sequence[LoweredSite]) -> str:
    """How each site runs, and each generated source once, as Python text."""
    if not found:
        return "# nothing was rewritten: there is no kernel"
    by_source: dict[str, list[str]] = {}
    lines = []
    for low in found:
        if low.source:
            by_source.setdefault(low.source, []).append(low.site)
            continue
        why = "; ".join(f"{name}: {reason}" for name, reason in low.declined.items())
        what = f"portable implementation on {low.device}" + f" ({why})" * bool(why)
        lines.append(f"# {low.site}: {low.operator}, {what}")
    for source, sites in by_source.items():
        lines += ["", f"# {', '.join(sites)}", source.rstrip()]
    return "\n".join(lines).lstrip("\n")
