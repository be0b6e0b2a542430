"""Packed attention on CPU beside dense attention: `python benchmarks/cpu_attention.py`.

Prints how many times faster the operator is than `scaled_dot_product_attention`, causal where the
mask is, on one thread. Ratios only: milliseconds of somebody's CPU say little.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.ops import compile_mask, sparse_attention
from fxpress.timing import interleave

SIZES = ((1, 8, 1024, 64), (1, 6, 1500, 64))  # (B, H, N, D)
KEPT = (0.5, 0.2, 0.1, 0.05)


def kept_columns(heads: int, size: int, share: float, causal: bool) -> Tensor:
    """Draw a mask that keeps a share of the key columns, different in each head."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(heads, 1, size, generator=generator) < share
    mask = columns | torch.eye(size, dtype=torch.bool) if causal else columns.expand(-1, size, -1)
    return mask.tril() if causal else mask


def ratio(shape: tuple[int, int, int, int], share: float, causal: bool) -> float:
    """Return how many times faster the operator is than dense attention."""
    q, k, v = (torch.randn(shape) for _ in range(3))
    layout = compile_mask(kept_columns(shape[1], shape[2], share, causal), device="cpu")
    timings = interleave(
        {
            "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
            "packed": lambda: sparse_attention(q, k, v, layout),
        },
        rounds=7,
        seconds=5,
    )
    return timings.speedup("dense", "packed")


def main() -> None:
    """Print one line per shape, causality and share."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for shape in SIZES:
        for causal in (False, True):
            ratios = [f"{share:.0%} {ratio(shape, share, causal):.2f}x" for share in KEPT]
            size = "x".join(map(str, shape)) + " causal" * causal
            print(f"{size:20}  kept columns: " + ", ".join(ratios), flush=True)


if __name__ == "__main__":
    main()
