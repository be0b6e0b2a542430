"""Attention of every model of the zoo, against a count that knows nothing of graphs."""

from __future__ import annotations

import pytest
import torch

from fxpress.capture import capture
from fxpress.passes.fuse_attention import FuseAttention
from fxpress.passes.sites import attention_sites
from fxpress.rewrite import PassContext
from tests.models.samples import NAMES, build, sample
from tests.passes.attention_count import AttentionCount

ATTEND = {
    "austen-transformer",
    "bergamot-en-pt",
    "en-de-lstm",
    "en-de-transformer",
    "fashion-vit",
    "lstm-seq2seq",
    "minilm",
    "minilm-classifier",
    "prose-transformer",
    "prose-xl",
    "r8-encoder",
    "r8-minilm",
    "section-encoder",
    "smollm2",
    "text-encoder",
    "transformer-lm",
    "transformer-seq2seq",
    "transformer-xl",
    "vit",
    "whisper-tiny",
    "whisper-tiny-encoder",
}

ADDITIVE = {"pointer-generator", "summary-lstm", "summary-rum"}  # no product of q and k: declined


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_is_found(name: str) -> None:
    model = build(name)
    args, kwargs = sample(name)
    with AttentionCount() as count, torch.no_grad():
        model(*args, **kwargs)
    program = capture(model, args, kwargs)
    record = FuseAttention().run(program, PassContext())
    assert bool(record.declined) == (name in ADDITIVE)
    assert len(attention_sites(program)) + len(record.declined) == count.total
    assert (count.total > 0) == (name in ATTEND | ADDITIVE)
