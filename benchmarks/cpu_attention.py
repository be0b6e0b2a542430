"""Packed attention on CPU against PyTorch's dense kernel, as ratios: what a given mask is worth.

    python benchmarks/cpu_attention.py [--threads 2] [--repetitions 15]

Timings on shared cores are noisy: both sides run in turn and the fastest of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.ops import compile_mask


def columns(heads: int, length: int, rows: int, density: float) -> Tensor:
    """Columns kept per tile of `rows` rows, per head."""
    kept = torch.rand(heads, -(-length // rows), length) < density
    return kept.repeat_interleave(rows, 1)[:, :length]


def causal_blocks(heads: int, length: int, block: int, density: float) -> Tensor:
    """Blocks kept below the diagonal, and the diagonal."""
    count = length // block
    kept = (torch.rand(heads, count, count) < density) | torch.eye(count, dtype=torch.bool)
    cells = kept.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return cells & torch.ones(length, length, dtype=torch.bool).tril()


def causal_window(heads: int, length: int, width: int) -> Tensor:
    """The last `width` positions and the first four."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return (((i - j < width) | (j < 4)) & (i >= j)).expand(heads, -1, -1)


def cases() -> Iterator[tuple[str, Tensor, bool]]:
    """Yield name, mask and whether the dense side is causal."""
    for density in (1.0, 0.5, 0.2, 0.1, 0.05):
        yield f"columns per 125 rows, {density:.0%}", columns(6, 1500, 125, density), False
    for density in (1.0, 0.5, 0.2, 0.1):
        yield f"causal blocks of 16, {density:.0%}", causal_blocks(9, 1024, 16, density), True
    for width in (512, 128, 64):
        yield f"causal window of {width}", causal_window(9, 1024, width), True


def fastest(functions: list[Callable[[], Tensor]], repetitions: int) -> list[float]:
    """Least seconds of each, run in turn."""
    times = [[float("inf")] for _ in functions]
    for _ in range(repetitions + 1):
        for function, seen in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seen.append(time.perf_counter() - start)
    return [min(seen) for seen in times]


def compare(name: str, mask: Tensor, causal: bool, repetitions: int) -> str:
    """One line: densities and the speed-up."""
    heads, length, _ = mask.shape
    q, k, v = (torch.randn(1, length, heads, 64).transpose(1, 2) for _ in range(3))
    layout = compile_mask(mask, device="cpu")
    tensors, spec = list(layout.tensors), layout.spec

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def packed() -> Tensor:
        out: Tensor = torch.ops.fxpress.sparse_attention(
            q, k, v, tensors, spec, None, False, 0.125, 0
        )
        return out

    before, after = fastest([dense, packed], repetitions)
    return (
        f"{name:30} kept {layout.live_density:5.1%}  computed {layout.tile_density:5.1%}  "
        f"{before / after:5.2f}x"
    )


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description="Packed against dense attention on CPU.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, mask, causal in cases():
            print(compare(name, mask, causal, arguments.repetitions), flush=True)


if __name__ == "__main__":
    main()
