"""How time grows with size: what tests of speed measure by."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

from fxpress.program import Program

__all__ = ["seconds_in_turns"]


def seconds_in_turns(
    programs: Mapping[int, Program], work: Callable[[Program], None], rounds: int = 7
) -> dict[int, float]:
    """Processor time of `work` on a copy of each program: the least of several that take turns.

    Taking turns, what else the machine does hits all alike. Garbage is not looked for meanwhile:
    one look through what other tests left takes longer than the work.
    """
    seconds = dict.fromkeys(programs, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for size, program in programs.items():
                copy = program.copy()
                start = time.process_time()
                work(copy)
                seconds[size] = min(seconds[size], time.process_time() - start)
    finally:
        gc.enable()
    return seconds
