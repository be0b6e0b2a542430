"""A planned pass for tests of the run itself: it has nothing to do with attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from fxpress.passes import all_passes
from fxpress.passes.sites import linear_sites
from fxpress.planning import Decisions, PlanContext, PlannedPass, Proposal
from fxpress.program import Program
from fxpress.rewrite import Applied, PassContext, PassRecord, provide
from fxpress.testing import APPROXIMATES, Exactness


class ScaleLinear(PlannedPass):
    """linear(x, W, b) -> linear(x, W, b) * factor; its proposals are whatever a test asks for."""

    name: ClassVar[str] = "scale-linear"
    phase: ClassVar[str] = "rewrite"
    exactness: ClassVar[Exactness] = APPROXIMATES(0.0)
    ladder: ClassVar[list[Decisions]] = []

    def run(self, program: Program, ctx: PassContext) -> PassRecord:
        """Scale what was decided."""
        record = PassRecord(self.name, self.exactness)
        for site in linear_sites(program):
            if site.name not in ctx.decisions or not ctx.fuel.burn():
                continue
            factor = ctx.decisions[site.name]["factor"]
            node = site.node

            def build(node: fx.Node = node, factor: float = factor) -> fx.Node:
                graph = program.graph
                linear = graph.call_function(torch.ops.aten.linear.default, node.args)
                return graph.call_function(torch.ops.aten.mul.Tensor, (linear, factor))

            provide(program, node, self.name, build, site.name)
            record.ledger[site.name] = {"modelled_ms": {"before": 1.0, "after": factor}}
            record.rewrites.append(Applied(self.name, node.name, site.name, site.name))
        program.finish()
        return record

    def propose(self, ctx: PlanContext) -> list[Proposal]:
        """The ladder of the test."""
        return [
            Proposal(f"rung {index}", functools.partial(dict, decisions))
            for index, decisions in enumerate(self.ladder)
        ]

    def sites(self, program: Program) -> Mapping[str, Mapping[str, Any]]:
        """Every product with a weight."""
        return {s.name: {"kind": "linear", "shape": list(s.shape)} for s in linear_sites(program)}


def scaled(**factors: float) -> Decisions:
    """Decisions for sites of `models.stack`: `scaled(out0=1.5)` scales the module `0.out`."""
    return {
        f"{name[-1]}.{name[:-1]}": {"factor": factor, "error": abs(factor - 1)}
        for name, factor in factors.items()
    }


def offer(patch: pytest.MonkeyPatch, *ladder: Decisions) -> None:
    """Let `optimize` find the pass, with this ladder, strongest first."""
    found = {**all_passes(), ScaleLinear.name: ScaleLinear}
    patch.setattr("fxpress.api.all_passes", lambda: found)
    patch.setattr(ScaleLinear, "ladder", list(ladder))
