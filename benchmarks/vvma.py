"""Factored matmuls on one GPU at small batch, bf16: ours, cuBLAS dense, low rank, int8 and int4.

Each figure is microseconds per layer of a chain of 24 N x N layers with weights of their own, run
as one CUDA graph: a layer's weights are not in the cache of the layer before, and launches cost
what they cost in decoding. Weights are drawn, not trained: this measures kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sampling import attempt, described, replayed
from torch import Tensor, nn

from fxpress.kernels.vvma_linear import (
    VvmaKernel,
    emit,
    kernel_of,
    launch,
    sums_of,
    whole_of,
)
from fxpress.ops.low_rank_linear import low_rank_linear
from fxpress.ops.vvma_linear import VvmaSite, lay_out_cores, vvma_linear, vvma_reference

__all__ = ["measure"]

LAYERS = 24
BLOCK = 64
TERMS = (1, 4, 16)

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One size and batch, with the microseconds to reach by number of terms."""

    size: int
    batch: int
    targets: dict[int, float]


ROWS = (
    Row(1024, 1, {1: 2.3}),
    Row(1024, 8, {1: 2.4}),
    Row(1024, 32, {1: 2.5}),
    Row(2048, 1, {1: 2.4, 4: 3.5, 16: 5.0}),
    Row(2048, 8, {1: 2.6, 4: 4.0, 16: 6.0}),
    Row(2048, 32, {1: 3.1}),
    Row(4096, 1, {1: 2.8, 4: 4.5, 16: 6.5}),
    Row(4096, 8, {1: 3.7, 4: 6.0, 16: 10.0}),
    Row(4096, 32, {1: 5.1}),
    Row(8192, 1, {1: 4.3, 4: 7.0, 16: 14.0}),
    Row(8192, 8, {1: 6.0, 4: 10.0, 16: 18.0}),
    Row(8192, 32, {1: 9.8}),
)


# --- timing ---------------------------------------------------------------------------------


def chain(layers: list[Layer], x: Tensor) -> dict[str, Any]:
    """Microseconds per layer of one CUDA graph that runs them in turn."""

    def run() -> Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    return described(replayed(run, warmup=15, rep=60), "us", 1e3 / len(layers))


# --- peers ----------------------------------------------------------------------------------


def draw(*shape: int, fan: int) -> Tensor:
    """Weights that keep the scale of what they are applied to."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(fan**-0.5)


def dense(size: int) -> list[Layer]:
    """One cuBLAS product a layer."""
    return [_apply(F.linear, draw(size, size, fan=size)) for _ in range(LAYERS)]


def _apply(function: Callable[..., Tensor], *weights: Tensor) -> Layer:
    return lambda x: function(x, *weights)


def low_rank(size: int, fewer: int) -> list[Layer]:
    """Two cuBLAS products a layer, `fewer` times less bytes in all."""
    rank = size // (2 * fewer)
    return [
        _apply(low_rank_linear, draw(rank, size, fan=size), draw(size, rank, fan=rank))
        for _ in range(LAYERS)
    ]


def quantized(size: int, bits: int) -> list[Layer]:
    """The weight-only quantization of torchao: equal bytes to r=16 at 4 bits or fewer."""
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    config = Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig()
    layers: list[Layer] = []
    for _ in range(LAYERS):
        module = nn.Linear(size, size, bias=False, device="cuda", dtype=torch.bfloat16)
        quantize_(module, config)
        layers.append(torch.compile(module, dynamic=False))
    return layers


def peers(row: Row, x: Tensor) -> dict[str, Any]:
    """Everything to compare with."""
    ways: dict[str, Callable[[], list[Layer]]] = {"dense": lambda: dense(row.size)}
    for fewer in (4, 16):
        ways[f"low_rank_{fewer}x"] = partial(low_rank, row.size, fewer)
    if row.size >= 4096 and row.batch == 1:
        for bits in (8, 4):
            ways[f"int{bits}"] = partial(quantized, row.size, bits)
    results = {}
    for name, build in ways.items():
        results[name] = attempt(lambda build=build: chain(build(), x))  # type: ignore[misc]
        torch.cuda.empty_cache()
    return results


# --- ours -----------------------------------------------------------------------------------


Factors = list[tuple[Tensor, Tensor]]


def factors(size: int, terms: int) -> Factors:
    """Core and vectors of each layer."""
    pieces = size // BLOCK
    shape = (terms, pieces, pieces, BLOCK)
    return [
        (lay_out_cores(draw(terms, BLOCK, BLOCK, fan=BLOCK)), draw(*shape, fan=terms * pieces))
        for _ in range(LAYERS)
    ]


def site(row: Row, weights: Factors) -> VvmaSite:
    """The call that every layer is."""
    x = torch.empty(row.batch, row.size, device="meta", dtype=torch.bfloat16)
    return VvmaSite.of(x, *weights[0], None, None, row.size)


def ours(row: Row, weights: Factors, x: Tensor) -> dict[str, Any]:
    """The operator as a user calls it."""
    got = vvma_linear(x, *weights[0]).double()
    core, vectors = (w.double() for w in weights[0])
    want = vvma_reference(x.double(), core, vectors)
    error = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
    if error > 0.02:
        raise AssertionError(f"{row}: relative error {error:.3g} against the reference")
    kernel = kernel_of(site(row, weights), overlap=True)
    facts = {"relative_error": error, "source": emit(kernel).digest[:16], "stage": kernel.stage}
    return chain([_apply(vvma_linear, *pair) for pair in weights], x) | facts


def candidates(at: VvmaSite) -> Iterator[VvmaKernel]:
    """The kernel that the table gives, and launch options around it."""
    yield kernel_of(at, overlap=True)
    one, sums = whole_of(at, overlap=True), sums_of(at, overlap=True)
    options = ((1, 64, 1), (2, 16, 1), (2, 16, 2), (4, 8, 2), (8, 8, 2), (4, 4, 1))
    for rows, width, warps in options:
        changes: dict[str, Any] = {"width": min(width, at.tiles[1]), "warps": warps}
        if rows <= at.batch:
            yield replace(sums, rows=rows, **changes)
            if at.terms <= 4:
                yield replace(one, rows=rows, **changes)


def tune(row: Row, weights: Factors, x: Tensor, deadline: float) -> list[dict[str, Any]]:
    """Time candidates until the deadline, fastest first in the result."""
    results: list[dict[str, Any]] = []
    for spec in candidates(site(row, weights)):
        if time.monotonic() > deadline:
            break
        function = emit(spec).load().kernel

        def layer(
            x: Tensor, core: Tensor, vectors: Tensor, run: Any = function, s: VvmaKernel = spec
        ) -> Tensor:
            return launch(run, s, x, core, vectors, None)

        chained = partial(chain, [_apply(layer, *pair) for pair in weights], x)
        kept = ("stage", "group", "rows", "width", "warps", "overlap")
        results.append(attempt(chained) | {"kernel": {k: getattr(spec, k) for k in kept}})
    return sorted(results, key=lambda result: float(result.get("us", 1e9)))


def measure_row(row: Row, deadline: float, *, tuning: bool) -> dict[str, Any]:
    """All figures of one line; of candidates only, where they are tuned."""
    torch.manual_seed(0)
    x = torch.randn(row.batch, row.size, device="cuda", dtype=torch.bfloat16)
    result: dict[str, Any] = {"peers": {} if tuning else peers(row, x), "ours": {}}
    counts = TERMS[1:] if tuning else TERMS
    for index, terms in enumerate(counts):
        weights = factors(row.size, terms)
        mine = attempt(partial(ours, row, weights, x))
        if tuning:
            left = deadline - time.monotonic()
            share = time.monotonic() + left / (len(counts) - index)
            mine["tuned"] = tune(row, weights, x, share)[:8]
        result["ours"][str(terms)] = mine
        del weights
        torch.cuda.empty_cache()
    return result


def measure(seconds: float, *, tuning: bool = False) -> dict[str, Any]:
    """Measure all rows within about `seconds`; what no time was left for is named."""
    end = time.monotonic() + seconds
    rows = [row for row in ROWS if len(row.targets) > 1] if tuning else list(ROWS)
    done: list[dict[str, Any]] = []
    with torch.no_grad():
        for index, row in enumerate(rows):
            left = end - time.monotonic()
            if left < 0:
                break
            share = time.monotonic() + left / (len(rows) - index)
            result = attempt(partial(measure_row, row, share, tuning=tuning))
            done.append(result | {"size": row.size, "batch": row.batch})
            print(summary(row, done[-1]), flush=True)
            torch.cuda.empty_cache()
    return {
        "rows": done,
        "not_measured": [[row.size, row.batch] for row in rows[len(done) :]],
    }


def summary(row: Row, result: dict[str, Any]) -> str:
    """A few lines for a person."""
    line = f"N={row.size} batch {row.batch}:"
    if "error" in result:
        return f"{line} {result['error']}"
    for name, peer in result["peers"].items():
        line += f" {name} {peer['us']:.2f}" if "us" in peer else f" {name} ({peer['error'][:60]})"
    for terms, mine in result["ours"].items():
        reach = row.targets.get(int(terms))
        took = f"{mine['us']:.2f}" if "us" in mine else f"({mine['error']})"
        line += f" | r={terms} {took}" + (f" (reach {reach})" if reach else "")
        for tuned in mine.get("tuned", []):
            took = f"{tuned['us']:.2f}" if "us" in tuned else tuned["error"]
            options = " ".join(f"{k}={v}" for k, v in tuned["kernel"].items())
            line += f"\n    {took} {options}"
    return line


if __name__ == "__main__":
    import sys

    measure(float(sys.argv[1]) if len(sys.argv) > 1 else 120, tuning="--tune" in sys.argv)
