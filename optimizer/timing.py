"""Timing: interleaved rounds of several callables, so that drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timings", "interleave"]


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each callable, round by round.

    Attributes:
        samples: name -> one figure per round; the n-th figures of all were taken together.
        had_core: share of the time for which the calling thread had a core; far below 1 where other
            processes kept the machine busy. Not measured (1) where it waits for a device.
    """

    samples: Mapping[str, tuple[float, ...]]
    had_core: float = 1.0

    def median(self, name: str) -> float:
        """Median milliseconds."""
        return statistics.median(self.samples[name])

    def ratios(self, base: str, candidate: str) -> list[float]:
        """Per round, how many times faster the candidate was, sorted."""
        pairs = zip(self.samples[base], self.samples[candidate], strict=True)
        return sorted(b / c for b, c in pairs)

    def speedup(self, base: str, candidate: str) -> float:
        """Median over rounds of how many times faster the candidate was."""
        return statistics.median(self.ratios(base, candidate))

    def figures(self, base: str, candidate: str) -> dict[str, float]:
        """Medians of both, for a verdict."""
        before, after = (round(self.median(name), 4) for name in (base, candidate))
        return {"ms_before": before, "ms_after": after}

    def is_faster(self, base: str, candidate: str) -> bool:
        """Whether the candidate was faster in at least three quarters of the rounds."""
        ratios = self.ratios(base, candidate)
        return ratios[len(ratios) // 4] > 1.0


def interleave(
    callables: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    seconds: float = 20.0,
    cuda: bool = False,
) -> Timings:
    """Time callables in turn, after one warm-up of each.

    Args:
        callables: what to time, by name; the order within a round alternates.
        rounds: how many rounds at most; at least three are made.
        seconds: no further round begins after this time.
        cuda: synchronize the device around each run.
    """
    for function in callables.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in callables}
    names = list(callables)
    start, own_start = time.perf_counter(), time.thread_time()
    for index in range(rounds):
        if index >= 3 and time.perf_counter() - start > seconds:
            break
        for name in names if index % 2 == 0 else reversed(names):
            samples[name].append(_once(callables[name], cuda))
    had_core = (time.thread_time() - own_start) / (time.perf_counter() - start)
    taken = {name: tuple(values) for name, values in samples.items()}
    return Timings(taken, 1.0 if cuda else had_core)


def _once(function: Callable[[], Any], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
