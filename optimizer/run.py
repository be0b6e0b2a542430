"""One run of `optimize`: canonicalize, then plan, rewrite and judge every planned pass; or replay.

Nothing here knows a pass by name: what a pass can gain, its sites and their cost by its own model
come from `PlannedPass`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxpress.calibration import Calibration
from fxpress.capture import Call
from fxpress.config import OptimizeConfig, nearest
from fxpress.errors import PlanError
from fxpress.judge import Judge
from fxpress.optimized import OptimizedModule
from fxpress.pipeline import Pipeline, resolve_order
from fxpress.plan import Plan, Verdict, describe_call
from fxpress.planning import Decisions, PlanContext, PlannedPass, Proposal
from fxpress.progress import Progress
from fxpress.quality import Quality
from fxpress.recover import distill
from fxpress.regions import CapturedModel, capture_model
from fxpress.report import Report
from fxpress.rewrite import Pass, PassRecord, RolledBack
from fxpress.timing import Timings

__all__ = ["Run"]


@dataclass
class Run:
    """What has been captured, done and decided so far.

    Attributes:
        model: what is optimized, on the device where it will run.
        config: settings of passes and judge.
        passes: every pass by name.
        objective: `"latency"` or `"memory"`.
        progress: told of all long work.
        device: where the model runs.
        seed: for the report.
        canonical: the programs after the exact passes.
        captured: the programs as they stand.
        records: what each pass did.
        plan: decisions and verdicts.
        judge: None in a replay.
        quality: the budget; None in a replay and with `judge="off"`.
        final_drop: how much quality the finished model loses, if it was measured.
        timings: whole models side by side, from the last time that they were timed.
        notes: what the reader of the report must know.
        dropped: inputs of batches that the model does not take.
    """

    model: nn.Module
    config: OptimizeConfig
    passes: Mapping[str, type[Pass]]
    objective: str
    progress: Progress
    device: torch.device
    seed: int = 0
    canonical: CapturedModel = field(init=False)
    captured: CapturedModel = field(init=False)
    records: dict[str, PassRecord] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    judge: Judge | None = None
    quality: Quality | None = None
    final_drop: float | None = None
    timings: Timings | None = None
    notes: list[str] = field(default_factory=list)
    dropped: tuple[str, ...] = ()
    start: float = field(default_factory=time.perf_counter)
    _pipeline: Pipeline = field(init=False)

    def __post_init__(self) -> None:
        self._pipeline = Pipeline(self.config, self.device.type)

    # Search --------------------------------------------------------------------------------------

    def search(self, data: Calibration, quality: Quality | None, mode: str) -> None:
        """Canonicalize, then let every planned pass propose, and keep what the judge lets stand.

        Args:
            data: calibration and held-out calls.
            quality: the budget; None for `mode="off"`.
            mode: as `Judge.mode`.
        """
        self.notes += data.notes
        self.dropped, self.quality = data.dropped, quality
        self.plan.calls = _distinct([describe_call(call) for call in data.calls])
        self.judge = Judge(
            mode,
            quality,
            data.heldout,
            self.config.judge_seconds,
            self.device.type == "cuda",
            self.progress,
        )
        self._canonicalize(data.calls)
        for kind in self.planned():
            self._search_pass(kind, data, self.judge)
        if self.changed and quality is not None:
            self.final_drop = quality.drop(self._module(self.captured))

    def _canonicalize(self, calls: Sequence[Call]) -> None:
        """Capture the model and run the exact passes."""
        self.canonical = capture_model(self.model, calls)
        for kind in resolve_order(self.passes.values()):
            if not issubclass(kind, PlannedPass) and self.config.enables(kind.name):
                self.records[kind.name] = self._pipeline.run(kind, self.canonical)
        self.captured = self.canonical.copy()

    def planned(self) -> list[type[PlannedPass]]:
        """The planned passes that the configuration leaves in, in order."""
        order = resolve_order(self.passes.values())
        return [k for k in order if issubclass(k, PlannedPass) and self.config.enables(k.name)]

    def _search_pass(self, kind: type[PlannedPass], data: Calibration, judge: Judge) -> None:
        record = PassRecord(kind.name, kind.exactness)
        proposals = self._proposals(kind, data, record)
        with judge.at_work():
            decisions = judge.strongest(kind.name, proposals, lambda d: self._trial(kind, d))
            decisions = self._recovered(kind, proposals, data, judge, record) or decisions
            if decisions:
                self.plan.decisions[kind.name] = decisions
            if proposals and not decisions and judge.mode != "off":
                self.plan.verdicts[kind.name] = [judge.nothing_holds(kind.name)]
            elif decisions:
                self._judge_gain(kind, decisions, judge)
        self._apply(kind, record)

    def _proposals(
        self, kind: type[PlannedPass], data: Calibration, record: PassRecord
    ) -> list[Proposal]:
        if self.objective not in kind.objectives:
            self.notes.append(
                f"{kind.name} saves no {self.objective}: left out for objective='{self.objective}'"
            )
            return []
        return kind().propose(
            PlanContext(
                captured=self.captured,
                calls=data.profile,
                settings=lambda path: self.config.settings(kind.name, kind, path),
                enabled=lambda path: self.config.enables_at(kind.name, path),
                record=record,
                device=self.device.type,
                objective=self.objective,
                forced=self.judge is not None and self.judge.mode == "off",
                exact=self.quality is not None and self.quality.is_exact,
                progress=self.progress,
            )
        )

    def _recovered(
        self,
        kind: type[PlannedPass],
        proposals: Sequence[Proposal],
        data: Calibration,
        judge: Judge,
        record: PassRecord,
    ) -> Decisions | None:
        """Decisions of the proposal that missed the budget least, if training brings it back."""
        settings = self.config.recover
        if settings is None or judge.mode == "off" or not proposals:
            return None
        proposal = judge.nearest_miss(kind.name, proposals, settings.reach)
        if proposal is None:
            return None
        captured = self.captured.copy()
        decisions = _own_tensors(proposal.decide())
        trial = self._pipeline.trial().run(kind, captured, decisions)
        programs = captured.programs.values()
        trained = {key: p for program in programs for key, p in kind().trainable(program).items()}
        if not trained:
            return None
        recovery = distill(
            self.model,
            captured.build(),
            list(trained.values()),
            data.profile,
            settings,
            strength=proposal.strength,
            seed=self.seed,
            progress=self.progress,
        )
        record.recovery = recovery.as_dict()
        if not recovery.best:
            return None
        module = self._module(captured, {**self.records, kind.name: trial})
        if not judge.holds(kind.name, module, f"{proposal.strength}, recovered", len(decisions)):
            return None
        for (site, key), parameter in trained.items():
            decisions[site][key] = parameter.detach().clone()
        return decisions

    # Judging -------------------------------------------------------------------------------------

    def _judge_gain(self, kind: type[PlannedPass], decisions: Decisions, judge: Judge) -> None:
        """Take back sites, then the pass, where nothing is gained."""
        if judge.mode == "modelled" or (judge.mode == "measured" and self.objective == "memory"):
            self.plan.verdicts[kind.name] = self._judge_cost(kind, decisions)
        elif judge.mode == "measured":
            self.plan.verdicts[kind.name] = self._judge_sites(kind, decisions, judge)
            if standing := self.plan.standing(kind.name):
                self.plan.verdicts[kind.name] += self._judge_whole(kind, standing, judge)

    def _judge_cost(self, kind: type[PlannedPass], decisions: Decisions) -> list[Verdict]:
        """Sites that the cost model, or a count of bytes, finds no better are taken back."""
        record = self._pipeline.trial().run(kind, self.captured.copy(), decisions)
        key, unit = ("bytes", "bytes") if self.objective == "memory" else ("modelled_ms", "ms")
        verdicts = []
        for site, entry in record.ledger.items():
            before, after = entry[key]["before"], entry[key]["after"]
            reason = f"{'fewer' if after < before else 'no fewer'} {unit} by the cost model"
            figures = {f"{unit}_before": before, f"{unit}_after": after}
            verdicts.append(Verdict(site, after < before, reason, figures))
        return verdicts

    def _judge_sites(
        self, kind: type[PlannedPass], decisions: Decisions, judge: Judge
    ) -> list[Verdict]:
        """Sites that are not faster in isolation are taken back."""
        after = self.captured.copy()
        self._pipeline.trial().run(kind, after, decisions)
        return judge.slow_sites(self.captured, after, list(decisions))

    def _judge_whole(
        self, kind: type[PlannedPass], standing: Decisions, judge: Judge
    ) -> list[Verdict]:
        """The pass is taken back where the whole model is not faster than any form before it."""
        modules = {"original": self.model, "dense": self.canonical.build()}
        if self.changed:
            modules["so far"] = self.captured.build()
        timings = judge.time_models(modules | {"optimized": self._trial(kind, standing)})
        base = min(modules, key=timings.median)
        is_faster = timings.is_faster(base, "optimized")
        if is_faster or self.timings is None:
            self.timings = timings
        if is_faster:
            return []
        reason = f"the whole model is not measurably faster than in {base} form"
        return [Verdict("", False, reason, timings.figures(base, "optimized"))]

    def _trial(self, kind: type[PlannedPass], decisions: Decisions) -> OptimizedModule:
        """The model as it stands with decisions of one more pass."""
        captured = self.captured.copy()
        record = self._pipeline.trial().run(kind, captured, decisions)
        return self._module(captured, {**self.records, kind.name: record})

    def _module(
        self, captured: CapturedModel, records: Mapping[str, PassRecord] | None = None
    ) -> OptimizedModule:
        """Some programs as a module that a user's `validation_fn` can take."""
        return OptimizedModule(
            captured,
            passes=self.records if records is None else records,
            plan=self.plan,
            report=Report({}),
            original=self.model,
        )

    # Applying ------------------------------------------------------------------------------------

    def replay(self, plan: Plan, calls: Sequence[Call] = ()) -> None:
        """Apply the decisions of a plan that its verdicts let stand.

        Args:
            plan: from an earlier run on a model like this one.
            calls: what to capture the model for; the plan's own example calls where empty.

        Raises:
            PlanError: a pass or a site of the plan is unknown.
        """
        self.plan = plan
        for name in plan.decisions:
            if name not in self.passes:
                raise PlanError(
                    f"the plan is for an unknown pass {name!r}: {nearest(name, self.passes)}"
                )
        self._canonicalize(calls or plan.example_calls(self.device))
        for kind in self.planned():
            if kind.name in plan.decisions:
                self._check_sites(kind, plan.decisions[kind.name])
                self._apply(kind)
        self.notes.append("decisions and verdicts of a stored plan: nothing was judged again")

    def _check_sites(self, kind: type[PlannedPass], decisions: Decisions) -> None:
        known = {site for p in self.captured.programs.values() for site in kind().sites(p)}
        if missing := sorted(set(decisions) - known):
            hint = nearest(missing[0], known) if known else f"it has none for {kind.name}"
            raise PlanError(
                f"the plan does not fit this model: it has no site {missing[0]!r}; {hint}"
            )

    def _apply(self, kind: type[PlannedPass], record: PassRecord | None = None) -> None:
        """Apply what stands; `record` is what the pass noted while it planned."""
        applied = self._pipeline.run(kind, self.captured, self.plan.standing(kind.name))
        if record is not None:
            applied.merge(record)
        applied.rolled_back = [
            RolledBack(v.site, v.reason, v.figures)
            for v in self.plan.verdicts.get(kind.name, [])
            if not v.kept
        ]
        self.records[kind.name] = applied

    @property
    def changed(self) -> bool:
        """Whether any planned pass changed anything."""
        return any(
            self.records[kind.name].rewrites for kind in self.planned() if kind.name in self.records
        )


def _own_tensors(decisions: Decisions) -> Decisions:
    """Decisions whose tensors can be trained without changing others."""
    return {
        site: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in decision.items()}
        for site, decision in decisions.items()
    }


def _distinct(items: Sequence[Any]) -> list[Any]:
    """Items without repeats, in order."""
    kept: list[Any] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return kept
