"""`explain`: every attention, matmul and recurrence, recognised or the reason why not.

Each site comes with its share of the modelled time of a call, and with what the whole model would
gain if that site alone were rewritten to a stated target, both by the cost model: an estimate that
knows nothing of what the quality allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxpress.capture import check_module, frozen
from fxpress.config import OptimizeConfig
from fxpress.cost import Hardware, attention_work, hardware_of, sparse_attention_work
from fxpress.modelled import RECURRENCES, modelled_ms, sizes
from fxpress.passes import all_passes
from fxpress.passes.factor_forms import Form, Place, candidates
from fxpress.passes.factor_settings import FactorVvmaConfig
from fxpress.passes.sites import AttentionSite, LinearSite, attention_sites, linear_sites
from fxpress.pipeline import Pipeline, resolve_order
from fxpress.program import Program, module_path, source_line
from fxpress.regions import CapturedModel, capture_model
from fxpress.rewrite import Decline

__all__ = ["Explanation", "Region", "Site", "explain"]

_TILES = 0.2  # of all tiles, in the estimate of what pruning could gain
_PARAMETERS = 0.25  # of a weight, in the estimate of what factoring could gain


@dataclass(frozen=True)
class Site:
    """One place in a model that fxpress works on.

    Attributes:
        path: name of the site: module path, with `#n` for further calls in the same module.
        recognised: whether it was brought to its canonical form.
        reason: why not, or the estimate in milliseconds.
        kind: attention: "self", "causal" or "cross"; matmul: "linear", "patches" of a convolution
            whose windows do not overlap, or a bank of "experts"; recurrence: its cell.
        shape: attention (B, H, Hkv, Nq, Nk, D, Dv); matmul (m, n), or (experts, m, n); recurrence:
            input sizes.
        node: name of the node.
        gain: estimated speed-up of the whole model from rewriting this site alone to the target
            that `Explanation.assumptions` states; below 1 where that would make it slower.
        source: `file:line` of the model's code.
        ms: modelled milliseconds of the site as it is.
        share: of the modelled time of the whole model.
    """

    path: str
    recognised: bool
    reason: str
    kind: str
    shape: tuple[int, ...]
    node: str
    gain: float
    source: str = ""
    ms: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class Region:
    """One captured graph in canonical form, with the modelled milliseconds of its calls."""

    program: Program
    ms: Mapping[fx.Node, float]


@dataclass
class Explanation:
    """What was found in a model; printing it gives a table.

    Attributes:
        attention, matmuls, recurrences: the sites.
        regions: every captured region and every module that stays Python.
        device: what the estimate is for.
        modelled_ms: milliseconds of a call of the captured parts.
        graphs: the captured regions, in canonical form.
    """

    attention: list[Site] = field(default_factory=list)
    matmuls: list[Site] = field(default_factory=list)
    recurrences: list[Site] = field(default_factory=list)
    regions: list[dict[str, str]] = field(default_factory=list)
    device: str = ""
    modelled_ms: float = 0.0
    graphs: list[Region] = field(default_factory=list, repr=False)

    @property
    def groups(self) -> dict[str, list[Site]]:
        """The sites by what they are."""
        return {
            "attention": self.attention,
            "matmuls": self.matmuls,
            "recurrences": self.recurrences,
        }

    @property
    def assumptions(self) -> str:
        """What the estimates rest on, in one line."""
        return (
            f"estimate by the cost model of {self.device}: gain of the whole model if that site "
            f"alone is rewritten, attention to {_TILES:.0%} of all its tiles, a matmul to "
            f"at most {_PARAMETERS:.0%} of its parameters; what quality allows is not known here"
        )

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        found: dict[str, Any] = {n: [asdict(s) for s in g] for n, g in self.groups.items()}
        estimate = {"device": self.device, "modelled_ms": self.modelled_ms}
        assumptions = {"assumptions": self.assumptions}
        return {"schema": 1, **found, "regions": self.regions, **estimate, **assumptions}

    def __str__(self) -> str:
        """A table of all sites."""
        rows = [["what", "site", "kind", "shape", "recognised", "ms", "share", "gain", "reason"]]
        for what, sites in self.groups.items():
            rows += [_row(what.removesuffix("s"), site) for site in sites]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += [self.summary, self.assumptions]
        lines += [
            f"stays Python: {r['path'] or 'the root'}: {r['reason']}"
            for r in self.regions
            if r["captured"] == "no"
        ]
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """How many sites of each sort were recognised, and their share of the time."""
        parts = []
        for name, sites in self.groups.items():
            share = f", {sum(s.share for s in sites):.0%} of the time" * bool(sites)
            count = sum(s.recognised for s in sites)
            parts.append(f"{name} {count} of {len(sites)} recognised{share}")
        return f"modelled {self.modelled_ms:.3g} ms: {'; '.join(parts)}"

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML page: the table, and the graph by module.

        Raises:
            ImportError: jinja2 is missing: install `fxpress[report]`.
        """
        from fxpress.explain_page import page

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(self), encoding="utf-8")
        return path


def _row(what: str, site: Site) -> list[str]:
    shape = "x".join(map(str, site.shape))
    yes = "yes" if site.recognised else "no"
    reason = site.reason if site.recognised else f"{site.reason} ({site.source})"
    figures = [f"{site.ms:.3g}", f"{site.share:.1%}", f"{site.gain:.2f}x"]
    return [what, site.path, site.kind, shape, yes, *figures, reason]


def explain(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Explanation:
    """List every attention, matmul and recurrence of a model, and what optimizing it could gain.

    Args:
        model: any module; it is left as it is. Where its parameters are is what the estimate is
            for.
        args: positional arguments of one call.
        kwargs: keyword arguments of it.

    Raises:
        CaptureError: no part of the model can be captured.
    """
    check_module(model)
    with frozen(model):
        captured = capture_model(model, [(tuple(args), dict(kwargs or {}))])
    found = Explanation(regions=captured.as_dicts())
    _canonicalize(captured, found)
    hardware = hardware_of(_device(model))
    _Estimate.of(captured, hardware, found).fill(found)
    return found


def _canonicalize(captured: CapturedModel, found: Explanation) -> None:
    """Run the exact passes; what they decline are sites that were not recognised."""
    pipeline = Pipeline(OptimizeConfig())
    for kind in resolve_order(all_passes().values()):
        if kind.phase != "canonicalize":
            continue
        record = pipeline.run(kind, captured)
        if kind.name == "fuse-attention":
            found.attention += [_refused(d, "attention") for d in record.declined]
        elif kind.name in ("normalize-linear", "hoist-products"):
            found.matmuls += [_refused(d, "linear") for d in record.declined]
        elif kind.name == "roll-recurrence":
            found.recurrences += [_refused(d, "loop") for d in record.declined]


def _refused(decline: Decline, kind: str) -> Site:
    node = decline.at.name if decline.at is not None else ""
    where = decline.site or decline.path
    return Site(where, False, decline.reason, kind, (), node, 1.0, decline.source)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@dataclass
class _Estimate:
    """Turns sites into rows with their modelled time.

    Attributes:
        hardware: the device.
        graphs: the regions.
        total: milliseconds of all of them.
        forms: the form and cost of matmuls already looked at, by shape, tokens and dtype.
    """

    hardware: Hardware
    graphs: list[Region]
    total: float
    forms: dict[Any, tuple[Form | None, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, captured: CapturedModel, hardware: Hardware, found: Explanation) -> _Estimate:
        """Model every node of every region."""
        graphs = []
        for program in captured.programs.values():
            ms = modelled_ms(program, hardware)
            for site in attention_sites(program):  # a mask may say that it is causal
                work = attention_work(site.shape, site.is_causal, _itemsize(site), hardware)
                ms[site.node] = hardware.ms(work, site.q.meta["val"].dtype)
            graphs.append(Region(program, ms))
        total = sum(sum(region.ms.values()) for region in graphs)
        found.device, found.modelled_ms, found.graphs = hardware.name, total, graphs
        return cls(hardware, graphs, total)

    def fill(self, found: Explanation) -> None:
        """List the sites of every region."""
        for region in self.graphs:
            found.attention += [self._attention(s, region) for s in attention_sites(region.program)]
            found.matmuls += [self._matmul(s, region) for s in linear_sites(region.program)]
            found.recurrences += self._recurrences(region)

    def _attention(self, site: AttentionSite, region: Region) -> Site:
        work = sparse_attention_work(site.shape, _TILES, _itemsize(site), self.hardware)
        after = self.hardware.ms(work, site.q.meta["val"].dtype)
        what = f"{_TILES:.0%} of its tiles"
        return self._site(site.name, site.kind, site.shape, site.node, region, (what, after))

    def _matmul(self, site: LinearSite, region: Region) -> Site:
        dtype = site.node.meta["val"].dtype
        place = Place.of(site, dtype, self.hardware)
        key = (site.shape, site.tokens, dtype, place.copied, place.experts)
        if key not in self.forms:
            self.forms[key] = _cheapest(place)
        form, after = self.forms[key]
        target = None if form is None else (str(form), after)
        reason = f"too narrow for a form of {_PARAMETERS:.0%} of its parameters"
        shape = site.shape if site.experts is None else (site.experts, *site.shape)
        return self._site(site.name, site.kind, shape, site.node, region, target, reason)

    def _recurrences(self, region: Region) -> list[Site]:
        sites = []
        for node in region.ms:
            if node.target in RECURRENCES:
                path = f"{region.program.path}.{module_path(node)}".strip(".")
                cell = RECURRENCES[node.target]
                sites.append(self._site(path, cell, _sizes(node), node, region, None))
        return sites

    def _site(
        self,
        name: str,
        kind: str,
        shape: tuple[int, ...],
        node: fx.Node,
        region: Region,
        target: tuple[str, float] | None,
        reason: str = "nothing rewrites it",
    ) -> Site:
        """A recognised site; `target` is what it could become and the milliseconds of that."""
        ms, gain = region.ms[node], 1.0
        if target is not None:
            reason = f"{ms:.3g} ms as it is, {target[1]:.3g} ms with {target[0]}"
            gain = self.total / max(self.total - ms + target[1], 1e-12)
        share = ms / (self.total or 1.0)
        return Site(name, True, reason, kind, shape, node.name, gain, source_line(node), ms, share)


def _itemsize(site: AttentionSite) -> int:
    dtype: torch.dtype = site.q.meta["val"].dtype
    return dtype.itemsize


def _cheapest(place: Place) -> tuple[Form | None, float]:
    """The cheapest form among the largest of each sort within the target, and its cost."""
    m, n = place.shape
    largest: dict[int, Form] = {}
    for form in candidates(place.shape, FactorVvmaConfig()):  # small to large within a sort
        if form.parameters(place.shape) <= _PARAMETERS * m * n:
            largest[form.block] = form
    costs = {form: form.cost(place, "latency") for form in largest.values()}
    best = min(costs, key=costs.__getitem__, default=None)
    return (best, costs[best]) if best is not None else (None, 0.0)


def _sizes(node: fx.Node) -> tuple[int, ...]:
    """Sizes of the first tensor that a call reads."""
    return sizes(node.all_input_nodes[0].meta["val"])
