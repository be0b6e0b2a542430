"""Factored matmuls on CPU against PyTorch's dense product: one thread, float32, in one run.

    taskset -c 1 python benchmarks/cpu_linear.py [--size 4096] [--block 64] [--seconds 10]

Dense, vector-vector-matrix form of 1, 4 and 16 terms, and low rank at the bytes of 4 and 16 run in
turn, so that each round sees the machine in one state; ratios are medians over rounds. A dense run
in every round empties the caches: weights are read from memory ("in turn"). Then each form runs by
itself, so that weights which a cache holds stay there ("alone"), as in a model that fits it. Writes
results/cpu-linear.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.ops.low_rank_linear import low_rank_linear
from fxpress.ops.vvma_linear import lay_out, vvma_linear
from fxpress.timing import interleave

BATCHES = (1, 8, 32, 128)
TERMS = (1, 4, 16)
RESULT = Path(__file__).resolve().parent / "results" / "cpu-linear.json"


def forms(size: int, block: int, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every form of an N x N weight, applied to x."""
    pieces = size // block
    calls: dict[str, Callable[[], Tensor]] = {
        "dense": partial(F.linear, x, torch.randn(size, size)),
    }
    for terms in TERMS:
        core = torch.randn(terms, block, block)
        core, vectors = lay_out(core, torch.randn(terms, pieces, pieces, block))
        calls[f"vvma_{terms}"] = partial(vvma_linear, x, core, vectors)
    for terms in TERMS[1:]:
        rank = size * terms // (2 * block)
        down, up = torch.randn(rank, size), torch.randn(size, rank)
        calls[f"low_rank_{terms}"] = partial(low_rank_linear, x, down, up)
    return calls


def measure(size: int, block: int, batch: int, seconds: float) -> dict[str, Any]:
    """Milliseconds and speed-up of each form at one batch, in turn and alone."""
    calls = forms(size, block, torch.randn(batch, size))
    timings = interleave(calls, rounds=200, seconds=seconds)
    each = seconds / len(calls)
    alone = {
        name: interleave({name: call}, rounds=200, seconds=each).median(name)
        for name, call in calls.items()
    }
    return {
        "batch": batch,
        "rounds": len(timings.samples["dense"]),
        "forms": {
            name: {
                "ms": timings.median(name),
                "speedup": timings.speedup("dense", name),
                "alone_ms": alone[name],
                "alone_speedup": alone["dense"] / alone[name],
            }
            for name in calls
        },
    }


def summary(row: dict[str, Any]) -> str:
    """One line for a person."""
    cells = (
        f"{n} {f['ms']:.3f} ms {f['speedup']:.1f}x, alone {f['alone_speedup']:.1f}x"
        for n, f in row["forms"].items()
    )
    return f"batch {row['batch']:4}: " + " | ".join(cells)


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description="Factored matmuls on one CPU thread.")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10, help="time for each batch")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for batch in BATCHES:
            rows.append(measure(arguments.size, arguments.block, batch, arguments.seconds))
            print(summary(rows[-1]), flush=True)
    result = {
        "environment": {"torch": torch.__version__, "threads": 1, "load": os.getloadavg()[0]},
        "size": arguments.size,
        "block": arguments.block,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
