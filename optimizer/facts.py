"""From a finished run to the facts of its report, plain data."""

from __future__ import annotations

import datetime as dt
import time
from importlib import metadata
from typing import Any

import torch
from torch import nn

from fxpress.errors import FxpressError
from fxpress.flops import multiply_adds
from fxpress.pipeline import resolve_order
from fxpress.planning import PlannedPass
from fxpress.regions import CapturedModel
from fxpress.report import SCHEMA, Report
from fxpress.run import Run
from fxpress.timing import Timings

__all__ = ["report_of"]

_FORMS = {
    "original": "the original model",
    "dense": "its best dense form (scaled_dot_product_attention)",
    "so far": "what the passes before made of it",
}


def report_of(run: Run) -> Report:
    """The report of a finished run."""
    masks = {
        site: layout.to_dense().cpu()
        for record in run.records.values()
        for site, layout in record.masks.items()
    }
    return Report(_facts(run), masks)


def _facts(run: Run) -> dict[str, Any]:
    attempts = run.judge.attempts if run.judge else {}
    return {
        "schema": SCHEMA,
        "version": _version(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "model": type(run.model).__name__,
        "device": _device_name(run.device),
        "torch": torch.__version__,
        "objective": run.objective,
        "judge": run.judge.mode if run.judge else "replayed",
        "seed": run.seed,
        "baseline": _baseline(run),
        "changed": run.changed,
        "passes": [record.as_dict() for record in run.records.values()],
        "attempts": {name: [a.as_dict() for a in tried] for name, tried in attempts.items()},
        "sites": _sites(run),
        "quality": _quality(run),
        "latency_ms": _latency(run),
        **_sizes(run),
        "regions": run.captured.as_dicts(),
        "dropped_inputs": list(run.dropped),
        "notes": _notes(run),
        "seconds": round(time.perf_counter() - run.start, 2),
    }


def _notes(run: Run) -> list[str]:
    notes = run.notes + (run.judge.notes if run.judge else [])
    if run.dropped:
        notes.append(f"the model does not take {', '.join(run.dropped)}: dropped from batches")
    return notes


def _fastest_before(timings: Timings) -> str:
    """The fastest form that is not the optimized one: what every gain is measured against."""
    return min((name for name in timings.samples if name != "optimized"), key=timings.median)


def _baseline(run: Run) -> dict[str, Any]:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in run.model.parameters()})
    threads = torch.get_num_threads()
    form = _fastest_before(run.timings) if run.timings else "original"
    rounds = len(run.timings.samples[form]) if run.timings else 0
    return {
        "name": _FORMS[form],
        "attention": "scaled_dot_product_attention",
        "threads": threads,
        "dtype": dtypes,
        "rounds": rounds,
        "how": f"medians of {rounds} interleaved rounds on the first held-out batch, "
        f"{threads} threads, {', '.join(dtypes) or 'no parameters'}",
    }


def _quality(run: Run) -> dict[str, Any]:
    if run.quality is None:
        return dict.fromkeys(("metric", "before", "after", "drop", "budget"))
    drop = (run.final_drop or 0.0) if run.changed else 0.0
    scored = run.quality.validation_fn is not None
    return {
        "metric": run.quality.metric,
        "before": run.quality.before,
        "after": run.quality.before - drop if scored else drop,
        "drop": drop,
        "budget": run.quality.budget,
    }


def _latency(run: Run) -> dict[str, Any]:
    if run.timings is None or not run.changed:
        return dict.fromkeys(("before", "dense", "after", "speedup"))
    return {
        "before": run.timings.median("original"),
        "dense": run.timings.median("dense"),
        "after": run.timings.median("optimized"),
        "speedup": run.timings.speedup(_fastest_before(run.timings), "optimized"),
        "speedup_over_original": run.timings.speedup("original", "optimized"),
        "samples": {name: list(s) for name, s in run.timings.samples.items()},
    }


def _sizes(run: Run) -> dict[str, Any]:
    before, after = _weights(run.canonical), _weights(run.captured)
    call = run.plan.example_calls(run.device)[0]
    done = multiply_adds(run.canonical.build(), call)
    left = multiply_adds(run.captured.build(), call) if run.changed else done
    return {
        "parameters": {"before": before[0], "after": after[0]},
        "bytes": {"before": before[1], "after": after[1]},
        "multiply_adds": {"before": done, "after": left},
    }


def _weights(captured: CapturedModel) -> tuple[int, int]:
    """Number of parameters, and bytes of all tensors, that the programs read."""
    held = {
        tensor.data_ptr(): tensor
        for program in captured.programs.values()
        for tensor in program.tensors().values()
    }
    parameters = sum(t.numel() for t in held.values() if isinstance(t, nn.Parameter))
    return parameters, sum(t.nbytes for t in held.values())


def _sites(run: Run) -> list[dict[str, Any]]:
    """Every site that a planned pass could rewrite, with its outcome."""
    return [
        {"site": name, "pass": kind.name, **site, **_outcome(run, kind, name)}
        for kind in resolve_order(run.passes.values())
        if issubclass(kind, PlannedPass)
        for program in run.canonical.programs.values()
        for name, site in kind().sites(program).items()
    ]


def _outcome(run: Run, kind: type[PlannedPass], site: str) -> dict[str, Any]:
    figures = {
        key: value
        for verdict in run.plan.verdicts.get(kind.name, [])
        if verdict.site == site
        for key, value in verdict.figures.items()
    }
    record = run.records.get(kind.name)
    if record is None:
        return {"status": "left as it was", "reason": "the pass did not run"}
    if site in record.ledger:
        return {"status": "rewritten", "reason": "", **record.ledger[site], **figures}
    rolled = {r.site: r.reason for r in record.rolled_back}
    declined = {d.site: d.reason for d in record.declined}
    for status, reasons, where in (
        ("rolled back", rolled, site),
        ("declined", declined, site),
        ("rolled back", rolled, ""),  # the whole pass
    ):
        if where in reasons:
            return {"status": status, "reason": reasons[where], **figures}
    reason = "nothing was proposed for it"
    if kind.name in run.plan.decisions:
        reason = "the strongest proposal within the budget leaves it as it is"
    return {"status": "left as it was", "reason": reason, **figures}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _version() -> str:
    try:
        return metadata.version("fxpress")
    except metadata.PackageNotFoundError as error:
        raise FxpressError("fxpress is not installed: pip install -e .") from error
