"""Prefill of a SmolLM2-shaped model on one GPU, batch 1, bf16: the whole of fxpress at work.

Three forms of one model with drawn weights: as the user has it (transformers, sdpa), its best dense
form (causal attention recognized), and pruned to a window with first columns at 80 % of the causal
cells. Each runs as one CUDA graph, as it is and as `torch.compile` makes it. What a window loses in
quality is measured elsewhere (docs/quality.md); this measures what it gains.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sampling import attempt, described, replayed
from torch import nn

import fxpress

__all__ = ["measure"]

LENGTHS = (2048, 8192)
COMPILING = 40  # seconds that a form may take
VOCABULARY = 49152
PRUNED = {"pruned": 0.8, "mask": "window", "block": 64}
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}


def build(**changes: Any) -> nn.Module:
    """The model, with seeded weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE | changes))
    return model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16).eval()


def timed(model: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Milliseconds of one call, as a CUDA graph."""

    def run() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return described(replayed(run, warmup=50, rep=300), "ms")


def compiled(model: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """The same of what `torch.compile` makes of a form, for this one shape."""
    torch.compiler.reset()
    return timed(torch.compile(model, dynamic=False), **call)


@dataclass
class Length:
    """The three forms of one model at one length."""

    length: int
    call: dict[str, Any]
    forms: dict[str, nn.Module]
    row: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, length: int) -> Length:
        """Optimize, and time what comes out."""
        device = next(model.parameters()).device
        ids = torch.randint(0, VOCABULARY, (2, 1, length), device=device)
        batches = [{"input_ids": row, "use_cache": False} for row in ids]
        config = {"prune-attention": PRUNED, "factor-vvma": False}
        pruned = fxpress.optimize(model, batches, config=config, judge="off", progress=False)
        ledger = pruned.passes["prune-attention"].ledger
        forms = {"original": model, "dense": pruned.without("prune-attention"), "pruned": pruned}
        row: dict[str, Any] = {
            "sites": len(ledger),
            "tile_density": sum(e["tile_density"] for e in ledger.values()) / len(ledger),
            "kernels": len(set(pruned.sources.values())),
        }
        for name, form in forms.items():
            row[name] = attempt(partial(timed, form, **batches[0]))
        return cls(length, batches[0], forms, row)

    def compile(self, end: float) -> None:
        """Time what `torch.compile` makes of each form, while there is time."""
        row = self.row["compiled"] = dict[str, Any]()
        for name, form in self.forms.items():
            if time.monotonic() < end - COMPILING:
                row[name] = attempt(partial(compiled, form, self.call))
                print(self.length, "compiled", name, row[name].get("ms", row[name]), flush=True)


def measure(seconds: float, *, tuning: bool = False) -> dict[str, Any]:  # noqa: ARG001
    """Measure lengths, then their compiled forms, until the time is up."""
    end = time.monotonic() + seconds
    model = build()
    rows: list[dict[str, Any]] = []
    done: list[Length] = []

    def as_they_are(length: int) -> dict[str, Any]:
        done.append(Length.of(model, length))
        return done[-1].row

    for length in LENGTHS:
        if rows and time.monotonic() > end - seconds / 2:
            break
        row = attempt(partial(as_they_are, length))
        row["length"] = length
        rows.append(row)
        shown = {name: row.get(name, {}).get("ms") for name in ("original", "dense", "pruned")}
        print(length, shown, row.get("error", ""), flush=True)
        torch.cuda.empty_cache()
    for one in done:
        one.compile(end)
    return {"rows": rows, "not_measured": list(LENGTHS[len(rows) :])}
