"""Prefill of a SmolLM2-shaped model on one GPU, batch 1, bf16: the whole of fxpress at work.

Three forms of one model with drawn weights: as the user has it (transformers, sdpa), its best dense
form (causal attention recognized), and pruned to a window with first columns at 80 % of the causal
cells. Each runs as one CUDA graph. What a window loses in quality is measured elsewhere
(docs/quality.md); this measures what it gains.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import fxpress

__all__ = ["measure"]

LENGTHS = (8192, 2048)
PRUNED = {"pruned": 0.8, "mask": "window", "block": 64}
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}


def build(**changes: Any) -> nn.Module:
    """The model, with seeded weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE | changes))
    return model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16).eval()


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What fails is a result too."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - recorded, whatever it is
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def timed(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Median and quantiles in ms of one call, as a CUDA graph."""
    from triton.testing import do_bench

    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    samples = torch.tensor(do_bench(graph.replay, warmup=50, rep=300, return_mode="all"))
    low, middle, high = samples.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"ms": middle, "p10": low, "p90": high, "samples": len(samples)}


def measure_row(length: int) -> dict[str, Any]:
    """The three forms at one length."""
    model = build()
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 1, length), device=model.device)  # type: ignore[call-overload]
    batches = [{"input_ids": row, "use_cache": False} for row in ids]
    config = {"prune-attention": PRUNED, "factor-vvma": False}
    pruned = fxpress.optimize(model, batches, config=config, judge="off", progress=False)
    ledger = pruned.passes["prune-attention"].ledger
    forms = {"original": model, "dense": pruned.without("prune-attention"), "pruned": pruned}
    times = {name: attempt(partial(timed, form, **batches[0])) for name, form in forms.items()}
    return {
        "length": length,
        "sites": len(ledger),
        "tile_density": sum(entry["tile_density"] for entry in ledger.values()) / len(ledger),
        "kernels": len(set(pruned.sources.values())),
        **times,
    }


def measure(seconds: float, *, tuning: bool = False) -> dict[str, Any]:  # noqa: ARG001
    """Measure lengths until the time is up."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        if rows and time.monotonic() > end - seconds / 2:
            break
        rows.append(attempt(partial(measure_row, length)) | {"length": length})
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    return {"rows": rows, "not_measured": list(LENGTHS[len(rows) :])}
