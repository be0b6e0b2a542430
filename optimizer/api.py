"""`optimize`: the way of a model through fxpress, as a table of contents.

capture -> canonicalize -> profile and plan -> rewrite -> judge -> report
"""

from __future__ import annotations

import copy
import datetime as dt
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fxpress.kernels  # noqa: F401  (registers the lowerings)
from fxpress import calibration
from fxpress.calibration import Calibration
from fxpress.capture import frozen
from fxpress.config import OptimizeConfig, nearest
from fxpress.errors import FxpressError, PassError, PlanError
from fxpress.flops import multiply_adds
from fxpress.judge import JUDGES, Decisions, Judge, Proposal, time_sites
from fxpress.optimized import OptimizedModule
from fxpress.passes import all_passes
from fxpress.passes.sites import attention_sites
from fxpress.pipeline import Pipeline, resolve_order
from fxpress.plan import Plan, Verdict, describe_call
from fxpress.progress import Progress, progress_for
from fxpress.quality import Quality
from fxpress.regions import CapturedModel, capture_model
from fxpress.report import SCHEMA, Report
from fxpress.rewrite import Pass, PassRecord, RolledBack
from fxpress.timing import Timings

__all__ = ["optimize", "optimize_"]

OBJECTIVES = ("latency", "memory")


def optimize(
    model: nn.Module,
    calib_data: Any,
    *,
    objective: str = "latency",
    config: Any = None,
    max_divergence: float | None = None,
    validation_fn: Callable[[nn.Module], float] | None = None,
    max_drop: float = 0.01,
    validation_data: Any = None,
    input_fn: Callable[[Any], Any] | None = None,
    plan: Plan | None = None,
    judge: str = "measured",
    keep_original: bool | str = True,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Any = None,
) -> OptimizedModule:
    """Rewrite a model into a faster one of the same quality, as calibration data shows it.

    Args:
        model: any module; it is left bit for bit as it is.
        calib_data: batches of inputs: an iterable of tensors, tuples or lists (positional
            arguments) or mappings (keyword arguments), a `DataLoader`, a `datasets.Dataset`, or a
            callable `forward_loop(model)`. Not needed with `plan`.
        objective: `"latency"`, or `"memory"` (attention pruning then does nothing).
        config: settings by pass name and overrides by module pattern: a mapping, the path of a
            YAML file, or an `OptimizeConfig`.
        max_divergence: largest mean divergence of outputs on held-out batches: KL in nats for
            outputs called `logits`, else relative RMS. The default depends on the dtype and is
            stated in the report.
        validation_fn: scores a module, higher is better; then `max_drop` is the budget.
        max_drop: how far the score may fall, absolute.
        validation_data: batches to judge on; without it every fifth batch is held out.
        input_fn: picks the model's inputs from a batch.
        plan: decisions of an earlier run, applied as they stand.
        judge: `"measured"` (quality and time), `"modelled"` (time by the cost model:
            deterministic) or `"off"` (apply what the configuration says).
        keep_original: False lets the original go; `"cpu"` keeps a copy of it on the CPU.
        device: where to run; the model is copied there if it is elsewhere.
        seed: of everything random.
        progress: None (bars on a terminal), True, False, or a callable `(title, done, total)`.

    Returns:
        The optimized module with `.passes`, `.report`, `.plan`, `.original`.

    Raises:
        PlanError: an unknown pass, setting, module pattern, objective or judge; a budget out of
            range; a plan that does not fit.
        CalibrationError: data that is empty, malformed, or does not fit the model.
        CaptureError: no part of the model can be captured.
    """
    passes = all_passes()
    settings = OptimizeConfig.of(config, passes, model)
    _check_choice("objective", objective, OBJECTIVES)
    _check_choice("judge", judge, JUDGES)
    _check_choice("keep_original", keep_original, (True, False, "cpu"))
    original, model = model, _on_device(model, device)
    where = _device_of(model)
    run = _Run(model, settings, passes, objective, progress_for(progress), where, seed=seed)
    with torch.random.fork_rng(devices=[]), frozen(model):
        torch.manual_seed(seed)
        if plan is not None:
            run.replay(plan, calib_data, input_fn)
        else:
            data = calibration.collect(
                model,
                calib_data,
                input_fn=input_fn,
                validation_data=validation_data,
                device=where,
            )
            quality = None
            if judge != "off":
                quality = Quality.of(model, data.heldout, validation_fn, max_drop, max_divergence)
            elif max_divergence is not None or validation_fn is not None:
                run.notes.append("judge='off': the quality budget was not checked")
            run.search(data, quality, judge)
    return run.result(original, keep_original)


def optimize_(model: nn.Module, calib_data: Any, **options: Any) -> OptimizedModule:
    """As `optimize`, in place: captured regions of `model` run their programs from now on.

    Parameters stay where they are. Returns the optimized module that carries the report.
    """
    optimized = optimize(model, calib_data, **options)
    for path in optimized.captured.programs:
        if path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, optimized.body.get_submodule(path))
        else:
            # The root cannot be exchanged under its owner: its calls are redirected instead.
            unredirected = copy.copy(model)
            optimized.body.__dict__["original"] = unredirected
            optimized.__dict__["original"] = unredirected
            model.forward = optimized.body.forward
    return optimized


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise PlanError(f"{name} is {value!r}: give one of {', '.join(map(repr, allowed))}")


def _on_device(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    if device is None:
        return model
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise PlanError(f"device {device!r} is no device: {str(error).splitlines()[0]}") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise PlanError(f"device {device!r} was asked for, but there is no CUDA device here")
    if _device_of(model).type == wanted.type:
        return model
    return copy.deepcopy(model).to(wanted)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@dataclass
class _Run:
    """The state of one run: what has been captured, done and decided so far."""

    model: nn.Module
    config: OptimizeConfig
    passes: Mapping[str, type[Pass]]
    objective: str
    progress: Progress
    device: torch.device
    seed: int = 0
    records: dict[str, PassRecord] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    notes: list[str] = field(default_factory=list)
    dropped: tuple[str, ...] = ()
    judge: Judge | None = None
    quality: Quality | None = None
    final_drop: float | None = None
    timings: Timings | None = None
    seconds: float = field(default_factory=time.perf_counter)

    def search(self, data: Calibration, quality: Quality | None, mode: str) -> None:
        """Canonicalize, then plan, rewrite and judge every approximating pass."""
        self.notes += data.notes
        self.dropped = data.dropped
        self.quality = quality
        self.plan.calls = _distinct([describe_call(call) for call in data.calls])
        self.canonicalize(capture_model(self.model, data.calls))
        self.judge = Judge(
            mode,
            quality,
            data.heldout,
            self.config.judge_seconds,
            self.device.type == "cuda",
            self.progress,
        )
        for kind in self._rewriting():
            self._search_pass(kind, data)
        if self.changed and self.quality is not None and self.final_drop is None:
            self.final_drop = self.quality.drop(self._module(self.plan))

    def replay(self, plan: Plan, calib_data: Any, input_fn: Any) -> None:
        """Apply the decisions of a plan that its verdicts let stand."""
        if calib_data is not None:
            data = calibration.collect(
                self.model, calib_data, input_fn=input_fn, device=self.device
            )
            calls = data.calls
        else:
            calls = plan.example_calls(self.device)
        if not calls:
            raise PlanError("the plan holds no example calls: give calib_data together with plan=")
        for name in plan.decisions:
            if name not in self.passes:
                raise PlanError(
                    f"the plan is for an unknown pass {name!r}: {nearest(name, self.passes)}"
                )
        self.plan = plan
        self.canonicalize(capture_model(self.model, calls))
        known = {s.name for p in self.captured.programs.values() for s in attention_sites(p)}
        for name in plan.decisions:
            if missing := sorted(set(plan.decisions[name]) - known):
                raise PlanError(
                    f"the plan does not fit this model: it has no site {missing[0]!r}; "
                    f"{nearest(missing[0], known) if known else 'it has no attention'}"
                )
        self.notes.append("decisions and verdicts of a stored plan: nothing was judged again")
        for kind in self._rewriting():
            if kind.name in plan.decisions:
                self._apply(kind, plan)

    def canonicalize(self, captured: CapturedModel) -> None:
        """Run the exact passes."""
        self.pipeline = Pipeline(self.config, self.device.type)
        for kind in resolve_order(self.passes.values()):
            if kind.phase == "canonicalize" and self.config.enables(kind.name):
                self.records[kind.name] = self.pipeline.run(kind, captured)
        self.canonical = captured
        self.captured = captured.copy()

    def _rewriting(self) -> list[type[Pass]]:
        order = resolve_order(self.passes.values())
        return [k for k in order if k.phase == "rewrite" and self.config.enables(k.name)]

    def _search_pass(self, kind: type[Pass], data: Calibration) -> None:
        assert self.judge is not None
        record = PassRecord(kind.name, kind.exactness)
        proposals = self._proposals(kind, data, record)
        start = self.captured.copy()

        def build(decisions: Decisions) -> nn.Module:
            return self._module(self._with(kind.name, decisions))

        decisions = self.judge.strongest(kind.name, proposals, build)
        self.plan = self._with(kind.name, decisions)
        if proposals and not decisions:
            reason = "no proposal keeps the quality budget"
            figures = {"budget": self.quality.budget} if self.quality else {}
            tried = self.judge.attempts.get(kind.name, [])
            if tried:
                figures["least_drop"] = min(a.drop for a in tried)
            self.plan.verdicts[kind.name] = [Verdict("", False, reason, figures)]
        if decisions and self.judge.mode != "off":
            self._judge_time(kind, start)
        self._apply(kind, self.plan, record)

    def _proposals(self, kind: type[Pass], data: Calibration, record: PassRecord) -> list[Proposal]:
        if self.objective == "memory":
            self.notes.append(f"{kind.name} saves no memory: left out for objective='memory'")
            return []
        propose = getattr(kind(), "propose", None)
        if propose is None:
            raise PassError(f"{kind.name} is in phase 'rewrite' but proposes nothing")
        return propose(  # type: ignore[no-any-return]
            self.captured,
            data.profile,
            lambda path: self.config.settings(kind.name, kind, path),
            lambda path: self.config.enables_at(kind.name, path),
            self.device.type,
            self.progress,
            record,
        )

    def _with(self, name: str, decisions: Decisions) -> Plan:
        return Plan(
            {**self.plan.decisions, name: decisions}, dict(self.plan.verdicts), self.plan.calls
        )

    def _judge_time(self, kind: type[Pass], start: CapturedModel) -> None:
        """Take back sites, then the pass, that are not faster."""
        assert self.judge is not None
        if self.judge.mode == "modelled":
            self.plan.verdicts[kind.name] = self._modelled(kind)
            return
        after = start.copy()
        self.pipeline.run(kind, after, self.plan.standing(kind.name))
        sites = list(self.plan.decisions[kind.name])
        times = time_sites(
            start,
            after,
            sites,
            self.judge.calls[0],
            cuda=self.judge.cuda,
            progress=self.progress,
        )
        self.plan.verdicts[kind.name] = self.judge.slow_sites(times)
        standing = self.plan.standing(kind.name)
        if not standing:
            return
        modules = {
            "original": self.model,
            "dense": start.build(),
            "optimized": self._module(self.plan),
        }
        self.timings = self.judge.time_models(modules)
        base = self._baseline()
        if not self.timings.is_faster(base, "optimized"):
            figures = {
                "ms_before": self.timings.median(base),
                "ms_after": self.timings.median("optimized"),
            }
            reason = f"the whole model is not measurably faster than in {base} form"
            self.plan.verdicts[kind.name].append(Verdict("", False, reason, figures))

    def _baseline(self) -> str:
        """The faster of the model as the user has it and its dense canonical form."""
        assert self.timings is not None
        return min(("original", "dense"), key=self.timings.median)

    def _modelled(self, kind: type[Pass]) -> list[Verdict]:
        """Sites whose modelled cost is not below the dense one are taken back."""
        trial = self.captured.copy()
        record = self.pipeline.run(kind, trial, self.plan.decisions[kind.name])
        verdicts = []
        for site, entry in record.ledger.items():
            cost = entry["tile_density"]
            dense = 0.5 if entry["kind"] == "causal" else 1.0
            kept = cost < dense
            reason = "cheaper by the cost model" if kept else "not cheaper by the cost model"
            verdicts.append(Verdict(site, kept, reason, {"cost": cost, "dense_cost": dense}))
        return verdicts

    def _module(self, plan: Plan) -> OptimizedModule:
        """The model with the decisions of a plan, for the judge to look at."""
        captured = self.canonical.copy()
        records = {}
        for kind in self._rewriting():
            if decisions := plan.standing(kind.name):
                records[kind.name] = self.pipeline.run(kind, captured, decisions)
        report = Report({})
        return OptimizedModule(
            captured, passes=records, plan=plan, report=report, original=self.model
        )

    def _apply(self, kind: type[Pass], plan: Plan, record: PassRecord | None = None) -> None:
        applied = self.pipeline.run(kind, self.captured, plan.standing(kind.name))
        if record is not None:
            applied.mean_attention = record.mean_attention
            applied.declined = record.declined + applied.declined
        applied.rolled_back = [
            RolledBack(v.site, v.reason, v.figures)
            for v in plan.verdicts.get(kind.name, [])
            if not v.kept
        ]
        self.records[kind.name] = applied

    @property
    def changed(self) -> bool:
        """Whether any approximating pass changed anything."""
        return any(
            self.records[k.name].rewrites for k in self._rewriting() if k.name in self.records
        )

    def result(self, original: nn.Module, keep: bool | str) -> OptimizedModule:
        """The optimized module with its report."""
        plan, config = self.plan, self.config
        kept: nn.Module | None = original if keep is True else None
        if keep == "cpu":
            kept = copy.deepcopy(original).to("cpu")

        def rebuild(changed: Plan) -> OptimizedModule:
            fresh = _Run(self.model, config, self.passes, self.objective, Progress(), self.device)
            with frozen(self.model):
                fresh.replay(changed, None, None)
            return fresh.result(original, keep)

        return OptimizedModule(
            self.captured,
            passes=self.records,
            plan=plan,
            report=self._report(),
            original=kept,
            rebuild=rebuild if keep else None,
        )

    def _report(self) -> Report:
        masks = {
            site: layout.to_dense().cpu()
            for record in self.records.values()
            for site, layout in record.masks.items()
        }
        return Report(self._facts(), masks)

    def _facts(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": _version(),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "model": type(self.model).__name__,
            "device": _device_name(self.device),
            "torch": torch.__version__,
            "objective": self.objective,
            "judge": self.judge.mode if self.judge else "replayed",
            "seed": self.seed,
            "baseline": self._baseline_facts(),
            "changed": self.changed,
            "passes": [record.as_dict() for record in self.records.values()],
            "attempts": {
                name: [a.as_dict() for a in attempts]
                for name, attempts in (self.judge.attempts if self.judge else {}).items()
            },
            "sites": self._sites(),
            "quality": self._quality_facts(),
            "latency_ms": self._latency_facts(),
            **self._sizes(),
            "regions": self.captured.as_dicts(),
            "dropped_inputs": list(self.dropped),
            "notes": self._all_notes(),
            "seconds": round(time.perf_counter() - self.seconds, 2),
        }

    def _all_notes(self) -> list[str]:
        notes = self.notes + (self.judge.notes if self.judge else [])
        if self.dropped:
            notes.append(f"the model does not take {', '.join(self.dropped)}: dropped from batches")
        return notes

    def _baseline_facts(self) -> dict[str, Any]:
        dtypes = {str(p.dtype).removeprefix("torch.") for p in self.model.parameters()}
        form = "the original model"
        if self.timings is not None and self._baseline() == "dense":
            form = "its best dense form (scaled_dot_product_attention)"
        threads = torch.get_num_threads()
        rounds = len(self.timings.samples["dense"]) if self.timings else 0
        return {
            "name": form,
            "attention": "scaled_dot_product_attention",
            "threads": threads,
            "dtype": sorted(dtypes),
            "rounds": rounds,
            "how": f"medians of {rounds} interleaved rounds on the first held-out batch, "
            f"{threads} threads, {', '.join(sorted(dtypes)) or 'no parameters'}",
        }

    def _quality_facts(self) -> dict[str, Any]:
        if self.quality is None:
            return dict.fromkeys(("metric", "before", "after", "drop", "budget"))
        drop = (self.final_drop or 0.0) if self.changed else 0.0
        scored = self.quality.validation_fn is not None
        after = self.quality.before - drop if scored else drop
        return {
            "metric": self.quality.metric,
            "before": self.quality.before,
            "after": after,
            "drop": drop,
            "budget": self.quality.budget,
        }

    def _latency_facts(self) -> dict[str, Any]:
        if self.timings is None or not self.changed:
            return dict.fromkeys(("before", "dense", "after", "speedup"))
        return {
            "before": self.timings.median("original"),
            "dense": self.timings.median("dense"),
            "after": self.timings.median("optimized"),
            "speedup": self.timings.speedup(self._baseline(), "optimized"),
            "speedup_over_original": self.timings.speedup("original", "optimized"),
            "samples": {name: list(s) for name, s in self.timings.samples.items()},
        }

    def _sizes(self) -> dict[str, Any]:
        before, after = _weights(self.canonical), _weights(self.captured)
        macs = self._multiply_adds()
        return {
            "parameters": {"before": before[0], "after": after[0]},
            "bytes": {"before": before[1], "after": after[1]},
            "multiply_adds": macs,
        }

    def _multiply_adds(self) -> dict[str, int]:
        call = self.plan.example_calls(self.device)[0]
        forms = {"before": self.canonical, "after": self.captured}
        return {name: multiply_adds(form.build(), call) for name, form in forms.items()}

    def _sites(self) -> list[dict[str, Any]]:
        """Every attention site with its outcome."""
        record = self.records.get("prune-attention")
        rolled = {r.site: r for r in record.rolled_back} if record else {}
        declined = {d.site: d for d in record.declined} if record else {}
        verdicts = {v.site: v for v in self.plan.verdicts.get("prune-attention", [])}
        rows = []
        for program in self.canonical.programs.values():
            for site in attention_sites(program):
                row: dict[str, Any] = {
                    "site": site.name,
                    "kind": site.kind,
                    "path": site.path,
                    "shape": list(site.shape),
                    "status": "left as it was",
                    "reason": "",
                }
                if record and site.name in record.ledger:
                    row |= record.ledger[site.name] | {"status": "pruned"}
                elif site.name in rolled:
                    row |= {"status": "rolled back", "reason": rolled[site.name].reason}
                elif site.name in declined:
                    row |= {"status": "declined", "reason": declined[site.name].reason}
                elif "" in rolled:
                    row |= {"status": "rolled back", "reason": rolled[""].reason}
                if site.name in verdicts:
                    row |= dict(verdicts[site.name].figures)
                rows.append(row)
        return rows


def _distinct(descriptions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Descriptions without repeats, in order."""
    kept: list[dict[str, Any]] = []
    for description in descriptions:
        if description not in kept:
            kept.append(description)
    return kept


def _weights(captured: CapturedModel) -> tuple[int, int]:
    """Numbers and bytes of the parameters and buffers that the programs read."""
    tensors: dict[int, Tensor] = {}
    parameters = 0
    for program in captured.programs.values():
        for name, tensor in program.tensors().items():
            key = tensor.untyped_storage().data_ptr()
            if key not in tensors:
                tensors[key] = tensor
                parameters += tensor.numel() if "_layout_" not in name else 0
    return parameters, sum(t.nbytes for t in tensors.values())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("fxpress")
    except metadata.PackageNotFoundError as error:
        raise FxpressError("fxpress is not installed: pip install -e .") from error
