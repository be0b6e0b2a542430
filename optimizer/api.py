"""`optimize`: the way of a model through fxpress, as a table of contents.

capture -> canonicalize -> profile and plan -> rewrite -> judge -> report
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxpress.kernels  # noqa: F401  (registers the lowerings)
from fxpress import calibration
from fxpress.capture import check_module, frozen
from fxpress.config import OptimizeConfig
from fxpress.errors import PlanError
from fxpress.facts import report_of
from fxpress.judge import JUDGES
from fxpress.lowered import trace
from fxpress.optimized import OptimizedModule
from fxpress.passes import all_passes
from fxpress.plan import Plan
from fxpress.planning import OBJECTIVES
from fxpress.progress import Progress, progress_for
from fxpress.quality import Quality
from fxpress.run import Run

__all__ = ["optimize", "optimize_"]


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
        keep_original: True keeps the original as `.original`, and calls that the model was not
            captured for run it. False lets it go: such calls raise `CaptureError`, and of its
            attributes only plain ones (`.config`) stay. `"cpu"` keeps a copy of it on the CPU, for
            `.original` and `.without()`, and is otherwise as False; on a CPU run it is as True.
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
    check_module(model)
    passes = all_passes()
    settings = OptimizeConfig.of(config, passes, model)
    _check_choice("objective", objective, OBJECTIVES)
    _check_choice("judge", judge, JUDGES)
    _check_choice("keep_original", keep_original, (True, False, "cpu"))
    original, model = model, _on_device(model, device)
    where = _device_of(model)
    run = Run(model, settings, passes, objective, progress_for(progress), where, seed)
    with torch.random.fork_rng(devices=[]), frozen(model):
        torch.manual_seed(seed)
        if plan is not None and calib_data is None:
            plan.check_fits(model, where)
            run.replay(plan)
        else:
            data = calibration.collect(
                model,
                calib_data,
                input_fn=input_fn,
                validation_data=validation_data,
                device=where,
            )
            if plan is not None:
                run.replay(plan, data.calls)
            else:
                quality = None
                if judge != "off":
                    budgets = (validation_fn, max_drop, max_divergence)
                    quality = Quality.of(model, data.heldout, *budgets)
                elif max_divergence is not None or validation_fn is not None:
                    run.notes.append("judge='off': the quality budget was not checked")
                run.search(data, quality, judge)
    return _result(run, original, keep_original)


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


def _result(run: Run, original: nn.Module, keep: bool | str) -> OptimizedModule:
    """What a finished run comes to, holding of the original only what it is to keep."""
    kept = original if keep else None
    if keep == "cpu" and _device_of(original).type != "cpu":
        kept = copy.deepcopy(original).to("cpu")
    stays = keep is True or (keep == "cpu" and run.device.type == "cpu")
    report = report_of(run)
    trace(report, run.captured)
    return OptimizedModule(
        run.captured if stays else run.captured.release(),
        passes=run.records,
        plan=run.plan,
        report=report,
        original=kept,
        rebuild=None if kept is None else _rebuilder(run, kept, keep),
    )


def _rebuilder(run: Run, kept: nn.Module, keep: bool | str) -> Callable[[Plan], OptimizedModule]:
    """How another plan is applied to the original; does not hold on to the run."""
    config, passes, objective, device = run.config, run.passes, run.objective, run.device

    def rebuild(plan: Plan) -> OptimizedModule:
        model = _on_device(kept, device)
        fresh = Run(model, config, passes, objective, Progress(), device)
        with frozen(model):
            fresh.replay(plan)
        return _result(fresh, kept, keep)

    return rebuild


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
