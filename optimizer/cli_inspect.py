"""`fxpress inspect`: graphs before and after each pass, masks, kernels, ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from fxpress.cli_tables import table
from fxpress.config import nearest
from fxpress.errors import PlanError
from fxpress.lowered import lower
from fxpress.ops.mask_layout import MaskLayout
from fxpress.optimized import OptimizedModule
from fxpress.rewrite import PassRecord

__all__ = ["GRAPHS", "Wish", "inspect", "render"]

GRAPHS = ("before", "after", "diff")
_SHADES = " .:-=+*#%@"
_TOLD = {"site", "pass", "status", "reason", "path"}  # elsewhere
_DRAWING = (16, 48)  # rows and columns of characters at most


@dataclass(frozen=True)
class Wish:
    """What to show.

    Attributes:
        pass_name: of one pass only.
        graph: one of `GRAPHS`.
        masks: the compiled masks.
        kernels: how each rewritten site runs, with generated source.
        ledger: figures of each rewritten site.
        device: type of the device that kernels are shown for; None: where the model is.
    """

    pass_name: str | None = None
    graph: str | None = None
    masks: bool = False
    kernels: bool = False
    ledger: bool = False
    device: str | None = None


def inspect(optimized: OptimizedModule, wish: Wish) -> dict[str, Any]:
    """The facts that were asked for, JSON-able.

    Raises:
        PlanError: an unknown pass or view of the graph, or a graph that an artifact does not hold.
    """
    if wish.graph not in (None, *GRAPHS):
        raise PlanError(f"--graph is {wish.graph!r}: give one of {', '.join(GRAPHS)}")
    records = dict(optimized.passes)
    if wish.pass_name is not None:
        if wish.pass_name not in records:
            raise PlanError(f"no pass {wish.pass_name!r} here: {nearest(wish.pass_name, records)}")
        records = {wish.pass_name: records[wish.pass_name]}
    facts: dict[str, Any] = {"schema": 1, "passes": [_pass(r, wish) for r in records.values()]}
    if wish.graph is not None:
        facts["graphs"] = _graphs(optimized, records, wish)
    if wish.kernels:
        lowered = lower(optimized.captured, wish.device)
        facts["kernels"] = [vars(low) for low in lowered if _is_of(low.site, records, wish)]
    return facts


def _is_of(site: str, records: Mapping[str, PassRecord], wish: Wish) -> bool:
    changed = {done.site for record in records.values() for done in record.rewrites}
    return wish.pass_name is None or site in changed


def _pass(record: PassRecord, wish: Wish) -> dict[str, Any]:
    facts = record.as_dict()
    if wish.ledger:
        facts["ledger"] = record.ledger
    if wish.masks:
        facts["masks"] = {site: _mask(layout) for site, layout in record.masks.items()}
    return facts


def _mask(layout: MaskLayout) -> dict[str, Any]:
    return {
        "shape": list(layout.shape),
        "form": layout.facts.form,
        "tile": list(layout.tile),
        "different_heads": layout.facts.unique,
        "live_density": layout.live_density,
        "tile_density": layout.tile_density,
        "drawing": _drawing(layout),
    }


def _drawing(layout: MaskLayout) -> list[str]:
    """Rows of characters: the darker, the larger the share of heads and cells that are kept."""
    share = layout.to_dense().cpu().float().mean(0)
    rows, columns = (min(n, most) for n, most in zip(share.shape, _DRAWING, strict=True))
    small = F.adaptive_avg_pool2d(share[None, None], (rows, columns))[0, 0]
    levels = (small * (len(_SHADES) - 1)).round().int().tolist()
    return ["".join(_SHADES[level] for level in row) for row in levels]


def _graphs(
    optimized: OptimizedModule, records: Mapping[str, PassRecord], wish: Wish
) -> dict[str, str]:
    """Texts by pass. A loaded artifact has but one graph: the final one, under the name `final`."""
    view = {"before": lambda r: str(r.before), "after": lambda r: str(r.after)}
    view["diff"] = PassRecord.diff
    assert wish.graph is not None
    if all(record.after.programs for record in records.values()):
        return {name: view[wish.graph](record) for name, record in records.items()}
    if wish.graph != "after" or wish.pass_name is not None:
        raise PlanError(
            "an artifact holds the final graph only (--graph after, without --pass): give "
            "--model too, and its plan is applied to that model pass by pass"
        )
    return {"final": str(optimized.captured.snapshot())}


# --- text -----------------------------------------------------------------------------------


def render(facts: Mapping[str, Any]) -> str:
    """The facts for a terminal."""
    lines: list[str] = []
    for entry in facts["passes"]:
        lines += _pass_lines(entry)
    for name, text in facts.get("graphs", {}).items():
        lines += ["", f"graph of {name}:", text or "(unchanged)"]
    for low in facts.get("kernels", []):
        what = low["lowering"] or "the operator's portable implementation"
        lines += ["", f"{low['site']}: {low['operator']} on {low['device']} by {what}"]
        lines += [f"  {name} declines: {why}" for name, why in low["declined"].items()]
        lines += [low["source"]] * bool(low["source"])
    return "\n".join(lines)


def _pass_lines(entry: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{n} {rule}" for rule, n in entry["counts"].items()) or "no rewrite"
    lines = [f"{entry['name']}: {counts} ({entry['exactness']})"]
    for kind in ("declined", "rolled_back"):
        reasons: dict[str, list[str]] = {}
        for refused in entry[kind]:
            place = refused["site"] or refused.get("path", "")
            reasons.setdefault(refused["reason"], []).append(place)
        word = kind.replace("_", " ")
        lines += [f"  {word} {len(at)}: {why} ({at[0]})" for why, at in reasons.items()]
    if entry.get("ledger"):
        lines += [_ledger_table(entry["ledger"])]
    for site, mask in entry.get("masks", {}).items():
        shape = " x ".join(map(str, mask["shape"]))
        kept = f"live {mask['live_density']:.1%}, tiles {mask['tile_density']:.1%}"
        lines += [f"  {site}: {shape}, {mask['form']}, {kept}; heads averaged:"]
        lines += [f"    |{row}|" for row in mask["drawing"]]
    return lines


def _ledger_table(ledger: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per site; figures of before and after with an arrow."""
    names = list(dict.fromkeys(name for entry in ledger.values() for name in entry))
    names = [name for name in names if name not in _TOLD]
    rows = [["site", *names]]
    rows += [[site, *(_figure(entry.get(n)) for n in names)] for site, entry in ledger.items()]
    return table(rows)


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return " -> ".join(_figure(v) for v in value.values())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    return "-" if value is None else str(value)
