"""A wide model of the zoo on one GPU, batch 1, bf16: what factored maps gain in a whole model.

Residual feed-forward blocks and a vocabulary projection (`zoo:wide`, larger here), each form as one
CUDA graph. Weights are drawn: this measures what a form gains, and its quality is another matter.
The last form is what `optimize` decides by itself under a budget that lets every form pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import prefill
import torch
from sampling import attempt
from torch import nn

import fxpress
from fxpress import zoo

__all__ = ["measure"]

SIZES = {"layers": 6, "hidden": 8192, "vocabulary": 49152}
STATED: dict[str, dict[str, Any]] = {
    "r=1": {"block": 64, "terms": 1},
    "r=4": {"block": 64, "terms": 4},
    "low rank 64": {"rank": 64},
}
ANY_QUALITY = 1e9


def build(device: str = "cuda", **changes: int) -> nn.Module:
    """The model, with seeded weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | changes
    return zoo.create_model("wide", **sizes).to(device, torch.bfloat16)


def optimized(model: nn.Module, batches: list[torch.Tensor], **options: Any) -> nn.Module:
    """The model with its maps factored."""
    return fxpress.optimize(model, batches, progress=False, **options)


def forms(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, Callable[[], nn.Module]]:
    """What builds each form."""
    ways: dict[str, Callable[[], nn.Module]] = {"dense": lambda: model}
    for name, settings in STATED.items():
        config = {"factor-vvma": settings}
        ways[name] = partial(optimized, model, batches, config=config, judge="off")
    free = {"factor-vvma": {"max_error": ANY_QUALITY}, "recover": False}
    ways["as decided"] = partial(optimized, model, batches, max_divergence=ANY_QUALITY, config=free)
    return ways


def measure(seconds: float, *, tuning: bool = False) -> dict[str, Any]:  # noqa: ARG001
    """Measure the forms until the time is up."""
    end = time.monotonic() + seconds
    model = build()
    width = next(model.parameters()).shape[-1]
    batches = [torch.randn(1, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    rows: dict[str, Any] = {}
    for name, way in forms(model, batches).items():
        if time.monotonic() > end:
            break
        rows[name] = attempt(partial(row, way, batches[0]))
        print(name, rows[name].get("ms", rows[name]), flush=True)
        torch.cuda.empty_cache()
    return {"sizes": SIZES, "rows": rows}


def row(way: Callable[[], nn.Module], x: torch.Tensor) -> dict[str, Any]:
    """Bytes of the parameters of a form and the time of a call."""
    model = way()
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    return {"bytes": size} | prefill.timed(model, x)
