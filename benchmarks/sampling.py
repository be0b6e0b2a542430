"""What all GPU benchmarks share: samples as they are recorded, and failures as results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["attempt", "described", "replayed"]

KEPT = 40  # raw samples of each figure that are recorded


def described(samples: list[float], unit: str, scale: float = 1.0) -> dict[str, Any]:
    """Median (under the name of the unit), quantiles, the count, and the first raw samples."""
    values = torch.tensor(samples, dtype=torch.float64) * scale
    low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    raw = [float(f"{value:.4g}") for value in values[:KEPT].tolist()]
    return {unit: middle, "p10": low, "p90": high, "count": len(values), "samples": raw}


def replayed(run: Callable[[], Any], warmup: int, rep: int) -> list[float]:
    """Milliseconds of a call as a CUDA graph, time and again.

    Args:
        run: the call.
        warmup: milliseconds of replays before the first sample.
        rep: milliseconds of samples.
    """
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    samples: list[float] = do_bench(graph.replay, warmup=warmup, rep=rep, return_mode="all")
    return samples


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What fails is a result too."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - recorded, whatever it is
        return {"error": f"{type(error).__name__}: {error}"[:400]}
