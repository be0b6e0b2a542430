"""`fxpress bench`: interleaved timing of an artifact, and of the model that it was made from."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxpress.capture import Call
from fxpress.cli_tables import table
from fxpress.optimized import OptimizedModule
from fxpress.timing import Timings, interleave

__all__ = ["measure", "render"]

_BASELINES = {
    "original": "the model as you have it",
    "dense": "its best dense form (exact passes only)",
}


def measure(
    artifact: OptimizedModule, others: Mapping[str, nn.Module], rounds: int, seconds: float
) -> dict[str, Any]:
    """Time an artifact on each example call of its plan.

    Args:
        artifact: what to time.
        others: baselines by name, called alike.
        rounds: at most, of each call.
        seconds: no further round of a call begins after that.
    """
    device = next((t.device for t in (*artifact.parameters(), *artifact.buffers())), None)
    device = device or torch.device("cpu")
    modules = {**others, "artifact": artifact}
    calls = [
        _measure_call(call, modules, rounds, seconds, device)
        for call in artifact.plan.example_calls(device)
    ]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in artifact.parameters()}
    is_cuda = device.type == "cuda"
    return {
        "schema": 1,
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "dtype": sorted(dtypes),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fxpress": metadata.version("fxpress"),
        "baseline": {name: _BASELINES[name] for name in others},
        "calls": calls,
    }


def _measure_call(
    call: Call,
    modules: Mapping[str, nn.Module],
    rounds: int,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    args, kwargs = call
    runs = {name: functools.partial(module, *args, **kwargs) for name, module in modules.items()}
    with torch.no_grad():
        timings = interleave(runs, rounds=rounds, seconds=seconds, cuda=device.type == "cuda")
    return {
        "call": _describe(call),
        "had_core": round(timings.had_core, 3),
        "ms": {name: _quartiles(timings, name) for name in modules},
        "speedup": {n: timings.speedup(n, "artifact") for n in modules if n != "artifact"},
    }


def _quartiles(timings: Timings, name: str) -> dict[str, Any]:
    lower, median, upper = statistics.quantiles(timings.samples[name], n=4, method="inclusive")
    samples = list(timings.samples[name])
    return {"median": median, "lower": lower, "upper": upper, "samples": samples}


def _describe(call: Call) -> str:
    """Arguments with dtype and shape; positional ones by number."""
    leaves, _ = pytree.tree_flatten_with_path(call)
    tensors = {_argument(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
    described = [
        f"{name}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
        for name, t in tensors.items()
    ]
    return ", ".join(described)


def _argument(path: Any) -> str:
    """A key path without the outer (args, kwargs) pair."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:])


def render(facts: Mapping[str, Any]) -> str:
    """The measurement as text: medians and quartiles of each form."""
    dtypes = ", ".join(facts["dtype"]) or "no parameters"
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}"
    where = f"{facts['device']}, {dtypes}, {threads}, torch {facts['torch']}"
    lines = [f"{where}; interleaved rounds, example inputs of zeros and ones"]
    lines += [f"{name}: {what}" for name, what in facts["baseline"].items()]
    if not facts["baseline"]:
        lines.append("no baseline: give the model with --against to compare")
    for call in facts["calls"]:
        lines += ["", call["call"], _call_table(call)]
        if call["had_core"] < 0.8:
            lines.append(f"a busy machine: this process had a core for {call['had_core']:.0%}")
    return "\n".join(lines)


def _call_table(call: Mapping[str, Any]) -> str:
    rows = [["form", "median ms", "quartiles", "rounds", "artifact's speed-up"]]
    for name, ms in call["ms"].items():
        speedup = f"{call['speedup'][name]:.2f}x" if name in call["speedup"] else ""
        spread = f"{ms['lower']:.4g} to {ms['upper']:.4g}"
        rows.append([name, f"{ms['median']:.4g}", spread, str(len(ms["samples"])), speedup])
    return table(rows)
