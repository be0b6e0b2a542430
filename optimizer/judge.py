"""The judge: a rewrite stands only if it keeps the quality budget and is measurably faster.

Quality is measured on held-out calls; time by interleaved rounds against the same model in its
best dense form. Both figures go into every verdict. The total cost is capped.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fxpress.capture import Call
from fxpress.plan import Verdict
from fxpress.planning import Decisions, Proposal
from fxpress.progress import Progress
from fxpress.quality import Quality
from fxpress.regions import CapturedModel
from fxpress.site_timing import time_sites
from fxpress.timing import Timings, interleave

__all__ = ["JUDGES", "Attempt", "Judge"]

JUDGES = ("measured", "modelled", "off")
_HAD_CORE = 0.8  # below it times are not trusted
_BUSY = "other work kept the machine busy while times were taken"


@dataclass(frozen=True)
class Attempt:
    """A proposal that was tried, and what came of it.

    Attributes:
        strength: its name.
        drop: quality lost.
        holds: whether that is within the budget.
        sites: that it decides on; none where what it asks for leaves every site as it is.
    """

    strength: str
    drop: float
    holds: bool
    sites: int

    @property
    def outcome(self) -> str:
        """In a few words."""
        if not self.sites:
            return "changes nothing"
        return "holds" if self.holds else "over budget"

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {**asdict(self), "outcome": self.outcome}


@dataclass
class _OneAtATime:
    """Decisions of proposals, the last alone held: they can be as large as the model."""

    proposals: Sequence[Proposal]
    _held: dict[int, Decisions] = field(default_factory=dict)

    def decisions(self, index: int) -> Decisions:
        """Those of one proposal, made again if another was asked for since."""
        if index not in self._held:
            self._held.clear()
            gc.collect()  # what was built of them holds them too, and a graph module is a cycle
            self._held[index] = self.proposals[index].decide()
        return self._held[index]


@dataclass
class Judge:
    """Judges the rewrites of one run.

    Attributes:
        mode: `"measured"`, `"modelled"` (time by the cost model) or `"off"`.
        quality: the budget; None when off.
        calls: held-out calls; the first is what time is measured on.
        seconds: how long judging may take in all; profiling does not count.
        cuda: whether the model runs on a CUDA device.
        progress: told of what is judged.
        attempts: what was tried, by pass.
        notes: what was not judged, and why.
    """

    mode: str
    quality: Quality | None
    calls: Sequence[Call]
    seconds: float = 150.0
    cuda: bool = False
    progress: Progress = field(default_factory=Progress)
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _spent: float = 0.0
    _since: float | None = None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Count what is done within against the cap."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._spent += time.perf_counter() - self._since
            self._since = None

    def time_left(self) -> float:
        """Seconds left of the cap."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self.seconds - self._spent - running

    def strongest(
        self,
        name: str,
        proposals: Sequence[Proposal],
        build: Callable[[Decisions], nn.Module],
    ) -> Decisions:
        """The decisions of the strongest proposal that keeps the quality budget.

        Proposals are ordered from the strongest to the weakest, and quality is taken to rise along
        them, so a binary search finds it. After the first that does not hold, the weakest is looked
        at: where not even that holds, nothing else need be tried. A single proposal that does not
        hold is cut down to the sites of least predicted error that do.
        """
        if self.mode == "off" or not proposals:
            return proposals[0].decide() if proposals else {}
        tried = self.attempts.setdefault(name, [])
        one = _OneAtATime(proposals)

        def holds(index: int) -> bool:
            decisions = one.decisions(index)
            return self._holds(build(decisions), proposals[index].strength, len(decisions), tried)

        low, high = 0, len(proposals)
        while low < high:
            if self._out_of_time(f"{name}: weaker and stronger proposals were not all tried"):
                break
            middle = (low + high) // 2
            if holds(middle):
                high = middle
                continue
            low = middle + 1
            if len(tried) == 1 and low < high:
                if not holds(high - 1):
                    return {}
                high -= 1
        if high < len(proposals):
            return one.decisions(high)
        if len(proposals) > 1:
            return {}
        return self._harmless_sites(proposals[0].strength, one.decisions(0), build, tried)

    def _harmless_sites(
        self,
        strength: str,
        decisions: Decisions,
        build: Callable[[Decisions], nn.Module],
        tried: list[Attempt],
    ) -> Decisions:
        """The longest prefix of sites, by predicted error, that keeps the budget."""
        order = sorted(decisions, key=lambda site: (decisions[site].get("error", 0.0), site))
        low, high = 0, len(order) - 1
        while low < high:
            if self._out_of_time("sites were not all bisected"):
                break
            middle = (low + high + 1) // 2
            kept = {site: decisions[site] for site in order[:middle]}
            holds = self._holds(build(kept), f"{strength}, {middle} sites", middle, tried)
            low, high = (middle, high) if holds else (low, middle - 1)
        return {site: decisions[site] for site in order[:low]}

    def _out_of_time(self, consequence: str) -> bool:
        if self.time_left() > 0:
            return False
        self.notes.append(f"judge_seconds={self.seconds:g} ran out: {consequence}")
        return True

    def holds(self, name: str, module: nn.Module, strength: str, sites: int) -> bool:
        """Whether a module that was made otherwise keeps the budget; it counts as an attempt."""
        return self._holds(module, strength, sites, self.attempts.setdefault(name, []))

    def nearest_miss(
        self, name: str, proposals: Sequence[Proposal], reach: float
    ) -> Proposal | None:
        """The proposal over the budget that missed it least, by no more than a factor."""
        assert self.quality is not None
        missed = {a.strength: a.drop for a in self.attempts.get(name, []) if not a.holds}
        within = reach * self.quality.budget
        near = [p for p in proposals if missed.get(p.strength, math.inf) <= within]
        return min(near, key=lambda p: missed[p.strength], default=None)

    def _holds(self, module: nn.Module, strength: str, sites: int, tried: list[Attempt]) -> bool:
        assert self.quality is not None
        with self.progress.step(f"judge quality: {strength}", 1) as advance:
            drop = self.quality.drop(module)
            advance()
        holds = drop <= self.quality.budget
        tried.append(Attempt(strength, drop, holds, sites))
        return holds

    def nothing_holds(self, name: str) -> Verdict:
        """The verdict on a pass none of whose proposals changes anything within the budget."""
        assert self.quality is not None
        figures = {"budget": self.quality.budget}
        tried = self.attempts.get(name)
        if not tried:
            return Verdict("", False, "there was no time to try a proposal", figures)
        over = [attempt.drop for attempt in tried if not attempt.holds]
        if not over:
            return Verdict("", False, "every proposal leaves all sites as they are", figures)
        figures["least_drop"] = min(over)
        return Verdict("", False, "no proposal keeps the quality budget", figures)

    def slow_sites(
        self, before: CapturedModel, after: CapturedModel, sites: Sequence[str]
    ) -> list[Verdict]:
        """Verdicts on sites: what is not faster in isolation is taken back.

        Sites that there is no time for stand, and are named.

        Args:
            before: the captured model before the pass.
            after: the same after it.
            sites: which sites.
        """
        timed = time_sites(
            before,
            after,
            sites,
            self.calls[0],
            cuda=self.cuda,
            progress=self.progress,
            time_left=self.time_left,
        )
        if untimed := [site for site in sites if site not in timed]:
            names = ", ".join(untimed[:3]) + (f" and {len(untimed) - 3} more" * (len(untimed) > 3))
            self._out_of_time(f"not timed in isolation: {names}")
        self._note_load(list(timed.values()))
        verdicts = []
        for site, timings in timed.items():
            faster = timings.is_faster("before", "after")
            reason = "faster in isolation" if faster else "not faster in isolation"
            verdicts.append(Verdict(site, faster, reason, timings.figures("before", "after")))
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
            timings = interleave(
                {name: runner(module) for name, module in modules.items()},
                rounds=15,
                seconds=seconds,
                cuda=self.cuda,
            )
        self._note_load([timings])
        return timings

    def _note_load(self, timings: Sequence[Timings]) -> None:
        """Say that a machine was too busy for its times to be those of an idle one.

        Sparse operators suffer more than dense ones: they are many small parallel regions, and
        at the end of each every thread waits for the last that gets a core
        (docs/notes/judging-under-load.md).
        """
        least = min((t.had_core for t in timings), default=1.0)
        if least < _HAD_CORE and not any(note.startswith(_BUSY) for note in self.notes):
            self.notes.append(
                f"{_BUSY} (the judge had a core for {least:.0%} of it): what was rolled back for "
                "its time may be faster on an idle machine"
            )
