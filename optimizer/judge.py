"""The judge: a rewrite stands only if it keeps the quality budget and is measurably faster.

Quality is measured on held-out calls; time by interleaved rounds against the same model in its
best dense form. Both figures go into every verdict. The total cost is capped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxpress.capture import Call
from fxpress.plan import Verdict
from fxpress.profile import Observer, profile
from fxpress.program import Program, attribute
from fxpress.progress import Progress
from fxpress.quality import Quality
from fxpress.regions import CapturedModel
from fxpress.timing import Timings, interleave

__all__ = ["JUDGES", "Attempt", "Judge", "Proposal", "SiteTimes"]

JUDGES = ("measured", "modelled", "off")
Decisions = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Proposal:
    """Decisions of one strength that a pass could apply.

    Attributes:
        strength: how strong, in words for the report (`"20 % of dense attention cost"`).
        decide: makes the decisions, site -> plain data with `"error"`, the predicted error, and
            `"cost"`, the modelled cost as a share of the dense site's.
    """

    strength: str
    decide: Callable[[], Decisions]


@dataclass(frozen=True)
class Attempt:
    """A proposal that was tried, and what came of it."""

    strength: str
    drop: float
    holds: bool

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"strength": self.strength, "drop": self.drop, "holds": self.holds}


@dataclass(frozen=True)
class SiteTimes:
    """Milliseconds of a site in isolation, dense and rewritten."""

    before: float
    after: float
    faster: bool

    def figures(self) -> dict[str, float]:
        """For a verdict."""
        return {"ms_before": round(self.before, 4), "ms_after": round(self.after, 4)}


@dataclass
class Judge:
    """Judges the rewrites of one run.

    Attributes:
        mode: `"measured"`, `"modelled"` (time by the cost model) or `"off"`.
        quality: the budget; None when off.
        calls: held-out calls; the first is what time is measured on.
        seconds: how long judging may take in all.
        cuda: whether the model runs on a CUDA device.
        progress: told of what is judged.
    """

    mode: str
    quality: Quality | None
    calls: Sequence[Call]
    seconds: float = 150.0
    cuda: bool = False
    progress: Progress = field(default_factory=Progress)
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    drops: list[float] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)

    def time_left(self) -> float:
        """Seconds left of the cap."""
        return self.seconds - (time.perf_counter() - self._start)

    def strongest(
        self,
        name: str,
        proposals: Sequence[Proposal],
        build: Callable[[Decisions], nn.Module],
    ) -> Decisions:
        """The decisions of the strongest proposal that keeps the quality budget.

        Proposals are ordered from the strongest to the weakest, and quality is taken to rise along
        them, so a binary search finds it. A single proposal that does not hold is cut down to the
        sites of least predicted error that do.
        """
        if self.mode == "off" or not proposals:
            return proposals[0].decide() if proposals else {}
        tried = self.attempts.setdefault(name, [])
        best: Decisions = {}
        low, high = 0, len(proposals)
        while low < high:
            if self._out_of_time(f"{name}: weaker and stronger proposals were not all tried"):
                return best
            middle = (low + high) // 2
            decisions = proposals[middle].decide()
            if self._holds(build(decisions), proposals[middle].strength, tried):
                best, high = decisions, middle
            else:
                low = middle + 1
        if best or len(proposals) > 1:
            return best
        return self._harmless_sites(proposals[0], build, tried)

    def _harmless_sites(
        self, proposal: Proposal, build: Callable[[Decisions], nn.Module], tried: list[Attempt]
    ) -> Decisions:
        """The longest prefix of sites, by predicted error, that keeps the budget."""
        decisions = proposal.decide()
        order = sorted(decisions, key=lambda site: (decisions[site].get("error", 0.0), site))
        low, high = 0, len(order) - 1
        while low < high:
            if self._out_of_time("sites were not all bisected"):
                break
            middle = (low + high + 1) // 2
            kept = {site: decisions[site] for site in order[:middle]}
            holds = self._holds(build(kept), f"{proposal.strength}, {middle} sites", tried)
            low, high = (middle, high) if holds else (low, middle - 1)
        return {site: decisions[site] for site in order[:low]}

    def _out_of_time(self, consequence: str) -> bool:
        if self.time_left() > 0:
            return False
        self.notes.append(f"judge_seconds={self.seconds:g} ran out: {consequence}")
        return True

    def _holds(self, module: nn.Module, strength: str, tried: list[Attempt]) -> bool:
        assert self.quality is not None
        with self.progress.step(f"judge quality: {strength}", 1) as advance:
            drop = self.quality.drop(module)
            advance()
        holds = drop <= self.quality.budget
        tried.append(Attempt(strength, drop, holds))
        return holds

    def slow_sites(self, times: Mapping[str, SiteTimes]) -> list[Verdict]:
        """Verdicts on sites: what is not faster in isolation is taken back."""
        verdicts = []
        for site, t in times.items():
            reason = "faster in isolation" if t.faster else "not faster in isolation"
            verdicts.append(Verdict(site, t.faster, reason, t.figures()))
        return verdicts

    def time_models(self, modules: Mapping[str, nn.Module]) -> Timings:
        """Whole models side by side on the first held-out call."""
        args, kwargs = self.calls[0]

        def runner(module: nn.Module) -> Callable[[], Any]:
            def run() -> Any:
                with torch.no_grad():
                    return module(*args, **kwargs)

            return run

        seconds = max(3.0, min(25.0, self.time_left()))
        with self.progress.step("judge latency", None):
            return interleave(
                {name: runner(module) for name, module in modules.items()},
                rounds=15,
                seconds=seconds,
                cuda=self.cuda,
            )


@dataclass
class _Recorder(Observer):
    """Keeps what a node was called with in the first call."""

    node: fx.Node
    values: dict[str, Any] = field(default_factory=dict)

    def observe(self, inputs: Mapping[str, Any], _output: Any) -> None:
        if not self.values:
            self.values.update(inputs)


def time_sites(
    before: CapturedModel,
    after: CapturedModel,
    sites: Sequence[str],
    call: Call,
    *,
    cuda: bool = False,
    progress: Progress | None = None,
) -> dict[str, SiteTimes]:
    """Time rewritten sites in isolation, on inputs recorded from one call.

    Args:
        before: the captured model before the pass.
        after: the same after it; its new nodes carry the site in their provenance.
        sites: which sites.
        call: the call to record.
        cuda: whether to synchronize a device.
        progress: told of every site.
    """
    progress = progress or Progress()
    pairs = _pairs(before, after, sites)
    recorders = {site: _Recorder(old) for site, (_, old, _) in pairs.items()}
    observers: dict[str, list[Observer]] = {}
    for site, (path, _, _) in pairs.items():
        observers.setdefault(path, []).append(recorders[site])
    profile(before, [call], observers, Progress())
    times: dict[str, SiteTimes] = {}
    known: dict[Any, SiteTimes] = {}
    with progress.step("judge sites", len(pairs)) as advance:
        for site, (path, old, new) in pairs.items():
            values = recorders[site].values
            key = _key(old, new, values)
            if key not in known:
                known[key] = _time_site(after.programs[path], old, new, values, cuda)
            times[site] = known[key]
            advance()
    return times


def _pairs(
    before: CapturedModel, after: CapturedModel, sites: Sequence[str]
) -> dict[str, tuple[str, fx.Node, list[fx.Node]]]:
    """Site -> (region, the old node, the new nodes in order)."""
    found: dict[str, tuple[str, fx.Node, list[fx.Node]]] = {}
    for path, program in after.programs.items():
        old = {node.name: node for node in before.programs[path].graph.nodes}
        for node in program.graph.nodes:
            origin = node.meta.get("provenance")
            if origin is None or origin.site not in sites or origin.sources[0] not in old:
                continue
            entry = found.setdefault(origin.site, (path, old[origin.sources[0]], []))
            entry[2].append(node)
    return found


def _key(old: fx.Node, new: Sequence[fx.Node], values: Mapping[str, Any]) -> Any:
    """Equal sites do equal work: same operators, shapes and specs."""
    shapes = tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in values.values())
    plain = tuple(str(a) for n in new for a in n.args if isinstance(a, (str, int, float, bool)))
    return (str(old.target), shapes, tuple(str(n.target) for n in new if n.op != "get_attr"), plain)


def _time_site(
    program: Program,
    old: fx.Node,
    new: Sequence[fx.Node],
    values: Mapping[str, Any],
    cuda: bool,
) -> SiteTimes:
    held = {n: attribute(program.graph_module, str(n.target)) for n in new if n.op == "get_attr"}
    inputs = {node.name: value for node, value in held.items()} | dict(values)

    def run_old() -> Any:
        return _evaluate([old], dict(values))

    def run_new() -> Any:
        return _evaluate([n for n in new if n.op != "get_attr"], dict(inputs))

    with torch.no_grad():
        timings = interleave({"old": run_old, "new": run_new}, rounds=7, seconds=2.0, cuda=cuda)
    faster = timings.is_faster("old", "new")
    return SiteTimes(timings.median("old"), timings.median("new"), faster)


def _evaluate(nodes: Sequence[fx.Node], env: dict[str, Any]) -> Any:
    result = None
    for node in nodes:
        args, kwargs = pytree.tree_map(
            lambda a: env[a.name] if isinstance(a, fx.Node) else a, (node.args, dict(node.kwargs))
        )
        result = env[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
    return result
