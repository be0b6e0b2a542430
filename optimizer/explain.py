"""`explain`: every attention, matmul and recurrence, recognised or the reason why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxpress.capture import frozen
from fxpress.config import OptimizeConfig
from fxpress.flops import multiply_adds
from fxpress.passes import all_passes
from fxpress.passes.sites import attention_sites, linear_sites
from fxpress.pipeline import Pipeline, resolve_order
from fxpress.program import Program, module_path, source_line
from fxpress.regions import capture_model
from fxpress.rewrite import Decline

__all__ = ["Explanation", "Site", "explain"]

aten = torch.ops.aten

_TARGET_DENSITY = 0.2  # of attention, in the estimate of what pruning could gain
_RECURRENCES = {
    aten.lstm.input: "lstm",
    aten.gru.input: "gru",
    aten.rnn_tanh.input: "rnn",
    aten.rnn_relu.input: "rnn",
}


@dataclass(frozen=True)
class Site:
    """One place in a model that fxpress works on.

    Attributes:
        path: name of the site: module path, with `#n` for further calls in the same module.
        recognised: whether it was brought to its canonical form.
        reason: why not, or what the estimate assumes.
        kind: attention: "self", "causal" or "cross"; matmul: "linear"; recurrence: its cell.
        shape: attention (B, H, Hkv, Nq, Nk, D, Dv); matmul (m, n); recurrence: input sizes.
        node: name of the node.
        gain: estimated speed-up of the whole model from optimizing this site alone.
        source: `file:line` of the model's code.
    """

    path: str
    recognised: bool
    reason: str
    kind: str
    shape: tuple[int, ...]
    node: str
    gain: float
    source: str = ""


@dataclass
class Explanation:
    """What was found in a model; printing it gives a table."""

    attention: list[Site] = field(default_factory=list)
    matmuls: list[Site] = field(default_factory=list)
    recurrences: list[Site] = field(default_factory=list)
    regions: list[dict[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        groups = {"attention": self.attention, "matmuls": self.matmuls}
        groups["recurrences"] = self.recurrences
        found: dict[str, Any] = {name: [asdict(s) for s in g] for name, g in groups.items()}
        return {"schema": 1, **found, "regions": self.regions}

    def __str__(self) -> str:
        """A table of all sites."""
        rows = [["what", "site", "kind", "shape", "recognised", "gain", "reason"]]
        groups = [("attention", self.attention), ("matmul", self.matmuls)]
        for what, sites in [*groups, ("recurrence", self.recurrences)]:
            rows += [_row(what, site) for site in sites]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines.append(self._summary())
        lines += [
            f"stays Python: {r['path'] or 'the root'}: {r['reason']}"
            for r in self.regions
            if r["captured"] == "no"
        ]
        return "\n".join(lines)

    def _summary(self) -> str:
        parts = []
        for name, sites in (
            ("attention", self.attention),
            ("matmuls", self.matmuls),
            ("recurrences", self.recurrences),
        ):
            parts.append(f"{name} {sum(s.recognised for s in sites)} of {len(sites)} recognised")
        return "; ".join(parts)


def _row(what: str, site: Site) -> list[str]:
    shape = "x".join(map(str, site.shape))
    yes = "yes" if site.recognised else "no"
    reason = site.reason if site.recognised else f"{site.reason} ({site.source})"
    return [what, site.path, site.kind, shape, yes, f"{site.gain:.2f}x", reason]


def explain(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Explanation:
    """List every attention, matmul and recurrence of a model, and what optimizing it could gain.

    Args:
        model: any module; it is left as it is.
        args: positional arguments of one call.
        kwargs: keyword arguments of it.

    Raises:
        CaptureError: no part of the model can be captured.
    """
    call = (tuple(args), dict(kwargs or {}))
    with frozen(model):
        captured = capture_model(model, [call])
    pipeline = Pipeline(OptimizeConfig())
    found = Explanation(regions=captured.as_dicts())
    for kind in resolve_order(all_passes().values()):
        if kind.phase != "canonicalize":
            continue
        record = pipeline.run(kind, captured)
        if kind.name == "fuse-attention":
            found.attention += [_refused(d, "attention") for d in record.declined]
        elif kind.name == "normalize-linear":
            found.matmuls += [_refused(d, "linear") for d in record.declined]
    total = max(multiply_adds(captured.build(), call), 1)
    for path, program in captured.programs.items():
        found.attention += _attention(program, total)
        found.matmuls += _matmuls(program)
        found.recurrences += _recurrences(path, program)
    return found


def _refused(decline: Decline, kind: str) -> Site:
    node = decline.at.name if decline.at is not None else ""
    where = decline.site or decline.path
    return Site(where, False, decline.reason, kind, (), node, 1.0, decline.source)


def _attention(program: Program, total: int) -> list[Site]:
    sites = []
    for site in attention_sites(program):
        batch, heads, _, queries, keys, width, value_width = site.shape
        share = batch * heads * queries * keys * (width + value_width) / total
        gain = 1 / (1 - min(share, 1.0) * (1 - _TARGET_DENSITY))
        reason = f"if {_TARGET_DENSITY:.0%} of its tiles stay; by multiply-adds"
        line = source_line(site.node)
        sites.append(
            Site(site.name, True, reason, site.kind, site.shape, site.node.name, gain, line)
        )
    return sites


def _matmuls(program: Program) -> list[Site]:
    return [
        Site(
            s.name,
            True,
            "no pass rewrites matmuls",
            "linear",
            s.shape,
            s.node.name,
            1.0,
            source_line(s.node),
        )
        for s in linear_sites(program)
    ]


def _recurrences(region: str, program: Program) -> list[Site]:
    sites = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in _RECURRENCES:
            continue
        path = f"{region}.{module_path(node)}".strip(".")
        sites.append(
            Site(
                path,
                True,
                "no pass rewrites recurrences",
                _RECURRENCES[node.target],
                _sizes(node),
                node.name,
                1.0,
                source_line(node),
            )
        )
    return sites


def _sizes(node: fx.Node) -> tuple[int, ...]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return tuple(int(size) for size in source.meta["val"].shape)
