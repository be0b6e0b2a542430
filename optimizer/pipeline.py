"""`Pipeline`: which passes run, in which order, with verification, provenance, fuel and dumps.

The order is data: each pass states its phase and which passes must come before it, with the
reason; a topological sort by name makes it one order, which a golden file holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx

from fxpress import environment
from fxpress.config import OptimizeConfig
from fxpress.errors import PassError
from fxpress.planning import PlannedPass
from fxpress.program import Program
from fxpress.regions import CapturedModel
from fxpress.rewrite import Decline, Fuel, Pass, PassContext, PassRecord
from fxpress.verify import verify

__all__ = ["PHASES", "Pipeline", "resolve_order"]

PHASES = ("canonicalize", "rewrite")

log = logging.getLogger("fxpress")


def resolve_order(passes: Iterable[type[Pass]]) -> list[type[Pass]]:
    """Passes in the order in which they run: by phase, then by `after`, then by name.

    Raises:
        PassError: an unknown or wrong phase, an `after` that names no pass, or a circle.
    """
    by_name = {p.name: p for p in passes}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(by_name)
    for kind in by_name.values():
        if kind.phase not in PHASES:
            raise PassError(f"{kind.name}: unknown phase {kind.phase!r}, not one of {PHASES}")
        if (kind.phase == "rewrite") != issubclass(kind, PlannedPass):
            raise PassError(f"{kind.name}: a PlannedPass, and no other, is of the phase 'rewrite'")
        for earlier in kind.after:
            if earlier not in by_name:
                raise PassError(f"{kind.name} must run after {earlier!r}, which is no pass")
            graph.add_edge(earlier, kind.name)
    try:
        names = nx.lexicographical_topological_sort(
            graph, key=lambda name: (PHASES.index(by_name[name].phase), name)
        )
        return [by_name[name] for name in names]
    except nx.NetworkXUnfeasible:
        raise PassError(f"passes wait for each other: {nx.find_cycle(graph)}") from None


@dataclass
class Pipeline:
    """Runs passes over every region of a captured model.

    Attributes:
        config: settings and overrides.
        device: type of the device that the model will run on.
        fuel: how many rewrites may still be applied.
        verify_each: check the invariants after each pass.
    """

    config: OptimizeConfig = field(default_factory=OptimizeConfig)
    device: str = "cpu"
    fuel: Fuel = field(default_factory=lambda: Fuel(environment.fuel()))
    verify_each: bool = True

    def trial(self) -> Pipeline:
        """The same, with fuel of its own: what is only tried burns none."""
        return replace(self, fuel=Fuel(self.fuel.left))

    def run(
        self,
        kind: type[Pass],
        captured: CapturedModel,
        decisions: Mapping[str, Any] | None = None,
    ) -> PassRecord:
        """Run one pass over every region, in place.

        Raises:
            PassError: the pass raised; the message names it and the region.
            VerifyError: the pass broke an invariant.
        """
        record = PassRecord(kind.name, kind.exactness, before=captured.snapshot())
        for path, program in captured.programs.items():
            record.merge(self._run_region(kind, path, program, decisions or {}))
            if self.verify_each:
                verify(program, kind.name, record.before.programs[path])
        record.after = captured.snapshot()
        self._dump(record)
        return record

    def _run_region(
        self, kind: type[Pass], path: str, program: Program, decisions: Mapping[str, Any]
    ) -> PassRecord:
        ctx = PassContext(
            config=self.config.settings(kind.name, kind),
            decisions=decisions,
            device=self.device,
            fuel=self.fuel,
            enabled=self._enabled(kind.name, path),
        )
        start = time.perf_counter()
        try:
            for shorter in program.shorter if kind.phase == "canonicalize" else ():
                kind().run(shorter, replace(ctx, fuel=Fuel(ctx.fuel.left)))
            record = kind().run(program, ctx)
        except (PassError, AssertionError):
            raise
        except Exception as error:
            where = f" in region {path}" if path else ""
            raise PassError(f"{kind.name}{where} raised {type(error).__name__}: {error}") from error
        record.seconds = time.perf_counter() - start
        return record

    def _enabled(self, name: str, region: str) -> Callable[[str], bool]:
        def enabled(path: str) -> bool:
            full = f"{region}.{path}".strip(".") if region else path
            return self.config.enables_at(name, full)

        return enabled

    def _dump(self, record: PassRecord) -> None:
        level = environment.debug_level()
        if level >= 2:
            log.warning("%s: %s", record.name, record.counts() or _summary(record.declined))
        if level >= 3:
            log.warning("after %s:\n%s", record.name, record.after)
        if folder := environment.dump_folder():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{record.name}.before.txt").write_text(str(record.before))
            (folder / f"{record.name}.after.txt").write_text(str(record.after))


def _summary(declined: Iterable[Decline]) -> str:
    return "; ".join(sorted({d.reason for d in declined})) or "nothing to do"
