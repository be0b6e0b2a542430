"""`Report`: what was done, gained, lost, refused and why; as text, JSON and HTML."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Report"]

SCHEMA = 1
_HEATMAP_SITES = 12
_HEATMAP_CELLS = 256


def _curve(recovery: Mapping[str, Any]) -> str:
    """The checks as points of a 400 x 100 picture, losses on a logarithmic scale."""
    steps, losses = zip(*recovery["checks"], strict=True)
    logs = [math.log(max(loss, 1e-12)) for loss in losses]
    low, high = min(logs), max(logs)
    return " ".join(
        f"{400 * step / max(steps[-1], 1):.1f},{98 - 96 * (value - low) / ((high - low) or 1):.1f}"
        for step, value in zip(steps, logs, strict=True)
    )


def _milliseconds(site: dict[str, Any]) -> list[str]:
    found = (site.get(key) for key in ("ms_before", "ms_after"))
    return ["-" if ms is None else f"{ms:.3g}" for ms in found]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


@dataclass
class Report:
    """Facts of one run.

    Attributes:
        facts: the JSON-able content; see `as_dict`.
        masks: per rewritten site, its dense mask (H, Nq, Nk), for pictures.
    """

    facts: dict[str, Any]
    masks: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data.

        Keys: `schema`, `device`, `torch`, `baseline`, `passes`, `sites`, `quality` (metric,
        before, after, drop, budget), `latency_ms` (before, dense, after, speedup), `parameters`,
        `bytes`, `multiply_adds` (before, after), `regions`, `changed`, `attempts`, `notes`.
        Densities of a site: `live_density` (kept over possible cells), `tile_density` (computed
        over all cells), `pruned` (nominal: 1 - live_density).
        """
        return self.facts

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` where one is given."""
        text = json.dumps(self.facts, indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        """The report for a terminal."""
        return "\n".join([*self._headline(), "", *self._passes(), *self._sites(), *self._notes()])

    def _headline(self) -> list[str]:
        f = self.facts
        lines = [f"fxpress report: {f['model']} on {f['device']}, torch {f['torch']}"]
        if not f["changed"]:
            lines.append("nothing was changed: the outputs are the original's")
        latency = f["latency_ms"]
        if latency.get("after") is not None:
            lines.append(
                f"latency     {latency['before']:.1f} ms as you have it, {latency['dense']:.1f} ms"
                f" in dense form -> {latency['after']:.1f} ms: {latency['speedup']:.2f}x faster"
                f" than {f['baseline']['name']}"
            )
            lines.append(f"            {f['baseline']['how']}")
        quality = f["quality"]
        if quality.get("drop") is not None:
            lines.append(
                f"quality     {quality['metric']}: {quality['before']:.4g} -> "
                f"{quality['after']:.4g}, drop {quality['drop']:.4g} of {quality['budget']:.4g}"
                " allowed"
            )
        for name in ("parameters", "bytes", "multiply_adds"):
            before, after = f[name]["before"], f[name]["after"]
            lines.append(f"{name.replace('_', '-'):<11} {before:,} -> {after:,}")
        return lines

    def _passes(self) -> list[str]:
        lines = []
        for p in self.facts["passes"]:
            counts = ", ".join(f"{n} {rule}" for rule, n in p["counts"].items()) or "no rewrite"
            lines.append(f"{p['name']}: {counts} in {p['seconds']:.2f} s ({p['exactness']})")
            refusals: dict[str, list[str]] = {}
            for d in p["declined"]:
                refusals.setdefault(d["reason"], []).append(d["site"] or d["path"] or d["node"])
            for reason, where in refusals.items():
                more = f" and {len(where) - 3} more" if len(where) > 3 else ""
                lines.append(f"  declined {len(where)}: {reason} ({', '.join(where[:3])}{more})")
            for r in p["rolled_back"]:
                figures = ", ".join(f"{k} {v:.4g}" for k, v in r.items() if _is_number(v))
                what = r["site"] or "the whole pass"
                lines.append(
                    f"  rolled back {what}: {r['reason']}" + f" ({figures})" * bool(figures)
                )
            lines += [
                f"  tried {a['strength']}: drop {a['drop']:.4g}, {a['outcome']}"
                for a in self.facts["attempts"].get(p["name"], [])
            ]
            if r := p.get("recovery"):
                ends = [f"{loss:.4g}" for _, loss in (*r["checks"][:1], *r["checks"][-1:])]
                done = (
                    f"loss {' -> '.join(ends)} in {len(r['losses'])} steps, {r['seconds']:.1f} s: "
                )
                lines.append(f"  recovery of {r['strength']}: {done * bool(ends)}{r['stopped']}")
        return lines

    def _sites(self) -> list[str]:
        return [*self._pruned(), *self._factored()]

    def _pruned(self) -> list[str]:
        rows = [["site", "kind", "pruned", "live", "tiles", "ms dense", "ms now"]]
        for s in self.facts["sites"]:
            if "tile_density" in s:
                shares = [_percent(s[k]) for k in ("pruned", "live_density", "tile_density")]
                rows.append([s["site"], s["kind"], *shares, *_milliseconds(s)])
        return ["", *_table(rows)] if rows[1:] else []

    def _factored(self) -> list[str]:
        rows = [["site", "form", "error", "parameters", "multiply-adds", "ms dense", "ms now"]]
        for s in self.facts["sites"]:
            if "form" in s:
                falls = [
                    f"{s[k]['before']:,} -> {s[k]['after']:,}"
                    for k in ("parameters", "multiply_adds")
                ]
                error = f"{s['relative_error']:.3f}"
                rows.append([s["site"], s["form"], error, *falls, *_milliseconds(s)])
        return ["", *_table(rows)] if rows[1:] else []

    def _notes(self) -> list[str]:
        lines = [f"note: {note}" for note in self.facts["notes"]]
        lines += [
            f"stays Python: {region['path'] or 'the root'}: {region['reason']}"
            for region in self.facts["regions"]
            if region["captured"] == "no"
        ]
        return ["", *lines] if lines else []

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one self-contained HTML page.

        Raises:
            ImportError: jinja2 or matplotlib is missing: install `fxpress[report]`.
        """
        try:
            import jinja2
        except ImportError as error:
            raise ImportError("HTML reports need jinja2: pip install 'fxpress[report]'") from error
        template = resources.files("fxpress").joinpath("report.html.j2").read_text("utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters["percent"] = _percent
        environment.filters["curve"] = _curve
        pictures = {s: _heatmap(m) for s, m in list(self.masks.items())[:_HEATMAP_SITES]}
        touched, left = _apart(self.facts["sites"])
        facts = {**self.facts, "sites": touched, "left": left, "pictures": pictures}
        more = len(self.masks) - len(pictures)
        page = environment.from_string(template).render(facts, text=str(self), more=more)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        return path


def _apart(
    sites: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[tuple[str, str, str], list[str]]]:
    """Sites that were rewritten or timed, and names of the others by kind, status and reason."""
    touched: list[dict[str, Any]] = []
    left: dict[tuple[str, str, str], list[str]] = {}
    for site in sites:
        if site["status"] == "rewritten" or site.get("ms_after") is not None:
            touched.append(site)
        else:
            key = (site["kind"], site["status"], site["reason"])
            left.setdefault(key, []).append(site["site"])
    return touched, left


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _heatmap(mask: Tensor) -> str:
    """Share of heads that keep a cell, as a PNG data address."""
    import matplotlib as mpl

    mpl.use("Agg", force=False)
    import torch.nn.functional as F
    from matplotlib import image

    share = mask.float().mean(0)[None, None]
    rows, columns = (min(n, _HEATMAP_CELLS) for n in share.shape[-2:])
    small = F.adaptive_avg_pool2d(share, (rows, columns))[0, 0]
    buffer = io.BytesIO()
    image.imsave(buffer, small.numpy(), cmap="viridis", vmin=0.0, vmax=1.0, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
